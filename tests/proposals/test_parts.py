"""Several machines make one store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from siamese_detr.errors import UserError
from siamese_detr.proposals.propose import propose
from siamese_detr.proposals.store import ProposalStore, part_name

pytestmark = pytest.mark.promise("proposals")


def test_parts_make_the_store_of_one(photos: Path, tmp_path: Path) -> None:
    """The same rows in the same order, also when a part is killed and run again, or a file is bad."""
    (photos / "bad.jpg").write_bytes(b"none")
    options = {"images": str(photos), "method": "random", "workers": 1}
    propose(out=str(tmp_path / "one"), **options)
    for part in ("3/3", "1/3", "2/3", "1/3"):
        propose(out=str(tmp_path / "parts"), part=part, **options)
    one, parts = ProposalStore.open(tmp_path / "one"), ProposalStore.open(tmp_path / "parts")
    assert len(one) == len(parts) == 6
    assert one.paths() == parts.paths()
    assert one.failures == parts.failures
    for index in range(6):
        assert np.array_equal(one.row(index).boxes, parts.row(index).boxes)
    assert np.array_equal(one.sizes(), parts.sizes())


def test_missing_and_mixed_parts_are_named(photos: Path, tmp_path: Path) -> None:
    options = {"images": str(photos), "method": "random", "workers": 1, "out": str(tmp_path / "store")}
    propose(part="1/2", **options)
    with pytest.raises(UserError, match=r"1 parts are missing, the first part-00002-of-00002"):
        ProposalStore.open(tmp_path / "store")
    propose(part="2/2", **options | {"max_boxes": 3})
    with pytest.raises(UserError, match="other settings"):
        ProposalStore.open(tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / part_name(2, 2))
    propose(part="2/2", **options)
    propose(part="3/3", **options)
    with pytest.raises(UserError, match="different divisions"):
        ProposalStore.open(tmp_path / "store")


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/99", "-1/2"])
def test_parts_that_are_none(photos: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match="give I/N"):
        propose(images=str(photos), out=str(tmp_path / "store"), part=part)
