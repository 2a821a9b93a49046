"""The detector's sizes, as ``pretrain`` and ``finetune`` are told them: None leaves them to the family."""

from __future__ import annotations

from typing import Any

DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
SIZES = ("num_queries", "hidden_size", "heads", "encoder_layers", "decoder_layers", "ffn_size", *DROPOUTS)


def given(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of ``names`` that the configuration sets."""
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}
