"""What padding does to a pretext task, from pixels: nothing that the backbone's convolutions do not do at a border."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pretext_cases import CHANNELS, randomise, small_detector
from siamese_detr.pretext import SiameseConfig
from siamese_detr.pretext.siamese import SiamesePretext
from siamese_detr.views.batch import ViewInputs, prepare
from siamese_detr.views.two_views import TwoViewDataset, collate
from view_cases import SMALL, photo_store


def batches(photos: Path) -> tuple[ViewInputs, ViewInputs]:
    """Three images, and the same three beside a larger one, which pads them further; float64, without crops."""
    store = photo_store(photos)
    small = [TwoViewDataset(store, SMALL, 0)[0, index] for index in range(3)]
    large = TwoViewDataset(store, replace(SMALL, short_sides=(300,), max_size=400, area_range=(1, 1)), 0)[0, 3]
    alone, accompanied = (
        prepare(collate(samples), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), None) for samples in (small, [*small, large])
    )
    more = [b - a for a, b in zip(alone.pixel_mask.shape[1:], accompanied.pixel_mask.shape[1:], strict=True)]
    assert min(more) > 32
    return double(alone), double(accompanied)


def double(inputs: ViewInputs) -> ViewInputs:
    names = ("pixel_values", "boxes", "query_boxes")
    return replace(inputs, **{name: getattr(inputs, name).double() for name in names})


def boxes(pretext: SiamesePretext, inputs: ViewInputs) -> Tensor:
    """(layers, V, 3, Q, 4), what is predicted for the first three images."""
    with torch.no_grad():
        decoded = pretext.predict(pretext.frozen_features(inputs))[1]
    return decoded.boxes.unflatten(1, (2, -1))[:, :, :3]


def make_pretext() -> SiamesePretext:
    torch.manual_seed(1)  # the pretext's own embeddings and heads
    pretext = SiamesePretext(small_detector(), SiameseConfig(discrimination="none"))
    return randomise(pretext).eval()  # type: ignore[return-value]


def test_more_padding_changes_nothing_behind_convolutions_without_borders(photos: Path) -> None:
    pretext = make_pretext()
    patches = nn.Conv2d(3, CHANNELS, 32, stride=32, dtype=torch.float64)  # patches side by side: no border anywhere

    def features(pixel_values: Tensor, pixel_mask: Tensor, fast: bool = False) -> list[Tensor]:
        return [patches(pixel_values)]

    pretext.detector.features = features  # type: ignore[method-assign]
    alone, accompanied = (boxes(pretext, inputs) for inputs in batches(photos))
    torch.testing.assert_close(accompanied, alone, rtol=0, atol=1e-9)


def test_a_real_backbone_sees_its_own_borders_only(photos: Path) -> None:
    """Tolerance: 0.05 of the image's side (a random ResNet on maps of a few cells, most of them at a border)."""
    pretext = make_pretext()
    alone, accompanied = (boxes(pretext, inputs) for inputs in batches(photos))
    torch.testing.assert_close(accompanied, alone, rtol=0, atol=0.05)
    assert 0 < (accompanied - alone).abs().mean() < 0.005
