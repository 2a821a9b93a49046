"""Boxes of one image: geometry, determinism, and images that have nothing to find."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from siamese_detr.errors import UserError
from siamese_detr.proposals.methods import EdgeBoxesSettings, Proposals, edge_boxes, random_boxes, selective_search
from siamese_detr.randomness import rng


def scene(width: int = 240, height: int = 180, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two bright discs and a rectangle on a soft background, and their boxes (xyxy)."""
    generator = np.random.default_rng(seed)
    image = np.full((height, width, 3), 60, np.uint8)
    boxes = np.array([[20, 20, 80, 80], [130, 90, 220, 165], [110, 15, 150, 60]]) * width // 240
    for box, colour in zip(boxes.tolist(), [(200, 40, 40), (40, 190, 60), (230, 230, 80)], strict=True):
        x0, y0, x1, y1 = box
        if box == boxes[1].tolist():
            cv2.rectangle(image, (x0, y0), (x1, y1), colour, -1)
        else:
            cv2.ellipse(
                image, ((x0 + x1) // 2, (y0 + y1) // 2), ((x1 - x0) // 2, (y1 - y0) // 2), 0, 0, 360, colour, -1
            )
    noise = generator.normal(0, 3, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), boxes.astype(np.float64)


def best_overlaps(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    low = np.maximum(found[:, None, :2], wanted[None, :, :2])
    high = np.minimum(found[:, None, 2:], wanted[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = lambda boxes: (boxes[:, 2:] - boxes[:, :2]).prod(-1)  # noqa: E731
    return (shared / (area(found)[:, None] + area(wanted)[None] - shared)).max(0)


def check(found: Proposals, width: int, height: int) -> None:
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.boxes.shape == (len(found.scores), 4)
    assert len(found.boxes) > 0
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, [0, 2]] <= width).all()
    assert (found.boxes[:, [1, 3]] <= height).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("size", [(240, 180), (960, 720)])
def test_edge_boxes_find_objects_at_any_resolution(size: tuple[int, int]) -> None:
    image, objects = scene(*size)
    found = edge_boxes(image, max_boxes=50)
    check(found, *size)
    assert found.origin == "image"
    assert (best_overlaps(found.boxes.astype(np.float64), objects) > 0.7).all()


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_selective_search_finds_objects(mode: str) -> None:
    image, objects = scene()
    found = selective_search(image, mode)
    check(found, 240, 180)
    assert (best_overlaps(found.boxes.astype(np.float64), objects) > 0.7).all()
    np.testing.assert_array_equal(selective_search(image, mode).boxes, found.boxes)
    assert len(selective_search(image, mode, max_boxes=2).boxes) == 2
    with pytest.raises(ValueError, match="fast"):
        selective_search(image, "slow")


def test_edge_boxes_are_deterministic_limited_and_not_near_duplicates() -> None:
    image, _ = scene()
    found = edge_boxes(image)
    np.testing.assert_array_equal(edge_boxes(image).boxes, found.boxes)
    boxes = edge_boxes(image, max_boxes=7).boxes
    assert len(boxes) == 7
    for index in range(1, 7):
        assert best_overlaps(boxes[:index].astype(float), boxes[index : index + 1].astype(float)) <= 0.501


def test_edge_boxes_do_not_depend_on_the_image_being_mirrored() -> None:
    image, objects = scene()
    mirrored = objects.copy()
    mirrored[:, [0, 2]] = 240 - objects[:, [2, 0]]
    found = edge_boxes(np.ascontiguousarray(image[:, ::-1]), max_boxes=50)
    assert (best_overlaps(found.boxes.astype(np.float64), mirrored) > 0.7).all()


def test_thinned_edges_are_thin() -> None:
    from siamese_detr.proposals.methods import _gradient_edges

    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    edges, orientation = _gradient_edges(image, 1.3)
    assert ((edges > 0.5).sum(1) <= 2).all()
    assert edges.max() <= 1
    # The normal of an upright edge lies flat.
    assert np.allclose(np.sin(orientation[edges > 0.5]), 0, atol=1e-4)


def test_a_featureless_image_gets_the_centred_box() -> None:
    found = edge_boxes(np.full((120, 200, 3), 77, np.uint8))
    assert found.origin == "centre"
    np.testing.assert_array_equal(found.boxes, [[50, 30, 150, 90]])
    assert found.scores.tolist() == [0]


def test_a_tiny_image_is_enlarged() -> None:
    image = np.full((17, 17, 3), 100, np.uint8)
    image[5:12, 5:12] = 110
    found = edge_boxes(image, settings=EdgeBoxesSettings(min_area=0.005))
    check(found, 17, 17)
    assert found.origin in ("image", "enhanced")


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 400), st.integers(16, 400), st.integers(0, 2**32 - 1), st.integers(1, 12))
@example(16, 16, 159, 1)  # a near-duplicate's score, scaled down to the last one's, was rounded up
def test_any_image_gives_valid_boxes(width: int, height: int, seed: int, cell: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height // cell + 1, width // cell + 1, 3), np.uint8)
    image = np.repeat(np.repeat(noise, cell, 0), cell, 1)[:height, :width].copy()
    check(edge_boxes(image, max_boxes=40, settings=EdgeBoxesSettings(side=64)), width, height)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 5000), st.integers(16, 5000), st.integers(0, 2**32 - 1))
def test_random_boxes(width: int, height: int, seed: int) -> None:
    found = random_boxes(width, height, rng(seed, 1))
    check(found, width, height)
    assert len(found.boxes) == 100
    w, h = (found.boxes[:, 2:] - found.boxes[:, :2]).T
    if max(width, height) < 8 * min(width, height):
        assert (np.maximum(w, h) <= 8.01 * np.minimum(w, h)).all()
    np.testing.assert_array_equal(random_boxes(width, height, rng(seed, 1)).boxes, found.boxes)


def test_an_edge_model_that_is_none(tmp_path: Path) -> None:
    image, _ = scene()
    with pytest.raises(UserError, match="does not exist; leave it out"):
        edge_boxes(image, model=str(tmp_path / "model.yml.gz"))
    (tmp_path / "model.yml.gz").write_text("no model")
    with pytest.raises(UserError, match="OpenCV cannot load it"):
        edge_boxes(image, model=str(tmp_path / "model.yml.gz"))
