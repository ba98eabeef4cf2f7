import json

import pytest

from shared_core import InputError
from smm_dp import RoundPrivacy
from smm_dp.ledger import BudgetExceeded, PrivacyLedger

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
