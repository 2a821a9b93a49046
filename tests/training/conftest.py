"""Options of a tiny pre-training run, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import textured
from runs import TINY
from siamese_detr.proposals.propose import propose


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a tiny run on 10 images with their proposals."""
    root = tmp_path_factory.mktemp("pretrain")
    (root / "photos").mkdir()
    for n in range(10):
        textured(n, *((120, 90) if n % 3 else (90, 120))).save(root / "photos" / f"{n:02}.jpg")
    propose(images=str(root / "photos"), out=str(root / "store"), method="random", workers=1)
    return TINY | {"images": str(root / "photos"), "proposals": str(root / "store"), "steps": 4}
