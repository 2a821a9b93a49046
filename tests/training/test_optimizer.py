"""Parameter groups of the optimiser."""

from __future__ import annotations

import pytest

from siamese_detr.errors import UserError
from siamese_detr.training.optimizer import adamw
from tiny_detectors import tiny_detector


@pytest.mark.parametrize("case", ["lw-detr", "rf-detr"])
def test_earlier_blocks_learn_slower(case: str) -> None:
    detector = tiny_detector(case)
    detector.set_trainable(backbone=True, class_head=True)
    optimizer = adamw(detector, 1e-3, 1e-4, backbone=detector.backbone, backbone_lr=1e-4, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in detector.backbone.named_parameters()}
    rates = {
        names[id(parameter)]: group["lr"] / 1e-4
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    }
    blocks = {name: rate for name, rate in rates.items() if name.startswith("encoder.layer.")}
    assert blocks
    assert all(rate == pytest.approx(0.5 ** (4 - int(name.split(".")[2]))) for name, rate in blocks.items())
    before = [rate for name, rate in rates.items() if name.startswith("embeddings.")]
    assert before == pytest.approx([0.5**5] * len(before))
    assert before
    after = [rate for name, rate in rates.items() if not name.startswith(("embeddings.", "encoder."))]
    assert after == pytest.approx([1.0] * len(after))


@pytest.mark.parametrize("case", ["detr", "rt-detr"])
def test_backbones_without_blocks_are_refused(case: str) -> None:
    detector = tiny_detector(case)
    with pytest.raises(UserError, match=r"layer_decay.*no attention blocks"):
        adamw(detector, 1e-3, 1e-4, backbone=detector.backbone, backbone_lr=1e-4, layer_decay=0.7)
