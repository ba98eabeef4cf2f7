"""Settings that hang on the role, the backbone or the number of classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees

from kdcicam.runs import TrainingRun, build_model, flagged, resumed
from kdcicam.settings import ROLES, Settings, settings_from
from shared_core import InputError


def test_the_image_size_is_the_backbones_own_unless_asked(tmp_path: Path):
    data = str(trees.class_folders(tmp_path / "data", train=1, test=1))
    for backbone, given, side in (
        ("inception_v3", {}, 299),
        ("vgg16", {}, 224),
        ("vgg16", {"image_size": 64}, 64),
    ):
        asked = settings_from(None, {"role": "cls", "backbone": backbone, "data": data, **given})
        run, images = TrainingRun.begin(tmp_path / f"{backbone}{side}", asked)
        assert run.settings.image_size == side
        assert flagged(asked, images)[0, 0][0].shape == (3, side, side)
        assert resumed(asked, run.folder) == run
    assert build_model(Settings("ci-cam", backbone="inception_v3"), 3).image_size == 299


@pytest.mark.parametrize("role", [role for role in ROLES if role not in ("cls", "loc")])
def test_an_auxiliary_loss_is_for_teachers(role):
    for auxiliary in ("fore", "diff_aux"):
        words = (
            rf"auxiliary: is for the roles cls and loc: {role} has no auxiliary loss \(got '{auxiliary}'\)"
        )
        with pytest.raises(InputError, match=words):
            settings_from(None, {"role": role, "auxiliary": auxiliary})
    assert settings_from(None, {"role": role}).auxiliary == "none"


@pytest.mark.parametrize("combine", ["quadratic", "sum_1"])
def test_more_last_classes_than_there_are_is_refused(combine):
    small = {"backbone": "tiny:backbone", "image_size": 24, "combine": combine}
    with pytest.raises(InputError, match=r"last: expected 1 to the 3 classes \(got 4\)"):
        build_model(Settings("ci-cam", last=4, **small), 3)
    assert build_model(Settings("ci-cam", last=2, **small), 3).last == 2
    assert build_model(Settings("ci-cam", **small), 3).last == 3
    assert build_model(Settings("ci-cam", **small), 25).last == 20
