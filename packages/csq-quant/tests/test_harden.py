"""The hardened model is exact, plain, and says what it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from hosted_models import images, optimizer_for, randomize_masks, small_net, train
from torch import nn

import csq
from csq.hardened import weight_gap
from shared_core import InputError


def hard_model(n_bits: int = 8, seed: int = 0) -> nn.Sequential:
    model = csq.parametrize(small_net(), n_bits)
    randomize_masks(model, n_bits, seed)
    with torch.no_grad():
        for planes in csq.bit_layers(model).values():
            planes.positive.add_(0.2 * torch.randn_like(planes.positive))
            planes.negative.add_(0.2 * torch.randn_like(planes.negative))
    return model


@pytest.mark.filterwarnings("ignore:hardened at temperature")
def test_weights_are_whole_multiples_of_a_step_from_selected_planes_only():
    model = hard_model()
    final = csq.harden(model)
    for name, planes in csq.bit_layers(model).items():
        weight = final.get_submodule(name).weight.detach()
        q = weight * 255 / planes.scale.detach()
        assert (q - q.round()).abs().max() < 1e-4
        selected = planes.mask.detach() >= 0
        p, n = (planes.positive >= 0).int(), (planes.negative >= 0).int()
        expected = sum((p[b] - n[b]) * 2**b for b in range(8) if selected[b])
        assert torch.equal(q.round().int(), expected)


@pytest.mark.filterwarnings("ignore:hardened at temperature")
def test_a_soft_model_whose_gates_have_closed_has_the_same_outputs_to_the_last_bit():
    model = hard_model()
    for planes in csq.bit_layers(model).values():
        planes.set_live(planes.selected(), fix=True)
        planes.set_temperature(1e4)
        with torch.no_grad():
            for gate in (planes.positive, planes.negative):
                gate.copy_(torch.where(gate >= 0, gate + 0.1, gate - 0.1))
    final = csq.harden(model)
    x, _ = images()
    assert torch.equal(model.eval()(x), final.eval()(x))


@pytest.mark.filterwarnings("ignore:hardened at temperature")
def test_integers_of_the_report_reproduce_the_outputs_in_integer_arithmetic():
    """The classifier's products computed in int64 from the codes, scaled once at the end."""
    final = csq.harden(hard_model()).eval()
    layer = next(layer for layer in final.report.layers if layer.name == "4")
    features = torch.randint(0, 255, (5, 288))
    linear = final[4]
    whole = features @ layer.codes.long().T
    expected = whole.double() * layer.step + linear.bias.double()
    found = linear(features.float()).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)
    assert torch.equal(linear.weight, layer.weight())


@pytest.mark.filterwarnings("ignore:hardened at temperature")
def test_classes_return_and_the_soft_model_stays():
    model = hard_model()
    before = copy.deepcopy(model.state_dict())
    final = csq.harden(model)
    assert [type(module) for module in final] == [type(module) for module in small_net()]
    assert final.state_dict().keys() == small_net().state_dict().keys()
    assert all(isinstance(p, nn.Parameter) for p in (final[0].weight, final[4].weight))
    assert list(csq.bit_layers(model)) == ["0", "4"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    csq.harden(model)  # the class that both share still works


@pytest.mark.filterwarnings("ignore:hardened at temperature")
def test_attention_returns_to_plain_parameters():
    model = csq.parametrize(nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True))
    final = csq.harden(model).eval()
    x, memory = torch.randn(1, 3, 8), torch.randn(1, 5, 4)
    assert type(final) is nn.MultiheadAttention
    torch.testing.assert_close(final(x, memory, memory)[0], model.eval()(x, memory, memory)[0])


@pytest.mark.filterwarnings("ignore:hardened at temperature")
def test_contiguous_projects_schemes_to_runs():
    model = hard_model(seed=3)
    final = csq.harden(model, contiguous=True)
    for layer, before in zip(final.report.layers, csq.report(model).layers, strict=True):
        assert "0" not in layer.mask_text.strip("0")
        assert layer.bits == before.bits
        assert layer.stored_bits <= layer.bits + 1


class TestReport:
    @pytest.mark.filterwarnings("ignore:hardened at temperature")
    def test_counts_all_weights_first_last_and_shortcut_included(self):
        def resnet10() -> nn.Module:
            return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4, num_classes=5)

        model = csq.parametrize(resnet10(), n_bits=3)
        for planes in csq.bit_layers(model).values():
            planes.set_live(torch.tensor([False, True, True]), fix=True)
        found = csq.harden(model).report
        plain = resnet10()
        kinds = (nn.Conv2d, nn.Linear)
        assert found.weights == sum(m.weight.numel() for m in plain.modules() if isinstance(m, kinds))
        assert {"conv1", "fc", "layer2.0.downsample.0"} <= {layer.name for layer in found.layers}
        assert found.average_bits == 2
        assert found.average_stored_bits == 3  # the sign
        assert found.compression == pytest.approx(32 / 3)
        assert found.paper_compression == 16
        others = sum(t.numel() for t in plain.state_dict().values() if t.is_floating_point()) - found.weights
        assert found.float_parameters == others
        batches = sum(t.numel() for t in plain.state_dict().values() if not t.is_floating_point())
        scales = len(found.layers) * (4 + 3)  # a step and a mask
        assert found.expected_bytes == found.weights * 3 / 8 + 4 * others + 8 * batches + scales

    def test_is_weighted_by_size_and_also_by_layer(self):
        model = csq.parametrize(nn.Sequential(nn.Linear(2, 2), nn.Linear(10, 10)))
        for bits, planes in zip((8, 1), csq.bit_layers(model).values(), strict=True):
            planes.set_live(torch.arange(8) >= 8 - bits, fix=True)
        found = csq.report(model)
        assert found.average_bits == pytest.approx((4 * 8 + 100 * 1) / 104)
        assert found.average_bits_by_layer == 4.5
        assert [row["mask"] for row in found.rows()] == ["11111111", "10000000"]

    def test_needs_a_quantized_model(self):
        with pytest.raises(InputError, match=r"expected a model of csq\.parametrize"):
            csq.report(small_net())


class TestWarnings:
    def test_a_temperature_cut_short_tells_the_gap(self):
        model = csq.parametrize(small_net())
        train(model, optimizer_for(model), csq.Schedule(model, 4.0, 100), 10)
        gap = max(weight_gap(model).values())
        with pytest.warns(UserWarning, match=f"after 10 of 100 scheduled steps: .* is {gap:.1%}"):
            csq.harden(model)

    def test_an_exact_model_is_silent(self):
        model = csq.parametrize(small_net(), n_bits=4, mask="fixed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            csq.harden(model)
        assert max(weight_gap(model).values()) < 1e-5

    @pytest.mark.filterwarnings("ignore:hardened at temperature")
    def test_a_layer_without_planes_is_named(self):
        model = csq.parametrize(small_net())
        csq.bit_layers(model)["4"].set_live(torch.zeros(8, dtype=torch.bool), fix=True)
        with pytest.warns(UserWarning, match="4: no plane is selected"):
            final = csq.harden(model)
        assert final[4].weight.eq(0).all()
        assert final.report.layers[1].stored_bits == 0

    def test_weights_that_are_not_finite_are_refused(self):
        model = csq.parametrize(small_net())
        with torch.no_grad():
            csq.bit_layers(model)["0"].positive[0, 0, 0, 0, 0] = torch.nan
        with pytest.raises(InputError, match="gates are not finite in 0: the training diverged"):
            csq.harden(model)

    def test_plain_models_are_refused(self):
        with pytest.raises(InputError, match=r"call csq\.parametrize first"):
            csq.harden(small_net())


class TestBatchNorm:
    def test_statistics_are_plain_averages_over_the_batches(self):
        model = small_net()
        batches = [images(8)[0], images(20)[0][8:], images(32)[0][20:]]
        csq.reestimate_batchnorm(model, batches, 2)
        features = [model[0](batch).detach() for batch in batches[:2]]
        means = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
        variances = torch.stack([f.transpose(0, 1).flatten(1).var(1) for f in features]).mean(0)
        torch.testing.assert_close(model[1].running_mean, means)
        torch.testing.assert_close(model[1].running_var, variances)
        assert model[1].momentum == 0.1

    def test_nothing_else_is_in_training_mode_and_modes_return(self):
        model = nn.Sequential(small_net(), nn.Dropout(0.5)).train()
        model[0][3].eval()
        modes = [module.training for module in model.modules()]
        csq.reestimate_batchnorm(model, [{"input": images(4)[0]}, images(4)])
        assert [module.training for module in model.modules()] == modes

    def test_a_batch_of_one_value_is_refused_and_the_statistics_stay(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model[1].running_mean.fill_(7.0)
        with pytest.raises(InputError, match="bn_loader: BatchNorm needs more than one value"):
            csq.reestimate_batchnorm(model, [torch.randn(1, 3)])
        assert model[1].running_mean.eq(7.0).all()

    def test_no_batch_is_refused(self):
        with pytest.raises(InputError, match="bn_loader: has no batch"):
            csq.reestimate_batchnorm(small_net(), [])

    def test_models_without_batchnorm_are_left_as_they_are(self):
        layer = nn.Linear(2, 2)
        assert csq.reestimate_batchnorm(layer, []) is layer


def test_a_model_that_is_parametrized_again_reports_its_new_scheme():
    model = csq.harden(csq.parametrize(nn.Linear(6, 5), 8, mask="fixed"))
    again = csq.parametrize(model, 2, mask="fixed")
    assert csq.report(again).average_bits == 2
    final = csq.harden(again)
    assert final.report.average_bits == csq.report(final).average_bits == 2


def test_projecting_a_gapped_mask_warns_of_what_it_changes():
    model = csq.parametrize(nn.Linear(40, 30), 8)
    planes = next(iter(csq.bit_layers(model).values()))
    with torch.no_grad():
        planes.mask.copy_(torch.tensor([-1.0, -1, -1, 1, 1, -1, -1, 1]))
    with pytest.warns(UserWarning, match="hardened at temperature"):
        csq.harden(model, contiguous=True)


def test_steps_of_lsq_are_not_decayed():
    from csq.activations import quantize_activations

    model = csq.parametrize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    quantize_activations(model, 4, torch.randn(2, 4), method="lsq")
    decayed, free = csq.param_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert not any(names[id(p)].endswith("log_step") for p in decayed["params"])
    assert any(names[id(p)].endswith("log_step") for p in free["params"])


def test_a_file_for_onnx_is_not_written_from_weights_that_changed(tmp_path):
    final = csq.harden(csq.parametrize(nn.Sequential(nn.Linear(4, 3)), 4))
    with torch.no_grad():
        final[0].weight.add_(1)
    with pytest.raises(InputError, match="no longer the quantized one"):
        csq.export_onnx(final, tmp_path / "m.onnx", torch.randn(1, 4))
    assert not list(tmp_path.iterdir())


def test_settling_says_where_it_cannot_meet_the_target():
    model = csq.parametrize(nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 1, bias=False)))
    schedule = csq.Schedule(model, 2.5, 2, search=0.5, on_miss="settle")
    with pytest.warns(UserWarning, match=r"settled at \d\.\d+ bits where 2\.5 were asked for"):
        schedule.step()
