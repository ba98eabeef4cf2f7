"""Every field of a file is checked: what `csq.save` cannot have written is refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hosted_models import images, randomize_masks, small_net
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import csq
from csq.activations import ActivationQuantizer, install_activations, plan_activations
from csq.file_contents import checksum
from shared_core import InputError

pytestmark = pytest.mark.filterwarnings("ignore:hardened at temperature")

Description = dict[str, Any]
Tensors = dict[str, Tensor]


class Net(nn.Module):
    """Layers with and without a codebook, a tied pair, buffers of integers, LSQ and PACT."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.wide, self.twin, self.other = nn.Linear(40, 60), nn.Linear(3, 3), nn.Linear(3, 3)
        self.twin.weight = self.other.weight
        self.twin.bias = self.other.bias
        self.register_buffer("calls", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Net()
    for name, other, method in (("0", "4", "lsq"), ("4", "0", "pact")):
        plan = plan_activations(small_net(), 4, images(4)[0], method, skip=[other])
        install_activations(model.net, plan)
        assert isinstance(model.net.get_submodule(f"{name}.input_quantizer"), ActivationQuantizer)
    csq.parametrize(model)
    randomize_masks(model, 8)
    gaps = csq.bit_layers(model)["wide"]
    with torch.no_grad():
        gaps.mask.copy_(torch.tensor([-1.0, 1, -1, -1, 1, -1, -1, -1]))  # nine values: by a codebook
    path = tmp_path_factory.mktemp("good") / "m.safetensors"
    csq.save(csq.harden(model), path, notes={"name": "net"})
    description, tensors = taken_apart(path)
    assert description["shared"]
    assert "csq.codebook/wide" in tensors
    assert {each["method"] for each in description["activations"].values()} == {"lsq", "pact"}
    csq.load(Net(), path)
    return path


def taken_apart(path: Path) -> tuple[Description, Tensors]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["csq"]), load_file(path)


def written(path: Path, description: Description, tensors: Tensors, *, seal: bool) -> Path:
    if seal and isinstance(description, dict) and "checksum" in description:
        del description["checksum"]
        description["checksum"] = checksum(description, tensors)
    save_file(tensors, path, {"csq": json.dumps(description, separators=(",", ":"))})
    return path


@pytest.fixture(scope="module")
def refused() -> Iterator[Callable[..., None]]:
    """Loading must fail in one line, and must leave the model as it was."""
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def check(path: Path, text: str = "m.safetensors") -> None:
        with pytest.raises(InputError, match=text) as caught:
            csq.load(model, path)
        assert "m.safetensors" in str(caught.value)
        assert "\n" not in str(caught.value)

    yield check
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


STRANGE = (None, True, False, -1, 0, 1, 2.5, 10**12, "", "x", [], [0], ["x"], {}, {"a": 1}, float("nan"))


def fields(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value in nested lists and objects."""
    if place:
        yield place
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield from fields(inner, (*place, key))


def test_no_damage_of_any_field_of_the_description_is_loaded(good, tmp_path, refused):
    """Each value replaced by each strange one, and each entry left out, the checksum as it was."""
    whole, tensors = taken_apart(good)
    places = [
        place for place in fields(whole) if len(place) < 3 or place[1] in (0, 2) or place[0] != "layers"
    ]
    assert len(places) > 30
    for place in places:
        for value in (*STRANGE, "gone"):
            broken = copy.deepcopy(whole)
            *way, last = place
            holder = broken
            for key in way:
                holder = holder[key]
            if value == "gone":
                del holder[last]
            elif holder[last] == value and type(holder[last]) is type(value):
                continue
            else:
                holder[last] = value
            refused(written(tmp_path / "m.safetensors", broken, tensors, seal=False))


def test_no_changed_bit_or_shape_of_any_tensor_is_loaded(good, tmp_path, refused):
    whole, tensors = taken_apart(good)
    for name, tensor in tensors.items():
        changed = tensor.clone()
        flat = changed.reshape(-1).view(torch.uint8)
        flat[len(flat) // 2] ^= 1
        longer = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
        cast = tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)
        gone = {key: value for key, value in tensors.items() if key != name}
        for broken in ({**tensors, name: changed}, {**tensors, name: longer}, {**tensors, name: cast}, gone):
            refused(written(tmp_path / "m.safetensors", whole, broken, seal=False))
    refused(written(tmp_path / "m.safetensors", whole, {**tensors, "more": torch.zeros(1)}, seal=False))


def row(description: Description, name: str) -> list[Any]:
    return next(each for each in description["layers"] if each[0] == name)


def entry(name: str, place: int, value: Any) -> Callable[[Description, Tensors], None]:
    def change(description: Description, tensors: Tensors) -> None:
        row(description, name)[place] = value

    return change


def tensor(key: str, edit: Callable[[Tensor], Tensor]) -> Callable[[Description, Tensors], None]:
    def change(description: Description, tensors: Tensors) -> None:
        tensors[key] = edit(tensors[key].clone())

    return change


def part(*place: Any, value: Any) -> Callable[[Description, Tensors], None]:
    def change(description: Description, tensors: Tensors) -> None:
        holder: Any = description
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value

    return change


def put(flat: Tensor, place: int, value: float) -> Tensor:
    flat.view(-1)[place] = value
    return flat


WRONG = {
    "version of another format": (part("version", value=7), r"version: expected format version 3.*got 7"),
    "version that is a bool": (part("version", value=True), r"expected format version 3.*got True"),
    "version that is no whole number": (part("version", value=3.0), r"expected format version 3.*got 3\.0"),
    "unknown key": (part("more", value=1), r"description: has unknown more; expected version, layers"),
    "no layer": (part("layers", value=[]), r"layers: expected a list of one layer or more \(got \[\]\)"),
    "short row": (part("layers", 0, value=["net.0"]), r"layer 0: expected name, tensors, shape, width"),
    "name": (entry("net.0", 0, 3), r"layer 0: name: expected a text \(got 3\)"),
    "name twice": (entry("net.0", 0, "net.4"), r"layer net\.4: expected each name once"),
    "tensors": (entry("net.0", 1, []), r"layer net\.0: tensors: expected names of tensors"),
    "tensor twice": (entry("net.4", 1, ["net.0.weight"]), r"layer net\.4: expected each name once"),
    "shape": (entry("net.0", 2, [8, 0, 3, 3]), r"layer net\.0: shape: expected whole numbers from 1 on"),
    "shape of bools": (entry("net.0", 2, [True, 216]), r"layer net\.0: shape: expected whole numbers"),
    "huge shape": (entry("net.0", 2, [2**40]), r"layer net\.0: is far larger than any weight of the model"),
    "width": (entry("net.0", 3, 10), r"layer net\.0: width: expected 0 to 9 bits \(got 10\)"),
    "negative width": (entry("net.0", 3, -1), r"layer net\.0: width: expected 0 to 9 bits \(got -1\)"),
    "width of a bool": (entry("net.0", 3, True), r"layer net\.0: width: expected 0 to 9 bits \(got True\)"),
    "another width": (entry("net.0", 3, 1), r"layer net\.0: expected csq\.codes/net\.0 to be torch\.uint8"),
    "offset": (entry("net.0", 4, -70000), r"layer net\.0: offset: expected -255 to 255 \(got -70000\)"),
    "offset out of reach": (entry("twin", 4, 200), r"layer twin: expected numbers that planes [01]+ make"),
    "offset of a codebook": (entry("wide", 4, 1), r"layer wide: expected a codebook of rising numbers, and"),
    "dtype": (entry("net.0", 5, "int8"), r"layer net\.0: dtype: expected float16 or bfloat16.*got 'int8'"),
    "shared": (part("shared", "twin.bias", value="none"), r"twin\.bias: expected another name of a tensor"),
    "shared number": (part("shared", "twin.bias", value=4), r"shared twin\.bias: expected a name of another"),
    "notes": (part("notes", value=[]), r"notes: expected an object \(got \[\]\)"),
    "activation method": (
        part("activations", "net.4", "method", value="max"), r"activations net\.4: expected the settings of"),
    "activation bits": (
        part("activations", "net.4", "bits", value=17), r"activations net\.4: bits: expected 1 to 16"),
    "activation sign": (
        part("activations", "net.4", "signed", value=0), r"activations net\.4: signed: expected true or"),
    "activation features": (
        part("activations", "net.0", "features", value=0), r"activations net\.0: features: expected a whole"),
    "short stream": (tensor("csq.codes/net.0", lambda t: t[:-1]), r"layer net\.0: expected csq\.codes/net"),
    "stream of floats": (tensor("csq.codes/net.0", lambda t: t.float()), r"to be torch\.uint8 of \(\d+\)"),
    "steps of another length": (tensor("csq.steps", lambda t: t[1:]), r"expected csq\.steps to be torch\."),
    "steps of another dtype": (tensor("csq.steps", lambda t: t.double()), r"torch\.float32 of \(4\) \(got"),
    "step": (tensor("csq.steps", lambda t: put(t, 1, 0.0)), r"layer net\.4: its step is no positive number"),
    "infinite step": (tensor("csq.steps", lambda t: put(t, 1, torch.inf)), r"layer net\.4: its step is no"),
    "step that is no number": (tensor("csq.steps", lambda t: put(t, 1, torch.nan)), r"layer net\.4: its"),
    "masks of a layer less": (tensor("csq.masks", lambda t: t[1:]), r"expected csq\.masks to be torch"),
    "masks of nine planes": (
        tensor("csq.masks", lambda t: torch.cat([t, t[:, :1]], 1)), r"csq\.masks: expected 1 to 8 planes"),
    "mask of twos": (tensor("csq.masks", lambda t: put(t, 3, 2)), r"layer net\.0: expected a mask of zeros"),
    "mask that makes other numbers": (
        tensor("csq.masks", lambda t: t * 0), r"layer net\.0: expected numbers that planes 0"),
    "codebook of another size": (
        tensor("csq.codebook/wide", lambda t: t[:2]), r"layer wide: expected a codebook that takes 3 bits"),
    "codebook out of order": (
        tensor("csq.codebook/wide", lambda t: t.flip(0)), r"layer wide: expected a codebook of rising"),
    "codebook of other numbers": (
        tensor("csq.codebook/wide", lambda t: put(t, -1, 99)), r"layer wide: expected numbers that planes 0"),
    "codebook of another dtype": (
        tensor("csq.codebook/wide", lambda t: t.int()), r"layer wide: expected csq\.codebook/wide to be"),
    "index beyond the codebook": (
        tensor("csq.codes/wide", lambda t: t | 0xFF), r"layer wide: stream: an index is beyond the"),
    "rest of another dtype": (
        tensor("calls", lambda t: t.float()), r"calls is torch\.float32 in the file, torch\.int64 in the"),
    "rest of another shape": (tensor("calls", lambda t: t[:2]), r"calls is \(2,\) in the file, \(3,\) in"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_impossible_field_is_named_with_what_would_be_right(name, good, tmp_path, refused):
    """Also with a checksum that fits, as of a file that another program wrote."""
    change, text = WRONG[name]
    description, tensors = taken_apart(good)
    change(description, tensors)
    refused(written(tmp_path / "m.safetensors", description, tensors, seal=True), text)


@pytest.mark.parametrize("key", ["csq.codes/ghost", "csq.codebook/net.9"])
def test_tensors_of_no_layer_are_refused(key, good, tmp_path, refused):
    description, tensors = taken_apart(good)
    tensors[key] = torch.zeros(1, dtype=torch.uint8)
    refused(
        written(tmp_path / "m.safetensors", description, tensors, seal=True), f"{key}: belongs to no layer"
    )


@pytest.mark.parametrize("key", ["csq.codes/net.0", "csq.steps", "csq.masks"])
def test_missing_tensors_are_named(key, good, tmp_path, refused):
    description, tensors = taken_apart(good)
    del tensors[key]
    refused(written(tmp_path / "m.safetensors", description, tensors, seal=True), f"{key} is missing")


def test_a_quantized_weight_that_is_there_twice_is_refused(good, tmp_path, refused):
    description, tensors = taken_apart(good)
    tensors["net.0.weight"] = torch.zeros(8, 3, 3, 3)
    refused(written(tmp_path / "m.safetensors", description, tensors, seal=True), r"net\.0\.weight: .* twice")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is damaged"), ("[]", "no object"), ("[" * 10**5, "damaged")]
)
def test_a_description_that_is_none_is_refused(text, words, good, tmp_path, refused):
    save_file(load_file(good), tmp_path / "m.safetensors", {"csq": text})
    refused(tmp_path / "m.safetensors", words)


def test_other_files_are_refused(good, tmp_path, refused):
    path = tmp_path / "m.safetensors"
    refused(path, "there is no such file")
    for length in (0, 7, 200, good.stat().st_size - 1):
        path.write_bytes(good.read_bytes()[:length])
        refused(path, "is no whole safetensors file")
    save_file({"a": torch.zeros(1)}, path)
    refused(path, r"is no file of csq\.save")


def test_another_architecture_is_named_and_left_alone(good):
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4))
    before = other[0].weight.clone()
    with pytest.raises(InputError, match=r"holds another architecture: the model has no layer net\.0"):
        csq.load(other, good)
    assert torch.equal(other[0].weight, before)
    wider = Net()
    wider.net[4] = nn.Linear(288, 7)
    with pytest.raises(
        InputError, match=r"net\.4\.weight is \(10, 288\) in the file, \(7, 288\) in the model"
    ):
        csq.load(wider, good)
    lacking = Net()
    del lacking.wide
    with pytest.raises(InputError, match=r"another architecture: the model lacks wide\.bias, wide\.weight"):
        csq.load(lacking, good)


def test_a_soft_model_is_no_place_to_load_into(good):
    with pytest.raises(InputError, match="load into a plain model"):
        csq.load(csq.parametrize(Net()), good)
