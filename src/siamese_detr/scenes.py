"""Small labelled scenes for the demonstration and for trials, composed from the photographs that scikit-image ships.

Objects are cut out of real photographs along hand-drawn outlines and pasted, turned, scaled, mirrored and re-lit, onto
crops of other photographs: real texture, real edges, known boxes, no download.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from siamese_detr.errors import UserError
from siamese_detr.randomness import rng

# Outlines in pixels of the source photograph: a polygon (three points or more), or an ellipse as its centre and radii.
Outline = list[tuple[int, int]]
OBJECTS: dict[str, tuple[str, list[Outline]]] = {
    "cat": ("chelsea.png", [[(211, 150), (150, 146)]]),
    "cup": ("coffee.png", [[(279, 203), (198, 184)]]),
    "astronaut": (
        "astronaut.png",
        [
            [
                *[(152, 93), (163, 35), (226, 9), (291, 35), (303, 93), (298, 140), (314, 198), (349, 268)],
                *[(368, 350), (366, 480), (349, 511), (0, 511), (0, 419), (88, 279), (105, 221), (152, 140)],
            ]
        ],
    ),
    "motorcycle": (
        "motorcycle_left.png",
        [
            [
                *[(106, 222), (144, 159), (233, 192), (334, 184), (485, 121), (523, 76), (561, 147), (637, 273)],
                *[(682, 374), (662, 450), (586, 450), (498, 361), (473, 387), (334, 437), (195, 399), (119, 324)],
            ]
        ],
    ),
}
BACKGROUNDS = (
    *("brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "ihc.png", "rocket.jpg"),
    *("camera.png", "retina.jpg"),
)

TRIES = 8
"""Places tried for an object before the scene does without it."""


def make_scenes(out: str | Path, count: int, seed: int = 0, size: tuple[int, int] = (320, 240)) -> Path:
    """Write ``count`` JPEG scenes of 1-3 objects, none of which hides another, to ``out``. Their labels go to
    ``out``.json in COCO format.

    Args:
        out: folder for the pictures; made if missing.
        count: number of scenes.
        seed: scene i depends on (seed, i) alone.
        size: (width, height) in pixels.

    Returns:
        the path of the COCO JSON.

    Raises:
        UserError: scikit-image is not installed.
    """
    photos = _photos()
    cutouts = {
        name: [_cut(photos[file], outline) for outline in outlines] for name, (file, outlines) in OBJECTS.items()
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(count):
        scene, objects = _compose(photos, cutouts, rng(seed, index), size)
        name = f"scene-{seed}-{index:05d}.jpg"
        scene.save(out / name, quality=90)
        images.append({"id": index, "file_name": name, "width": size[0], "height": size[1]})
        for category, (x1, y1, x2, y2) in objects:
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {"id": len(annotations), "image_id": index, "category_id": category, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(OBJECTS)]
    labels = out.with_suffix(".json")
    labels.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return labels


def _photos() -> dict[str, Image.Image]:
    try:
        import skimage.data
    except ImportError as error:
        raise UserError("the demonstration's scenes need scikit-image: pip install 'siamese-detr[demo]'") from error
    folder = Path(skimage.data.__file__).parent
    names = {file for file, _ in OBJECTS.values()} | set(BACKGROUNDS)
    return {name: Image.open(folder / name).convert("RGB") for name in sorted(names) if (folder / name).is_file()}


def _cut(photo: Image.Image, outline: Outline) -> Image.Image:
    """The object inside ``outline`` as RGBA, cropped to its alpha, with an edge softened by a pixel."""
    mask = Image.new("L", photo.size)
    draw = ImageDraw.Draw(mask)
    if len(outline) == 2:
        (x, y), (rx, ry) = outline
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
    else:
        draw.polygon(outline, fill=255)
    cutout = photo.copy()
    cutout.putalpha(mask.filter(ImageFilter.GaussianBlur(1)))
    return cutout.crop(mask.getbbox())


def _compose(
    photos: dict[str, Image.Image],
    cutouts: dict[str, list[Image.Image]],
    random: np.random.Generator,
    size: tuple[int, int],
) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """A scene and its objects as (category, xyxy box in pixels)."""
    scene = _background(photos, random, size)
    objects: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(int(random.integers(1, 4))):
        category = int(random.integers(len(cutouts)))
        choices = list(cutouts.values())[category]
        cutout = choices[int(random.integers(len(choices)))]
        if random.random() < 0.5:
            cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = float(np.exp(random.uniform(np.log(60), np.log(150))))
        scale = side / max(cutout.size)
        cutout = cutout.resize((round(cutout.width * scale), round(cutout.height * scale)))
        cutout = cutout.rotate(random.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        cutout = cutout.crop(cutout.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())
        colours = ImageEnhance.Brightness(cutout.convert("RGB")).enhance(random.uniform(0.6, 1.4))
        colours = ImageEnhance.Color(colours).enhance(random.uniform(0.3, 1.5))
        for _ in range(TRIES):
            x = int(random.integers(0, size[0] - cutout.width + 1))
            y = int(random.integers(0, size[1] - cutout.height + 1))
            box = (x, y, x + cutout.width, y + cutout.height)
            if not any(_overlap(box, other) for _, other in objects):
                scene.paste(colours, (x, y), cutout.getchannel("A"))
                objects.append((category, box))
                break
    return scene, objects


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _background(photos: dict[str, Image.Image], random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    names = [name for name in BACKGROUNDS if name in photos]
    photo = photos[names[int(random.integers(len(names)))]]
    share = random.uniform(0.4, 0.9)
    width = min(photo.width, photo.height * size[0] / size[1]) * share
    height = width * size[1] / size[0]
    x, y = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    crop = photo.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))
    tint = np.asarray(crop, np.float32) * random.uniform(0.75, 1.15, 3).astype(np.float32)
    return Image.fromarray(np.clip(tint, 0, 255).astype(np.uint8))
