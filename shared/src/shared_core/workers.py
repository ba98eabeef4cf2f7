"""What the workers of a process pool do first: one thread each, and no life after their parent's."""

import multiprocessing
import os
from multiprocessing.connection import wait
from threading import Thread


def end_with_parent() -> None:
    """End this process when the one that made it ends, however that comes about; else nothing.

    A pool that is closed ends its workers. One whose process is killed does not: its workers would go on
    with what they have begun.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, name="end_with_parent", daemon=True).start()


def one_thread() -> None:
    """Start a worker that has one core: torch uses one thread, and the worker ends with its parent."""
    import torch

    torch.set_num_threads(1)
    end_with_parent()
