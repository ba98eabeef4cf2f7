from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from feature_worlds import architecture
from generated_slides import lossless, tissue_picture, tissue_slide

from rlogist.model import RLogist
from rlogist.ppo import PPOSettings
from rlogist.report import write_report
from rlogist.slides import OneLevelWarning, Slide
from rlogist.sources import Bag, SlideSource
from rlogist.staged import StagedSettings


@pytest.fixture(scope="module")
def model() -> RLogist:
    g = torch.Generator().manual_seed(0)
    made = [Bag(torch.randn(9, 36, generator=g), torch.randn(9, 4, 36, generator=g), i % 2) for i in range(4)]
    settings = StagedSettings(epochs=1, batch=4, global_epochs=1, mixed_epochs=1)
    own = RLogist("stain", rho=0.2, architecture=architecture(dim=36), classes=["a", "<b>"])
    return own.fit(made, staged=settings, ppo=PPOSettings(steps=16, n_envs=4, n_steps=4))


def test_the_page_has_everything_and_needs_nothing_from_elsewhere(model, tmp_path: Path):
    with Slide(tissue_slide(tmp_path / "a & b.tif"), patch=32) as slide:
        found = model.predict(slide)
        whole = model.predict(slide, strategy="exhaustive")
        write_report(tmp_path / "a.html", slide, found, whole)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) >= 3 + 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "a &amp; b" in page
    assert "<b>" not in page.replace("<b>", "", 1)  # only the summary's own, no class name unescaped
    assert page.count("<circle") == found.looks
    deep = found.ledger.total("deep").pixels
    assert f"{deep:,} pixels read in depth" in page
    shapes = json.loads((tmp_path / "a.geojson").read_text(encoding="utf-8"))["features"]
    looks = [shape for shape in shapes if shape["properties"]["classification"]["name"] == "Look"]
    assert [shape["properties"]["measurements"]["Look"] for shape in looks] == list(range(1, found.looks + 1))
    x, y = Slide(tmp_path / "a & b.tif", patch=32).regions.xy[found.path[0].region]
    assert looks[0]["geometry"]["coordinates"][0][0] == [x, y]


def test_what_the_first_look_changed_is_shown(model, tmp_path: Path):
    with Slide(tissue_slide(tmp_path / "a.tif"), patch=32) as slide:
        found = model.predict(slide)
        write_report(tmp_path / "a.html", slide, found, top=found.looks)
    change = found.path[0].probability[-1] - found.start[-1]
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert change != 0
    assert re.search(rf"look 1 at \([^)]*\): {re.escape(f'{change:+.3f}')}<", page)
    own, scan = model.modules, SlideSource(Slide(tmp_path / "a.tif", patch=32), model.extractor).scan()
    rows = own.standardize(scan, own.centre(scan)).unsqueeze(0)
    logits = own.classifier(rows, torch.ones(rows.shape[:2], dtype=torch.bool))
    assert found.start == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-6)


def test_the_page_of_a_slide_with_one_level_says_that_nothing_was_saved(model, tmp_path: Path):
    path = lossless(tmp_path / "one.tif", [tissue_picture()])
    with pytest.warns(OneLevelWarning):
        slide = Slide(path, patch=32)
    with slide:
        found = model.predict(slide)
        again = model.predict(slide)
        write_report(tmp_path / "a.html", slide, found)
    assert "nothing is saved" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "nothing is saved" in again.ledger.notes[0]


def test_glass_has_a_page_too(model, tmp_path: Path):
    path = tissue_slide(tmp_path / "glass.tif", height=512, width=512, margin=255)
    with Slide(path, patch=32) as slide:
        write_report(tmp_path / "g.html", slide, model.predict(slide))
    assert "No tissue" in (tmp_path / "g.html").read_text(encoding="utf-8")
