import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core import InputError
from shared_core.errors import TrainingDiverged, needs_extra


def test_names_file_field_and_value_in_this_order():
    error = InputError("expected 2 to 8", file=Path("run.toml"), field="bits", value=9)
    assert str(error) == "run.toml: bits: expected 2 to 8 (got 9)"
    assert (error.file, error.field, error.value) == ("run.toml", "bits", 9)


def test_names_only_what_is_given_and_none_is_a_value():
    assert str(InputError("expected an image")) == "expected an image"
    assert str(InputError("expected a number", field="lr", value=None)) == "lr: expected a number (got None)"


@given(st.text(), st.text(), st.text(), st.text())
def test_is_always_one_line(message, file, field, value):
    assert len(str(InputError(message, file=file, field=field, value=value)).splitlines()) <= 1


def test_a_huge_value_is_cut():
    assert len(str(InputError("expected a name", value="x" * 10_000))) < 150


def test_is_a_value_error_and_survives_another_process():
    error = InputError("expected 2 to 8", file="a", field="b")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ValueError)
    assert str(again) == str(error) == "a: b: expected 2 to 8"


def test_a_diverged_training_names_the_checkpoint_that_is_there_and_survives_another_process(tmp_path):
    file = tmp_path / "checkpoint"
    assert "checkpoint" not in str(TrainingDiverged.at("the loss is nan at step 6", 0.1, file))
    file.touch()
    error = TrainingDiverged.at("the loss is nan at step 6", 0.1, file)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, TrainingDiverged)
    assert str(again) == str(error)
    assert str(error).endswith(f"try a lower learning rate; the last checkpoint is {file} (got 0.1)")
    assert (again.field, again.value) == ("lr", 0.1)


def test_a_missing_module_becomes_the_command_that_installs_it():
    with pytest.raises(InputError, match=r"not_there is not installed: pip install 'shared-core\[vision\]'"):  # noqa: SIM117 one error, raised inside
        with needs_extra("vision"):
            import not_there  # noqa: F401  # pyright: ignore[reportMissingImports]


def test_a_module_of_ours_that_is_missing_stays_a_fault():
    with pytest.raises(ModuleNotFoundError), needs_extra("vision"):
        import shared_core.not_there  # noqa: F401  # pyright: ignore[reportMissingImports]
