from __future__ import annotations

import json
import pickle
import threading

import pytest

from rlogist.ledger import ReadLedger, Tally
from shared_core import InputError


def filled() -> ReadLedger:
    ledger = ReadLedger()
    ledger.record("scan", 3, Tally(10, 1000, 0.5))
    ledger.record("deep", 1, Tally(2, 400, 0.25))
    ledger.record("prefetch", 1, Tally(1, 200, 0.25))
    ledger.note("region 7 is damaged")
    return ledger


def test_sums_by_purpose_and_by_level():
    ledger = filled()
    assert ledger.total() == Tally(13, 1600, 1.0)
    assert ledger.total("deep", "prefetch") == Tally(3, 600, 0.5)
    assert ledger.levels() == {1: Tally(3, 600, 0.5), 3: Tally(10, 1000, 0.5)}


def test_what_was_read_since_a_copy():
    ledger = filled()
    before = ledger.copy()
    ledger.record("deep", 1, Tally(3, 600, 0.5))
    ledger.note("another")
    later = ledger.since(before)
    assert later.entries() == {("deep", 1): Tally(3, 600, 0.5)}
    assert later.notes == ["another"]
    assert before.total("deep").reads == 2  # the copy stays


def test_json_and_processes_keep_it():
    for other in (
        ReadLedger.from_dict(json.loads(json.dumps(filled().to_dict()))),
        pickle.loads(pickle.dumps(filled())),
    ):
        assert other.entries() == filled().entries()
        assert other.notes == filled().notes


def test_a_read_that_fails_is_counted():
    ledger = ReadLedger()
    with pytest.raises(OSError, match="broken"), ledger.reading("deep", 0, 8, 4):
        raise OSError("broken")
    assert (ledger.total().reads, ledger.total().pixels) == (1, 32)


def test_threads_lose_no_read():
    ledger = ReadLedger()

    def read():
        for _ in range(500):
            with ledger.reading("prefetch", 0, 2, 2):
                pass

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.total().pixels == 4 * 500 * 4


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({}, "expected a ledger with lists"),
        ({"reads": [{"purpose": "deep"}]}, "expected purpose, level, reads"),
        (
            {"reads": [{"purpose": "fun", "level": 0, "reads": 1, "pixels": 1, "seconds": 1}]},
            "expected one of segment",
        ),
    ],
)
def test_what_is_no_ledger_is_refused(stored, words):
    with pytest.raises(InputError, match=words):
        ReadLedger.from_dict(stored)
