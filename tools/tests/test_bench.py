import json
from pathlib import Path

import pytest

from tools import bench
from tools.tests.conftest import FakeWorkspace

ROW = {
    "what": "calibration",
    "ours": 1.0,
    "theirs": 20.0,
    "peer": "a loop",
    "peer_version": "1.0",
    "ratio": 20.0,
    "unit": "s",
}


def add(fake: FakeWorkspace, name: str, script: str) -> None:
    folder = fake.package(name, "") / "benchmarks"
    folder.mkdir()
    (folder / "bench.py").write_text(
        "import json, pathlib, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n" + script
    )


def writing(content: object) -> str:
    return f"out.mkdir(parents=True, exist_ok=True); (out / 'bench.json').write_text({json.dumps(content)!r})"


def test_ratios_are_printed_and_written(fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    add(fake, "one", writing({"package": "one", "machine": "2 cores", "rows": [ROW]}))
    assert bench.main(["--root", str(fake.root)]) == 0
    out = capsys.readouterr().out
    assert "calibration" in out
    assert "20.00×" in out
    page = (fake.root / "runs" / "bench.html").read_text()
    assert "2 cores" in page
    assert "20.00×" in page
    assert (fake.root / "runs" / "bench" / "one" / "bench.json").is_file()


def test_a_crash_is_named_and_the_others_still_run(
    fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "bad", "sys.exit(3)")
    add(fake, "good", writing({"package": "good", "machine": {"cores": 2}, "rows": [ROW]}))
    assert bench.main(["--root", str(fake.root)]) == 70
    out = capsys.readouterr().out
    assert "crashed: exit code 3" in out
    assert "20.00×" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": []}, "a list rows that is not empty"),
        ({"rows": [{**ROW, "ratio": "20x"}]}, r"rows\[0\]: ratio should be a number, found '20x'"),
        ({"rows": [{"what": "x"}]}, r"rows\[0\]: missing ours, theirs"),
        ([], "expected an object"),
    ],
)
def test_what_is_wrong_with_a_result_is_named(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        bench.load(file)


def test_packages_without_benchmarks_are_left_out(
    fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.package("none", "")
    assert bench.main(["--root", str(fake.root)]) == 2
    assert "has a benchmarks/bench.py" in capsys.readouterr().err
