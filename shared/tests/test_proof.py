import io
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shared_core import InputError
from shared_core.proof import (
    Claim,
    Metric,
    ProofRecord,
    ProofRun,
    load,
    paired_difference,
    peak_memory_bytes,
    show,
    spread,
    versions,
)

# What the repository's design asks of every proof.json.
DESIGN_FIELDS = {"package", "version", "claim", "source", "data", "rule", "holds", "seeds", "methods"} | {
    "wall_seconds",
    "peak_memory_bytes",
    "versions",
    "quick",
}


def new_run(out, **changes) -> ProofRun:
    arguments = {
        "package": "repqvit",
        "version": "0.1.0",
        "source": "Li et al. (2023)",
        "data": {"images": 20},
        "seeds": [0, 1, 2],
        "out": out,
        "names": [],
    }
    return ProofRun(**(arguments | changes))


def filled(out, *, holds=(True,), **changes) -> ProofRun:
    run = new_run(out, **changes)
    with run:
        run.metric("top1", "top-1 agreement", unit="%", fmt=".1f")
        run.metric("mse", "output error", higher_is_better=False, fmt=".4f")
        for seed in run.seeds:
            run.add("repqvit", "top1", 90.0 + seed)
            run.add("minmax", "top1", 80.0 - seed)
            run.add("repqvit", "mse", 0.01 * (seed + 1))
            run.add("minmax", "mse", 0.05)
        for number, verdict in enumerate(holds):
            run.claim(f"Claim {number}.", rule=f"Rule {number}.", holds=verdict, reason="90 > 80")
        run.meaning("It agrees more often.")
    return run


def record_of(out, **changes) -> ProofRecord:
    filled(out, **changes).finish()
    return load(out)


def test_the_file_has_the_fields_of_the_design_and_the_numbers(tmp_path):
    run = filled(tmp_path, quick=True, command="repqvit eval --data imagenet")
    run.picture("claim").write_bytes(b"png")
    run.note("Twenty images.")
    run.detail("bits", {"weights": 4})
    assert run.finish() == 0
    content = json.loads((tmp_path / "proof.json").read_text())
    assert set(content) >= DESIGN_FIELDS
    assert content["methods"]["repqvit"] == {"top1": [90.0, 91.0, 92.0], "mse": [0.01, 0.02, 0.03]}
    assert content["pictures"] == ["claim.png"]
    assert content["claims"] == [{"text": "Claim 0.", "rule": "Rule 0.", "holds": True, "reason": "90 > 80"}]
    assert (content["notes"], content["details"]) == (["Twenty images."], {"bits": {"weights": 4}})
    assert content["meaning"] == "It agrees more often."
    assert (content["quick"], content["command"]) == (True, "repqvit eval --data imagenet")


@given(holds=st.lists(st.booleans(), min_size=1, max_size=4))
def test_it_holds_where_every_claim_does_and_the_exit_code_says_so(tmp_path_factory, holds):
    out = tmp_path_factory.mktemp("proof")
    assert filled(out, holds=holds).finish() == (0 if all(holds) else 1)
    record = load(out)
    assert record.holds == all(holds)
    assert record.claim == " ".join(f"Claim {number}." for number in range(len(holds)))
    assert record.rule == " ".join(f"Rule {number}." for number in range(len(holds)))


def test_a_numpy_bool_is_a_verdict(tmp_path):
    assert filled(tmp_path, holds=[np.float32(1) < np.float32(0)]).finish() == 1


finite = st.floats(-1e6, 1e6)
names = st.text(min_size=1, max_size=8)


@st.composite
def contents(draw) -> dict:
    """What any proof.json may hold."""
    seeds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
    values = st.lists(finite, min_size=len(seeds), max_size=len(seeds))
    metrics = draw(st.lists(names, min_size=1, max_size=2, unique=True))
    claim = st.fixed_dictionaries({"text": names, "rule": names, "holds": st.booleans(), "reason": names})
    claims = draw(st.lists(claim, min_size=1, max_size=2))
    return {
        "package": "ours",
        "version": "0",
        "claim": draw(names),
        "source": draw(names),
        "data": draw(names | st.dictionaries(names, st.integers() | names, max_size=2)),
        "rule": draw(names),
        "holds": all(claim["holds"] for claim in claims),
        "seeds": seeds,
        "methods": {name: {metric: draw(values) for metric in metrics} for name in ("ours", draw(names))},
        "wall_seconds": draw(st.floats(0, 1e4)),
        "peak_memory_bytes": draw(st.integers(0, 2**40)),
        "versions": draw(st.dictionaries(names, names, max_size=2)),
        "quick": draw(st.booleans()),
        "claims": claims,
        "metrics": [
            {
                "name": name,
                "label": name,
                "higher_is_better": draw(st.booleans()),
                "unit": "",
                "fmt": ".3f",
                "measured": False,
            }
            for name in metrics
        ],
        "pictures": draw(st.lists(names, max_size=2)),
        "notes": draw(st.lists(names, max_size=2)),
        "details": draw(st.dictionaries(names, st.lists(st.integers()), max_size=2)),
        "command": draw(st.text(max_size=8)),
        "meaning": draw(st.text(max_size=8)),
    }


@given(contents())
def test_a_record_comes_back_from_its_file(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("proof") / "proof.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert asdict(load(file)) == content


@given(st.sampled_from(list(ProofRecord.__dataclass_fields__)), st.booleans())
def test_a_missing_and_an_ill_typed_field_are_named(tmp_path_factory, field, missing):
    out = tmp_path_factory.mktemp("proof")
    filled(out).finish()
    content = json.loads((out / "proof.json").read_text())
    content.pop(field) if missing else content.update({field: None})
    (out / "proof.json").write_text(json.dumps(content))
    message = "is missing" if missing else "expected .*, got null"
    with pytest.raises(InputError, match=rf"proof\.json: {field}: {message}"):
        load(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 1]}, r"methods\.repqvit\.top1: expected a value for each of 2 seeds, got 3"),
        ({"seeds": [0, True, 2]}, r"seeds\[1\]: expected an integer, got true"),
        ({"quick": 1}, "quick: expected true or false, got 1"),
        ({"data": 3}, "data: expected text, got 3"),
        ({"holds": False}, "holds: is False, but the claims say otherwise"),
        ({"claims": []}, "claims: expected at least one"),
        ({"claims": [{"text": "a", "rule": "b", "holds": True}]}, r"claims\[0\]\.reason: is missing"),
        ({"metrics": []}, r"methods\.repqvit\.top1: is not declared in metrics"),
        (
            {"methods": {"repqvit": {"top1": [1, None, 2]}}},
            r"methods\.repqvit\.top1\[1\]: expected a finite number",
        ),
        ({"methods": {"minmax": {"top1": [1, 2, 3]}}}, "methods: lacks repqvit, the method itself"),
        ({"package": "other"}, "methods: lacks other, the method itself"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(tmp_path, change, message):
    filled(tmp_path).finish()
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load(file)


def test_a_file_that_is_absent_or_no_record_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: cannot be read: No such file"):
        load(tmp_path / "nowhere")
    for content in ("{", "[]", '{"package": NaN}'):
        (tmp_path / "proof.json").write_text(content)
        with pytest.raises(InputError, match=r"proof\.json: "):
            load(tmp_path)


def test_values_are_refused_when_they_are_added(tmp_path):
    with new_run(tmp_path, seeds=[0]) as run:
        run.metric("top1")
        for bad in (math.nan, math.inf, np.float32("nan")):
            with pytest.raises(ValueError, match=r"repqvit, top1: expected a finite number, got (nan|inf)"):
                run.add("repqvit", "top1", bad)
        with pytest.raises(ValueError, match=r"metric 'top5' is not declared: one of \['top1'\]"):
            run.add("repqvit", "top5", 1.0)
        run.add("repqvit", "top1", 1.0)
        with pytest.raises(ValueError, match="there is a value for each of the 1 seeds already"):
            run.add("repqvit", "top1", 1.0)
        with pytest.raises(ValueError, match="metric 'top1' is declared twice"):
            run.metric("top1")
        with pytest.raises(ValueError, match="plain file name"):
            run.picture("../out.png")


def test_an_incomplete_proof_is_refused_with_all_its_gaps_and_the_old_file_stays(tmp_path):
    filled(tmp_path).finish()
    before = (tmp_path / "proof.json").read_bytes()
    with new_run(tmp_path) as run:
        run.metric("top1")
        run.metric("mse")
        run.add("minmax", "top1", 1.0)
        run.picture("claim")
    with pytest.raises(ValueError, match="the proof is not complete") as caught:
        run.finish()
    for gap in (
        "there is no claim",
        "nobody says what it means",
        "methods lack 'repqvit'",
        "metric 'mse' has no value",
        "minmax, top1: 1 values for 3 seeds",
        "picture claim.png is not there",
    ):
        assert gap in str(caught.value)
    assert (tmp_path / "proof.json").read_bytes() == before


def test_bad_seeds_and_a_bad_folder_are_input_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: the folder cannot be made"):
        new_run(tmp_path / "file")
    for seeds in ([], [1, 1]):
        with pytest.raises(InputError, match="seeds: expected one or more different seeds"):
            new_run(tmp_path, seeds=seeds)


pairs = st.lists(st.tuples(finite, finite), min_size=1, max_size=6)


@given(pairs)
def test_a_paired_difference_turns_its_sign_with_the_order(values):
    ours, theirs = zip(*values, strict=True)
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.mean == pytest.approx(np.mean(np.subtract(ours, theirs)), abs=1e-6)
    assert one.low <= one.mean + 1e-9
    assert one.mean <= one.high + 1e-9


@given(st.lists(finite, min_size=1), finite)
def test_what_a_seed_does_to_both_cancels(values, gain):
    assert spread([value + gain for value in values]).mean == pytest.approx(
        spread(values).mean + gain, abs=1e-6
    )
    assert paired_difference([value + gain for value in values], values).mean == pytest.approx(gain, abs=1e-6)


def printed(record: ProofRecord, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_each_method_with_its_spread_and_the_paired_difference(tmp_path):
    rows = [" ".join(line.replace("│", " ").split()) for line in printed(record_of(tmp_path)).splitlines()]
    assert "┃ metric ┃ method ┃ mean [min..max] of 3 seeds ┃ repqvit minus it, by seed ┃" in rows
    assert "top-1 agreement (%) ↑ repqvit 91.0 [90.0..92.0]" in rows
    assert "minmax 79.0 [78.0..80.0] +12.0 [+10.0..+14.0]" in rows
    assert "output error ↓ repqvit 0.0200 [0.0100..0.0300]" in rows
    assert "minmax 0.0500 -0.0300 [-0.0400..-0.0200]" in rows
    assert "HOLDS Claim 0." in rows
    assert "rule: Rule 0." in rows
    assert "numbers: 90 > 80" in rows


@pytest.mark.parametrize(("higher_is_better", "style"), [(True, "green"), (False, "red")])
def test_a_difference_is_green_where_every_seed_is_better_and_red_where_every_seed_is_worse(
    tmp_path, higher_is_better, style
):
    metric = Metric("top1", "top-1", higher_is_better, "", ".1f", False)
    record = replace(record_of(tmp_path), metrics=[metric])
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    show(record, console)
    assert isinstance(console.file, io.StringIO)
    code = {"green": 32, "red": 31}[style]
    assert re.search(rf"\x1b\[{code}m *\+12\.0 \[\+10\.0\.\.\+14\.0\]", console.file.getvalue())


def test_the_table_fits_in_100_columns_with_long_names(tmp_path):
    record = record_of(tmp_path, holds=[False])
    methods = dict.fromkeys(("layer-wise MSE search", "percentile 99.99, W4A4"), record.methods["minmax"])
    text = printed(replace(record, methods=record.methods | methods))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "DOES NOT HOLD" in text
    assert text.count("percentile 99.99, W4A4") == 2


def test_markup_in_texts_is_shown_as_it_is(tmp_path):
    record = record_of(tmp_path)
    claims = [Claim("[bold]x[/bold] [0, 1]", "[red]", True, "a[b]")]
    text = printed(replace(record, claims=claims))
    assert "[bold]x[/bold] [0, 1]" in text
    assert "rule: [red]" in text


def test_finish_prints_the_table_and_where_the_file_is(tmp_path, capsys):
    filled(tmp_path).finish()
    output = capsys.readouterr().out
    assert "minmax" in output
    assert output.endswith(f"written: {tmp_path}/proof.json\n")


def test_wall_time_is_that_of_the_block(tmp_path):
    with new_run(tmp_path, seeds=[0]) as run:
        run.metric("top1")
        run.add("repqvit", "top1", 1.0)
        run.claim("a", rule="b", holds=True, reason="c")
        run.meaning("d")
        time.sleep(0.05)
    time.sleep(0.3)
    run.finish()
    assert 0.05 <= load(tmp_path).wall_seconds < 0.3
    with pytest.raises(ValueError, match="use it in a with statement"):
        new_run(tmp_path).finish()


@pytest.mark.parametrize("where", ["here", "child"])
def test_peak_memory_sees_what_was_allocated_and_freed(where):
    allocate = "bytearray(b'x') * 300_000_000"
    body = (
        allocate if where == "here" else f"subprocess.run([sys.executable, '-c', {allocate!r}], check=True)"
    )
    imports = "import subprocess, sys\nfrom shared_core.proof import peak_memory_bytes"
    code = f"{imports}\n{body}\nprint(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 300_000_000 < int(done.stdout) < 450_000_000


def test_peak_memory_is_at_least_what_is_held_now():
    held = np.ones(20_000_000, dtype=np.uint8)
    assert peak_memory_bytes() > held.nbytes


def test_peak_memory_is_not_that_of_the_process_which_started_this_one():
    child = "from shared_core.proof import peak_memory_bytes; print(peak_memory_bytes())"
    start = f"subprocess.run([sys.executable, '-c', {child!r}])"
    parent = f"import subprocess, sys\nheld = bytearray(b'x') * 300_000_000\n{start}"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000_000


def test_versions_are_those_of_the_declared_dependencies_that_were_imported():
    found = versions("shared-core")
    assert {"python", "platform", "shared-core", "numpy", "rich"} <= set(found)
    assert found["numpy"] == np.__version__
    assert "hypothesis" in found  # declared in an extra, and imported here
    assert "pygments" not in found  # imported, but declared by no one here
    assert set(versions("not-installed", ["numpy", "not-there"])) == {"python", "platform", "numpy"}
