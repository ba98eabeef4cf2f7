import json
import time
from pathlib import Path

import pytest

from tools import prove, record
from tools.tests.conftest import FakeWorkspace, proof


def run(fake: FakeWorkspace, *options: str) -> int:
    return prove.main(["--root", str(fake.root), *options])


def outcomes(fake: FakeWorkspace) -> dict[str, record.Outcome]:
    return {outcome.package: outcome for outcome in record.read_summary(fake.root / "runs")}


def test_all_claims_hold_gives_0(fake: FakeWorkspace) -> None:
    fake.proving("one", proof("one"), 0)
    fake.proving("two", proof("two"), 0)
    assert run(fake) == 0
    assert [outcome.status for outcome in outcomes(fake).values()] == ["holds", "holds"]


def test_a_claim_that_does_not_hold_gives_1(fake: FakeWorkspace) -> None:
    fake.proving("one", proof("one", holds=False), 1)
    fake.proving("two", proof("two"), 0)
    assert run(fake) == 1
    assert outcomes(fake)["one"].status == "does not hold"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise RuntimeError('lost the thread')", "exit code 1, but proof.json was not written"),
        ("sys.exit(70)", "exit code 70"),
        ("sys.exit(2)", "exit code 2 (bad input)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
        ("(out / 'proof.json').write_text('{\"package\": ')", "exit code 0, but proof.json cannot be read"),
        ("(out / 'proof.json').write_text('[]')", "proof.json: expected an object, found list"),
    ],
)
def test_a_crash_gives_70_its_reason_and_does_not_stop_the_others(
    fake: FakeWorkspace, script: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.package("broken", script)
    fake.proving("other", proof("other", holds=False), 1)
    assert run(fake) == 70
    assert outcomes(fake)["broken"].status == "crashed"
    assert reason in outcomes(fake)["broken"].reason
    assert outcomes(fake)["other"].status == "does not hold"
    page = (fake.root / "runs" / "report.html").read_text()
    assert "0 of 1 claims hold, 1 proof crashed" in page
    assert "1 does not hold, 1 crashed" in capsys.readouterr().out


def test_a_crash_shows_the_end_of_the_log(fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    fake.package("broken", "raise RuntimeError('lost the thread')")
    run(fake)
    assert "RuntimeError: lost the thread" in capsys.readouterr().out
    assert "RuntimeError: lost the thread" in (fake.root / "runs" / "report.html").read_text()


@pytest.mark.parametrize(("holds", "code"), [(True, 1), (False, 0)])
def test_a_verdict_that_the_exit_code_contradicts_counts_as_a_crash(
    fake: FakeWorkspace, holds: bool, code: int
) -> None:
    fake.proving("odd", proof("odd", holds=holds), code)
    assert run(fake) == 70
    assert f"exit code {code} contradicts holds = {str(holds).lower()}" in outcomes(fake)["odd"].reason


def test_the_proof_of_an_earlier_run_does_not_save_a_crash(fake: FakeWorkspace) -> None:
    fake.package("broken", "sys.exit(0)")
    old = fake.root / "runs" / "broken" / "proof.json"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps(proof("broken")))
    assert run(fake) == 70


def test_a_proof_that_hangs_is_ended_with_its_children(fake: FakeWorkspace, tmp_path: Path) -> None:
    mark = tmp_path / "still-alive"
    fake.package(
        "hangs",
        f"""
        import subprocess
        subprocess.Popen(["sh", "-c", "sleep 3; touch {mark}"])
        print("waiting for nothing", flush=True)
        time.sleep(60)
        """,
    )
    start = time.monotonic()
    assert run(fake, "--timeout", "1") == 70
    assert time.monotonic() - start < 10
    assert outcomes(fake)["hangs"].reason == "stopped at its time limit of 1 s"
    assert "waiting for nothing" in (fake.root / "runs" / "hangs" / "prove.log").read_text()
    time.sleep(max(0.0, 3.5 - (time.monotonic() - start)))
    assert not mark.exists()


def test_a_child_left_behind_does_not_hold_up_the_run(fake: FakeWorkspace) -> None:
    before = "import subprocess; subprocess.Popen(['sleep', '30'])"
    fake.proving("leaves", proof("leaves"), 0, before)
    start = time.monotonic()
    assert run(fake) == 0
    assert time.monotonic() - start < 10


def test_a_command_that_is_not_installed_crashes_with_its_name(fake: FakeWorkspace) -> None:
    fake.add_folder("packages/absent", "absent", "absent", "absent-command")
    assert run(fake) == 70
    assert "cannot start absent-command" in outcomes(fake)["absent"].reason


def test_quick_and_out_reach_the_command(fake: FakeWorkspace) -> None:
    fake.package("one", "(out / 'argv.json').write_text(json.dumps(argv))")
    run(fake, "--quick")
    argv = json.loads((fake.root / "runs" / "one" / "argv.json").read_text())
    assert argv == ["prove", "--out", str(fake.root / "runs" / "one"), "--quick"]


def test_one_package_alone_keeps_the_others_in_the_report(fake: FakeWorkspace) -> None:
    fake.proving("one", proof("one", holds=False), 1)
    fake.proving("two", proof("two"), 0)
    run(fake)
    assert run(fake, "--package", "two") == 0
    assert list(outcomes(fake)) == ["one", "two"]
    assert json.loads((fake.root / "runs" / "summary.json").read_text())["exit_code"] == 0


def test_a_package_without_a_proof_is_named_and_left_out(
    fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.proving("one", proof("one"), 0)
    fake.package("two", "sys.exit(2)")
    (fake.root / "packages" / "two" / "src" / "two" / "proof.py").unlink()
    assert run(fake) == 0
    assert list(outcomes(fake)) == ["one"]
    assert "two  under construction: it has no proof yet" in capsys.readouterr().out


def test_an_unknown_package_gives_2_and_the_names(
    fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.proving("one", proof("one"), 0)
    assert run(fake, "--package", "tow") == 2
    assert capsys.readouterr().err == "error: no package is named 'tow'; packages here: one\n"


def test_a_workspace_without_packages_gives_2(
    fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fake) == 2
    assert "holds no package yet" in capsys.readouterr().err


def test_the_childs_table_is_shown_and_its_progress_is_not(
    fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = r"print('claim | holds'); sys.stderr.write('10 %\r50 %\r100 %\n')"
    fake.proving("one", proof("one"), 0, noise)
    run(fake)
    out = capsys.readouterr().out
    assert "claim | holds" in out
    assert "50 %" not in out
    log = (fake.root / "runs" / "one" / "prove.log").read_text()
    assert sorted(log.split()) == ["%", "100", "claim", "holds", "|"]


def test_numbers_must_be_the_same_the_second_time_but_for_what_is_measured(
    fake: FakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = [{"name": "accuracy", "measured": True}]
    drifting = "a['methods']['{0}']['accuracy'] = [time.time(), 0.8]"
    for name, declared, change in (
        ("steady", [], ""),
        ("drifts", [], drifting.format("drifts")),
        ("measured", measured, drifting.format("measured")),
    ):
        script = (
            f"a = {proof(name, metrics=declared)!r}\n{change}\n(out / 'proof.json').write_text(json.dumps(a))"
        )
        fake.package(name, script)
    assert run(fake) == 0
    assert run(fake, "--again") == 70
    assert {name: one.status for name, one in outcomes(fake).items()} == {
        "drifts": "crashed", "measured": "holds", "steady": "holds",
    }  # fmt: skip
    assert "1 numbers are others in a second run: drifts, accuracy: [" in outcomes(fake)["drifts"].reason
    assert capsys.readouterr().out.count("the second run gave the same numbers") == 2
