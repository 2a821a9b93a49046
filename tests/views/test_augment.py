"""Photometric augmentation and crops against torchvision and Pillow; padding changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from PIL import Image
from torchvision.ops import roi_align

from conftest import textured
from siamese_detr.views.batch import prepare
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.photometric import ORDERS, augment_picture, blur_radius
from siamese_detr.views.plan import draw_photometric, plan_sample
from siamese_detr.views.resample import Pyramid, resize
from siamese_detr.views.two_views import TwoViewDataset, ViewSample, collate, cut_views
from view_cases import SMALL, photo_store, stored

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPERATIONS = (
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
    reference.adjust_hue,
)


def picture(seed: int, height: int = 60, width: int = 80) -> torch.Tensor:
    image = torch.from_numpy(np.asarray(textured(seed, width, height)).copy()).permute(2, 0, 1).float() / 255
    image[:, :4, :4] = 0.5  # grey, black and white have no hue
    image[:, :4, 4:8], image[:, :4, 8:12] = 0, 1
    return image


def row(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=-1, gray=0, sigma=0.0) -> np.ndarray:
    return np.array([[brightness, contrast, saturation, hue, order, gray, sigma]], np.float32)


def plain(image: torch.Tensor, parameters: np.ndarray) -> torch.Tensor:
    """One image, one operation after the other, by torchvision."""
    order = int(parameters[4])
    for operation in ORDERS[order] if order >= 0 else ():
        image = OPERATIONS[operation](image, float(parameters[operation]))
    if parameters[5] > 0:
        image = reference.rgb_to_grayscale(image, 3)
    if parameters[6] > 0:
        radius = blur_radius(float(parameters[6]))
        image = reference.gaussian_blur(image, [2 * radius + 1] * 2, [float(parameters[6])] * 2)
    return image


def apply(images: torch.Tensor, parameters: np.ndarray) -> torch.Tensor:
    pictures = images.permute(0, 2, 3, 1).contiguous().numpy().copy()
    made = [augment_picture(x, p) for x, p in zip(pictures, parameters, strict=True)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("amount", [-0.9, -0.4, 0.0, 0.3, 0.9])
def test_each_operation_is_torchvisions(operation, amount):
    value = amount / 2 if operation == 3 else 1 + amount
    order = int(np.flatnonzero(ORDERS[:, 0] == operation)[0])
    parameters = row(order=order)
    parameters[0, operation] = value
    ours = apply(picture(1)[None], parameters)[0]
    torch.testing.assert_close(ours, OPERATIONS[operation](picture(1), value), atol=2e-5, rtol=0)


def test_random_chains_in_random_orders_are_torchvisions():
    random = np.random.default_rng(0)
    parameters = draw_photometric(ViewConfig(), random, (60,))
    assert len(np.unique(parameters[:, 4])) > 10
    images = torch.stack([picture(seed) for seed in range(60)])
    expected = torch.stack([plain(i, p) for i, p in zip(images, parameters, strict=True)])
    difference = (apply(images, parameters) - expected).abs()
    # Hue is discontinuous where channels tie and rounding decides: a few isolated pixels may differ more.
    assert difference.max() < 2e-2
    assert (difference > 1e-4).float().mean() < 1e-4


def test_augmentations_are_drawn_each_by_itself():
    config = ViewConfig()
    drawn = draw_photometric(config, np.random.default_rng(0), (3000, 2))
    events = np.stack([drawn[..., 4] >= 0, drawn[..., 5] > 0, drawn[..., 6] > 0], -1).reshape(3000, 6)
    shares = np.tile([config.color_probability, config.gray_probability, config.blur_probability], 2)
    expected = np.outer(shares, shares)
    np.fill_diagonal(expected, shares)
    together = (events[:, :, None] & events[:, None]).mean(0)
    assert (np.abs(together - expected) < 5 * np.sqrt(expected * (1 - expected) / 3000)).all()
    strengths = drawn[(drawn[..., 4] >= 0) & (drawn[..., 6] > 0)][:, [0, 1, 2, 3, 4, 6]]
    assert np.abs(np.corrcoef(strengths.T) - np.eye(6)).max() < 5 / len(strengths) ** 0.5


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_torchvisions(sigma):
    image = picture(2)
    radius = blur_radius(sigma)
    expected = reference.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
    torch.testing.assert_close(apply(image[None], row(sigma=sigma))[0], expected, atol=1e-5, rtol=0)


def test_images_smaller_than_the_blur_are_mirrored_again():
    dot = torch.rand(1, 3, 1, 1)
    torch.testing.assert_close(apply(dot, row(sigma=2.0)), dot)
    assert apply(torch.rand(1, 3, 3, 2), row(sigma=2.0)).isfinite().all()


@pytest.fixture
def batch(photos):
    dataset = TwoViewDataset(photo_store(photos), SMALL, 0)
    return collate([dataset[0, i] for i in range(5)])


def test_prepared_views_are_augmented_normalised_and_zero_under_padding(batch):
    inputs = prepare(batch, MEAN, STD, crop_size=32)
    count, (height, width) = len(batch["images"]), batch["images"].shape[-2:]
    assert inputs.pixel_values.shape == (2 * count, 3, height, width)
    assert inputs.crops.shape == (2 * count * SMALL.num_regions, 3, 32, 32)
    assert inputs.boxes.shape == inputs.query_boxes.shape == (2, count, SMALL.num_regions, 4)
    assert torch.equal(inputs.boxes[1], batch["boxes"][:, 1])
    for v in range(2):
        for b in range(count):
            i = v * count + b
            h, w = inputs.sizes[i].tolist()
            assert (h, w) == tuple(batch["sizes"][b, v].tolist())
            assert inputs.pixel_mask[i].sum() == h * w
            assert inputs.pixel_mask[i, :h, :w].all()
            assert (inputs.pixel_values[i, :, h:] == 0).all()
            assert (inputs.pixel_values[i, :, :, w:] == 0).all()
            parameters = batch["photometric"][b, v, 0]
            image = plain(batch["images"][b, v, :, :h, :w].float() / 255, parameters)
            expected = reference.normalize(image, list(MEAN), list(STD))
            difference = (inputs.pixel_values[i, :, :h, :w] - expected).abs()
            assert difference.max() < 0.05
            assert difference.mean() < 1e-4


def test_what_lies_under_the_padding_changes_nothing(batch):
    expected = prepare(batch, MEAN, STD, crop_size=32)
    images = batch["images"].clone()
    for b in range(images.shape[0]):
        height, width = batch["sizes"][b, 0].tolist()
        images[b, :, :, height:] = 255
        images[b, :, :, :, width:] = 200
    assert not torch.equal(images, batch["images"])
    changed = prepare({**batch, "images": images}, MEAN, STD, crop_size=32)
    assert torch.equal(changed.pixel_values, expected.pixel_values)
    assert torch.equal(changed.crops, expected.crops)


def test_crops_are_those_pillow_cuts(batch):
    still = np.zeros_like(batch["photometric"])
    still[...] = row()[0]
    inputs = prepare({**batch, "photometric": still}, (0, 0, 0), (1, 1, 1), crop_size=32)
    crops = inputs.crops.unflatten(0, inputs.boxes.shape[:3])
    for v in range(2):
        for b in range(crops.shape[1]):
            height, width = batch["sizes"][b, v].tolist()
            view = Image.fromarray(batch["images"][b, v, :, :height, :width].permute(1, 2, 0).numpy())
            for box, crop in zip(batch["boxes"][b, v].tolist(), crops[v, b], strict=True):
                pillow = np.asarray(view.resize((32, 32), Image.Resampling.BILINEAR, box=box))
                difference = np.abs(crop.permute(1, 2, 0).numpy() * 255 - pillow)
                assert difference.mean() < 4


def test_crops_get_their_own_augmentation(batch):
    mixed = prepare(batch, MEAN, STD, crop_size=32).crops
    still = np.zeros_like(batch["photometric"])
    still[...] = row()[0]
    raw = prepare({**batch, "photometric": still}, (0, 0, 0), (1, 1, 1), crop_size=32).crops
    parameters = batch["photometric"].swapaxes(0, 1)[:, :, 1:].reshape(len(raw), -1)
    for crop, source, values in zip(mixed, raw, parameters, strict=True):
        expected = reference.normalize(plain(source, values), list(MEAN), list(STD))
        assert (crop - expected).abs().mean() < 1e-3


def test_without_crops_and_without_images(batch):
    assert prepare(batch, MEAN, STD, crop_size=None).crops is None
    empty = collate([])
    inputs = prepare(empty, MEAN, STD)
    assert len(inputs.pixel_values) == len(inputs.crops) == 0


def test_one_view_of_the_older_methods():
    for config in (
        replace(SMALL, views="patches", num_regions=10),
        replace(SMALL, views="proposals", num_regions=30),
    ):
        image = np.asarray(textured(1, 160, 120))
        plan = plan_sample(config, stored("-", 160, 120), 0, 0, 0)
        batch = collate([ViewSample(cut_views(image, (160, 120), plan), plan, 0)])
        inputs = prepare(batch, MEAN, STD)
        assert inputs.boxes.shape == (1, 1, config.num_regions, 4)
        pixels = torch.from_numpy(cut_views(image, (160, 120), plan)[0]).permute(2, 0, 1) / 255
        plain = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(inputs.pixel_values[0], plain, atol=1e-5, rtol=1e-5)
        assert inputs.crops.shape == (config.num_regions, 3, 128, 128)


def test_resize_is_pillows_within_rounding():
    image = np.asarray(textured(4, 200, 150))
    random = np.random.default_rng(0)
    for _ in range(20):
        corners = np.sort(random.random((2, 2)), 0) * [160, 110] + [[0, 0], [40, 40]]
        rectangle, size = corners.reshape(-1), tuple(int(x) for x in random.integers(20, 250, 2))
        pillow = np.asarray(
            Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR, box=tuple(rectangle))
        ).astype(int)
        assert np.abs(resize(image, rectangle, size) - pillow).max() <= 3
        assert np.abs(resize(image, rectangle, size, flip=True)[:, ::-1] - pillow).max() <= 3


def test_pyramid_crops_are_close_to_pillows_and_to_roi_align():
    image = np.asarray(textured(5, 400, 300))
    pyramid, pixels = Pyramid(image), torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    for box in ([3.3, 5.1, 390.2, 290.9], [20.5, 10, 60, 280], [100, 100, 150, 130], [0, 0, 400, 300]):
        crop = pyramid.crop(box, 64).astype(float)
        pillow = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR, box=tuple(box)))
        aligned = roi_align(pixels, torch.tensor([[0.0, *box]]), 64, aligned=True)[0].permute(1, 2, 0).numpy()
        assert np.abs(crop - pillow).mean() < 3
        assert np.abs(crop - aligned).mean() < 3
