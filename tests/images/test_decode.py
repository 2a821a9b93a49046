"""Reading image files: what good ones give, and that bad ones end in `ImageError`."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import textured
from siamese_detr.errors import ImageError
from siamese_detr.images import read_image, read_size


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def assert_close(actual: np.ndarray, expected: Image.Image | np.ndarray, tolerance: int) -> None:
    expected = np.asarray(expected)
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= tolerance


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp", "a.jp2", "wrong_name.txt"])
def test_lossless_formats_give_the_pixels(tmp_path: Path, name: str) -> None:
    picture = textured(0)
    options = {"format": "PNG"} if name.endswith("txt") else {"lossless": True} if name.endswith("webp") else {}
    path = save(picture, tmp_path / name, **options)
    image = read_image(path)
    assert_close(image, picture, 0)
    assert image.flags.writeable
    assert image.flags.c_contiguous
    assert read_size(path) == picture.size


@pytest.mark.parametrize("name", ["a.jpg", "a.avif", "a.gif"])
def test_lossy_formats_give_nearly_the_pixels(tmp_path: Path, name: str) -> None:
    picture = textured(0)
    path = save(picture, tmp_path / name)
    assert np.abs(read_image(path).astype(int) - np.asarray(picture).astype(int)).mean() < 12
    assert read_size(path) == picture.size


def test_one_pixel(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path / "a.png")
    assert read_image(path).tolist() == [[[1, 2, 3]]]
    assert read_image(path, min_side=100).shape == (1, 1, 3)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    base = textured(1).convert("RGB" if mode in ("LAB", "PA") else mode)
    if mode == "LAB":
        base = Image.merge("LAB", base.split())
    if mode == "PA":
        base = base.convert("P").convert("PA")
    path = save(base, tmp_path / "a.tif")
    image = read_image(path)
    assert image.shape == (120, 160, 3)
    if mode not in ("LAB", "PA"):
        assert_close(image, base.convert("RGB"), 0)


def test_cmyk_jpeg_has_the_right_polarity(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (16, 16), (250, 20, 20)).convert("CMYK"), tmp_path / "a.jpg", quality=95)
    assert_close(read_image(path), np.full((16, 16, 3), (250, 20, 20)), 8)


def test_palette_with_transparency_keeps_its_colours_without_warning(tmp_path: Path, recwarn) -> None:
    picture = textured(2).convert("P")
    path = save(picture, tmp_path / "a.png", transparency=bytes(range(256)))
    assert_close(read_image(path), picture.convert("RGB"), 0)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    path = save(Image.fromarray(values), tmp_path / name)
    expected = np.repeat((values / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    assert_close(read_image(path), expected, 1)


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    import cv2

    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    for name in ("a.png", "a.tiff"):
        assert cv2.imwrite(str(tmp_path / name), values[..., ::-1])
        assert_close(read_image(tmp_path / name), (values / 257).round().astype(np.uint8), 1)


@pytest.mark.parametrize("top", [1.0, 255.0, 60000.0, 1e6])
def test_float_and_wide_integer_images_span_the_range(tmp_path: Path, top: float) -> None:
    values = np.linspace(0, 1, 32 * 8, dtype=np.float32).reshape(8, 32) * np.float32(top)
    image = read_image(save(Image.fromarray(values), tmp_path / "a.tif"))
    assert image[0, 0, 0] == 0
    assert image.max() >= 230
    with pytest.raises(ImageError, match="finite"):
        read_image(save(Image.fromarray(values * np.nan), tmp_path / "nan.tif"))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_first_frame_of_several(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    path = save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert_close(read_image(path), frames[0], 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    from PIL import ImageOps

    picture = textured(3, 48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "a.webp" else {"quality": 95} if name == "a.jpg" else {}
    path = save(picture, tmp_path / name, exif=exif, **options)
    with Image.open(path) as raw:
        expected = ImageOps.exif_transpose(raw)
    assert_close(read_image(path), expected, 0)
    assert read_size(path) == expected.size
    if orientation >= 5:
        assert read_size(path) == (32, 48)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_broken_exif_does_not_hide_the_picture(tmp_path: Path, exif: bytes) -> None:
    path = save(textured(3), tmp_path / "a.jpg", exif=exif)
    assert read_image(path).shape == (120, 160, 3)
    assert read_size(path) == (160, 120)


@pytest.mark.parametrize("min_side", [1, 50, 100, 101, 200, 399, 400, 1000])
def test_reduced_decoding_keeps_the_short_side(tmp_path: Path, min_side: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(textured(4, 600, 400), tmp_path / "a.jpg", exif=exif)
    full, reduced = read_image(path), read_image(path, min_side=min_side)
    assert full.shape == (600, 400, 3)
    assert min(reduced.shape[:2]) >= min(min_side, 400)
    assert min(reduced.shape[:2]) < max(2 * min_side, 51)
    assert abs(reduced.mean() - full.mean()) < 3
    assert read_size(path) == (400, 600)


def test_missing_empty_folder_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "svg.jpg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    reasons = {
        "missing.jpg": "no such file",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "svg.jpg": "not an image",
        "eps.jpg": "not an image",
        "pipe.jpg": "not a regular file",
        "dangling.jpg": "no such file",
        ".": "folder",
        "nul\0.jpg": "null",
        "x" * 300: "long",
    }
    for name, reason in reasons.items():
        for read in (read_image, read_size):
            with pytest.raises(ImageError, match=reason) as caught:
                read(f"{tmp_path}/{name}")
            assert caught.value.path == f"{tmp_path}/{name}"
            assert "\n" not in str(caught.value)
            assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_every_truncation_of_a_jpeg_is_an_error(tmp_path: Path, options: dict) -> None:
    buffer = io.BytesIO()
    textured(5, 96, 64).save(buffer, "JPEG", **options)
    content = buffer.getvalue()
    path = tmp_path / "a.jpg"
    for end in [*range(0, len(content), 37), len(content) - 3]:
        path.write_bytes(content[:end])
        with pytest.raises(ImageError):
            read_image(path)
    for share in (0.5, 0.7, 0.9):  # an interrupted download into a file of the full size
        path.write_bytes(content[: int(share * len(content))].ljust(len(content), b"\0"))
        with pytest.raises(ImageError):
            read_image(path)


@pytest.mark.parametrize("min_side", [None, 16])
def test_a_jpeg_ended_too_early_is_an_error_and_a_grey_one_is_not(tmp_path: Path, min_side: int | None) -> None:
    picture = textured(5, 128, 96)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    path = tmp_path / "a.jpg"
    for share in (0.4, 0.6, 0.9):
        path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))] + b"\xff\xd9")
        with pytest.raises(ImageError, match="ends early"):
            read_image(path, min_side=min_side)
    picture.paste((128, 128, 128), (0, 50, 128, 96))
    assert len(read_image(save(picture, path), min_side=min_side))
    path.write_bytes(path.read_bytes() + b"what some cameras append")
    assert len(read_image(path, min_side=min_side))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.bmp", "a.ppm", "a.avif", "a.gif", "a.jp2"])
def test_truncated_files_are_errors(tmp_path: Path, name: str) -> None:
    path = save(textured(6), tmp_path / name)
    content = path.read_bytes()
    for share in (0.02, 0.3, 0.6):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageError):
            read_image(path)


def test_decompression_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(30_000, 30_000))
    for read in (read_image, read_size):
        with pytest.raises(ImageError, match=r"30000x30000 = 900 megapixels.*limit of 200 megapixels"):
            read(path)
    path.write_bytes(png_header(2**31 - 1, 2**31 - 1))
    with pytest.raises(ImageError):
        read_image(path)


def test_the_limit_is_a_parameter_in_both_directions(tmp_path: Path) -> None:
    path = save(textured(0, 40, 30), tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"0\.001 megapixels"):
        read_image(path, max_pixels=1000)
    path.write_bytes(png_header(15_000, 13_000))  # below our limit, though above the library's own
    assert read_size(path) == (15_000, 13_000)


def test_threads_agree(photos: Path) -> None:
    paths = sorted(photos.iterdir()) * 8
    expected = [read_image(path).sum() for path in paths]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda path: read_image(path).sum(), paths)) == expected
