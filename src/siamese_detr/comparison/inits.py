"""What fine-tuning can start from: the initialisations that a comparison compares."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siamese_detr.errors import UserError
from siamese_detr.pretext import is_pretext, pretext_names

NEW = ("scratch", "backbone")
"""What a new detector can start from."""
THEN = ("self-training", "longer")
"""What a name may end in, after a plus."""
INLINE = re.compile(r"((?:.*\+)?[\w-]+):(\w+=.*)")
"""A method with options of its pre-training, ``siamese:discrimination=none,iou=0.3``."""
OPTION = re.compile(r"(\w+)=(.*?)(?:,(?=\w+=)|$)")


@dataclass(frozen=True)
class Init:
    """An initialisation.

    Args:
        name: as the user named it.
        start: ``scratch`` (everything random), ``backbone`` (only the backbone pre-trained), or a stored detector.
        method: how it is pre-trained before fine-tuning; None: not at all.
        options: further options of this pre-training.
        then: ``self-training`` on the unlabelled images after the first part of fine-tuning; ``longer``: fine-tuned for
            as many more steps as the pre-training of other rows takes; empty: neither.
    """

    name: str
    start: str
    method: str | None
    options: Mapping[str, Any]
    then: str = ""

    @property
    def pretrained(self) -> str:
        """The name of what is fine-tuned: rows that differ only in ``then`` share it."""
        return self.name.removesuffix(f"+{self.then}")

    @property
    def stored(self) -> bool:
        """Whether it starts from a stored detector, not from a new one."""
        return self.start not in NEW


def short_names(inits: Sequence[Init]) -> dict[str, str]:
    """Name -> the same with as many of the last folders of a detector's path as tell it from the other detectors."""
    starts = {init.start: Path(init.start.removesuffix("/best").removesuffix("/last")).parts for init in inits}
    short = {}
    for init in inits:
        parts = starts[init.start]
        others = [other for start, other in starts.items() if start != init.start]
        taken = (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others))
        short[init.name] = init.name.replace(init.start, "/".join(parts[-next(taken, len(parts)) :]))
    return short


def split_init(name: str) -> tuple[str, dict[str, str]]:
    """``siamese:iou=0.3`` as ``siamese`` and ``{"iou": "0.3"}``, without what follows the pre-training; any other name
    unchanged, without options."""
    for then in THEN:
        name = name.removesuffix(f"+{then}")
    parts = INLINE.fullmatch(name)
    return (parts[1], dict(OPTION.findall(parts[2]))) if parts else (name, {})


def parse_init(name: str, pretrain_at: Mapping[str, Mapping[str, Any]]) -> Init:
    """The initialisation that ``name`` means.

    Args:
        name: ``scratch``, ``backbone``, a method, a detector (``PATH`` or its name on the Hub), ``PATH+METHOD``, a
            method with options of its pre-training (``siamese:discrimination=none,iou=0.3``), or a name that
            ``pretrain_at`` defines; each also with ``+self-training``, those without a method also with ``+longer``.
        pretrain_at: options of pre-training by initialisation; an entry with a ``method`` defines a new one.

    Raises:
        UserError: the name has no meaning.
    """
    options = dict(pretrain_at.get(name, {}))
    method = options.pop("method", None)
    if method is not None:
        if not is_pretext(method):
            raise UserError(f"{name!r} in pretrain_at has method {method!r}; use one of {', '.join(pretext_names())}")
        return Init(name, str(options.pop("init", "backbone")), method, options)
    bare, _, then = name.rpartition("+")
    if bare and then in THEN:
        init = parse_init(bare, pretrain_at)
        if init.then or (then == "longer" and init.method is not None):
            raise UserError(
                f"initialisation {name!r}: +longer belongs to rows without pre-training, and neither it nor "
                "+self-training can be combined; use backbone+longer or siamese+self-training"
            )
        return dataclasses.replace(init, name=name, then=then)
    if name in NEW:
        if options:
            raise UserError(f"{name!r} is not pre-trained; remove it from pretrain_at")
        return Init(name, name, None, {})
    bare, inline = split_init(name)
    if inline:  # the method's own options hold for it with inline options, too
        options = {**pretrain_at.get(bare, {}), **options, **inline}
    if is_pretext(bare):
        return Init(name, "backbone", bare, options)
    path, plus, last = bare.rpartition("+")
    if plus and is_pretext(last):
        return Init(name, path, last, options)
    if "/" not in name and not Path(name).expanduser().exists():
        raise UserError(
            f"initialisation {name!r} is unknown; use scratch, backbone, one of {', '.join(pretext_names())} (alone or "
            "as in siamese:iou=0.3), a name defined in pretrain_at, or a detector's path or name on the Hub (alone or "
            "as PATH+METHOD); each may end in +self-training, and scratch, backbone and PATH in +longer"
        )
    return Init(name, name, None, {})
