"""Boxes of one image: geometry, determinism, and images that have nothing to find."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from siamese_detr.errors import UserError
from siamese_detr.proposals.methods import EdgeBoxes, RandomBoxes, SelectiveSearch, find_method, make_method
from siamese_detr.views.geometry import ious


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
    return np.array([ious(found, box).max() for box in wanted])


def check(boxes: np.ndarray, scores: np.ndarray, width: int, height: int) -> None:
    assert boxes.dtype == scores.dtype == np.float32
    assert boxes.shape == (len(scores), 4)
    assert len(boxes) > 0
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= width).all()
    assert (boxes[:, [1, 3]] <= height).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("size", [(240, 180), (960, 720)])
def test_edge_boxes_find_objects_at_any_resolution(size: tuple[int, int]) -> None:
    image, objects = scene(*size)
    boxes, scores = EdgeBoxes(max_boxes=50).boxes(image, "")
    check(boxes, scores, *size)
    assert (best_overlaps(boxes, objects) > 0.7).all()


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_selective_search_finds_objects(mode: Literal["fast", "full"]) -> None:
    image, objects = scene()
    search = SelectiveSearch(mode=mode)
    boxes, scores = search.boxes(image, "")
    check(boxes, scores, 240, 180)
    assert (best_overlaps(boxes, objects) > 0.7).all()
    np.testing.assert_array_equal(search.boxes(image, "")[0], boxes)
    assert len(SelectiveSearch(max_boxes=2, mode=mode).boxes(image, "")[0]) == 2


def test_edge_boxes_are_deterministic_limited_and_not_near_duplicates() -> None:
    image, _ = scene()
    np.testing.assert_array_equal(EdgeBoxes().boxes(image, "")[0], EdgeBoxes().boxes(image, "")[0])
    boxes, _ = EdgeBoxes(max_boxes=7).boxes(image, "")
    assert len(boxes) == 7
    for index in range(1, 7):
        assert best_overlaps(boxes[:index], boxes[index : index + 1]) <= 0.501


def test_edge_boxes_do_not_depend_on_the_image_being_mirrored() -> None:
    image, objects = scene()
    mirrored = objects.copy()
    mirrored[:, [0, 2]] = 240 - objects[:, [2, 0]]
    boxes, _ = EdgeBoxes(max_boxes=50).boxes(np.ascontiguousarray(image[:, ::-1]), "")
    assert (best_overlaps(boxes, mirrored) > 0.7).all()


def test_thinned_edges_are_thin() -> None:
    from siamese_detr.proposals.methods import _gradient_edges

    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    edges, orientation = _gradient_edges(image, 1.3)
    assert ((edges > 0.5).sum(1) <= 2).all()
    assert edges.max() <= 1
    # The normal of an upright edge lies flat.
    assert np.allclose(np.sin(orientation[edges > 0.5]), 0, atol=1e-4)


def test_a_featureless_image_has_no_edge_boxes() -> None:
    boxes, scores = EdgeBoxes().boxes(np.full((120, 200, 3), 77, np.uint8), "")
    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)


def test_a_tiny_image_is_enlarged() -> None:
    image = np.full((17, 17, 3), 100, np.uint8)
    image[5:12, 5:12] = 110
    check(*EdgeBoxes(min_area=0.005).boxes(image, ""), 17, 17)


@settings(max_examples=25, deadline=None)
@given(st.integers(16, 400), st.integers(16, 400), st.integers(0, 2**32 - 1), st.integers(1, 12))
@example(16, 16, 159, 1)  # a near-duplicate's score, scaled down to the last one's, was rounded up
def test_any_image_gives_valid_boxes(width: int, height: int, seed: int, cell: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height // cell + 1, width // cell + 1, 3), np.uint8)
    image = np.repeat(np.repeat(noise, cell, 0), cell, 1)[:height, :width].copy()
    boxes, scores = EdgeBoxes(max_boxes=40, side=64).boxes(image, "")
    if len(boxes):
        check(boxes, scores, width, height)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 5000), st.integers(16, 5000), st.integers(0, 2**32 - 1))
def test_random_boxes(width: int, height: int, seed: int) -> None:
    image = np.broadcast_to(np.uint8(0), (height, width, 3))
    boxes, scores = RandomBoxes(seed=seed).boxes(image, "a.jpg")
    check(boxes, scores, width, height)
    assert len(boxes) == 100
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    if max(width, height) < 8 * min(width, height):
        assert (np.maximum(w, h) <= 8.01 * np.minimum(w, h)).all()
    np.testing.assert_array_equal(RandomBoxes(seed=seed).boxes(image, "a.jpg")[0], boxes)
    assert not np.array_equal(RandomBoxes(seed=seed).boxes(image, "b.jpg")[0], boxes)


def test_an_edge_model_that_is_none(tmp_path: Path) -> None:
    method = EdgeBoxes(edge_model=str(tmp_path / "model.yml.gz"))
    with pytest.raises(UserError, match="does not exist; leave it out"):
        method.parameters()
    (tmp_path / "model.yml.gz").write_text("no model")
    with pytest.raises(UserError, match="OpenCV cannot load it"):
        method.parameters()


def test_methods_and_options_are_looked_up_by_name() -> None:
    shared = {"max_boxes": 9, "mode": "full", "seed": 3}
    assert make_method("selective-search", shared, {}) == SelectiveSearch(max_boxes=9, mode="full")
    assert make_method("edge-boxes", shared, {"alpha": 0.6}) == EdgeBoxes(max_boxes=9, alpha=0.6)
    with pytest.raises(UserError, match=r"unknown proposal method 'edge-bokses' \(did you mean 'edge-boxes'\?\)"):
        find_method("edge-bokses")
    with pytest.raises(UserError, match=r"unknown key 'alfa' in the options of edge-boxes \(did you mean 'alpha'"):
        make_method("edge-boxes", shared, {"alfa": 0.6})
    with pytest.raises(UserError, match="mode='slow' in the options of selective-search is not valid"):
        make_method("selective-search", {"mode": "slow"}, {})
