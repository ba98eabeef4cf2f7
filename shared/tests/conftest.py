import sys
from pathlib import Path

from hypothesis import settings
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))  # worker_tasks.py stands beside the tests

# Shapes and types that annotations state are checked in every call. Installed before any test imports it.
install_import_hook("shared_core", "beartype.beartype")

# The machines that run the tests are shared and slow at times: no law here is about speed.
settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("house")
