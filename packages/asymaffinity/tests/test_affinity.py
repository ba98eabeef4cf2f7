"""Colour and depth-gradient affinity: known colours, ramps, planes, holes, units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2lab

from asymaffinity.affinity import (
    ColorAffinity,
    DepthGradAffinity,
    FeatureAffinity,
    cell_gradient,
    depth_gradient,
    lab,
    middle,
    similarity_quantiles,
    unit_range,
)
from asymaffinity.edges import alike
from shared_core import InputError


def test_lab_is_scikit_images():
    """Trap 12: and pure red is (53.2, 80.1, 67.2)."""
    rgb = torch.rand(2, 3, 13, 17)
    expected = np.stack([rgb2lab(image.permute(1, 2, 0).numpy()) for image in rgb])
    found = lab(rgb).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() < 0.01
    red = lab(torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)).flatten()
    assert red.tolist() == pytest.approx([53.24, 80.09, 67.20], abs=0.05)


def test_colour_edges_are_those_of_the_formula():
    image = torch.rand(1, 3, 32, 40) * 0.1 + 0.4
    edges = ColorAffinity(theta=2, thresh=0.3)(image)
    cells = image.reshape(1, 3, 8, 4, 10, 4).mean((3, 5))
    colours = rgb2lab(cells[0].permute(1, 2, 0).numpy())
    kept = 0
    for y, x in ((2, 2), (4, 5), (6, 7), (3, 3)):
        for n, (dy, dx) in enumerate(edges.offsets):
            if not (0 <= y + dy < 8 and 0 <= x + dx < 10):
                continue
            similarity = np.exp(-np.linalg.norm(colours[y, x] - colours[y + dy, x + dx]) / 2)
            if abs(similarity - 0.3) > 0.01:
                assert bool(edges.bits[0, y, x].item() >> n & 1) == (similarity >= 0.3)
                kept += similarity >= 0.3
    assert kept > 3


def test_bytes_floats_and_grey_are_the_same_picture():
    data = torch.randint(0, 256, (1, 1, 24, 24), dtype=torch.uint8)
    grey = ColorAffinity()(data)
    assert torch.equal(grey.bits, ColorAffinity()(data.float() / 255).bits)
    assert torch.equal(grey.bits, ColorAffinity()(data.expand(-1, 3, -1, -1).contiguous()).bits)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.randn(1, 3, 8, 8), "expected values from 0 to 1; is the image normalised already"),
        (torch.rand(1, 3, 8, 8) * 255, "expected values from 0 to 1; divide bytes by 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "expected values from 0 to 1"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), "divide 16-bit images by 65535"),
        (torch.zeros(1, 4, 8, 8), "expected 3 channels, or 1 of grey"),
    ],
)
def test_images_that_are_none(image, words):
    with pytest.raises(InputError, match=words):
        ColorAffinity()(image)


def test_padding_is_no_neighbour():
    image, valid = torch.zeros(1, 3, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool)
    valid[:, 20:] = False
    stack = ColorAffinity()(image, valid).stack()[0]
    cells = middle(valid, 4)[0]
    for n, (dy, dx) in enumerate(ColorAffinity()(image).offsets):
        for y, x in stack[n].nonzero().tolist():
            assert cells[y + dy, x + dx]
    assert stack[:, 5].any()  # an invalid cell may have valid neighbours: the neighbour alone counts


def test_a_ramp_has_its_slope_in_each_direction():
    """Trap 13."""
    u = torch.arange(20.0).repeat(16, 1)
    for field, expected in ((0.7 * u, (0.7, 0.0)), (-0.3 * u.T[:16, :16], (0.0, -0.3))):
        gradient, known = depth_gradient(field[None])
        assert known.all()
        inner = gradient[0, :, 2:-2, 2:-2]
        torch.testing.assert_close(inner[0], torch.full_like(inner[0], expected[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(inner[1], torch.full_like(inner[1], expected[1]), atol=1e-5, rtol=0)


def street(height=64, width=64, scale=1.0, shift=0.0):
    """Disparity of a ground plane below row 24, a facade above, and an upright post on the ground."""
    rows = torch.arange(float(height))[:, None].expand(height, width)
    field = 0.2 + 0.05 * (rows - 24).clamp(min=0)
    field = field.clone()
    field[20:52, 24:40] = field[51, 30]
    return (scale * field + shift)[None]


def test_objects_on_the_ground_break_edges_at_their_feet():
    edges = DepthGradAffinity()(street())
    stack, down = edges.stack()[0], edges.offsets.index((2, 0))
    assert stack[down, 6:10, 7:9].all()  # within the post
    assert stack[down, 7:13, 1:4].all()  # on the ground
    assert not stack[down, 11, 7:9].any()  # from the post's foot to the ground
    step = 2 * 4 * 0.05  # what the ground's disparity rises from a cell to the neighbour below
    depth = FeatureAffinity(theta=2 * step, thresh=0.5)(street()[:, None, 2::4, 2::4])
    assert depth.stack()[0, down, 11, 7:9].all()  # depth itself leaks: it is continuous at the foot


@pytest.mark.parametrize("normalize", ["spread", "median"])
def test_edges_do_not_depend_on_the_unit_of_depth(normalize: str):
    """Trap 6, and unknown scale and shift of monocular networks."""
    affinity = DepthGradAffinity(normalize=normalize)
    plain = affinity(street())
    assert 0.1 < plain.share() < 1
    for scale, shift in ((10.0, 0.0), (0.01, 5.0)):
        assert (affinity(street(scale=scale, shift=shift)).stack() == plain.stack()).float().mean() > 0.999
    raw = DepthGradAffinity(normalize="none", theta=0.03)
    assert not torch.equal(raw(street()).bits, raw(street(scale=10.0)).bits)


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_a_cells_gradient_is_the_mean_of_its_pixels(h: int, w: int, stride: int, holes: float, seed: int):
    """Holes, cut cells and all: as if the gradient were made at every pixel and averaged."""
    draw = torch.Generator().manual_seed(seed)
    field = torch.rand(2, h, w, generator=draw, dtype=torch.float64)
    field[torch.rand(2, h, w, generator=draw) < holes] = float("nan")
    gradient, known = depth_gradient(field)
    found, valid = cell_gradient(field, stride, 0.5)
    for y in range(found.shape[2]):
        for x in range(found.shape[3]):
            rows = (torch.arange(stride) + y * stride).clamp(max=h - 1)
            columns = (torch.arange(stride) + x * stride).clamp(max=w - 1)
            at = known[:, rows][:, :, columns]
            own = gradient[:, :, rows][:, :, :, columns]
            for n in range(2):
                share = at[n].double().mean()
                assert bool(valid[n, y, x]) == bool(share >= 0.5 - 1e-6)
                mean = own[n][:, at[n]].mean(1) if valid[n, y, x] else torch.zeros(2, dtype=torch.float64)
                torch.testing.assert_close(found[n, :, y, x], mean, atol=1e-10, rtol=1e-9)


def test_edges_that_touch_a_hole_vanish():
    """Trap 7."""
    field = street()
    field[:, 40:56, 4:20] = float("nan")
    edges = DepthGradAffinity()(field)
    stack = edges.stack()[0]
    _, known = DepthGradAffinity().features(field)
    assert not known[0, 10:14, 1:5].any()
    assert not stack[:, 10:14, 1:5].any()
    for n, (dy, dx) in enumerate(edges.offsets):
        for y, x in stack[n].nonzero().tolist():
            assert known[0, y + dy, x + dx]
    nothing = DepthGradAffinity()(torch.full((1, 32, 32), float("nan")))
    assert nothing.share() == 0
    assert DepthGradAffinity()(torch.full((1, 32, 32), 3.0)).share() == 1


def test_features_of_any_kind():
    features = torch.randn(1, 5, 6, 6)
    assert torch.equal(FeatureAffinity(2.0, 0.4)(features).bits, alike(features, 2.0, 0.4).bits)


def test_quantiles_tell_where_a_threshold_could_be():
    low, half, high = similarity_quantiles(torch.zeros(1, 2, 8, 8), 1.0)
    assert low == half == high == 1
    low, half, high = similarity_quantiles(torch.randn(1, 2, 16, 16), 1.0)
    assert 0 < low < half < high < 1


def test_options_that_are_none():
    with pytest.raises(InputError, match="theta: expected a number above 0"):
        ColorAffinity(theta=0)
    with pytest.raises(InputError, match="kernel: expected 3, 5 or 7"):
        DepthGradAffinity(kernel=2)
    with pytest.raises(InputError, match="field: expected one of disparity, depth, log_depth"):
        DepthGradAffinity(field="metres")
    with pytest.raises(InputError, match="min_valid: expected a share above 0"):
        DepthGradAffinity(min_valid=0)
    assert unit_range(torch.rand(1, 1, 2, 2)).max() <= 1
