"""Two views of one image: geometry, augmentation, batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siamese_detr.views.batch import ViewBatch, ViewInputs
    from siamese_detr.views.config import ViewConfig
    from siamese_detr.views.sampler import ViewBatchSampler
    from siamese_detr.views.two_views import TwoViewDataset, collate

__all__ = ["TwoViewDataset", "ViewBatch", "ViewBatchSampler", "ViewConfig", "ViewInputs", "collate"]

_MODULES = {
    "ViewConfig": "config",
    "ViewBatchSampler": "sampler",
    "TwoViewDataset": "two_views",
    "collate": "two_views",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: configurations do not need PyTorch, which takes seconds to load.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'batch')}"), name)
