import os
import stat
import sys
import textwrap
from pathlib import Path

import pytest

PYPROJECT = """
[project]
name = "{distribution}"
version = "0.1.0"
[project.scripts]
{command} = "{module}.cli:main"
[project.optional-dependencies]
test = ["pytest"]
onnx = ["onnx"]
"""


class FakeWorkspace:
    """A workspace of packages whose commands are small scripts on PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir(parents=True)
        (root / "pyproject.toml").write_text('[dependency-groups]\ndev = ["ruff>=0.12"]\n')
        self.add_folder("shared", "shared-core", "shared_core", "unused")

    def add_folder(self, folder: str, distribution: str, module: str, command: str) -> Path:
        path = self.root / folder
        (path / "src" / module).mkdir(parents=True)
        (path / "src" / module / "__init__.py").touch()
        (path / "src" / module / "proof.py").touch()
        text = PYPROJECT.format(distribution=distribution, module=module, command=command)
        (path / "pyproject.toml").write_text(text)
        return path

    def package(self, name: str, script: str) -> Path:
        """A package whose command runs ``script`` (Python) with ``out``, the proof's folder, and ``argv``."""
        module = name.replace("-", "_")
        path = self.add_folder(f"packages/{name}", name, module, name)
        command = self.bin / name
        command.write_text(
            f"#!{sys.executable}\n"
            "import json, pathlib, sys, time\n"
            "argv = sys.argv[1:]\n"
            "out = pathlib.Path(argv[argv.index('--out') + 1])\n"
            "out.mkdir(parents=True, exist_ok=True)\n" + textwrap.dedent(script)
        )
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        return path

    def proving(self, name: str, proof: object, code: int, before: str = "") -> None:
        """A package whose proof writes ``proof`` as JSON and exits with ``code``."""
        script = f"{before}\n(out / 'proof.json').write_text(json.dumps({proof!r}))\nsys.exit({code})\n"
        self.package(name, script)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWorkspace:
    workspace = FakeWorkspace(tmp_path / "repository")
    monkeypatch.setenv("PATH", f"{workspace.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "120")
    return workspace


def proof(package: str, **changes: object) -> dict[str, object]:
    """A whole proof.json of a method that beats its baseline in both seeds, with ``changes``."""
    whole: dict[str, object] = {
        "package": package,
        "version": "0.1.0",
        "claim": "The method is more accurate than the baseline.",
        "source": "A paper, 2023",
        "data": "16 photographs",
        "rule": "accuracy above the baseline's in every seed",
        "holds": True,
        "seeds": [0, 1],
        "methods": {package: {"accuracy": [0.9, 0.8]}, "baseline": {"accuracy": [0.5, 0.6]}},
        "wall_seconds": 1.5,
        "peak_memory_bytes": 3 * 2**20,
        "versions": {"python": "3.11.7"},
        "quick": False,
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}
