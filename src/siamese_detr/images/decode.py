"""Reading one image file: an 8-bit RGB array, or an `ImageError` that says what is wrong with the file.

Files come from anywhere and by the million, so nothing here trusts them: only raster formats of a fixed list are
tried, the size is judged from the header before memory is taken, and whatever the decoding library throws at a
damaged file ends as `ImageError`.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Importing the plugins registers them; `Image.open` would import them lazily, one more thing to race for in threads.
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from siamese_detr.errors import ImageError, UserError
from siamese_detr.images.listing import HEIF
from siamese_detr.images.shards import is_plain_file, read_bytes

MAX_PIXELS = 200_000_000
"""Images of more pixels are refused unless the caller allows them: decoded they take three bytes a pixel."""

_PLUGINS: tuple[tuple[str, str], ...] = (
    (JpegImagePlugin.JpegImageFile.format, "JPEG"),
    (PngImagePlugin.PngImageFile.format, "PNG"),
    (WebPImagePlugin.WebPImageFile.format, "WebP"),
    (GifImagePlugin.GifImageFile.format, "GIF"),
    (TiffImagePlugin.TiffImageFile.format, "TIFF"),
    (BmpImagePlugin.BmpImageFile.format, "BMP"),
    (PpmImagePlugin.PpmImageFile.format, "PPM"),
    (Jpeg2KImagePlugin.Jpeg2KImageFile.format, "JPEG 2000"),
    (AvifImagePlugin.AvifImageFile.format, "AVIF"),
)
if HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()  # turns pictures upright itself
    _PLUGINS = (*_PLUGINS, ("HEIF", "HEIF"))
_ORIENTATION_TAG = 0x0112
_FILL = (128, 128, 128)  # what the JPEG library puts where data are missing
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path, *, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to RGB, upright according to its EXIF orientation.

    Sixteen-bit images are scaled to eight bits, CMYK and palette images converted, transparency dropped, of
    animations the first frame is taken. A file whose pixel data end early is an error, never a half-grey image.

    Args:
        path: the file, a member of a tar shard or a URL (:mod:`siamese_detr.images.shards`).
        min_side: allow JPEGs to be decoded at 1/2, 1/4 or 1/8 scale, as small as leaves the short side at least this
            long. The result is then smaller than `read_size` says.
        max_pixels: refuse images whose header announces more pixels than this.

    Returns:
        uint8 array (height, width, 3), writable and contiguous.

    Raises:
        ImageError: the file is missing, not an image, damaged, truncated or too large.
    """
    with _opened(path, max_pixels) as (image, stream):
        orientation = _orientation(image)
        is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
        draft = (max(min_side, 1),) * 2 if is_jpeg and min_side is not None else None
        if draft is not None:
            image.draft(None, draft)
        image.load()
        rgb = _to_rgb(image)
        if is_jpeg and rgb.getpixel((rgb.width - 1, rgb.height - 1)) == _FILL and _ends_early(stream, rgb, draft):
            raise ImageError(path, "the picture ends early, its lower part is blank")
        if orientation in _TRANSPOSE:
            rgb = rgb.transpose(_TRANSPOSE[orientation])
        return np.array(rgb)


def as_pixels(image: Any, name: str) -> np.ndarray:
    """An image in memory as RGB, upright according to its EXIF orientation if it is Pillow's.

    Args:
        image: Pillow's, or an array (height, width) or (height, width, 1, 3 or 4) of uint8.
        name: what messages call it.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        UserError: something else.
    """
    if not isinstance(image, Image.Image):
        pixels = np.asarray(image)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[..., 0]
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,), (4,)):
            what = f"an array {pixels.shape} of {pixels.dtype}" if pixels.ndim else f"a {type(image).__name__}"
            raise UserError(f"{name} is {what}: give (height, width, 3) of uint8 in RGB order, or a Pillow image")
        image = Image.fromarray(pixels)
    return np.array(_to_rgb(ImageOps.exif_transpose(image)))


def decoded_scale(original: ArrayLike, decoded: ArrayLike) -> NDArray[np.float64]:
    """Decoded pixels per original pixel, (x, y), by both sizes (width, height).

    JPEGs are reduced by 1/2, 1/4 or 1/8 exactly, only sizes round up.
    """
    factor = reduction(original, decoded)
    if factor is not None:
        return np.full(2, 1 / factor)
    return np.asarray(decoded, np.float64) / np.asarray(original, np.float64)


def reduction(original: ArrayLike, decoded: ArrayLike) -> int | None:
    """By what (1, 2, 4 or 8) a file of the one size was reduced when it was decoded to the other; None: it was not."""
    full, small = np.asarray(original, np.float64), np.asarray(decoded, np.float64)
    return next((factor for factor in (1, 2, 4, 8) if np.array_equal(np.ceil(full / factor), small)), None)


def read_size(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the image `read_image` would give at full scale, from the file's header alone.

    Raises:
        ImageError: the file is missing, not an image, or too large (damage behind the header is not seen).
    """
    with _opened(path, max_pixels) as (image, _):
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def read_orientation(path: str | Path) -> int:
    """The EXIF orientation, 1 to 8, by which `read_image` turns the image; from 5 on it exchanges width and height.

    Raises:
        ImageError: as `read_size`.
    """
    with _opened(path, MAX_PIXELS) as (image, _):
        return _orientation(image)


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[tuple[ImageFile.ImageFile, BinaryIO]]:
    """The image and its file, header read and size accepted; every failure inside the block becomes `ImageError`."""
    try:
        with open_image(path) as stream:
            image = _read_header(path, stream)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    path,
                    f"{width}x{height} = {width * height / 1e6:.0f} megapixels, more than the limit of "
                    f"{max_pixels / 1e6:g} megapixels; shrink or remove it",
                )
            yield image, stream
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except IsADirectoryError:
        raise ImageError(path, "it is a folder") from None
    except MemoryError:
        raise ImageError(path, "not enough memory to decode it") from None
    # Deliberately broad: for hostile bytes, decoders raise errors of any kind (struct.error, SyntaxError,
    # ZeroDivisionError...).
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(path, f"damaged or unreadable ({' '.join(reason.split())[:200]})") from error


def open_image(path: str | Path) -> BinaryIO:
    """The bytes of an image: of a file, of a shard's member, or from behind a URL.

    Raises:
        ImageError: not a regular file, empty, or not to be had.
        OSError: it cannot be opened.
    """
    text = os.fspath(path)
    if not is_plain_file(text):
        content = read_bytes(text)
        size = len(content)
        stream: BinaryIO = io.BytesIO(content)
    else:
        stream = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 (the caller closes it)
        status = os.fstat(stream.fileno())
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            stream.close()
            raise ImageError(path, "not a regular file")
    if size == 0:
        stream.close()
        raise ImageError(path, "the file is empty")
    return stream


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would otherwise wait for a writer for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_header(path: str | Path, stream: BinaryIO) -> ImageFile.ImageFile:
    # Not `Image.open`: its limit on pixels is a process-wide setting, below ours and not ours to change.
    prefix = stream.read(16)
    failure = ""
    for name, title in _PLUGINS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is not True:
            continue
        stream.seek(0)
        try:
            return factory(stream, b"")
        except Exception as error:
            failure = (
                failure or f"damaged {title} header ({' '.join(str(error).split())[:200] or type(error).__name__})"
            )
    if prefix[4:8] == b"ftyp" and not failure:
        failure = "a HEIC picture, whatever its name says: convert it to JPEG, or install pillow-heif"
    raise ImageError(path, failure or f"not an image of a known format ({', '.join(title for _, title in _PLUGINS)})")


def _ends_early(stream: BinaryIO, decoded: Image.Image, draft: tuple[int, int] | None) -> bool:
    """Whether a JPEG's end marker comes before its last pixels, which the library only warns of, unheard.

    Other bytes put in place of the end marker become pixels if pixels are wanting, and are passed over if not.
    """
    stream.seek(0)
    content = stream.read()
    end = content.rfind(b"\xff\xd9")
    probe = JpegImagePlugin.JpegImageFile(io.BytesIO(content[:end] + b"\x5a\xa5\x3c" * 5000 + b"\xff\xd9"))
    if draft is not None:
        probe.draft(None, draft)
    try:
        return end > 0 and _to_rgb(probe).tobytes() != decoded.tobytes()
    except OSError:
        return False


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1..8 that remains to be applied; 1 where there is none or it cannot be read."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns TIFFs itself, size and pixels
    try:
        # The base class's method: PNG's own would decode the whole picture to look for EXIF behind it.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # broken metadata do not make the pixels unreadable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        # Dividing by 257 maps 65535 to 255; Pillow's own conversion would clip at 255.
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretched(np.asarray(image, dtype=np.float64), image.mode == "F")).convert("RGB")
    if image.mode == "P":
        # By way of RGBA, because transparency stored as bytes would raise a warning on the direct one; same colours.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _stretched(values: np.ndarray, is_float: bool) -> np.ndarray:
    """Integers of 32 bits and floats name no white: take the smallest usual range that holds them, else their own."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("pixel values that are not finite")
    if low < 0 or high > 65535:
        values, white = values - low, max(high - low, 1e-300)
    elif is_float and high <= 1:
        white = 1.0
    else:
        white = 255.0 if high <= 255 and is_float else 65535.0
    return np.rint(values * (255.0 / white)).astype(np.uint8)
