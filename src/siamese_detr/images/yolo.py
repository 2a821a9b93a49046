"""Reading labels in YOLO's form: a ``data.yaml``, and one text file per image with lines ``class cx cy w h``."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import yaml

from siamese_detr.errors import UserError
from siamese_detr.images.listing import existing, list_images
from siamese_detr.images.problems import LabelTables, Problems

_MAX_BYTES = 10_000_000


def is_yolo(path: Path) -> bool:
    """Whether it is a ``data.yaml``, darknet's ``obj.data``, or Label Studio's ``classes.txt`` (beside ``images`` and
    ``labels``)."""
    return path.suffix.lower() in (".yaml", ".yml", ".data") or path.name == "classes.txt"


def read_yolo(path: Path, images: str | None, split: str, problems: Problems) -> tuple[Path, LabelTables]:
    """The common folder of the images, and the tables (boxes in parts of the image's size).

    The labels of ``.../images/x.jpg`` are in ``.../labels/x.txt``; where no folder is called ``images``, beside the
    image. An image without a label file has no objects. A sixth number is the box's score, if those of all lines are
    from 0 to 1, as of pseudo-labels. Lines with more numbers are polygons, replaced by the box around them, or, where
    the YAML has ``kpt_shape``, a box with key points, which are passed over.

    Args:
        path: see :func:`is_yolo`.

    Raises:
        UserError: the YAML is unusable, the split is not in it or leads to no image, or not one label file is found.
    """
    content = read_description(path)
    shape = content.get("kpt_shape")
    points = math.prod(shape) if isinstance(shape, list) and all(type(side) is int for side in shape) else 0
    names = _names(path, content)
    class_index = {id_: index for index, id_ in enumerate(sorted(names))}
    files = sorted(
        {file for source in split_sources(path, content, split, images) for file in _files(source, problems)}
    )
    root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    tables = LabelTables([], [], [], [names[i] for i in class_index], list(class_index), normalised=True)
    tables.convention = "cxcywh"
    absent = []
    sixth: list[str] = []
    odd: list[tuple[str, list[float]]] = []
    for number, file in enumerate(files, 1):
        label = label_file(file)
        try:
            text = _read_text(label)
        except FileNotFoundError:
            absent.append(label)
            text = ""
        except (OSError, ValueError) as error:
            problems.add("unreadable label file", f"{label}: {' '.join(str(error).split())}")
            continue
        owner = len(tables.paths)
        tables.paths.append(file)
        tables.ids.append(number)
        tables.sizes.append((0, 0))
        odd += _add_lines(tables, owner, label, text, class_index, points, problems, sixth)
    _pass_over_tracks(tables, sixth, problems)
    _refuse_key_points(path, odd)
    if len(absent) == len(files):
        raise UserError(f"{path}: no image of split {split!r} has a label file (looked for such as {absent[0]})")
    for label in absent:
        problems.add("missing label file", label)
    return root, tables


def label_file(image: str) -> str:
    """The label file of an image file."""
    before, found, after = image.rpartition(f"{os.sep}images{os.sep}")
    return os.path.splitext(f"{before}{os.sep}labels{os.sep}{after}" if found else image)[0] + ".txt"


def _read_text(path: str | Path) -> str:
    with open(path, encoding="utf-8-sig") as stream:
        text = stream.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ValueError("too large")
    return text


def read_description(path: Path) -> dict:
    """The content of a data.yaml, or what stands for it in darknet's and Label Studio's folders."""
    try:
        text = _read_text(path)
        if path.suffix == ".data":
            pairs = (line.partition("=") for line in text.splitlines())
            content = {key.strip(): value.strip() for key, _, value in pairs if value.strip()}
            listed = next((p for p in _places(path, content.get("names", "")) if p.is_file()), None)
            if listed is None:
                raise UserError(f"{path}: its file of class names, {content.get('names')!r}, is not there")
            return {**content, "names": _read_text(listed).splitlines()}
        if path.name == "classes.txt":
            return {"names": [line for line in text.splitlines() if line.strip()], "train": "images"}
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or not ({"names", "nc"} & content.keys()):
        raise UserError(f"{path} has no 'names': a YOLO data.yaml has 'names' and 'train'/'val'")
    return content


def _places(path: Path, name: str) -> list[Path]:
    """Where a file of a darknet description may be: below its folder, which its own paths may repeat ("data/...")."""
    return [path.parent / name, path.parent / Path(name).name, path.parent.parent / name]


def _names(path: Path, content: dict) -> dict[int, str]:
    """Class names by class id."""
    names = content.get("names")
    if names is None and type(content.get("nc")) is int and 0 < content["nc"] < 100_000:
        names = [str(i) for i in range(content["nc"])]
    if isinstance(names, list):
        names = dict(enumerate(names))
    given = names if isinstance(names, dict) else {}
    result: dict[int, str] = {}
    # Only plain values are turned into text: what YAML's aliases build may be endless.
    if all(isinstance(name, str | int | float) for name in given.values()):
        with suppress(TypeError, ValueError, OverflowError):
            result = {int(id_): str(name).strip() for id_, name in given.items()}
    if not result or not all(result.values()) or len(set(result.values())) < len(given):
        raise UserError(
            f"{path}: 'names' must be a list of distinct class names, or a mapping from class number to name"
        )
    return result


def split_sources(path: Path, content: dict, split: str, images: str | None = None) -> list[Path]:
    """The folders or lists that a split names.

    Args:
        path: of the description.
        content: what :func:`read_description` read there.
        split: its name.
        images: folder that the names start from, where it is not the description's.

    Raises:
        UserError: no such split, or a folder that does not exist.
    """
    given = content.get(split)
    if given is None and split == "val":
        given = content.get("valid")
    if not given:
        known = [key for key in ("train", "val", "valid", "test") if content.get(key)]
        raise UserError(f"{path} has no split {split!r}: it has {', '.join(known) or 'none of train, val, test'}")
    items = given if isinstance(given, list) else [given]
    base = content.get("path")
    if not all(isinstance(i, str) and "\0" not in i for i in items) or not isinstance(base, str | None):
        raise UserError(f"{path}: {split!r} must name a folder or list of images, or several")
    if images is not None:
        bases = [existing(images)]
    else:
        bases = [path.parent / base.replace("\0", "")] if base else []
        bases.append(path.parent)
    sources = []
    for item in items:
        # Some exporters write ../train/images for a folder that lies beside the YAML.
        short = item.replace("\\", "/").removeprefix("../")
        candidates = [b / i for b in bases for i in (item, short, short.removeprefix("data/"))]
        found = next((c for c in candidates if os.path.exists(c)), None)
        if found is None:
            looked = ", ".join(dict.fromkeys(os.path.normpath(c) for c in candidates))
            raise UserError(f"{path}: the folder of split {split!r} does not exist (looked for {looked})")
        sources.append(Path(os.path.normpath(found)))
    return sources


def _files(source: Path, problems: Problems) -> list[str]:
    found = list_images(source)
    for problem in found.problems:
        problems.add("images not listed", problem)
    return [os.path.normpath(found.absolute(i)) for i in range(len(found))]


def _add_lines(
    tables: LabelTables,
    owner: int,
    label: str,
    text: str,
    class_index: dict[int, int],
    points: int,
    problems: Problems,
    sixth: list[str],
) -> list[tuple[str, list[float]]]:
    """Add the boxes of one label file; returns the lines, with their place, that have more numbers than a box. Lines
    with just one more are added to ``sixth``."""
    seen = set()
    longer = []
    for line_number, line in enumerate(text.splitlines(), 1):
        where = f"{label}, line {line_number}: {line.strip()}"
        values = _parse(line, where, problems)
        if values == []:
            continue
        if values is None:
            problems.add("malformed box", where)
            continue
        score = math.nan
        if len(values) == 5 + points:
            values = values[:5]
        elif len(values) == 6:
            sixth.append(where)
            score = values.pop()
        elif len(values) > 6:
            longer.append((where, values))
        if len(values) % 2 == 0:
            problems.add("malformed box", where)
        elif values[0] not in class_index:
            problems.add("box of an unknown class", where)
        elif tuple(values) in seen:
            problems.add("repeated box", where)
        else:
            seen.add(tuple(values))
            tables.owners.append(owner)
            tables.classes.append(class_index[int(values[0])])
            tables.boxes.append(_box(values[1:]))
            tables.crowd.append(False)
            tables.areas.append(math.nan)
            tables.scores.append(score)
    return longer


def _pass_over_tracks(tables: LabelTables, lines: list[str], problems: Problems) -> None:
    """Keep the numbers after boxes only if they can be scores: from 0 to 1, where tracks are counted."""
    counted = all(line.split()[-1].isdigit() for line in lines)
    if counted or not all(math.isnan(score) or 0 <= score <= 1 for score in tables.scores):
        tables.scores = [math.nan] * len(tables.scores)
        for line in lines:
            problems.add("number after the box", line)


def _parse(line: str, where: str, problems: Problems) -> list[float] | None:
    """The numbers of a line; [] of a blank one; None unless they are a class and at least four numbers more."""
    tokens = line.split()
    if len(tokens) == 1 and line.count(",") >= 4:
        tokens = line.split(",")
    elif any("," in token for token in tokens):
        tokens = [token.replace(",", ".") for token in tokens]
        problems.add("decimal comma", where)
    try:
        values = [float(token) for token in tokens]
    except ValueError:
        return None
    usable = len(values) >= 5 and all(abs(v) < 1e6 for v in values) and values[0].is_integer()
    return values if usable or not values else None


def _box(values: list[float]) -> tuple[float, float, float, float]:
    """cx, cy, width and height: as they are, or of the box around a polygon."""
    if len(values) == 4:
        return values[0], values[1], values[2], values[3]
    x1, y1, x2, y2 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def _refuse_key_points(path: Path, lines: list[tuple[str, list[float]]]) -> None:
    """Raise `UserError` if all longer lines look like a box with key points in it, which are no polygon."""

    def inside(values: list[float], step: int) -> bool:
        _, x, y, width, height, *rest = values
        points = list(zip(rest[::step], rest[1::step], strict=False))
        near = [abs(px - x) <= 0.55 * width and abs(py - y) <= 0.55 * height for px, py in points if px or py]
        return len(rest) % step == 0 and all(near)

    lengths = {len(values) for _, values in lines}
    for step in (2, 3):
        if len(lengths) == 1 and all(inside(values, step) for _, values in lines):
            count = (lengths.pop() - 5) // step
            raise UserError(
                f"{path}: lines with more numbers than a box look like a box and {count} key points ({lines[0][0]}), "
                f"not like polygons: add the line kpt_shape: [{count}, {step}]"
            )
