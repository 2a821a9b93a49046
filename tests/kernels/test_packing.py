"""A padded batch is encoded without its padding, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from siamese_detr.detectors import deformable_detr
from siamese_detr.kernels import deformable_attention
from siamese_detr.kernels.cpu_sampling import sample
from siamese_detr.kernels.packing import find_packing
from siamese_detr.pretext import SiameseConfig
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.pretext.siamese import SiamesePretext
from tiny_detectors import region_queries, tiny_batch, tiny_detector

DEFORMABLE = ("deformable-detr", "deformable-detr-one-scale", "deformable-detr-refined")


def corner(shape: tuple[int, int], height: int, width: int) -> Tensor:
    """A mask (h, w), True in so many rows and columns."""
    return (torch.arange(shape[0])[:, None] < height) & (torch.arange(shape[1]) < width)


@st.composite
def padded_levels(draw: st.DrawFn) -> tuple[list[Tensor], list[list[tuple[int, int]]]]:
    """Masks (B, h, w) of levels, and the sizes of what is inside, image by image."""
    side = st.integers(1, 7)
    batch, shapes = draw(st.integers(1, 4)), draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    inside = [[tuple(draw(st.integers(1, edge)) for edge in shape) for shape in shapes] for _ in range(batch)]
    masks = [torch.stack([corner(shape, *image[level]) for image in inside]) for level, shape in enumerate(shapes)]
    return masks, inside


@settings(max_examples=60, deadline=None)
@given(padded_levels())
def test_what_is_inside_is_packed_and_put_back(case: tuple[list[Tensor], list[list[tuple[int, int]]]]) -> None:
    masks, inside = case
    mask = torch.cat([level.flatten(1) for level in masks], 1)
    packing = find_packing(masks)
    if mask.all():
        assert packing is None
        return
    assert packing is not None
    assert packing.shapes == inside
    x = torch.randn(*mask.shape, 3, requires_grad=True)
    packed = packing.pack(x)
    assert torch.equal(packed[0], x[mask])
    back = packing.unpack(packed)
    assert torch.equal(back, torch.where(mask[..., None], x, 0))
    (gradient,) = torch.autograd.grad(back.square().sum(), x)
    assert torch.equal(gradient, 2 * back.detach())


@pytest.mark.parametrize("where", ["left", "top", "hole", "diagonal"])
def test_other_masks_are_not_packed(where: str) -> None:
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    match where:
        case "left":
            mask[1, :, 0] = False
        case "top":
            mask[1, 0] = False
        case "hole":
            mask[1, 2, 2] = False
        case "diagonal":
            mask[1, 3, 1:] = mask[1, 1:, 4] = False
    assert find_packing([torch.ones(2, 8, 10, dtype=torch.bool), mask]) is None


@settings(max_examples=30, deadline=None)
@given(padded_levels(), st.integers(0, 1000))
def test_packed_images_are_sampled_as_each_alone(
    case: tuple[list[Tensor], list[list[tuple[int, int]]]], seed: int
) -> None:
    _, images = case
    random = torch.Generator().manual_seed(seed)
    counts = [sum(height * width for height, width in levels) for levels in images]
    points = (1, sum(counts), 2, len(images[0]), 3)
    value = torch.randn(1, sum(counts), 2, 4, generator=random, dtype=torch.float64)
    offsets = 4 * torch.randn(*points, 2, generator=random, dtype=torch.float64)
    weights = torch.randn(points, generator=random, dtype=torch.float64)
    reference = torch.rand(1, sum(counts), points[3], 2, generator=random, dtype=torch.float64)
    above = torch.randn(1, sum(counts), 8, generator=random, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (value, offsets, weights, reference)]

    def gradients(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, inputs, above)]

    packed = gradients(sample(value, offsets, weights, images, reference))
    parts = zip(*(x.split(counts, 1) for x in inputs), images, strict=True)
    alone = gradients(torch.cat([sample(v, o, w, levels, r) for v, o, w, r, levels in parts], 1))
    for got, want in zip(packed, alone, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("wrong", ["tokens", "levels", "queries", "batch"])
def test_packed_shapes_that_do_not_belong_together_are_refused(wrong: str) -> None:
    images = [[(2, 3), (1, 2)], [(3, 3), (2, 1)]]
    tokens = queries = 19
    batch = 1
    match wrong:
        case "tokens":
            images[1][0] = (3, 4)
        case "levels":
            images[0] = [(8, 1)]
        case "queries":
            queries = 7
        case "batch":
            batch = 2
    value, weights = torch.zeros(batch, tokens, 1, 4), torch.zeros(batch, queries, 1, 2, 3)
    with pytest.raises(ValueError, match="belong together"):
        sample(value, weights[..., None].repeat(1, 1, 1, 1, 1, 2), weights, images, torch.zeros(batch, queries, 2, 2))


def test_nothing_is_packed_where_there_is_nothing() -> None:
    assert find_packing([torch.zeros(2, 4, 5, dtype=torch.bool)]) is None


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many tokens each layer encodes."""
    counts: list[int] = []
    layer = deformable_detr.encoder_layer

    def count(module: Any, tokens: Tensor, **own: Any) -> Tensor:
        counts.append(tokens.shape[:2].numel())
        return layer(module, tokens, **own)

    monkeypatch.setattr(deformable_detr, "encoder_layer", count)
    return counts


@pytest.mark.parametrize("case", DEFORMABLE)
def test_a_detector_learns_the_same_without_its_padding(case: str, encoded: list[int]) -> None:
    detector = tiny_detector(case).double().train()
    images, mask = tiny_batch()

    def learn(padding: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        detector.zero_grad()
        memory = detector.encode(detector.features(images.double(), mask), mask, padding=padding)
        decoded = detector.decode(memory, region_queries().double())
        (decoded.states.square().sum() + decoded.boxes.sum() + memory.pooled().square().sum()).backward()
        gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
        return memory.tokens[memory.mask], decoded.boxes, gradients

    theirs, ours = learn(padding=True), learn(padding=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    inside, everything = sorted(set(encoded))
    assert encoded == [everything] * 2 + [inside] * 2
    assert inside == len(ours[0])


@pytest.mark.parametrize("pools", [False, True])
def test_padding_is_encoded_where_it_is_pooled(pools: bool) -> None:
    pretext = SiamesePretext(tiny_detector("deformable-detr"), SiameseConfig(pool_padding=pools, discrimination="none"))
    images, mask = tiny_batch()
    images, mask = torch.cat((images, images)), torch.cat((mask, mask))
    boxes = torch.tensor([4.0, 4, 60, 60]).repeat(2, 3, 2, 1)
    sizes = torch.stack((mask.any(2).sum(1), mask.any(1).sum(1)), 1)
    maps = pretext.detector.features(images, mask)
    memory, _ = pretext.predict(FrozenFeatures(maps, mask, sizes, boxes, boxes))
    assert memory.tokens[~memory.mask].any(-1).all() == pools


@pytest.mark.parametrize("where", ["inference", "compiled", "stock attention"])
def test_padding_is_encoded_where_that_is_the_stock_way(where: str, encoded: list[int]) -> None:
    detector = tiny_detector("deformable-detr-one-scale").train(where != "inference")
    images, mask = tiny_batch()
    maps = detector.features(images, mask)
    if where == "stock attention":
        deformable_attention.uninstall(detector.model)
    encode = torch.compile(detector.encode, backend="eager") if where == "compiled" else detector.encode
    memory = encode(maps, mask)
    assert memory.tokens[~memory.mask].any(-1).all()
    assert where == "compiled" or encoded == [mask.shape[0] * memory.mask.shape[1]] * 2
