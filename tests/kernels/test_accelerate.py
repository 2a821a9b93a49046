"""Exchanging modules for faster ones: results, names and what is saved stay as they are, and it can be undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from siamese_detr import kernels
from siamese_detr.kernels import Sampling, accelerate, stock
from siamese_detr.kernels.frozen import FrozenBackbone
from tiny_detectors import CASES, fitting_side, tiny_batch, tiny_detector

SAMPLING = {"deformable-detr", "deformable-detr-one-scale", "deformable-detr-refined", "rt-detr", "lw-detr", "rf-detr"}


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_detector_computes_the_same(case: str) -> None:
    detector = tiny_detector(case).double().eval()
    images, mask = tiny_batch(side=fitting_side(detector))
    names, kinds = list(detector.state_dict()), [type(module) for module in detector.modules()]

    def boxes_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        detector.zero_grad()
        boxes = detector(images.double(), mask).boxes
        boxes.sum().backward()
        return boxes, {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}

    expected = boxes_and_gradients()
    exchanged = accelerate(detector, "cpu")
    assert "frozen backbone" in exchanged
    assert ("deformable sampling" in exchanged) or case not in SAMPLING
    assert list(detector.state_dict()) == names
    outputs = boxes_and_gradients()
    assert outputs[1].keys() == expected[1].keys()
    torch.testing.assert_close(outputs, expected, rtol=1e-7, atol=1e-7)
    accelerate(detector, "cpu")  # a second time changes nothing
    stock(detector)
    assert [type(module) for module in detector.modules()] == kinds
    assert torch.equal(boxes_and_gradients()[0], expected[0])


def test_nothing_is_exchanged_if_off(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = tiny_detector("deformable-detr")
    assert accelerate(detector, "cpu", "off") == []
    monkeypatch.setenv(kernels.ENVIRONMENT, "off")
    assert accelerate(detector, "cpu") == []
    assert detector.frozen_backbone is None
    assert not any(isinstance(module, Sampling) for module in detector.modules())


def test_a_learning_backbone_is_not_run_as_a_frozen_one() -> None:
    detector = tiny_detector("conditional-detr")
    accelerate(detector, "cpu")
    assert isinstance(detector.frozen_backbone, FrozenBackbone)
    images, mask = tiny_batch()
    assert not detector.features(images, mask)[-1].requires_grad
    detector.set_trainable(backbone=True, class_head=True)
    assert detector.features(images, mask)[-1].requires_grad
