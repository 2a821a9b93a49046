"""Checkpoints of other code bases, in and out."""

from __future__ import annotations

from typing import Any

__all__ = ["ResearchReport", "load_research_checkpoint", "research_state_dict", "save_research_checkpoint"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: the help of ``export`` must not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from siamese_detr.interchange import research

    return getattr(research, name)
