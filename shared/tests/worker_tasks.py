"""Tasks for workers, which import them by name."""

import contextlib
import os
import tempfile
import time
from pathlib import Path


def tidy(seconds):
    """Work with a temporary file."""
    with tempfile.NamedTemporaryFile(dir="."):
        time.sleep(seconds)


def deaf(seconds):
    """Do not heed that the process is to end."""
    with contextlib.suppress(BaseException):
        tidy(seconds)
    Path(f"deaf-{os.getpid()}").touch()
    time.sleep(seconds)
