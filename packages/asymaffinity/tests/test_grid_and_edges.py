"""Boxes on the grid and edges of images, against brute force."""

from __future__ import annotations

import loop_oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asymaffinity.edges import EdgeBits, alike, batched, edge_statistics, neighbour_offsets
from asymaffinity.grid import box_cells, box_masks, cell_masks, grid_size, to_grid
from shared_core import InputError


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    stride=st.sampled_from([2, 4, 8]),
    ends=st.lists(st.tuples(*[st.floats(-10, 50, width=32)] * 4), min_size=1, max_size=4),
)
def test_boxes_are_drawn_at_full_size_and_sampled(height, width, stride, ends):
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in ends])
    grid = grid_size(height, width, stride)
    cells, widened = box_cells(boxes, grid, stride)
    drawn = cell_masks(cells, grid)
    missing = 0
    for (x0, y0, x1, y1), mask, cell in zip(boxes.tolist(), drawn, cells, strict=True):
        full = torch.zeros(grid[0] * stride, grid[1] * stride, dtype=torch.bool)
        full[max(0, int(y0)) : max(0, int(y1) + 1), max(0, int(x0)) : max(0, int(x1) + 1)] = True
        if min(x1, y1) <= -1:
            full[:] = False
        sampled = full[stride // 2 :: stride, stride // 2 :: stride]
        if sampled.any():
            assert torch.equal(mask, sampled)
        else:
            missing += 1
            assert int(cell[2] - cell[0]) >= 1
            assert int(cell[3] - cell[1]) >= 1
            assert mask.any()
    assert widened == missing


def test_a_box_smaller_than_a_cell_keeps_the_nearest_and_is_counted():
    cells, widened = box_cells(torch.tensor([[8.6, 4.4, 9.4, 5.1], [0.0, 0, 15, 15]]), (4, 4))
    assert cells.tolist() == [[2, 1, 3, 2], [0, 0, 4, 4]]
    assert widened == 1


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([5.0, 5, 3, 9], r"boxes: expected x0 <= x1 and y0 <= y1; for x, y, width, height use"),
        ([float("nan"), 5, 3, 9], r"boxes: expected finite numbers"),
        ([0, 5, float("inf"), 9], r"boxes: expected finite numbers"),
    ],
)
def test_boxes_that_are_none(box, words):
    with pytest.raises(InputError, match=words):
        box_masks(torch.tensor([box]), (4, 4))


def test_the_grid_holds_the_means_of_its_pixels_and_ignores_those_beyond():
    values = torch.arange(60.0).reshape(6, 10)
    pooled = to_grid(values, 4)
    assert pooled.shape == grid_size(6, 10, 4) == (1, 2)
    assert pooled[0, 0] == values[:4, :4].mean()
    ragged = to_grid(torch.ones(1, 7, 11), 4)
    assert ragged.shape == (1, 2, 3)
    assert torch.equal(ragged, torch.ones(1, 2, 3))


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (5, 2), (7, 1), (3, 20)])
def test_the_edges_are_those_of_a_plain_loop(kernel: int, dilation: int):
    """Traps 3 and 4: neighbours, dilation, validity and the removed middle."""
    draw = torch.Generator().manual_seed(kernel)
    features = torch.randn(2, 3, 8, 9, generator=draw, dtype=torch.float64)
    valid = torch.rand(2, 8, 9, generator=draw) < 0.8
    edges = alike(features, 1.3, 0.3, valid, kernel=kernel, dilation=dilation)
    offsets = neighbour_offsets(kernel, dilation)
    assert len(offsets) == kernel**2 - 1
    stack = edges.stack()
    everywhere = [[1] * 9] * 8
    for i in range(2):
        found = {((y, x), (y + offsets[n][0], x + offsets[n][1])) for n, y, x in stack[i].nonzero().tolist()}
        expected = set(
            loop_oracle.ordered_edges(
                features[i].tolist(), everywhere, 1.3, 0.3, valid[i].tolist(), kernel, dilation
            )
        )
        assert found == expected
    both = alike(features, 1.3, 0.3, valid, both=True, kernel=kernel, dilation=dilation)
    assert torch.equal(both.stack(), stack & valid[:, None])
    assert 0 <= edges.share() <= 1


def test_joined_edges_are_those_of_both_or_of_either():
    one, other = (alike(torch.randn(1, 2, 6, 6), 1.0, 0.4) for _ in range(2))
    assert torch.equal(one.joined(other, "and").stack(), one.stack() & other.stack())
    assert torch.equal(one.joined(other, "or").stack(), one.stack() | other.stack())
    with pytest.raises(InputError, match="expected edges of the same window"):
        one.joined(alike(torch.randn(1, 2, 6, 6), 1.0, 0.4, dilation=1), "and")


def test_images_of_different_size_become_one_batch_without_edges_into_the_padding():
    small, large = alike(torch.zeros(1, 1, 4, 5), 1.0, 0.5), alike(torch.zeros(1, 1, 6, 3), 1.0, 0.5)
    both = batched([small, large])
    assert both.bits.shape == (2, 6, 5)
    assert torch.equal(both.bits[0, :4], small.bits[0])
    assert torch.equal(both.bits[1, :, :3], large.bits[0])
    assert not both.bits[0, 4:].any()
    assert not both.bits[1, :, 3:].any()
    assert batched([small], (8, 8)).bits.shape == (1, 8, 8)
    with pytest.raises(InputError, match="expected at least one image"):
        batched([])


def test_statistics_of_edges_by_hand():
    labels = torch.tensor([[[0, 0, 1]]])
    edges = alike(torch.tensor([[[[0.0, 0.0, 0.0]]]]), 1.0, 0.5, dilation=1)
    found = edge_statistics(edges, labels)
    assert found == {"positive_share": 1.0, "precision": 0.5, "leak": 1.0}


def test_words_that_are_none():
    with pytest.raises(InputError, match=r"bits: expected torch\.uint8"):
        EdgeBits(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="theta: expected a number above 0"):
        alike(torch.zeros(1, 1, 3, 3), 0.0, 0.5)
    with pytest.raises(InputError, match="thresh: expected a similarity above 0, at most 1"):
        alike(torch.zeros(1, 1, 3, 3), 1.0, 1.5)
