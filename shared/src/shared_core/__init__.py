"""The thin core that the method packages share.

Importing it is cheap: torch, datasets and matplotlib are imported by the functions that need them.
"""

from shared_core.errors import InputError

__all__ = ["InputError"]
