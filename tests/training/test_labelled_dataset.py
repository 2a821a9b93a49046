"""Labelled samples: boxes stay on their pixels, randomness is counted, batches are whole."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siamese_detr.images.decode import read_image
from siamese_detr.images.labels import read_labels
from siamese_detr.randomness import rng
from siamese_detr.training.labelled_dataset import (
    Cut,
    EpochBatches,
    TrainingImages,
    TransformConfig,
    collate,
    cut_boxes,
    cut_image,
    draw_cut,
    prepare,
    repeat_factors,
    short_sides,
)
from siamese_detr.training.task import skip

sizes = st.integers(40, 700)
configs = st.builds(
    TransformConfig,
    image_size=st.integers(64, 400),
    max_size=st.just(600),
    square=st.booleans(),
    crop=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(width=sizes, height=sizes, config=configs, seed=st.integers(0, 10**6))
def test_cuts_lie_in_the_image_and_keep_to_the_limits(width, height, config, seed):
    cut = draw_cut(width, height, config, rng(seed))
    x1, y1, x2, y2 = cut.rectangle
    assert 0 <= x1 < x2 <= width + 1e-9
    assert 0 <= y1 < y2 <= height + 1e-9
    if config.square:
        assert cut.size == (config.image_size, config.image_size)
    else:
        assert min(cut.size) <= max(short_sides(config))
        assert max(cut.size) <= config.max_size
        assert cut.size[1] / cut.size[0] == pytest.approx((x2 - x1) / (y2 - y1), rel=1.5 / min(cut.size))


def test_sizes_are_those_of_detr():
    assert short_sides(TransformConfig(800)) == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]


@settings(max_examples=40, deadline=None)
@given(
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    flip=st.booleans(),
    square=st.booleans(),
    seed=st.integers(0, 999),
)
def test_boxes_stay_on_their_pixels(corners, flip, square, seed):
    width, height = 240, 160
    config = TransformConfig(image_size=320, max_size=600, square=square, crop=1.0, flip=float(flip))
    cut = draw_cut(width, height, config, rng(seed))
    # Red tells the column, green the row: the colours at a box's corners say where in the original it lies.
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    picture = np.stack([columns, rows, 0 * rows], axis=-1).round().astype(np.uint8)
    taken = cut_image(picture, cut, (width, height)).astype(float)
    x1, y1, x2, y2 = cut.rectangle
    xs, ys = sorted(corners[:2]), sorted(corners[2:])
    box = np.array([[x1 + xs[0] * (x2 - x1), y1 + ys[0] * (y2 - y1), x1 + xs[1] * (x2 - x1), y1 + ys[1] * (y2 - y1)]])
    boxes, classes = cut_boxes(box, np.array([3]), cut)
    if len(boxes) == 0:
        assert (xs[1] - xs[0]) * cut.size[1] < 1 + 1e-6 or (ys[1] - ys[0]) * cut.size[0] < 1 + 1e-6
        return
    assert classes.tolist() == [3]
    cx, cy, w, h = boxes[0]
    column = min(int(cx * cut.size[1]), cut.size[1] - 1)
    row = min(int(cy * cut.size[0]), cut.size[0] - 1)
    centre = (box[0, :2] + box[0, 2:]) / 2
    np.testing.assert_allclose(taken[row, column, :2], centre, atol=1.6)
    np.testing.assert_allclose([w, h], [xs[1] - xs[0], ys[1] - ys[0]], atol=1e-5)


def test_boxes_stay_on_their_pixels_where_a_jpeg_is_decoded_smaller(tmp_path):
    """1/8 of 1001 pixels are 126, of which the last is not a whole one."""
    picture = np.zeros((801, 1001, 3), np.uint8)
    picture[:, 960:968] = picture[760:768] = 255
    Image.fromarray(picture).save(tmp_path / "lines.jpg", quality=95)
    small = read_image(tmp_path / "lines.jpg", min_side=100)
    assert small.shape == (101, 126, 3)
    taken = cut_image(small, Cut((901, 701, 1001, 801), (100, 100), flip=False), (1001, 801)).astype(float)
    for profile in (taken[:40].mean((0, 2)), taken[:, :40].mean((1, 2))):
        centre = (profile * (np.arange(100) + 0.5)).sum() / profile.sum()
        assert abs(centre - 63) < 0.5  # (964 - 901)


@pytest.mark.parametrize("square", [True, False])
def test_boxes_stay_on_their_pixels_under_strong_augmentation(tmp_path, square):
    """A black rectangle on white is where its box says in every augmented picture, at every brightness and contrast."""
    picture = np.full((150, 210, 3), 255, np.uint8)
    picture[40:100, 60:130] = 0
    Image.fromarray(picture).save(tmp_path / "a.png")
    labels = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [60, 40, 70, 60], "area": 4200}
    images = [{"id": 1, "file_name": "a.png", "width": 210, "height": 150}]
    document = {"images": images, "annotations": [labels], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "labels.json").write_text(json.dumps(document))
    config = TransformConfig(image_size=128, max_size=200, square=square, strong=True)
    samples = TrainingImages(read_labels(tmp_path / "labels.json", tmp_path), config, 0)
    assert (samples[(3, 0)].pixels == samples[(3, 0)].pixels).all()
    seen = 0
    for epoch in range(40):
        sample = samples[(epoch, 0)]
        height, width = sample.pixels.shape[:2]
        assert (height, width) == (128, 128) if square else max(height, width) <= 200
        for cx, cy, w, h in sample.boxes:
            dark = sample.pixels.max(-1) < 0.6 * sample.pixels.max()
            columns, rows = slice(int((cx - w / 2) * width) + 2, int((cx + w / 2) * width) - 2), int(cy * height)
            if w * width > 8 and h * height > 4:
                assert dark[rows, columns].all()
                seen += 1
    assert seen > 20
    assert len({sample.pixels.tobytes() for sample in map(samples.__getitem__, [(e, 0) for e in range(9)])}) > 6


def test_boxes_are_clipped_and_vanishing_ones_dropped():
    cut = Cut((50, 0, 150, 100), (200, 200), flip=True)
    boxes = np.array([[0, 0, 100, 50], [0, 0, 49, 100], [149.9, 10, 300, 90], [60, 60, 90, 60.2]], np.float32)
    kept, classes = cut_boxes(boxes, np.arange(4), cut)
    assert classes.tolist() == [0]
    np.testing.assert_allclose(kept, [[0.75, 0.25, 0.5, 0.5]], atol=1e-6)


def test_samples_depend_on_seed_epoch_and_index_alone(coco):
    dataset = read_labels(coco)
    config = TransformConfig(image_size=96, max_size=160)
    one, other = TrainingImages(dataset, config, 5), TrainingImages(dataset, config, 5)
    first = one[(2, 3)]
    other[(0, 0)], other[(2, 1)]
    again = other[(2, 3)]
    assert (first.pixels == again.pixels).all()
    assert (first.boxes == again.boxes).all()
    assert (first.jitter == again.jitter).all()
    for key, seed in (((3, 3), 5), ((2, 3), 6)):
        changed = TrainingImages(dataset, config, seed)[key]
        assert not np.array_equal(changed.jitter, first.jitter)


def test_crowds_are_no_targets(coco):
    dataset = read_labels(coco)
    dataset.images[1].crowd[:] = True
    config = TransformConfig(image_size=96, max_size=160, crop=0)
    assert len(TrainingImages(dataset, config, 0)[(0, 1)].boxes) == 0


def test_batches_pad_and_leave_out_what_cannot_be_read(coco, photos):
    dataset = read_labels(coco)
    Path(dataset.images[2].path).write_bytes(b"gone")
    images = TrainingImages(dataset, TransformConfig(image_size=64, max_size=200, colour_jitter=0), 0)
    batch = collate([images[(0, n)] for n in range(4)])
    assert [Path(path).name for path, _ in batch["skipped"]] == ["2.jpg"]
    assert batch["index"].tolist() == [0, 1, 3]
    assert batch["images"].dtype == torch.uint8
    height, width = batch["sizes"].max(0).values.tolist()
    assert batch["images"].shape == (3, 3, height, width)
    assert ((batch["classes"] >= 0).sum(1) > 0).any()
    assert len(collate([images[(0, 2)]])["images"]) == 0

    values, mask = prepare(batch, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    for row, (h, w) in enumerate(batch["sizes"].tolist()):
        assert mask[row].sum() == h * w
        assert mask[row, :h, :w].all()
        assert (values[row][:, ~mask[row]] == 0).all()
        expected = (batch["images"][row, :, :h, :w].float() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
        torch.testing.assert_close(values[row, :, :h, :w], expected, atol=1e-5, rtol=0)


def test_colour_jitter_changes_colours_only_within_bounds():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    batch = {
        "images": images,
        "sizes": torch.tensor([[8, 8], [8, 8]]),
        "jitter": torch.tensor([[1.0, 1, 1], [1.5, 0.5, 0]]),
    }
    values, _ = prepare(batch, (0, 0, 0), (1, 1, 1))
    torch.testing.assert_close(values[0], images[0].float() / 255, atol=1e-6, rtol=0)
    assert values.min() >= 0
    assert values.max() <= 1
    torch.testing.assert_close(values[1, 0], values[1, 1], atol=1e-6, rtol=0)  # no saturation: grey


def test_every_epoch_has_every_image_once_and_longer_runs_begin_alike():
    batches = EpochBatches(images=10, batch_size=4, batches=10, seed=1)
    keys = [key for batch in batches for key in batch]
    for epoch in range(4):
        assert sorted(keys[10 * epoch : 10 * epoch + 10]) == [(epoch, n) for n in range(10)]
    assert [n for _, n in keys[:10]] != [n for _, n in keys[10:20]]
    longer = EpochBatches(images=10, batch_size=4, batches=50, seed=1)
    assert [longer[n] for n in range(10)] == list(batches)
    assert list(skip(batches, 7)) == list(batches)[7:]
    assert list(EpochBatches(10, 4, 10, seed=2)) != list(batches)
    assert len(EpochBatches(3, 8, 1, seed=0)[0]) == 8  # more than there are: several epochs in one batch


def test_images_of_rare_classes_are_shown_more_often(coco):
    dataset = read_labels(coco)
    dataset.class_names = ["common", "rare"]
    item = dataset.images[0]
    kinds = [[0], [0, 1], *[[0]] * 13, []]
    dataset.images = [
        replace(item, classes=np.array(k, np.int64), crowd=np.zeros(len(k), bool), boxes=np.ones((len(k), 4)))
        for k in kinds
    ]
    factors = repeat_factors(dataset, 0.36)
    assert factors.tolist() == pytest.approx([1, math.sqrt(0.36 * 16), *[1] * 14])
    assert set(repeat_factors(dataset, 0.0)) == {1.0}

    batches = EpochBatches(16, 4, 100, seed=0, repeats=factors)
    assert batches.epoch_size == round(15 + 2.4)
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)  # each repetition is augmented differently
    epochs = [[n for _, n in keys[17 * e : 17 * e + 17]] for e in range(400 // 17)]
    rare = [epoch.count(1) for epoch in epochs]
    assert set(rare) == {2, 3}
    assert 2.2 < np.mean(rare) < 2.6
    assert all(0 <= epoch.count(n) <= 1 for epoch in epochs for n in range(16) if n != 1)
    assert [keys for keys in skip(batches, 40)] == list(batches)[40:]


def test_photos_are_decoded_no_larger_than_needed(tmp_path, coco, monkeypatch):
    dataset = read_labels(coco)
    item = dataset.images[1]
    Image.new("RGB", (item.width * 8, item.height * 8)).save(item.path)
    dataset.images[1] = replace(item, width=item.width * 8, height=item.height * 8)
    from siamese_detr.training import labelled_dataset

    decoded = []
    read = labelled_dataset.read_image
    monkeypatch.setattr(labelled_dataset, "read_image", lambda *a, **k: decoded.append(read(*a, **k)) or decoded[-1])
    sample = TrainingImages(dataset, TransformConfig(image_size=96, max_size=160, crop=0), 0)[(0, 1)]
    assert min(sample.pixels.shape[:2]) <= min(decoded[0].shape[:2]) < 250
