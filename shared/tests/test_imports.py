import json
import os
import re
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "torchvision",
    "torchmetrics",
    "datasets",
    "pandas",
    "matplotlib",
    "sklearn",
    "skimage",
    "PIL",
}


def imported_by(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize("module", ["", ".command", ".files", ".proof", ".plot", ".wheels", ".datasets"])
def test_importing_is_cheap(module):
    assert not imported_by(f"import shared_core{module}") & HEAVY


@pytest.mark.parametrize(
    ("blocked", "statement", "extra"),
    [
        ("datasets", "from shared_core.datasets import digits; digits()", "vision"),
        ("datasets", "from shared_core.datasets import image_folder; image_folder('.')", "vision"),
        ("torch", "import shared_core.metrics", "torch"),
        ("matplotlib", "from shared_core.plot import figure; figure()", "plot"),
    ],
)
def test_without_an_extra_the_error_says_what_to_install(tmp_path, blocked, statement, extra):
    # None in sys.modules makes an import fail as if the module were not installed.
    code = f"""
import sys
sys.modules["{blocked}"] = None
from shared_core import InputError
try:
    {statement}
except InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    end = re.escape(f" is not installed: pip install 'shared-core[{extra}]'")
    assert re.fullmatch(rf"{blocked}[\w.]*{end}\n", done.stdout)


def test_the_types_are_shipped():
    import shared_core

    assert os.path.isfile(os.path.join(os.path.dirname(shared_core.__file__), "py.typed"))
