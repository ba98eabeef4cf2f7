"""Section 3.5: few-shot learning."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from number_tokenizer import NumberTokenizer
from tiny_models import CORPUS, bart_with_tokenizer, family, t5_with_tokenizer

from relattn import RelAttnModule, Steerer, fewshot
from relattn.fewshot import (
    FewShotExample,
    FewShotSettings,
    SteeredCollator,
    SteeredModel,
    examples_of_step,
    fit,
    learning_rate_factor,
    new_module,
)
from relattn.fewshot_data import split_by_document
from shared_core import InputError

EXAMPLES = [
    FewShotExample(str(n // 2), f"{CORPUS[n]} {CORPUS[n + 1]}", CORPUS[n].split()[k], CORPUS[n])
    for n, k in ((0, 1), (1, 1), (2, 0), (3, 2), (4, 1), (5, 0))
]
TRAIN, VALIDATION = EXAMPLES[:4], EXAMPLES[4:]
QUICK = {"steps": 4, "warmup": 1, "batch_size": 3, "evaluate_every": 2, "learning_rate": 1e-3}
SAME_BUT = {"relevance": "trained", "weight": "linear", "initial_weight": 0.07}  # smoothing: new_module's
GENERATION = {"num_beams": 1, "max_new_tokens": 6}


def _settings(**more) -> FewShotSettings:
    return FewShotSettings(**(QUICK | {"generation": GENERATION} | more))


def _state(*modules) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in enumerate(modules) for k, v in m.state_dict().items()}


def _changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_split_keeps_all_examples_of_a_document_on_one_side():
    examples = [FewShotExample(f"d{n % 7}", "text", f"control {n}", "summary") for n in range(28)]
    for seed in range(20):
        train, validation = split_by_document(examples, 3, 2, seed)
        inside, outside = {e.document_id for e in train}, {e.document_id for e in validation}
        assert (len(inside), len(outside)) == (3, 2)
        assert not inside & outside
        assert len(train) == 12
    assert split_by_document(examples, 3, 2, 1) == split_by_document(examples, 3, 2, 1)
    assert split_by_document(examples, 3, 2, 1) != split_by_document(examples, 3, 2, 2)
    with pytest.raises(
        InputError, match="examples: expected at least 8 documents: 5 to train, 3 to validate"
    ):
        split_by_document(examples, 5, 3)


def test_a_document_on_both_sides_is_refused():
    other_aspect = FewShotExample(TRAIN[0].document_id, TRAIN[0].document, "dance", "another summary")
    with pytest.raises(
        InputError, match="document '0' is among the training documents too: split by document"
    ):
        fit(*bart_with_tokenizer(), TRAIN, [other_aspect], settings=_settings())


def test_loss_is_the_cross_entropy_of_the_steered_model():
    model, tokenizer = t5_with_tokenizer()
    module = RelAttnModule.for_model(model, weight="per_head", initial_weight=0.4)
    steered = SteeredModel(model, tokenizer, module).eval()
    batch = SteeredCollator(steered.steerer)(TRAIN[:2])
    found = steered(**batch)["loss"]
    source = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    steerer = Steerer(model, tokenizer, module.relevance, 0.4)
    with steerer.steer(source, [e.control for e in TRAIN[:2]]) as inputs:
        expected = model(**inputs, labels=batch["labels"]).loss
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, steered(**{k: v[:, :] for k, v in batch.items()})["loss"])


def test_gradients_reach_every_new_parameter_and_match_finite_differences():
    model, tokenizer = bart_with_tokenizer()
    module = RelAttnModule.for_model(model, relevance="trained", weight="linear", initial_weight=0.3)
    steered = SteeredModel(model, tokenizer, module).double().eval()
    batch = SteeredCollator(steered.steerer)(TRAIN[:2])
    steered(**batch)["loss"].backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        place = parameter.grad.abs().flatten().argmax()
        flat = parameter.data.view(-1)
        step = 0.05
        values = []
        for sign in (1, -1):
            flat[place] += sign * step
            values.append(steered(**batch)["loss"].item())
            flat[place] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        # relevance and loss are float32 by design: a smaller step would show its rounding
        assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=0.05, abs=1e-5), name


@pytest.mark.parametrize("name", ["bart", "t5", "led", "prophetnet", "fsmt", "bert2bert", "mbart"])
def test_families_train_and_lower_their_loss(name):
    model = family(name)
    tokenizer = NumberTokenizer(model.config.pad_token_id)
    tokenizer.__class__ = _TargetNumbers
    examples = [
        FewShotExample(str(n), f"{n + 5} 40 17 {n + 50} 33", str(n + 5), f"{n + 50} 33") for n in range(4)
    ]
    settings = FewShotSettings(
        steps=12,
        warmup=2,
        learning_rate=1e-2,
        batch_size=4,
        micro_batch=4,
        evaluate_every=12,
        generation=GENERATION,
    )
    found = fit(model, tokenizer, examples[:3], examples[3:], settings=settings)
    assert min(found.losses[-3:]) < found.losses[0]


class _TargetNumbers(NumberTokenizer):
    def __call__(self, text=None, text_target=None, **options):
        return super().__call__(text if text is not None else text_target, **options)


@pytest.mark.parametrize("trainable", ["all", "cross_attention", "new"])
def test_only_what_is_asked_for_is_trained(trainable, monkeypatch):
    rising = iter(range(100))  # every step is better than the one before: the last one is kept
    monkeypatch.setattr(fewshot, "validate", lambda *_: float(next(rising)))
    model, tokenizer = bart_with_tokenizer()
    module = new_module(model)
    before = _state(module, model)
    flags = [p.requires_grad for p in model.parameters()]
    result = fit(model, tokenizer, TRAIN, VALIDATION, module, _settings(trainable=trainable))
    assert result.best_step == 4
    changed = _changed(before, _state(module, model))
    assert any(name.startswith("0.linear") for name in changed)
    model_changed = {name for name in changed if name.startswith("1.")}
    if trainable == "new":
        assert not model_changed
    elif trainable == "cross_attention":
        assert model_changed
        assert all("encoder_attn." in name for name in model_changed)
    else:
        assert any("encoder.layers" in name for name in model_changed)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training


def test_the_result_is_the_best_steps_parameters():
    model, tokenizer = bart_with_tokenizer()
    settings = _settings(steps=8, evaluate_every=1, learning_rate=0.02)
    result = fit(model, tokenizer, TRAIN, VALIDATION, settings=settings)
    from relattn.fewshot import validate

    steerer = Steerer(model, tokenizer, module=result.module)
    assert validate(steerer, VALIDATION, GENERATION) == pytest.approx(
        result.scores[result.best_step], abs=1e-12
    )
    assert result.scores[result.best_step] == max(result.scores.values())
    assert len(result.losses) == 8


def test_the_learning_rate_rises_and_falls_as_transformers_schedule():
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 10, 100)
    for step in range(100):
        assert learning_rate_factor(step, 10, 100) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_every_example_is_seen_once_an_epoch_in_a_new_order():
    seen = [n for step in range(6) for n in examples_of_step(step, 5, 10, seed=3)]
    epochs = [seen[start : start + 10] for start in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_micro_batch_changes_memory_and_not_the_update():
    states = []
    for micro in (1, 4):
        model, tokenizer = bart_with_tokenizer()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.model.encoder.dropout = model.model.decoder.dropout = 0.0
        for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
            layer.dropout = layer.activation_dropout = 0.0
        settings = _settings(steps=1, warmup=0, batch_size=4, micro_batch=micro)
        states.append(fit(model, tokenizer, TRAIN, VALIDATION, settings=settings).losses)
    assert states[0] == pytest.approx(states[1], rel=1e-5)


def test_attention_dropout_takes_the_reference_path_where_there_is_one():
    model, tokenizer = bart_with_tokenizer()
    assert not SteeredModel(model, tokenizer, new_module(model)).reference
    for layer in model.model.decoder.layers:
        layer.encoder_attn.dropout = 0.1
    assert SteeredModel(model, tokenizer, new_module(model)).reference
    led = family("led")
    for layer in led.led.decoder.layers:
        layer.encoder_attn.dropout = 0.1
    assert not SteeredModel(led, NumberTokenizer(), new_module(led)).reference


def test_both_paths_have_the_same_gradients_without_dropout():
    gradients = []
    for reference in (False, True):
        model, tokenizer = bart_with_tokenizer()
        module = RelAttnModule.for_model(model, relevance="trained", weight="linear", initial_weight=0.3)
        steered = SteeredModel(model, tokenizer, module, reference=reference)
        model.eval()
        model.training = False
        batch = SteeredCollator(steered.steerer)(TRAIN[:2])
        steered.training = True  # so that the reference path is taken; the model's own dropout stays off
        steered(**batch)["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in steered.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5)


def test_training_leaves_the_global_random_state_alone_and_repeats():
    results = []
    for _ in range(2):
        model, tokenizer = bart_with_tokenizer()
        state = torch.get_rng_state()
        results.append(fit(model, tokenizer, TRAIN, VALIDATION, settings=_settings()).losses)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
    assert results[0] == results[1]


def _run(checkpoint: Path | None, die_after: int | None = None):
    """One run: its losses, scores, best step, all parameters, and the steps that it made."""
    model, tokenizer = bart_with_tokenizer()
    module = new_module(model)
    steps = []

    def on_step(step: int, _: float) -> None:
        steps.append(step)
        if step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    found = fit(
        model, tokenizer, TRAIN, VALIDATION, module, _settings(steps=8), checkpoint=checkpoint, resume=True,
        on_step=on_step,
    )  # fmt: skip
    return (found.losses, found.scores, found.best_step), _state(module, model), steps


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    file = tmp_path / "run.safetensors"
    child = os.fork()
    if child == 0:
        try:
            _run(file, die_after=5)
        finally:
            os._exit(1)  # reached only if it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    plain, state, every = _run(None)
    resumed, again, rest = _run(file)
    assert plain == resumed
    assert not _changed(state, again)
    assert every == list(range(1, 9))
    assert rest == [5, 6, 7, 8]  # the state was written behind step 4


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    model, tokenizer = bart_with_tokenizer()
    fit(model, tokenizer, TRAIN, VALIDATION, settings=_settings(), checkpoint=file)
    arguments = {"checkpoint": file, "resume": True}
    with pytest.raises(
        InputError, match=r"run\.safetensors: is the state of a run with another learning_rate"
    ):
        fit(model, tokenizer, TRAIN, VALIDATION, settings=_settings(learning_rate=0.5), **arguments)
    with pytest.raises(InputError, match="is the state of a run with another train"):
        fit(model, tokenizer, TRAIN[:2], VALIDATION, settings=_settings(), **arguments)
    first = TRAIN[0]
    for changed in (replace(first, document=f"{first.document} More."), replace(first, summary="Another.")):
        with pytest.raises(InputError, match="is the state of a run with another train"):
            fit(model, tokenizer, [changed, *TRAIN[1:]], VALIDATION, settings=_settings(), **arguments)
    smoothed = RelAttnModule.for_model(model, **SAME_BUT, smooth_sigma=1.0)
    with pytest.raises(InputError, match="is the state of a run with another module"):
        fit(model, tokenizer, TRAIN, VALIDATION, smoothed, _settings(), **arguments)
    with pytest.raises(InputError, match="is the state of a run that trained other parameters"):
        fit(*t5_with_tokenizer(), TRAIN, VALIDATION, settings=_settings(), **arguments)
    file.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="is not the state of a few-shot run"):
        fit(model, tokenizer, TRAIN, VALIDATION, settings=_settings(), **arguments)


def test_the_model_trains_under_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, tokenizer = bart_with_tokenizer()
    module = new_module(model)
    steered = SteeredModel(model, tokenizer, module)
    before = _state(module)
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, save_strategy="no",
        report_to=[], use_cpu=True, learning_rate=1e-2, disable_tqdm=True, logging_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    collator = SteeredCollator(steered.steerer)
    Trainer(model=steered, args=arguments, train_dataset=TRAIN, data_collator=collator).train()
    assert any(name.startswith("0.query") for name in _changed(before, _state(module)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": "decoder"}, 'trainable: expected "all", "cross_attention" or "new"'),
        ({"steps": 0}, "steps: expected 1 or more"),
        ({"warmup": 101}, "warmup: expected 0 to 100, the steps"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 to 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FewShotSettings(**settings)


def test_nothing_to_train_and_nothing_to_train_on_are_refused():
    model, tokenizer = bart_with_tokenizer()
    fixed = RelAttnModule.for_model(model)
    with pytest.raises(InputError, match="module: this module has no parameters"):
        fit(model, tokenizer, TRAIN, VALIDATION, fixed, _settings(trainable="new"))
    with pytest.raises(InputError, match="train: expected one example or more"):
        fit(model, tokenizer, [], VALIDATION)
    with pytest.raises(InputError, match="validation: expected one example or more"):
        fit(model, tokenizer, TRAIN, [])
    blank = FewShotExample("9", "A text.", "text", " ")
    with pytest.raises(InputError, match="summary: document '9' has an empty summary"):
        fit(model, tokenizer, [blank], VALIDATION, settings=_settings())
