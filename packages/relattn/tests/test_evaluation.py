"""Evaluations append what is finished, survive being killed, and go on to the same result."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from relattn.evaluation import evaluate, read_results, report
from relattn.examples import Example, MethodSummary
from shared_core import InputError

EXAMPLES = [Example(f"e{n}", f"d{n // 2}", f"text number {n}", (f"w{n}",), f"about w{n}") for n in range(7)]


def echo(documents, controls):
    return [MethodSummary(f"{c[0]} of {d}", 0.5) for d, c in zip(documents, controls, strict=True)]


def without_time(lines):
    return [{**vars(line), "seconds": None} for line in lines]


def test_a_killed_run_resumes_to_the_result_of_an_uninterrupted_one(tmp_path: Path):
    killed = tmp_path / "killed.jsonl"
    child = os.fork()
    if child == 0:
        try:
            calls = iter(range(3))

            def dies(documents, controls):
                if next(calls) == 2:
                    with killed.open("a") as file:
                        file.write('{"id": "e4", "summ')  # a line cut short, as a kill leaves it
                    os.kill(os.getpid(), signal.SIGKILL)
                return echo(documents, controls)

            evaluate(EXAMPLES, dies, killed, {"model": "m"}, batch_size=2)
        finally:
            os._exit(1)  # reached only if it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [json.loads(line)["id"] for line in killed.read_text().splitlines()[:-1]] == [
        "e0",
        "e1",
        "e2",
        "e3",
    ]
    asked: list[str] = []

    def watched(documents, controls):
        asked.extend(documents)
        return echo(documents, controls)

    resumed = evaluate(EXAMPLES, watched, killed, {"model": "m"}, batch_size=2, resume=True)
    assert asked == [e.document for e in EXAMPLES[4:]]  # nothing is done twice
    whole = evaluate(EXAMPLES, echo, tmp_path / "whole.jsonl", {"model": "m"}, batch_size=2)
    assert without_time(resumed) == without_time(whole) == without_time(read_results(killed))
    assert report(resumed) == report(whole)


def test_each_batch_is_on_disk_before_the_next_begins(tmp_path: Path):
    file, seen = tmp_path / "r.jsonl", []

    def watched(documents, controls):
        seen.append(len(file.read_text().splitlines()))
        return echo(documents, controls)

    counts: list[int] = []
    evaluate(EXAMPLES, watched, file, {}, batch_size=3, on_done=counts.append)
    assert seen == [0, 3, 6]
    assert counts == [0, 3, 6, 7]


def test_results_come_in_the_order_of_the_examples(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    evaluate(EXAMPLES[3:5], echo, file, {})
    found = evaluate(EXAMPLES, echo, file, {}, resume=True)
    assert [line.id for line in found] == [e.id for e in EXAMPLES]


def test_a_file_is_not_overwritten_and_other_settings_do_not_mix(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    evaluate(EXAMPLES[:1], echo, file, {"model": "m", "weight": 0.1})
    with pytest.raises(InputError, match=r"r.jsonl: is there already: give --resume"):
        evaluate(EXAMPLES, echo, file, {"model": "m", "weight": 0.1})
    with pytest.raises(InputError, match=r"was written with other settings \(weight\)"):
        evaluate(EXAMPLES, echo, file, {"model": "m", "weight": 0.2}, resume=True)
    assert len(read_results(file)) == 1


@pytest.mark.parametrize(
    "change",
    [{"document": "new"}, {"control": ("new",)}, {"summary": "new"}, {"other_summaries": ("new",)},
     {"document_id": "new"}],
)  # fmt: skip
def test_resuming_about_other_data_of_the_same_ids_is_refused(tmp_path: Path, change):
    file = tmp_path / "r.jsonl"
    evaluate(EXAMPLES[:3], echo, file, {"model": "m"})
    before = file.read_text()
    changed = [EXAMPLES[0], replace(EXAMPLES[1], **change), *EXAMPLES[2:]]
    with pytest.raises(InputError, match=r"r.jsonl: was written about other data: the example 'e1' has"):
        evaluate(changed, echo, file, {"model": "m"}, resume=True)
    assert file.read_text() == before


def test_damage_inside_the_file_is_an_error_and_not_skipped(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    evaluate(EXAMPLES[:2], echo, file, {})
    first, second = file.read_text().splitlines()
    file.write_text(f"{first[:20]}\n{second}\n")
    with pytest.raises(InputError, match=r"r.jsonl: line 1: is not a line of an evaluation"):
        evaluate(EXAMPLES, echo, file, {}, resume=True)
    assert os.path.getsize(file) == len(first[:20]) + len(second) + 2  # left as it was


def test_scores_do_not_depend_on_the_batch(tmp_path: Path):
    first, second = (
        evaluate(EXAMPLES, echo, tmp_path / f"{size}.jsonl", {}, batch_size=size) for size in (1, 7)
    )
    assert without_time(first) == without_time(second)
    with pytest.raises(InputError, match="expected 1 or more"):
        evaluate(EXAMPLES, echo, tmp_path / "x.jsonl", {}, batch_size=0)


def test_references_reach_the_scores_only(tmp_path: Path):
    # the method is given documents and controls: other references change scores, never summaries
    changed = [Example(e.id, e.document_id, e.document, e.control, "something else") for e in EXAMPLES]
    first = evaluate(EXAMPLES, echo, tmp_path / "a.jsonl", {})
    second = evaluate(changed, echo, tmp_path / "b.jsonl", {})
    assert [line.summary for line in first] == [line.summary for line in second]
    assert first[0].scores["rouge1"] != second[0].scores["rouge1"]
