import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import nn

from repqvit import images, sources
from repqvit.sources import ModelSpec, Preprocessing, load_model
from shared_core import InputError

GREY = Image.new("RGB", (48, 40), (51, 102, 153))  # 0.2, 0.4, 0.6


def first_pixel(source: sources.Source) -> list[float]:
    return source.preprocessing.transform(GREY)[:, 0, 0].tolist()


def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> list[float]:
    return [(value - m) / s for value, m, s in zip((0.2, 0.4, 0.6), mean, std, strict=True)]


def small_vit(**options: int) -> transformers.ViTForImageClassification:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        num_labels=3,
        **options,
    )
    return transformers.ViTForImageClassification(config)


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    small_vit().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


# Preprocessing


def test_preprocessing_is_what_each_model_says_of_itself():
    vit = load_model(ModelSpec("timm/test_vit", image_size=32))
    assert first_pixel(vit) == pytest.approx(normalized((0.5,) * 3, (0.5,) * 3), abs=1e-5)
    swin = load_model(ModelSpec("torchvision/swin_t", image_size=64))
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert first_pixel(swin) == pytest.approx(normalized(*imagenet), abs=1e-5)
    assert swin.preprocessing.transform(GREY).shape == (3, 64, 64)
    assert swin.preprocessing.image_size == (64, 64)


def test_a_transformers_folder_brings_its_own_processor(vit_folder: Path):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=list(mean), image_std=list(std)
    )
    processor.save_pretrained(vit_folder)
    source = load_model(ModelSpec(f"hf/{vit_folder}"))
    assert first_pixel(source) == pytest.approx(normalized(mean, std), abs=1e-5)
    assert source.weights == f"folder {vit_folder}"
    assert source.class_numbers == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_given_mean_and_std_take_the_place_of_the_models_own():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    source = load_model(ModelSpec("timm/test_vit", image_size=32, mean=mean, std=std))
    assert first_pixel(source) == pytest.approx(normalized(mean, std), abs=1e-5)
    with pytest.raises(InputError, match="mean: expected 3 values, one for each channel"):
        load_model(ModelSpec("timm/test_vit", mean=(0.5,)))


def test_a_model_that_says_nothing_needs_mean_std_and_size(vit_folder: Path):
    with pytest.raises(InputError, match="carries no preprocessing: give --mean, --std, --image-size"):
        load_model(ModelSpec(f"hf/{vit_folder}"))
    spec = ModelSpec(f"hf/{vit_folder}", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), image_size=32)
    source = load_model(spec)
    assert source.preprocessing.transform(GREY).shape == (3, 32, 32)
    expected = normalized((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert first_pixel(source) == pytest.approx(expected, abs=1e-5)


# Names and weights


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("timm/vit_tinny_patch16_224"), "timm has no model of this name; close ones: vit_tiny"),
        (ModelSpec("torchvision/vit_b_99"), "torchvision has no model of this name; close ones: vit_b"),
        (ModelSpec("vit_tiny_patch16_224"), "a model is timm/NAME, torchvision/NAME, hf/NAME-OR-FOLDER or"),
        (
            ModelSpec("timm/test_resnet", image_size=64),
            "image-size: timm/test_resnet has no fixed image size",
        ),
        (ModelSpec("hf/nobody/nothing"), "could not be had .* give a local folder, or --pretrained"),
        (ModelSpec("no_such_module:make"), "model: there is no such module here"),
        (ModelSpec("json:make"), "model: the module has no make"),
        (ModelSpec("collections:OrderedDict"), "must return a torch module, or a pair"),
        (ModelSpec("torch.nn:Identity"), "torch.nn:Identity carries no preprocessing"),
        (
            ModelSpec("torch.nn:Identity", weights="random"),
            "makes its own weights: drop --pretrained/--random",
        ),
        (ModelSpec("timm/test_vit", weights="random", checkpoint=Path("x.pt")), "x.pt: give either a checkp"),
    ],
)
def test_a_wrong_model_gets_one_clear_line(spec: ModelSpec, message: str):
    with pytest.raises(InputError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_say_what_to_do_without_a_network(monkeypatch: pytest.MonkeyPatch):
    import timm

    def offline(*args: object, **options: object) -> None:
        raise OSError("no connection\nmore about it")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"\(no connection\); without a network give --checkpoint FILE"):
        load_model(ModelSpec("timm/test_vit", weights="pretrained"))


def test_random_weights_are_the_same_each_time_and_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, second = (load_model(ModelSpec("timm/test_vit", weights="random")).model for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training


def test_a_transformers_folder_with_missing_weights_is_refused(vit_folder: Path):
    file = vit_folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    del state["classifier.weight"]
    safetensors.torch.save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks classifier.weight: not the weights of a ViTForImageClass"):
        load_model(ModelSpec(f"hf/{vit_folder}"))
    with pytest.raises(InputError, match=r"num-classes: the weights of .* have 3 classes"):
        load_model(ModelSpec(f"hf/{vit_folder}", num_classes=5))


def test_ones_own_module_may_bring_its_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Flatten(), lambda image: torch.full((3, image.height, image.width), 7.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = load_model(ModelSpec("my_models:make"))
    assert source.preprocessing.transform(GREY).shape == (3, 40, 48)
    assert source.weights == "made by my_models:make"
    sys.modules.pop("my_models")


# Checkpoints


@pytest.mark.parametrize("form", ["safetensors", "plain", "model", "state_dict", "wrapped"])
def test_every_form_of_checkpoint_restores_the_model(tmp_path: Path, form: str):
    spec = {"name": "timm/test_vit", "num_classes": 3, "image_size": 32}
    trained = load_model(ModelSpec(**spec)).model
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5)
    state = trained.state_dict()
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "wrapped":  # as DistributedDataParallel names them
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state if form == "plain" else {form: state, "epoch": 3}, path)
    restored = load_model(ModelSpec(**spec, checkpoint=path))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restored.model(pixels), trained(pixels))
    assert restored.weights == f"checkpoint {path}"


def test_what_does_not_fit_is_told_in_one_error(tmp_path: Path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    state = {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3), "head.weight": torch.zeros(1)}
    with pytest.raises(
        InputError,
        match=r"x.pt: does not fit Sequential: missing 1.weight, 1.bias; unexpected head.weight; "
        r"of other shape 0.weight \(3, 4\) for \(3, 2\)",
    ):
        sources.load_state(model, state, Path("x.pt"))


class Bomb:
    """Unpickling it creates a file: a checkpoint that runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_a_checkpoint_never_runs_code(tmp_path: Path):
    file, target = tmp_path / "x.pt", tmp_path / "it_ran"
    torch.save({"model": Bomb(target)}, file)
    with pytest.raises(InputError, match="holds more than tensors, which is not loaded because it could run"):
        sources.read_state_dict(file)
    assert not target.exists()
    file.write_bytes(pickle.dumps(Bomb(target), protocol=2))
    with pytest.raises(InputError, match=r"x\.pt: "):
        sources.read_state_dict(file)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"nonsense", "not a readable safetensors file"),
        ("x.pth", b"", "not a readable checkpoint"),
        ("none.pth", None, "no such file"),
        ("list.pth", [torch.zeros(1)], r"expected a state dict \(name -> tensor\) \(got 'list'\)"),
        ("epoch.pth", {"a": torch.zeros(1), "epoch": 3}, "also found epoch that are none"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, name: str, content: object, message: str):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        sources.read_state_dict(path)


# Images


def save_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """20 training and 6 validation images of the classes cat and dog; each image has its own grey value."""
    for number in range(20):
        save_image(tmp_path / "data/train" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    for number in range(6):
        save_image(tmp_path / "data/val" / ("cat", "dog")[number % 2] / f"{number}.png", 100 + number)
    return tmp_path / "data"


def value_of(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image).copy(), dtype=torch.float32).permute(2, 0, 1)


PLAIN = Preprocessing(value_of, {})


def test_calibration_takes_training_images_by_the_seed(data: Path):
    first = images.calibration_files(data, 8, seed=0)
    assert first.files == images.calibration_files(data, 8, seed=0).files
    assert first.files != images.calibration_files(data, 8, seed=1).files
    assert len(set(first.files)) == 8
    assert not set(first.files) & set(images.evaluation_files(data).files)
    record = first.record()
    assert record["count"] == 8
    assert all(name.startswith("train/") for name in record["files"])


def test_a_flat_folder_will_do(tmp_path: Path):
    for number in range(3):
        save_image(tmp_path / f"{number}.png")
    assert len(images.calibration_files(tmp_path, 3).files) == 3
    assert images.evaluation_files(tmp_path).labels is None


def test_fewer_images_than_asked_warn_with_the_number(data: Path):
    with pytest.warns(UserWarning, match="has 20 images, fewer than the 32 asked for"):
        assert len(images.calibration_files(data, 32).files) == 20


def test_calibrating_on_validation_images_is_refused(data: Path, tmp_path: Path):
    (tmp_path / "held_out").mkdir()
    (data / "val").rename(tmp_path / "held_out/val")
    with pytest.raises(InputError, match="has val but no train: calibrate on training images"):
        images.calibration_files(tmp_path / "held_out", 4)


def test_an_empty_or_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="holds no image"):
        images.calibration_files(tmp_path, 4)
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        images.calibration_files(tmp_path / "nowhere", 4)
    with pytest.raises(InputError, match="count: expected at least 1 image"):
        images.calibration_files(tmp_path, 0)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_broken_image_is_named(data: Path, damage: str):
    broken = data / "train/cat/4.png"
    broken.write_bytes(broken.read_bytes()[:50] if damage == "cut" else b"not an image")
    chosen = images.calibration_files(data, 20)
    with pytest.raises(InputError, match=r"train/cat/4\.png: not a readable image"):
        list(images.batches(chosen, PLAIN, 4))


@pytest.mark.parametrize("batch_size", [1, 4, 6, 99])
def test_batches_keep_the_order_of_files_and_labels(data: Path, batch_size: int):
    files = images.evaluation_files(data)
    got = list(images.batches(files, PLAIN, batch_size))
    assert torch.cat([pixels for pixels, _ in got])[:, 0, 0, 0].tolist() == [100, 102, 104, 101, 103, 105]
    labels = [part for _, part in got if part is not None]
    assert torch.cat(labels).tolist() == [0, 0, 0, 1, 1, 1]
    assert max(len(pixels) for pixels, _ in got) <= batch_size


def test_images_of_different_sizes_say_what_to_do(data: Path):
    save_image(data / "train/cat/a.png", size=(6, 4))
    with pytest.raises(InputError, match=r"after preprocessing, the image before it .* set --image-size"):
        list(images.batches(images.calibration_files(data, 21), PLAIN, 21))


def test_fewer_classes_than_outputs_are_found_by_name_or_refused(data: Path):
    files = images.evaluation_files(data)
    assert images.with_model_labels(files, 2, {}).labels == [0, 0, 0, 1, 1, 1]
    by_name = images.with_model_labels(files, 10, {"dog": 3, "cat": 7})
    assert by_name.labels == [7, 7, 7, 3, 3, 3]
    with pytest.raises(InputError, match="has 2 class folders, the model 10 outputs, and 'cat' names none"):
        images.with_model_labels(files, 10, {"dog": 3})
    assert images.with_model_labels(images.evaluation_files(data, labelled=False), 10, {}).labels is None


def test_wordnet_ids_are_the_outputs_of_imagenet_models(tmp_path: Path):
    save_image(tmp_path / "n01443537/a.png")  # goldfish, output 1
    save_image(tmp_path / "n15075141/a.png")  # toilet tissue, output 999
    files = images.evaluation_files(tmp_path)
    assert images.with_model_labels(files, 1000, {}).labels == [1, 999]
