"""View geometry: the paper's rules by property, and numbers computed with the official code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_detr.views import geometry, regions

CASES = json.loads((Path(__file__).parents[1] / "data" / "view_geometry.json").read_text())["cases"]

unit = st.floats(0, 1)
extents = st.tuples(st.integers(1, 900), st.integers(1, 900))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(geometry.ious(np.asarray(a)[None], np.asarray(b))[0])


@st.composite
def outers(draw: st.DrawFn) -> np.ndarray:
    x, y = draw(st.integers(0, 300)), draw(st.integers(0, 300))
    width, height = draw(extents)
    return np.array([x, y, x + width, y + height], float)


@given(outers(), st.floats(0.05, 1), st.booleans(), st.booleans())
def test_maximal_views_have_exactly_the_wanted_iou(outer, tau, swap, other):
    pair = geometry.view_pair(outer, tau, swap=swap, other_diagonal=other)
    assert iou(*pair.views) == pytest.approx(tau, rel=1e-9)


@given(outers(), st.floats(0.05, 1), unit, unit, st.booleans(), st.booleans())
def test_shrinking_never_lowers_the_iou_and_keeps_aspect_and_intersection(outer, tau, first, second, swap, other):
    pair = geometry.view_pair(outer, tau, (first, second), swap, other)
    assert iou(*pair.views) >= tau * (1 - 1e-9)
    overlap = np.concatenate([pair.views[:, :2].max(0), pair.views[:, 2:].min(0)])
    np.testing.assert_allclose(overlap, pair.intersection, atol=1e-9)
    width, height = outer[2:] - outer[:2]
    for view in pair.views:
        assert (view[2] - view[0]) / (view[3] - view[1]) == pytest.approx(width / height, rel=1e-6)
        assert (view[:2] >= outer[:2] - 1e-9).all()
        assert (view[2:] <= outer[2:] + 1e-9).all()


@given(outers(), unit, unit, st.lists(st.tuples(unit, unit, unit, unit), min_size=1, max_size=5), extents)
def test_boxes_map_to_the_other_view_and_back(outer, first, second, draws, size):
    pair = geometry.view_pair(outer, 0.5, (first, second))
    low, high = np.split(pair.intersection, 2)
    corners = low + np.array(draws).reshape(-1, 2, 2) * (high - low)
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    there = geometry.to_view(boxes, pair.views[0], size)
    base = geometry.from_view(there, pair.views[0], size)
    np.testing.assert_allclose(base, boxes, atol=1e-9)
    back = geometry.to_view(
        geometry.from_view(geometry.to_view(base, pair.views[1], size), pair.views[1], size), pair.views[0], size
    )
    np.testing.assert_allclose(back, there, atol=1e-7)
    frame = np.array([0, 0, size[1], size[0]])
    for view in pair.views:
        mapped = geometry.to_view(boxes, view, size)
        np.testing.assert_allclose(geometry.clamp(mapped, frame), mapped, atol=1e-7)


@given(outers(), st.lists(st.tuples(unit, unit, unit, unit), max_size=6), st.integers(0, 9), st.integers(0, 99))
def test_padding_lies_in_the_intersection_with_area(outer, draws, count, seed):
    inner = geometry.intersection_rectangle(outer, 0.5)
    candidates = regions.random_boxes(np.array(draws).reshape(-1, 4), inner)
    kept, _ = geometry.shared_regions(candidates, inner, 0.05)
    offsets = np.random.default_rng(seed).uniform(-0.1, 0.1, (count, 4))
    padding = geometry.pad_regions(kept, inner, offsets)
    assert padding.shape == (count, 4)
    np.testing.assert_array_equal(geometry.clamp(padding, inner), padding)
    sources = kept if len(kept) else inner[None]
    for i, box in enumerate(padding):
        assert iou(box, sources[i % len(sources)]) > 0.5
        assert geometry.areas(box) > 0


def test_regions_touching_the_edges_survive_on_every_side():
    inner = np.array([10.3, 20.7, 110.1, 90.9])
    whole = np.array([[-5, -5, 500, 500.0]])
    left, right = [-5, 0, 60, 500.0], [60, 0, 500, 500.0]
    boxes, kept = geometry.shared_regions(np.concatenate([whole, [left, right, [0, 0, 10.3, 99]]]), inner)
    assert kept.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(boxes[0], inner)


@given(extents, st.lists(st.tuples(unit, unit), min_size=10, max_size=10), unit, unit)
def test_outer_rectangle_lies_in_the_image(size, draws, x, y):
    area, aspect = np.array(draws).T
    box = geometry.outer_rectangle(size, area, aspect, (min(x, 0.999), min(y, 0.999)))
    assert (box[:2] >= 0).all()
    assert (box[2:] <= size).all()
    assert (box[2:] - box[:2] >= 1).all()
    assert (box == np.round(box)).all()


def test_outer_rectangle_has_the_drawn_area_and_aspect_and_a_centred_fallback():
    box = geometry.outer_rectangle((400, 300), [0.5], [0.5], (0, 0))  # 75 % of the area, square
    np.testing.assert_array_equal(box, [0, 0, 300, 300])
    panorama = geometry.outer_rectangle((1000, 90), np.full(10, 0.9), np.full(10, 0.5), (0.1, 0.9))
    np.testing.assert_array_equal(panorama, [440, 0, 560, 90])
    tower = geometry.outer_rectangle((90, 1000), np.full(10, 0.9), np.full(10, 0.5), (0.1, 0.9))
    np.testing.assert_array_equal(tower, [0, 440, 90, 560])


def test_sizes_of_many_images_equal_sizes_of_one():
    random = np.random.default_rng(0)
    sizes, short = random.integers(1, 700, (50, 2)), random.integers(10, 400, 50)
    draws = random.random((2, 50, 10))
    base = geometry.base_sizes(sizes, short, 500)
    assert base.max() <= 500
    outer, _ = geometry.outer_sizes(base, *draws)
    for i in range(50):
        np.testing.assert_array_equal(geometry.base_sizes(sizes[i], short[i], 500)[0], base[i])
        alone = geometry.outer_rectangle(tuple(base[i]), draws[0, i], draws[1, i], (0.3, 0.7))
        np.testing.assert_array_equal(alone[2:] - alone[:2], outer[i])


def test_diverse_selection_has_no_near_duplicates_and_prefers_high_scores():
    random = np.random.default_rng(0)
    corners = random.random((300, 2, 2)) * 100
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    boxes[1::2] = boxes[::2] + 0.1  # every box has a twin
    scores = random.random(300)
    whole = np.array([0, 0, 100, 100.0])
    counts = np.zeros(300)
    for draw in range(40):
        chosen = regions.choose_diverse(boxes, scores, 9, np.random.default_rng(draw).random(300), 0.8, whole)
        assert len(chosen) == 9
        for i in range(9):
            assert geometry.ious(chosen[:i], chosen[i]).max(initial=0) <= 0.8
            assert iou(chosen[i], whole) <= 0.8
        counts += (boxes[:, None] == chosen).all(-1).any(1)
    assert counts[scores > 0.5].sum() > 2 * counts[scores < 0.5].sum() > 0
    twins = regions.choose_diverse(np.tile(whole, (5, 1)), np.zeros(5), 3, np.full(5, 0.5))
    assert len(twins) == 1


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 400), st.integers(1, 400))
def test_random_boxes_and_patches_obey_their_limits(seed, width, height):
    draws = np.random.default_rng(seed).random((50, 4))
    boxes = regions.random_boxes(draws, [10, 20, 10 + width, 20 + height])
    extent = boxes[:, 2:] - boxes[:, :2]
    assert (extent > 0).all()
    assert (extent.max(1) <= 8 * extent.min(1)).all()
    assert (boxes >= [10, 20, 10, 20]).all()
    assert (boxes <= [10 + width, 20 + height] * 2).all()
    patches = regions.random_patches(draws, (height, width))
    assert (patches[:, 2:] - patches[:, :2] >= np.minimum(8, [width, height]) - 1e-9).all()
    assert (patches[:, :2] >= 0).all()
    assert (patches[:, 2:] <= [width, height]).all()


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_official_geometry(case):
    """Rectangles, kept proposals and their boxes in both views.

    The official code clamps right and bottom edges one pixel short, left and top ones not; here proposals are cut so
    before they are given to our functions, everything after is compared exactly. Padding is compared before that clamp.
    """
    original, base = case["original_size_wh"], case["base_size_wh"]
    short = min(base) if max(base) < 600 else 480
    np.testing.assert_array_equal(geometry.base_sizes(original, short, 600)[0], base)
    shrink = tuple(case["shrink_share"]) or (0, 0)
    pair = geometry.view_pair(case["outer_box_xyxy"], case["iou"], shrink, case["swapped"])
    views = np.array([case["view_q_xyxy_base"], case["view_k_xyxy_base"]])
    np.testing.assert_allclose(pair.views, views, atol=1e-8)
    np.testing.assert_allclose(pair.intersection, case["intersection_base_xyxy"], atol=1e-8)

    size = tuple(case["view_size_hw"])
    assert size == tuple((pair.outer[2:] - pair.outer[:2])[::-1])
    inner = pair.intersection
    proposals = np.array(case["proposals_base_xyxy"])
    short_by_one = np.concatenate([inner[:2], inner[2:] - 1])
    # The share is of the whole intersection, so only the boxes may be cut short.
    kept, positions = geometry.shared_regions(geometry.clamp(proposals, short_by_one), inner, case["area_min_ratio"])
    np.testing.assert_array_equal(positions, np.flatnonzero(case["kept_proposal_exact_mask"]))
    exact = [geometry.to_view(kept, view, size) for view in pair.views]
    np.testing.assert_allclose(exact[0], np.array(case["exact_q"]).reshape(-1, 4), atol=2e-5)
    np.testing.assert_allclose(exact[1], np.array(case["exact_k"]).reshape(-1, 4), atol=2e-5)
    ours, kept_ours = geometry.shared_regions(proposals, inner, case["area_min_ratio"])
    assert set(positions) <= set(kept_ours)
    assert np.abs(ours[np.isin(kept_ours, positions)] - kept).max() <= 1 + 1e-9

    for view, final in zip(pair.views, (case["final_q"], case["final_k"]), strict=True):
        np.testing.assert_allclose(geometry.to_view(inner, view, size), final[0], atol=1e-4)
    usable = kept[~np.array(case["official_dropped"], bool)]
    chosen = regions.choose_top(usable, np.linspace(1, 0, len(usable)), 9)
    final = np.array(case["final_q"])
    np.testing.assert_allclose(geometry.to_view(chosen, pair.views[0], size), final[1 : 1 + len(chosen)], atol=2e-4)
    assert 9 - len(chosen) == case["n_padded"]
    if case["n_padded"]:
        sigmoid = 1 / (1 + np.exp(-np.array(case["pad_randn"])))
        padding = geometry.pad_regions(chosen, inner, 0.2 * sigmoid - 0.1)
        in_q = geometry.to_view(padding, pair.views[0], size)
        official = final[1 + len(chosen) :]
        # Official padding is cut one pixel of view 1 before the right and bottom edges of the intersection.
        limit = np.array(case["final_q"][0])[2:] - 1
        np.testing.assert_allclose(in_q[:, :2], official[:, :2], atol=2e-4)
        np.testing.assert_allclose(np.minimum(in_q[:, 2:], limit), official[:, 2:], atol=2e-4)
