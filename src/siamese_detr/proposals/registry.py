"""The names of the proposal methods. A new one is a class (`siamese_detr.proposals.methods.Method`) and a row here.

Another package adds one by an entry point of the group ``siamese_detr.proposals`` that names its class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from siamese_detr import plugins
from siamese_detr.config import nearest, validate
from siamese_detr.errors import UserError
from siamese_detr.proposals.methods import EdgeBoxes, Method, RandomBoxes, SelectiveSearch

METHODS: dict[str, type[Method]] = {
    "edge-boxes": EdgeBoxes,
    "selective-search": SelectiveSearch,
    "random": RandomBoxes,
}


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UserError: there is none of that name, among ours or among the plug-ins.
    """
    if name in METHODS:
        return METHODS[name]
    known = METHODS | plugins.load("siamese_detr.proposals")
    if name not in known:
        raise UserError(
            f"unknown proposal method {name!r}{nearest(name, [*known])}; the methods are {', '.join(known)}"
        )
    return known[name]


def make_method(name: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> Method:
    """A method with its options.

    Args:
        name: of the method.
        shared: options that several methods have; those this one lacks are left out.
        own: options of this method alone.

    Raises:
        UserError: unknown name, or an option in ``own`` that the method lacks, or of the wrong type.
    """
    kind = find_method(name)
    names = [field.name for field in dataclasses.fields(kind)]
    options = {option: value for option, value in shared.items() if option in names}
    return validate(kind, options | dict(own), f"the options of {name}")
