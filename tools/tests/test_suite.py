import shutil
from pathlib import Path

import pytest

from tools import suite, workspace
from tools.tests.conftest import FakeWorkspace


def add_tests(folder: Path, text: str) -> None:
    tests = folder / "tests"
    tests.mkdir(parents=True)
    (tests / "test_it.py").write_text(text)


@pytest.fixture
def tested(fake: FakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> FakeWorkspace:
    # Other tools' plugins take seconds to import in each of the processes that are started here.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    shutil.copy(workspace.ROOT / "pyproject.toml", fake.root / "pyproject.toml")
    add_tests(fake.root / "tools", "def test_a():\n    pass\n")
    add_tests(
        fake.root / "shared",
        "import pytest\n\ndef test_a():\n    pass\n\ndef test_b():\n    pytest.skip('r')\n",
    )
    return fake


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().out.rstrip().split("\n")[-1].strip("= ")


def test_every_member_counts_in_the_closing_line(
    tested: FakeWorkspace, capfd: pytest.CaptureFixture[str]
) -> None:
    assert suite.main(["--root", str(tested.root)]) == 0
    assert last_line(capfd).startswith("2 passed, 1 skipped in ")


def test_a_failure_and_a_warning_fail_the_run(
    tested: FakeWorkspace, capfd: pytest.CaptureFixture[str]
) -> None:
    add_tests(
        tested.package("one", ""),
        "import warnings\n\ndef test_bad():\n    assert 0\n\ndef test_warns():\n    warnings.warn('w')\n",
    )
    assert suite.main(["--root", str(tested.root)]) == 1
    assert last_line(capfd).startswith("2 failed, 2 passed, 1 skipped in ")


def test_a_member_that_cannot_be_collected_or_has_no_tests_fails_the_run(
    tested: FakeWorkspace, capfd: pytest.CaptureFixture[str]
) -> None:
    add_tests(tested.package("one", ""), "import no_such_module\n")
    tested.package("two", "")
    assert suite.main(["--root", str(tested.root)]) == 1
    captured = capfd.readouterr()
    assert "1 errors" in captured.out.rstrip().split("\n")[-1]
    assert "the tests of two are missing" in captured.err


def test_one_member_alone_and_a_wrong_name(tested: FakeWorkspace, capfd: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--root", str(tested.root), "--package", "shared"]) == 0
    assert last_line(capfd).startswith("1 passed, 1 skipped in ")
    assert suite.main(["--root", str(tested.root), "--package", "sharde"]) == 2


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_suites_print_stays_together_and_adds_up(
    tested: FakeWorkspace, capfd: pytest.CaptureFixture[str], jobs: str
) -> None:
    for name in ("one", "two"):
        add_tests(
            tested.package(name, ""),
            f"import time\n\ndef test_slow():\n    print('start {name}', flush=True)\n"
            f"    time.sleep(0.5)\n    print('end {name}', flush=True)\n",
        )
    assert suite.main(["--root", str(tested.root), "--jobs", jobs, "--", "-s"]) == 0
    out = capfd.readouterr().out
    assert out.rstrip().split("\n")[-1].strip("= ").startswith("4 passed, 1 skipped in ")
    for name in ("one", "two"):
        between = out[out.index(f"== {name}") :].split(f"end {name}")[0]
        assert f"start {name}" in between
        assert between.count("start") == 1
