"""Workloads: the spec, the modes, and what their timing covers."""

import numpy as np
import pytest

from migperf import workloads
from migperf.workloads import from_spec, parse
from shared_core import InputError

TINY_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
TINY_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 64}


@pytest.mark.parametrize(
    ("text", "source", "model"),
    [
        ("torchvision/resnet18", "torchvision", "resnet18"),
        ("timm/vit_tiny_patch16_224", "timm", "vit_tiny_patch16_224"),
        ("transformers/bert", "transformers", "bert"),
        ("sleep:10ms", "sleep", "10ms"),
        ("spin:0.5s", "spin", "0.5s"),
        ("package.module:make", "custom", "package.module:make"),
    ],
)
def test_names_are_read_and_given_back(text, source, model):
    workload = parse(text)
    assert (workload.source, workload.model, workload.name) == (source, model, text)
    assert from_spec(workload.spec) == workload


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse("resnet18"), "expected torchvision/NAME"),
        (lambda: parse("spin:2 minutes"), "expected torchvision/NAME"),
        (lambda: parse("torchvision/resnet18", batch=0), "batch: expected a whole number above 0"),
        (lambda: parse("torchvision/resnet18", mode="learn"), "expected infer, train or generate"),
        (lambda: parse("torchvision/resnet18", mode="generate"), "only transformers"),
        (lambda: parse("timm/vit_tiny_patch16_224", dtype="int8"), "expected one of float32"),
        (lambda: parse("torchvision/resnet18", image_folder="/nowhere"), "is not a folder"),
        (lambda: parse("torchvision/resnet18", dataset="/nowhere"), "dataset: is not there"),
        (lambda: parse("spin:1ms", dataset="/"), "only models by name take one"),
        (lambda: parse("torchvision/resnet18", batchsize=3), "a workload has source, model"),
        (lambda: parse("torchvision/resnet81").build(), "no such model, did you mean resnet18"),
        (lambda: parse("transformers/brt").build(), "did you mean bert"),
        (lambda: parse("no.such.module:make").build(), "no such module here"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_inference_runs_in_evaluation_and_inference_mode_and_says_so():
    task = parse("torchvision/resnet18", image_size=32, batch=2, classes=10).build()
    statistics = {name: value.clone() for name, value in task.model.named_buffers() if "running" in name}
    task.step(1)
    assert task.facts["evaluation"] is True
    assert task.facts["inference_mode"] is True
    assert task.output.is_inference()
    assert not task.output.requires_grad
    assert tuple(task.output.shape) == (2, 10)
    # a forward in training mode would have moved them
    assert all(value.equal(dict(task.model.named_buffers())[name]) for name, value in statistics.items())


def test_training_steps_learn_their_batch_and_time_their_phases():
    import torch

    task = parse(
        "torchvision/resnet18", mode="train", image_size=32, batch=4, classes=10, learning_rate=0.05
    ).build()

    def loss():
        return torch.nn.functional.cross_entropy(task.logits(task.inputs.batch), task.inputs.labels).item()

    before = loss()
    phases = [task.step(1) for _ in range(6)]
    assert loss() < before
    assert all(set(phase) == {"data", "forward", "backward"} for phase in phases)
    assert all(phase["backward"] > 0 < phase["forward"] for phase in phases)


def test_a_micro_batch_serves_as_many_items_as_requests():
    task = parse("torchvision/resnet18", image_size=32, classes=10).build(requests=4)
    for requests in (4, 1, 3):
        task.step(requests)
        assert task.output.shape[0] == requests


def test_generation_with_the_cache_gives_the_tokens_that_it_gives_without():
    import torch

    task = parse(
        "transformers/gpt2", mode="generate", batch=2, sequence_length=5, new_tokens=4, config=TINY_GPT
    ).build()
    phases = task.step(1)
    assert {"first_token", "per_token"} <= set(phases)
    text = task.inputs.batch
    for step in range(4):
        with torch.no_grad():
            token = task.model(text).logits[:, -1:].argmax(-1)
        assert torch.equal(task.tokens[:, step : step + 1], token)
        text = torch.cat([text, token], 1)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_text_models_classify_sequences_of_the_length_asked_for(mode):
    task = parse(
        "transformers/bert", mode=mode, batch=3, sequence_length=7, classes=5, config=TINY_BERT
    ).build()
    task.step(1)
    assert tuple(task.inputs.batch.shape) == (3, 7)
    assert tuple(task.logits(task.inputs.batch).shape) == (3, 5)


def test_the_seed_decides_weights_and_inputs():
    def made(seed):
        task = parse("torchvision/resnet18", image_size=16, classes=2, seed=seed).build()
        return task.inputs.batch, next(task.model.parameters())

    assert all(a.equal(b) for a, b in zip(made(1), made(1), strict=True))
    assert not any(a.equal(b) for a, b in zip(made(1), made(2), strict=True))


def test_dtype_and_image_size_are_those_of_the_spec():
    import torch

    task = parse("timm/test_vit.r160_in1k", image_size=160, dtype="bfloat16").build()
    task.step(1)
    assert task.output.dtype == task.inputs.batch.dtype == torch.bfloat16
    assert tuple(task.inputs.batch.shape) == (1, 3, 160, 160)


def test_images_of_a_folder_are_read_as_a_phase_of_their_own_unless_preloaded(tmp_path):
    from PIL import Image

    for name, shade in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.fromarray(np.full((20, 20, 3), shade + index, np.uint8)).save(
                tmp_path / name / f"{index}.png"
            )
    options = {"image_size": 32, "batch": 3, "classes": 2, "image_folder": str(tmp_path)}
    task = parse("torchvision/resnet18", **options).build()
    assert task.step(1)["pipeline"] > 0
    preloaded = parse("torchvision/resnet18", **options, preload=True).build()
    assert "pipeline" not in preloaded.step(1)
    assert {round(float(image.mean()) * 255) for image in preloaded.inputs.batch} <= {10, 11, 200, 201}
    with pytest.raises(InputError, match="has 2 classes, more than the model's"):
        parse("torchvision/resnet18", **{**options, "classes": 1}).build()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of datasets' own imports
def test_rows_of_a_data_set_on_disk_are_inputs_and_reading_them_a_phase(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    images = [Image.fromarray(np.full((20, 20), shade, np.uint8)) for shade in (10, 200)]  # grey
    rows = datasets.Dataset.from_dict({"img": images, "label": [0, 1]}).cast_column("img", datasets.Image())
    rows.save_to_disk(tmp_path / "images")
    options = {"image_size": 32, "batch": 4, "classes": 2, "dataset": str(tmp_path / "images")}
    workload = parse("torchvision/resnet18", **options)
    assert from_spec(workload.spec) == workload
    task = workload.build()
    assert task.step(1)["pipeline"] > 0
    assert task.facts["inputs"] == str(tmp_path / "images")
    preloaded = parse("torchvision/resnet18", **options, preload=True).build()
    assert "pipeline" not in preloaded.step(1)
    shades = [round(float(image.mean()) * 255) for image in preloaded.inputs.batch]
    assert sorted(shades) == [10, 10, 200, 200]
    assert preloaded.inputs.labels.tolist() == [int(shade > 100) for shade in shades]
    with pytest.raises(InputError, match="has 2 classes, more than the model's"):
        parse("torchvision/resnet18", **{**options, "classes": 1}).build()
    with pytest.raises(InputError, match=r"expected a column input_ids or text \(there are: img, label\)"):
        parse("transformers/bert", dataset=options["dataset"], config=TINY_BERT).build()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of datasets' own imports
def test_tokens_of_a_file_are_cut_and_padded_to_the_sequence_length(tmp_path):
    pytest.importorskip("datasets")
    file = tmp_path / "tokens.jsonl"
    file.write_text('{"input_ids": [7, 8, 9, 10, 11, 12], "label": 1}\n' * 2)
    options = {"batch": 2, "classes": 3, "dataset": str(file), "config": TINY_BERT}
    short = parse("transformers/bert", sequence_length=4, preload=True, **options).build()
    assert short.inputs.batch.tolist() == [[7, 8, 9, 10]] * 2
    assert short.inputs.labels.tolist() == [1, 1]
    long = parse("transformers/bert", mode="train", sequence_length=8, **options).build()
    assert long.step(1)["pipeline"] > 0
    assert long.inputs.next(1, {})[0].tolist() == [[7, 8, 9, 10, 11, 12, 0, 0]]
    file.write_text('{"input_ids": [99]}\n')
    with pytest.raises(InputError, match="has token 99, the model knows 50"):
        parse("transformers/bert", preload=True, **options).build()
    file.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="tokenizer: name the folder"):
        parse("transformers/bert", preload=True, **options).build()


def test_spin_takes_processor_time_and_sleep_takes_none():
    import time

    for workload, low, high in ((workloads.spin("20ms"), 0.02, 0.03), (workloads.sleep("20ms"), 0, 0.01)):
        task = workload.build()
        before = time.thread_time()
        task.step(1)
        assert low <= time.thread_time() - before < high
