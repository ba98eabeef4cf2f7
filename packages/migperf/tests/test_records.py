"""Records survive a kill, say what is simulated, and do not mix it with what was measured."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from made_records import record

from migperf.latency import summarize
from migperf.records import SCHEMA, Writer, finished, raw_latencies, read, to_line, write_csv
from shared_core import InputError


def cell(name="a", repeat=0, workers=2, **changes):
    return [
        replace(record(**changes), cell=name, repeat=repeat, worker=w, workers=workers)
        for w in range(workers)
    ]


def test_what_is_written_is_read_back(tmp_path):
    made = cell(
        latency_interval_ms={"p50": (9.5, 10.5)},
        energy_joules=3.5,
        extra={"phases_ms": {"data": {"mean": 1.0}}},
    )
    writer = Writer(tmp_path, simulated=False)
    writer.append(made)
    assert read(tmp_path) == made
    assert json.loads(writer.path.read_text().splitlines()[0])["schema"] == SCHEMA


def test_a_torn_last_line_is_tolerated_and_its_cell_measured_again(tmp_path):
    writer = Writer(tmp_path, simulated=False)
    writer.append(cell("a"))
    text = "".join(to_line(one) for one in cell("b"))
    with open(writer.path, "a") as file:
        file.write(text[: len(text) - 40])
    assert [one.cell for one in read(tmp_path)] == ["a", "a", "b"]
    again = Writer(tmp_path, simulated=False)
    assert again.finished == {("a", 0)}  # of b one worker's record is there, the other's is not
    again.append(cell("b"))
    assert Writer(tmp_path, simulated=False).finished == {("a", 0), ("b", 0)}


def test_a_lost_newline_loses_no_record(tmp_path):
    writer = Writer(tmp_path, simulated=False)
    writer.append(cell("a"))
    writer.path.write_text(writer.path.read_text().rstrip("\n"))
    again = Writer(tmp_path, simulated=False)
    again.append(cell("b"))
    assert len(read(tmp_path)) == 4


def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path):
    writer = Writer(tmp_path, simulated=False)
    writer.append(cell("a"))
    writer.path.write_text("{broken\n" + writer.path.read_text())
    with pytest.raises(InputError, match="line 1 is no JSON"):
        read(tmp_path)


def test_another_schema_is_refused_and_a_later_field_is_not(tmp_path):
    path = tmp_path / "records.jsonl"
    values = json.loads(to_line(record()))
    path.write_text(json.dumps({**values, "later": 1}) + "\n")
    assert len(read(path)) == 1
    path.write_text(json.dumps({**values, "schema": 99}) + "\n")
    with pytest.raises(InputError, match=r"line 1: expected schema 1"):
        read(path)
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "cell"}) + "\n")
    with pytest.raises(InputError, match=r"is no record: .*cell"):
        read(path)


def test_simulated_records_have_a_file_of_their_own_and_are_not_mixed_unless_asked(tmp_path):
    writer = Writer(tmp_path, simulated=True)
    assert writer.path.name == "records.simulated.jsonl"
    writer.append(cell(simulated=True))
    with pytest.raises(InputError, match="not mixed unless asked"):
        writer.append(cell(simulated=False))
    Writer(tmp_path, simulated=False).append(cell(simulated=False))
    with pytest.raises(InputError, match="not mixed unless asked"):
        read(tmp_path)
    assert len(read(tmp_path, mixed=True)) == 4
    assert all(json.loads(line)["simulated"] for line in writer.path.read_text().splitlines())


def test_a_file_that_holds_the_other_kind_is_not_added_to(tmp_path):
    (tmp_path / "records.jsonl").write_text(to_line(record(simulated=True)))
    with pytest.raises(InputError, match="not mixed"):
        Writer(tmp_path, simulated=False)


def test_a_folder_that_cannot_be_written_is_known_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        Writer(tmp_path / "file" / "out", simulated=False)


def test_a_folder_without_records_says_what_it_should_have(tmp_path):
    with pytest.raises(InputError, match=r"has no records\.jsonl"):
        read(tmp_path)


def test_raw_latencies_stand_beside_the_records_and_pool(tmp_path):
    made = [replace(one, raw=f"raw/{one.worker}.npy") for one in cell()]
    raws = {"raw/0.npy": np.full(300, 1_000_000), "raw/1.npy": np.full(100, 9_000_000)}
    Writer(tmp_path, simulated=False).append(made, raws)
    pooled = raw_latencies(read(tmp_path), tmp_path)
    assert summarize(pooled).ms["p50"] == 1.0
    assert summarize(pooled).ms["p90"] == 9.0
    (tmp_path / "raw/1.npy").unlink()
    with pytest.raises(InputError, match=r"1\.npy: cannot be read"):
        raw_latencies(read(tmp_path), tmp_path)


def test_a_cell_is_finished_when_each_of_its_workers_is():
    assert finished(cell("a")[:1]) == set()
    assert finished([*cell("a"), *cell("a", 1)[1:]]) == {("a", 0)}


def test_the_csv_has_a_column_for_each_nested_number(tmp_path):
    write_csv([*cell(), replace(record(), metrics={"core_share": 0.99})], tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["latency_ms.p99"] for row in rows] == ["10.0"] * 3
    assert rows[2]["metrics.core_share"] == "0.99"
    assert rows[0]["simulated"] == "False"
