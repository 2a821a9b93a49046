"""Banks of frozen features: the losses of fresh views, of the right images, shared and continued."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from accelerate import PartialState

from runs import logged, with_photos
from siamese_detr.errors import UserError
from siamese_detr.pretext.siamese import SiamesePretext
from siamese_detr.proposals.shard import StoredImage
from siamese_detr.runtime.processes import Team
from siamese_detr.training import pretrain as module
from siamese_detr.training.feature_bank import FeatureBank, fingerprint
from siamese_detr.training.pretrain import pretrain
from siamese_detr.training.source import find_source
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.two_views import TwoViewDataset

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'random")


@pytest.mark.promise("checkpoints")
def test_a_bank_that_lost_files_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    options = {**base, "feature_bank": 1, "bank_dir": str(tmp_path / "banks"), "steps": 1}
    pretrain(**{**options, "out": str(tmp_path / "one")})
    (bank,) = (tmp_path / "banks").iterdir()
    (bank / "entries").write_bytes((bank / "entries").read_bytes()[:100])
    with pytest.raises(UserError, match=r"bank .* is damaged \(entries has 100 bytes.*remove that directory"):
        pretrain(**{**options, "out": str(tmp_path / "two")})


def test_detectors_that_read_other_maps_of_a_backbone_have_their_own_banks(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights, with and without dilation, and at several strides."""
    options = {**base, "feature_bank": 1, "bank_dir": str(tmp_path / "banks"), "steps": 1}
    pretrain(**{**options, "out": str(tmp_path / "one")})
    pretrain(**{**options, "out": str(tmp_path / "dilated"), "detector_options": {"dilation": True}})
    pretrain(**{**options, "out": str(tmp_path / "three"), "detector": "deformable-detr", "hidden_size": 32})
    assert len(list((tmp_path / "banks").iterdir())) == 3


@pytest.mark.promise("bad-images")
def test_images_that_a_bank_could_not_read_are_tried_again(base: dict[str, Any], tmp_path: Path) -> None:
    """By every run that begins or goes on; too many of them end the filling."""
    photos, own = with_photos(base, tmp_path)
    options = {**own, "feature_bank": 2, "bank_dir": str(tmp_path / "banks"), "max_bad_share": 0.1, "steps": 6}
    for n in (2, 3, 4):
        (photos / f"{n:02}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"of 10 images cannot be read .*failures.jsonl.*max_bad_share 0.1.*--resume"):
        pretrain(**options, out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    for repaired, run, skipped in (((2, 4), "run", 1), ((3,), "other", 0)):
        for n in repaired:
            shutil.copy(Path(base["images"]) / f"{n:02}.jpg", photos)
        assert pretrain(**options, out=str(tmp_path / run), resume=True).skipped == skipped
    (bank,) = (tmp_path / "banks").iterdir()
    assert np.fromfile(bank / "state", np.uint8).tolist() == [1] * 20


def test_each_process_computes_its_share_of_a_bank(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes, one has half the entries, as many at a time as it trains on."""
    seen: list[int] = []

    class Second(Team):
        """The second of two processes; the first one never comes, so nobody waits for it."""

        def __init__(self, state: PartialState) -> None:
            super().__init__(state)
            self.rank, self.size = 1, 2

        def wait(self) -> None:
            pass

    def noted(task: SiamesePretext, inputs: Any) -> Any:
        seen.append(len(inputs.pixel_values) // 2)  # of each image two views
        return features(task, inputs)

    features = SiamesePretext.frozen_features
    monkeypatch.setattr(SiamesePretext, "frozen_features", noted)
    monkeypatch.setattr(module, "find_source", lambda *given: find_source(*given[:3], Second(given[3].state), given[4]))
    options = {**base, "feature_bank": 1, "bank_dir": str(tmp_path / "banks"), "steps": 1, "max_bad_share": 1.0}
    with contextlib.suppress(UserError):
        pretrain(**options, out=str(tmp_path / "run"))
    assert seen[1:] == [2, 2, 1]  # the first only shows what an entry looks like
    (bank,) = (tmp_path / "banks").iterdir()
    assert np.fromfile(bank / "state", np.uint8).tolist() == [0, 1] * 5


@pytest.mark.parametrize("changed", ["path", "width", "height", "boxes", "scores"])
def test_a_bank_is_of_its_images_and_proposals(changed: str) -> None:
    rows = [StoredImage(f"{n}.jpg", 120, 90, np.full((3, 4), n, np.float32), np.ones(3, np.float32)) for n in (0, 1)]

    def name() -> str:
        store = MagicMock(row=rows.__getitem__, __len__=lambda _: 2)
        return fingerprint(TwoViewDataset(store, ViewConfig(), seed=0), backbone="some")

    before = name()
    assert name() == before
    rows[1] = dataclasses.replace(rows[1], **{changed: getattr(rows[1], changed) * 2})
    assert name() != before


def test_a_feature_bank_gives_the_losses_of_fresh_views(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to half precision, for as many epochs as it has view sets; shared, resumed, computed again for other views."""
    calm = {"lr": 1e-12, "steps": 7, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    options = {**base, **calm, "discrimination": "region"}
    pretrain(**{**options, "out": str(tmp_path / "fresh")})
    committed = FeatureBank.commit

    def interrupted(bank: FeatureBank, slots: list[int]) -> None:
        committed(bank, slots[: len(slots) // 2])
        raise KeyboardInterrupt

    options |= {"feature_bank": 2, "bank_dir": str(tmp_path / "banks")}
    banked = {**options, "out": str(tmp_path / "banked")}
    with monkeypatch.context() as patch:
        patch.setattr(FeatureBank, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(**banked)
    (bank,) = (tmp_path / "banks").iterdir()
    half_done = np.fromfile(bank / "state", np.uint8)
    assert 0 < half_done.sum() < 20
    before = (bank / "entries").read_bytes()
    pretrain(**{**banked, "resume": True})
    assert np.fromfile(bank / "state", np.uint8).tolist() == [1] * 20
    assert (bank / "entries").read_bytes() == before  # what had been written is what is written again
    fresh, stored = logged(tmp_path / "fresh"), logged(tmp_path / "banked")
    for one, two in zip(fresh[:5], stored[:5], strict=True):  # 20 samples: two epochs
        for name in ("loss", "loss_box", "loss_giou", "loss_class", "loss_region"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), name
    assert fresh[5]["loss_box"] != pytest.approx(stored[5]["loss_box"], rel=1e-3)  # the third epoch sees the first's
    pretrain(**{**options, "out": str(tmp_path / "other"), "feature_bank": 2, "iou": 0.3, "steps": 1})
    assert len(list((tmp_path / "banks").iterdir())) == 2


def test_a_bank_is_removed_when_the_run_is_done(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**base, "feature_bank": 1, "steps": 1, "out": str(tmp_path / "run")}
    pretrain(**options)
    said = capsys.readouterr().err
    assert re.search(r"feature bank: 10 images x 1 view sets, \d+ MB .* \(--keep-bank keeps it\)", said)
    assert not (tmp_path / "run" / "feature_bank").exists()
    pretrain(**options, resume=True)
    assert "feature bank" not in capsys.readouterr().err  # complete: it is not computed again
    pretrain(**{**options, "out": str(tmp_path / "kept")}, keep_bank=True)
    assert list((tmp_path / "kept" / "feature_bank").iterdir())
