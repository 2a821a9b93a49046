"""The kernel of ``siamese_detr::assign`` for CUDA devices: every problem has a program of its own.

The host need not wait for the costs. Shortest augmenting paths (Jonker and Volgenant), as in SciPy's
``linear_sum_assignment``: the same sums in double precision, so the same result but for ties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from siamese_detr.detection.matching import assign_operation

HIGHEST = 1e30
"""What counts as the cost of what is no finite number: such a query is the last to be taken."""


@assign_operation.register_kernel("cuda")
def assign(cost: Tensor, valid: Tensor) -> Tensor:
    """The query of each target: int64 (..., P), 0 where not valid.

    Args:
        cost: (..., P, Q), P <= Q.
        valid: bool (..., P); rows that are False take no query.
    """
    *outer, targets, queries = cost.shape
    chosen = torch.zeros((*outer, targets), dtype=torch.int64, device=cost.device)
    if chosen.numel():
        count = chosen.numel() // targets
        rows, columns = triton.next_power_of_2(targets), triton.next_power_of_2(queries)
        warps = min(16, max(1, columns // 128))
        tables = cost.contiguous(), valid.contiguous(), chosen
        with torch.cuda.device_of(cost):
            _assign[(count,)](*tables, targets, queries, HIGHEST, rows, columns, num_warps=warps)
    return chosen


@triton.jit
def _at(values, places, place):
    """values[place], a number."""
    return tl.sum(tl.where(places == place, values, 0))


@triton.jit
def _assign(cost, valid, chosen, targets, queries, highest, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * targets * queries
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    exists = columns < queries
    of_row = tl.full((ROWS,), -1, tl.int32)  # the column of each row, and the other way round
    of_column = tl.full((COLUMNS,), -1, tl.int32)
    row_price = tl.zeros((ROWS,), tl.float64)
    column_price = tl.zeros((COLUMNS,), tl.float64)
    for start in range(targets):
        if tl.load(valid + problem * targets + start) != 0:
            # The shortest path from this row to a free column (Dijkstra).
            length = tl.full((COLUMNS,), float("inf"), tl.float64)
            before = tl.full((COLUMNS,), -1, tl.int32)
            reached = tl.zeros((COLUMNS,), tl.int32)
            passed = tl.zeros((ROWS,), tl.int32)
            row, end, least = start, -1, tl.full((), 0.0, tl.float64)
            while end < 0:
                passed = tl.where(rows == row, 1, passed)
                price = tl.load(cost + row * queries + columns, mask=exists, other=0.0).to(tl.float64)
                price = tl.where(tl.abs(price) < highest, price, highest)
                price += least - _at(row_price, rows, row) - column_price
                shorter = (reached == 0) & (price < length)
                before = tl.where(shorter, row, before)
                length = tl.where(shorter, price, length)
                ahead = exists & (reached == 0)
                least = tl.min(tl.where(ahead, length, float("inf")))
                # Of equally near columns a free one, and the first of those.
                rank = columns + tl.where(of_column < 0, 0, COLUMNS)
                column = tl.min(tl.where(ahead & (length <= least), rank, 2 * COLUMNS)) % COLUMNS
                reached = tl.where(columns == column, 1, reached)
                row = _at(of_column, columns, column)
                end = tl.where(row < 0, column, -1)
            # Prices, so that taken pairs cost nothing and no pair less.
            column_price -= tl.where(reached != 0, least - length, 0.0)
            at_row = tl.gather(length, tl.maximum(of_row, 0), 0)
            row_price += tl.where(rows == start, least, tl.where(passed != 0, least - at_row, 0.0))
            # Along the path every column changes its row.
            row = -1
            while row != start:
                row = _at(before, columns, end)
                of_column = tl.where(columns == end, row, of_column)
                after = _at(of_row, rows, row)
                of_row = tl.where(rows == row, end, of_row)
                end = after
    tl.store(chosen + problem * targets + rows, tl.maximum(of_row, 0).to(tl.int64), mask=rows < targets)
