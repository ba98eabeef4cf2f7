"""A scheme in words for a picture."""

import torch
from torch import nn

import csq
from csq.bitops import BitOperations
from csq.scheme_view import sizes


def test_a_pictures_title_has_both_bits_the_bytes_and_the_bit_operations() -> None:
    torch.manual_seed(0)
    model = csq.parametrize(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))
    report = csq.report(model)
    line = sizes(report, BitOperations({"0": (24, 8, 4), "2": (8, 2, 32)}), 1234)
    assert f"{report.average_bits:.3f} paper bits" in line
    assert f"{report.average_stored_bits:.3f} stored bits" in line
    assert "1,234 bytes" in line
    assert "1,280 bit operations" in line  # 24 * 8 * 4 + 8 * 2 * 32
