"""What ``torch.compile`` is told of batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sizes_vary(maps: Iterable[Tensor], mask: Tensor) -> None:
    """Let one compilation do for pictures of all sizes; else there would be one more for the first two new sizes each.
    On a GPU there are two: PyTorch decides anew for attention masks whose length is no multiple of 8.

    Args:
        maps: (..., H, W).
        mask: (B, H, W).
    """
    for tensor in (*maps, mask):
        torch._dynamo.maybe_mark_dynamic(tensor, (tensor.ndim - 2, tensor.ndim - 1))
