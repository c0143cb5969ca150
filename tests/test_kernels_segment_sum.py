"""Sums of weighted rows by segment."""

import pytest
import torch
from kernel_checks import DEVICE, poisoned

from trimtab.kernels import segment_sum


@pytest.mark.parametrize("part", [1, 6, 16, 400])
def test_segments_are_summed_whatever_the_parts_they_are_cut_into(monkeypatch, part):
    """Segments of 0 to 20 entries, so that some begin or end at the edge of a part, and parts hold two of them."""
    monkeypatch.setattr(segment_sum, "PART", part)
    monkeypatch.setattr(segment_sum, "SPAN", 32)
    torch.manual_seed(part)
    count_R = torch.randint(0, 21, (12,))
    segment_E = torch.arange(12).repeat_interleave(count_R)
    E = len(segment_E)
    x_XD, index_E, g_E = torch.randn(9, 40), torch.randint(0, 9, (E,)), torch.randn(E)
    expected_RD = torch.zeros(12, 40).index_add(0, segment_E, g_E[:, None] * x_XD[index_E])
    offset_R = torch.nn.functional.pad(count_R.cumsum(0), (1, 0))
    with poisoned():
        out_RD = segment_sum.segment_sums(*(x.to(DEVICE) for x in (x_XD, index_E, g_E, segment_E, offset_R)))
    torch.testing.assert_close(out_RD.cpu(), expected_RD, rtol=0, atol=1e-5)
