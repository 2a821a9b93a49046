"""How loops of our own are compiled for a CPU."""

from __future__ import annotations

from typing import Any

import numba

# Sums may be reordered, as vectors need it, but what is no number stays so. Indices in the loops are unsigned: negative
# ones would count from the end, so that Numba tests every one.
compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
