"""Views of real files: pixels and boxes agree, samples are counted, bad files reported, batches well formed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from conftest import textured
from siamese_detr.errors import UserError
from siamese_detr.proposals.shard import StoredImage
from siamese_detr.views import geometry
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.plan import plan_sample, uniforms, view_sizes
from siamese_detr.views.sampler import ViewBatchSampler, group_by_size
from siamese_detr.views.two_views import TwoViewDataset, collate, cut_views
from view_cases import SMALL, MemoryStore, SizesOnly, photo_store, stored


@pytest.fixture
def store(photos: Path) -> MemoryStore:
    return photo_store(photos)


CONFIGS = {
    "paper": SMALL,
    "diverse": replace(SMALL, selection="diverse", diagonals=True),
    "square": replace(SMALL, view_size=64),
    "random": replace(SMALL, box_source="random", iou=0.3),
    "large": ViewConfig(short_sides=tuple(range(480, 801, 32)), max_size=1333),
    "patches": replace(SMALL, views="patches", num_regions=10),
    "proposals": replace(SMALL, views="proposals", num_regions=30),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_box_is_in_bounds_with_area_in_every_view(name):
    config = CONFIGS[name]
    for index in range(60):
        size = [(500, 375), (333, 500), (640, 90), (7, 5)][index % 4]
        image = stored("-", *size, count=[60, 3, 0][index % 3], seed=index)
        plan = plan_sample(config, image, 1, 2, index)
        assert plan.boxes.shape == (config.num_views, config.num_regions, 4)
        assert plan.boxes.dtype == np.float32
        real = config.num_regions - (plan.padded if config.views == "proposals" else 0)
        assert not plan.boxes[:, real:].any(), "DETReg's padding is no target"
        plan = replace(plan, boxes=plan.boxes[:, :real], query_boxes=plan.query_boxes[:, :real])
        for boxes in (plan.boxes, plan.query_boxes):
            assert (boxes[..., 2:] > boxes[..., :2]).all()
            assert (boxes >= 0).all()
            assert (boxes <= [plan.size[1], plan.size[0]] * 2).all()
        extent = plan.boxes[..., 2:] - plan.boxes[..., :2]
        moved = np.abs(plan.query_boxes - plan.boxes) / np.concatenate([extent, extent], -1)
        assert moved.max(initial=0) <= config.box_jitter + 1e-3
        assert tuple(view_sizes(config, [size], 1, 2, index)[0]) == plan.size
        if config.views == "two" and len(image.boxes) == 0 and config.box_source == "proposals":
            assert plan.padded == config.num_regions - 1


def test_first_region_is_what_both_views_share():
    for index in range(20):
        plan = plan_sample(SMALL, stored("-", 500, 375), 0, 0, index)
        shared = [geometry.from_view(plan.boxes[v, 0], plan.rectangles[v], plan.size) for v in range(2)]
        if plan.flip:
            mirrored = [geometry.mirror(plan.boxes[v, 0], plan.size[1]) for v in range(2)]
            shared = [geometry.from_view(mirrored[v], plan.rectangles[v], plan.size) for v in range(2)]
        np.testing.assert_allclose(shared[0], shared[1], atol=1e-3)
        union = geometry.areas(plan.rectangles).sum() - geometry.areas(shared[0])
        assert geometry.areas(shared[0]) / union >= 0.5 - 1e-6


def test_top_takes_the_best_scored_and_diverse_changes_with_the_epoch():
    image = stored("-", 500, 375)
    top = [plan_sample(replace(SMALL, flip=False), image, 0, 0, 3).boxes for _ in range(2)]
    np.testing.assert_array_equal(*top)
    config = replace(SMALL, selection="diverse", flip=False)
    regions = []
    for epoch in range(2):
        plan = plan_sample(config, image, 0, epoch, 3)
        regions.append(geometry.from_view(plan.boxes[0], plan.rectangles[0], plan.size))
    assert np.abs(regions[0] - regions[1]).max() > 1


def test_views_swap_and_shrink_at_random_each_by_itself():
    plans = [plan_sample(SMALL, stored("-", 500, 375, count=0), 0, 0, index) for index in range(400)]
    swapped = np.array([plan.rectangles[0, 1] > plan.rectangles[1, 1] for plan in plans])
    flipped = np.array([plan.flip for plan in plans])
    for events, share in ((swapped, 0.5), (flipped, 0.5), (swapped & flipped, 0.25)):
        assert abs(events.mean() - share) < 5 * (share * (1 - share) / len(plans)) ** 0.5
    # The share that both show is two thirds of the upper and of the lower view until they shrink.
    shared = np.array([geometry.areas(plan.boxes[:, 0]) / np.prod(plan.size) for plan in plans])
    shared = np.where(swapped[:, None], shared[:, ::-1], shared)
    assert (shared > 2 / 3 - 0.001).all()
    assert ((shared > 2 / 3 + 0.001).mean(0) > 0.95).all()
    np.testing.assert_allclose(shared.mean(0), shared.mean(), atol=5 * shared.std() / len(plans) ** 0.5)
    assert abs(np.corrcoef(shared.T)[0, 1]) < 5 / len(plans) ** 0.5


def test_edges_of_query_boxes_move_at_random_each_by_itself():
    config = replace(SMALL, box_source="random")
    plans = [plan_sample(config, stored("-", 500, 375, count=0), 0, 0, index) for index in range(200)]
    boxes, moved = (np.stack(x) for x in zip(*((plan.boxes, plan.query_boxes) for plan in plans), strict=True))
    extent = np.tile(boxes[..., 2:] - boxes[..., :2], 2)
    sides = np.array([plan.size[::-1] for plan in plans])[:, None, None]
    room = np.concatenate([boxes[..., :2], sides - boxes[..., 2:]], -1)
    inside = (room > config.box_jitter * extent).all((1, 3))  # in both views: no edge is held back
    offsets = ((moved - boxes) / extent).swapaxes(1, 2)[inside].reshape(-1, 8)
    assert len(offsets) > 300
    spread = config.box_jitter * np.tanh(np.random.default_rng(0).standard_normal(100_000) / 2).std()
    assert np.abs(offsets.mean(0)).max() < 5 * spread / len(offsets) ** 0.5
    np.testing.assert_allclose(offsets.std(0), spread, rtol=5 / (2 * len(offsets)) ** 0.5)
    assert np.abs(np.corrcoef(offsets.T) - np.eye(8)).max() < 5 / len(offsets) ** 0.5


@pytest.mark.parametrize("view_size", [None, 200])
@pytest.mark.parametrize("size", [(500, 375), (1500, 1125)])
def test_boxes_and_pixels_agree_below_a_pixel(size, view_size):
    """A bright rectangle on black, drawn at known edges: its edges in each view are where its mapped box says."""
    width, height = size
    box = np.array([0.42 * width, 0.4 * height, 0.61 * width, 0.63 * height]).round().astype(int)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[box[1] : box[3], box[0] : box[2]] = 255
    config = ViewConfig(num_regions=2, view_size=view_size, min_area=0.01)
    seen = 0
    for index in range(60):
        image = StoredImage("-", width, height, box[None].astype(np.float32), np.ones(1, np.float32))
        plan = plan_sample(config, image, 5, 0, index)
        if plan.padded:
            continue
        low, high = plan.boxes[:, 1, :2], np.array(plan.size[::-1]) - plan.boxes[:, 1, 2:]
        if min(low.min(), high.min()) < 4:  # cut by the intersection, or the filter's slope cut by the view
            continue
        for view, boxes in zip(cut_views(picture, size, plan), plan.boxes, strict=True):
            x0, y0, x1, y1 = boxes[1]
            bright = view[..., 0].astype(float) / 255
            # Whatever the filter, the sum of the bright part's profile is its extent and its centre of mass the centre.
            row, column = bright.max(0), bright.max(1)
            grid = [np.arange(len(p)) + 0.5 for p in (row, column)]
            seen += 1
            assert row.sum() == pytest.approx(x1 - x0, abs=0.2)
            assert column.sum() == pytest.approx(y1 - y0, abs=0.2)
            assert (row * grid[0]).sum() / row.sum() == pytest.approx((x0 + x1) / 2, abs=0.2)
            assert (column * grid[1]).sum() / column.sum() == pytest.approx((y0 + y1) / 2, abs=0.2)
    assert seen > 10


def test_both_views_show_the_same_pixels_in_every_region(tmp_path: Path):
    x, y = np.meshgrid(np.linspace(0, 1, 480), np.linspace(0, 1, 360))
    # Colour tells the place: red grows to the right, green downwards.
    picture = np.stack([x * 255, y * 255, np.full_like(x, 90)], -1).round().astype(np.uint8)
    for index in range(10):
        plan = plan_sample(ViewConfig(), stored("-", 480, 360), 0, 0, index)
        views = cut_views(picture, (480, 360), plan)
        for boxes in plan.boxes.swapaxes(0, 1):
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            colours = [view[int(c[1]), int(c[0])].astype(int) for view, c in zip(views, centre, strict=True)]
            assert np.abs(colours[0] - colours[1]).max() <= 3
            fraction = geometry.from_view(np.tile(centre[0], 2), plan.rectangles[0], plan.size)[:2] / [480, 360]
            if not plan.flip:
                np.testing.assert_allclose(colours[0][:2] / 255, fraction, atol=0.01)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_files_decoded_at_reduced_scale_give_the_same_views(tmp_path: Path, orientation):
    picture = textured(3, 1600, 1200)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "large.jpg"
    picture.save(path, quality=95, exif=exif)
    size = (1200, 1600) if orientation == 6 else (1600, 1200)
    config = ViewConfig(short_sides=(128,), max_size=400)
    dataset = TwoViewDataset(MemoryStore([stored(path, *size)]), config, 0)
    upright = np.asarray(
        picture.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation])
        if orientation > 1
        else picture
    )
    for epoch in range(4):
        sample = dataset[epoch, 0]
        reference = cut_views(upright, size, sample.plan)
        difference = np.abs(sample.images.astype(int) - reference)
        assert difference.mean() < 2


def test_samples_depend_only_on_seed_epoch_and_index_whatever_the_workers(store: MemoryStore):
    dataset = TwoViewDataset(store, SMALL, 7)
    sampler = ViewBatchSampler(store, SMALL, 3, 6, 7)
    runs = [list(DataLoader(dataset, batch_sampler=sampler, num_workers=n, collate_fn=collate)) for n in (0, 2)]
    assert len(runs[0]) == 6
    for one, other in zip(*runs, strict=True):
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key]), key
    again, epoch, seed = dataset[0, 1], dataset[1, 1], TwoViewDataset(store, SMALL, 8)[0, 1]
    np.testing.assert_array_equal(again.plan.boxes, dataset[0, 1].plan.boxes)
    for different in (epoch, seed):
        assert again.plan.rectangles.shape == different.plan.rectangles.shape
        assert not np.array_equal(again.plan.rectangles, different.plan.rectangles)


def test_unreadable_images_are_reported_and_left_out(store: MemoryStore, tmp_path: Path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(store.images[0].path).read_bytes()[:600])
    changed = stored(store.images[1].path, 999, 777)
    images = [store.images[0], stored(broken, 160, 120), stored(tmp_path / "gone.jpg", 160, 120), changed]
    dataset = TwoViewDataset(MemoryStore(images), SMALL, 0)
    batch = collate([dataset[0, i] for i in range(4)])
    assert batch["index"].tolist() == [0]
    assert batch["images"].shape[:2] == (1, 2)
    assert [path for path, _ in batch["skipped"]] == [str(broken), str(tmp_path / "gone.jpg"), changed.path]
    assert "run propose again" in batch["skipped"][2][1]
    nothing = collate([dataset[0, 1]])
    assert nothing["images"].shape[0] == nothing["boxes"].shape[0] == 0
    assert len(nothing["skipped"]) == 1


def test_batches_are_padded_right_and_bottom_with_zeros(store: MemoryStore):
    dataset = TwoViewDataset(store, SMALL, 0)
    samples = [dataset[0, i] for i in range(5)]
    batch = collate(samples)
    assert batch["images"].dtype == torch.uint8
    assert batch["images"].shape[:3] == (5, 2, 3)
    assert len({sample.plan.size for sample in samples}) > 1
    assert all(side % 32 == 0 for side in batch["images"].shape[3:])
    assert batch["photometric"].shape == (5, 2, 1 + SMALL.num_regions, 7)
    for b, sample in enumerate(samples):
        height, width = batch["sizes"][b, 0].tolist()
        assert (height, width) == sample.plan.size
        for v in range(2):
            view = batch["images"][b, v]
            np.testing.assert_array_equal(view[:, :height, :width].permute(1, 2, 0).numpy(), sample.images[v])
            assert view[:, height:].sum() == 0
            assert view[:, :, width:].sum() == 0


def test_sampler_sees_every_image_once_per_epoch_in_a_reproducible_random_order():
    sizes = SizesOnly(np.random.default_rng(0).integers(80, 600, (1000, 2)))
    batches = list(ViewBatchSampler(sizes, ViewConfig(), 8, 375, 3))
    assert len(batches) == 375
    assert all(len(batch) == 8 for batch in batches)
    keys = [key for batch in batches for key in batch]
    for epoch in range(2):
        seen = [index for e, index in keys if e == epoch]
        assert sorted(seen) == list(range(1000))
        assert np.corrcoef(seen, np.arange(1000))[0, 1] < 0.15
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]
    longer = ViewBatchSampler(sizes, ViewConfig(), 8, 500, 3)
    assert list(longer)[:375] == batches == list(ViewBatchSampler(sizes, ViewConfig(), 8, 375, 3))
    assert list(ViewBatchSampler(sizes, ViewConfig(), 8, 375, 3, start=130)) == batches[130:]
    assert list(ViewBatchSampler(sizes, ViewConfig(), 8, 10, 4)) != batches[:10]


def test_sampler_takes_few_images_again_and_again():
    sizes = SizesOnly(np.full((3, 2), 100))
    for config in (ViewConfig(), ViewConfig(view_size=192, num_regions=5, selection="diverse")):
        batches = list(ViewBatchSampler(sizes, config, 4, 48, 0))
        assert np.bincount([index for batch in batches for _, index in batch]).tolist() == [64, 64, 64]
    assert [epoch for batch in batches for epoch, _ in batch] == [n // 3 for n in range(192)]
    with pytest.raises(UserError, match="no images"):
        ViewBatchSampler(SizesOnly(np.zeros((0, 2))), ViewConfig(), 4, 10, 0)


def test_batches_of_similar_sizes_waste_little_padding():
    random = np.random.default_rng(0)
    common = np.array([[500, 375], [375, 500], [500, 333], [333, 500], [500, 500]])
    photos = common[random.choice(5, 4000, p=[0.45, 0.15, 0.22, 0.1, 0.08])]
    odd = random.random(4000) < 0.25
    photos[odd] = random.integers(150, 700, (odd.sum(), 2))
    config = ViewConfig()
    keys = np.array([key for batch in ViewBatchSampler(SizesOnly(photos), config, 16, 128, 0) for key in batch])
    sizes = view_sizes(config, photos[keys[:, 1]], 0, keys[:, 0], keys[:, 1])
    batches = sizes.reshape(-1, 16, 2)
    assert sizes.prod(1).sum() >= 0.85 * 16 * batches.max(1).prod(1).sum()
    groups = group_by_size(sizes[:160], 16)
    assert sorted(np.concatenate(groups)) == list(range(160))
    assert {len(group) for group in groups} == {16}


def test_counted_uniforms_are_uniform_and_independent():
    draws = uniforms(28, 0, 0, np.arange(4000))
    assert (draws >= 0).all()
    assert (draws < 1).all()
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(draws.var(0), 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(draws.T) - np.eye(28)).max() < 0.08
    np.testing.assert_array_equal(uniforms(28, 0, 0, 17)[0], draws[17])
    assert not np.isin(uniforms(28, 0, 1, np.arange(100)), draws).any()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("iou", 0.0),
        ("iou", 1.5),
        ("short_sides", ()),
        ("box_jitter", 0.5),
        ("min_area", 0.0),
        ("views", "three"),
        ("area_range", (0.9, 0.5)),
        ("blur_probability", 2.0),
        ("view_size", 4),
    ],
)
def test_impossible_settings_are_refused_by_name(setting, value):
    with pytest.raises(UserError, match=setting):
        ViewConfig(**{setting: value})
