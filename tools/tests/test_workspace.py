import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tools import workspace
from tools.tests.conftest import FakeWorkspace


@pytest.fixture
def three(fake: FakeWorkspace) -> Path:
    fake.add_folder("packages/csq", "csq-quant", "csq", "csq")
    fake.add_folder("packages/lead-kd", "lead-kd", "lead_kd", "lead-kd")
    return fake.root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def committed(three: Path) -> Path:
    git(three, "init", "-q")
    git(three, "add", ".")
    git(three, "commit", "-qm", "first")
    return three


def names(members: list[workspace.Member]) -> list[str]:
    return [member.name for member in members]


def test_members_are_found_by_their_folders(three: Path) -> None:
    assert names(workspace.discover(three)) == ["shared", "csq", "lead-kd"]
    csq = workspace.discover(three)[1]
    assert (csq.distribution, csq.import_name, csq.command) == ("csq-quant", "csq", "csq")
    (three / "packages" / "notes").mkdir()
    assert names(workspace.packages(three)) == ["csq", "lead-kd"]


@pytest.mark.parametrize("name", ["csq", "csq-quant"])
def test_a_package_goes_by_folder_or_distribution(three: Path, name: str) -> None:
    assert names(workspace.packages(three, name)) == ["csq"]


@pytest.mark.parametrize(("text", "message"), [("[project]\n", "'name'"), ("[project", "not a member's")])
def test_a_bad_pyproject_is_named(three: Path, text: str, message: str) -> None:
    (three / "packages" / "csq" / "pyproject.toml").write_text(text)
    with pytest.raises(workspace.WorkspaceError, match=message):
        workspace.discover(three)


def test_two_import_packages_are_refused(three: Path) -> None:
    extra = three / "packages" / "csq" / "src" / "extra"
    extra.mkdir()
    (extra / "__init__.py").touch()
    with pytest.raises(workspace.WorkspaceError, match="expected one import package, found csq, extra"):
        workspace.discover(three)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["packages/csq/src/csq/cli.py"], ["csq"]),
        (["packages/csq/README.md", "packages/lead-kd/pyproject.toml"], ["csq", "lead-kd"]),
        (["shared/src/shared_core/files.py"], ["shared", "csq", "lead-kd"]),
        (["ci/test-package.sh"], ["shared", "csq", "lead-kd"]),
        (["constraints.txt"], ["shared", "csq", "lead-kd"]),
        (["pyproject.toml"], ["shared", "csq", "lead-kd"]),
        ([".github/workflows/ci.yml"], ["shared", "csq", "lead-kd"]),
        (["README.md", "tools/report.py", "packages/gone/x.py"], []),
        (["packages/csq-old/x.py", "docs/shared/x"], []),
        ([], []),
    ],
)
def test_a_change_touches(three: Path, files: list[str], expected: list[str]) -> None:
    assert names(workspace.touched(files, three)) == expected


def test_affected_sees_commits_edits_new_files_and_both_ends_of_a_move(committed: Path) -> None:
    base = git(committed, "rev-parse", "HEAD")
    assert workspace.affected(base, committed) == []
    new = committed / "packages" / "csq" / "näme with space.txt"
    new.write_text("x" * 200)
    assert names(workspace.affected(base, committed)) == ["csq"]
    git(committed, "add", ".")
    git(committed, "commit", "-qm", "second")
    assert names(workspace.affected(base, committed)) == ["csq"]
    after = git(committed, "rev-parse", "HEAD")
    git(committed, "mv", str(new), "packages/lead-kd/moved.txt")
    assert names(workspace.affected(after, committed)) == ["csq", "lead-kd"]


def test_changes_on_the_base_branch_do_not_count(committed: Path) -> None:
    git(committed, "checkout", "-qb", "feature")
    (committed / "packages" / "csq" / "new.txt").touch()
    git(committed, "add", ".")
    git(committed, "commit", "-qm", "feature")
    git(committed, "checkout", "-qb", "trunk", "HEAD~1")
    (committed / "packages" / "lead-kd" / "new.txt").touch()
    git(committed, "add", ".")
    git(committed, "commit", "-qm", "trunk")
    git(committed, "checkout", "-q", "feature")
    assert names(workspace.affected("trunk", committed)) == ["csq"]


@pytest.mark.parametrize("base", ["0" * 40, "no-such-branch", ""])
def test_an_unknown_base_touches_all(committed: Path, base: str) -> None:
    assert names(workspace.affected(base, committed)) == ["shared", "csq", "lead-kd"]


def test_the_matrix_is_json_for_the_workflow(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.main(["--root", str(committed), "affected", "--base", "0" * 40]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "package": ["shared", "csq", "lead-kd"],
        "python": ["3.11", "3.12", "3.13"],
    }
    assert workspace.main(["--root", str(committed), "affected", "--base", "HEAD"]) == 0
    # The workflow looks for this very text to skip the package jobs.
    assert '"package": []' in capsys.readouterr().out


def test_setup_installs_every_extra_or_all_where_a_member_has_it(three: Path) -> None:
    file = three / "packages" / "csq" / "pyproject.toml"
    file.write_text(file.read_text() + 'all = ["csq-quant[onnx]"]\n')
    assert workspace.requirements(three) == [
        "ruff>=0.12",
        f"-e {three}/shared[test,onnx]",
        f"-e {three}/packages/csq[all,test]",
        f"-e {three}/packages/lead-kd[test,onnx]",
    ]


def test_facts_can_be_read_by_a_shell(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.main(["--root", str(three), "facts", "csq"]) == 0
    facts = dict(part.split("=", 1) for part in shlex.split(capsys.readouterr().out))
    assert facts == {"folder": f"{three}/packages/csq", "distribution": "csq-quant", "import_name": "csq"}


def test_an_unknown_member_gives_2_and_one_line(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.main(["--root", str(three), "facts", "cqs"]) == 2
    assert (
        capsys.readouterr().err == "error: no package is named 'cqs'; packages here: shared, csq, lead-kd\n"
    )
