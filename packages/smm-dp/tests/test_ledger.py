import json
import subprocess
import sys

import pytest

from shared_core import InputError
from smm_dp import RoundPrivacy
from smm_dp.ledger import BudgetExceeded, PrivacyLedger
from smm_dp.rdp import to_epsilon

KIND = RoundPrivacy(4096.0, 240 * 5.95, 4, sampling_rate=0.004)


def test_the_budget_stops_the_release_before_it_is_made(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger.json", 3.0, 1e-5, KIND)
    ledger.charge(1000)
    assert 2.99 < ledger.spent().epsilon <= 3.0
    before = (tmp_path / "ledger.json").read_text()
    with pytest.raises(
        BudgetExceeded, match=r"stopped before release 1001: epsilon would be 3\.\d+, the budget is 3"
    ):
        ledger.charge(2)
    assert ledger.rounds == 1000
    assert (tmp_path / "ledger.json").read_text() == before


def test_a_resumed_ledger_remembers_everything(tmp_path):
    path = tmp_path / "ledger.json"
    PrivacyLedger(path, 3.0, 1e-5, KIND).charge(400)
    again = PrivacyLedger(path, 3.0, 1e-5, KIND)
    assert again.rounds == 400
    again.charge(600)
    assert round(again.spent().epsilon, 6) == 2.998798
    with pytest.raises(BudgetExceeded):
        PrivacyLedger(path, 3.0, 1e-5, KIND).charge(2)


def test_the_file_is_written_before_charge_returns(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = PrivacyLedger(path, 3.0, 1e-5, KIND)
    for expected in (1, 2, 3):
        ledger.charge()
        assert json.loads(path.read_text())["history"][0]["rounds"] == expected


@pytest.mark.parametrize(
    ("epsilon", "delta", "kind", "field"),
    [
        (4.0, 1e-5, KIND, "epsilon"),
        (3.0, 1e-6, KIND, "delta"),
        (3.0, 1e-5, RoundPrivacy(4096.0, 1500.0, 4, sampling_rate=0.004), "round"),
    ],
)
def test_resuming_with_other_parameters_is_refused(tmp_path, epsilon, delta, kind, field):
    path = tmp_path / "ledger.json"
    PrivacyLedger(path, 3.0, 1e-5, KIND).charge()
    with pytest.raises(InputError, match=f"{field}: the ledger was made for"):
        PrivacyLedger(path, epsilon, delta, kind)


def test_files_that_are_no_ledger_are_refused(tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text("{")
    with pytest.raises(InputError, match="not a privacy ledger"):
        PrivacyLedger(path, 3.0, 1e-5, KIND)
    path.write_text("{}")
    with pytest.raises(InputError, match="no history"):
        PrivacyLedger(path, 3.0, 1e-5, KIND)


def test_a_ledger_in_memory():
    ledger = PrivacyLedger(None, 3.0, 1e-5, KIND)
    assert ledger.spent().epsilon == 0
    ledger.charge()
    assert ledger.rounds == 1


ONE = RoundPrivacy(100.0, 200.0, 1)
ONE_RELEASE = 1.05 * to_epsilon(range(2, 9), ONE.rdp(8), 1e-5).epsilon  # covers one, and not two


def test_a_budget_for_one_release_permits_one_whichever_ledger_of_the_file_charges(tmp_path):
    path = tmp_path / "ledger.json"
    first, second = (PrivacyLedger(path, ONE_RELEASE, 1e-5, ONE) for _ in range(2))
    assert first.rounds == second.rounds == 0
    first.charge()
    with pytest.raises(BudgetExceeded, match="stopped before release 2"):
        second.charge()
    assert second.rounds == 1  # read afresh, though it was opened before
    assert json.loads(path.read_text())["history"][0]["rounds"] == 1


def test_each_of_two_ledgers_of_a_file_adds_to_what_the_other_charged(tmp_path):
    path = tmp_path / "ledger.json"
    first, second = (PrivacyLedger(path, 3.0, 1e-5, KIND) for _ in range(2))
    for ledger, expected in ((first, 1), (second, 2), (first, 3)):
        ledger.charge()
        assert ledger.rounds == expected
    assert PrivacyLedger(path, 3.0, 1e-5, KIND).rounds == 3


def test_of_two_processes_that_race_for_the_last_release_one_is_stopped(tmp_path):
    """Each dawdles between reading the file and writing it: without the lock both would be let through."""
    code = f"""
import time
import smm_dp.ledger as module
from smm_dp import RoundPrivacy
write = module.write_json
def dawdle(*arguments):
    time.sleep(0.4)
    write(*arguments)
module.write_json = dawdle
ledger = module.PrivacyLedger({str(tmp_path / "ledger.json")!r}, {ONE_RELEASE}, 1e-5, {ONE!r})
print("ready", flush=True)
input()
try:
    ledger.charge()
except module.BudgetExceeded:
    print("stopped")
else:
    print("charged")
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert sorted(racer.communicate()[0] for racer in racers) == ["charged\n", "stopped\n"]
    assert PrivacyLedger(tmp_path / "ledger.json", ONE_RELEASE, 1e-5, ONE).rounds == 1


def test_a_ledger_that_cannot_be_locked_permits_nothing(tmp_path):
    ledger = PrivacyLedger(tmp_path / "missing" / "ledger.json", 3.0, 1e-5, KIND)
    with pytest.raises(InputError, match="cannot be locked"):
        ledger.charge()
    assert ledger.rounds == 0
