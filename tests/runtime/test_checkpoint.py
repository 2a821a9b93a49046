"""Checkpoints: whole or not there, verified, and free of pickles."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limits import largest_file
from siamese_detr.errors import UserError
from siamese_detr.files import clean
from siamese_detr.runtime import checkpoint
from siamese_detr.runtime.checkpoint import latest_valid, list_checkpoints, save_checkpoint, verify
from siamese_detr.runtime.journal import WindowMeans
from siamese_detr.training.optimizer import adamw, lr_factor

pytestmark = pytest.mark.promise("checkpoints")


def save(folder: Path, step: int, keep: int = 0) -> Path:
    tensors = {"model": {"a": torch.full((3,), float(step)), "b": torch.arange(6).reshape(2, 3).t()}}
    return save_checkpoint(
        folder, step, tensors=tensors, documents={"state": {"step": step, "lr": 1e-4 / 3}}, keep=keep
    )


def test_round_trip(tmp_path: Path) -> None:
    """What is saved comes back bit for bit: transposed and tied tensors, and floats in JSON."""
    tied = torch.randn(4, 4)
    tensors = {"model": {"first": tied, "second": tied, "slice": tied[1:3], "half": tied.half().t(), "none": tied[:0]}}
    path = save_checkpoint(tmp_path, 3, tensors=tensors, documents={"state": {"lr": 0.1 + 0.2}})
    verify(path)
    loaded = checkpoint.read_tensors(path, "model")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors["model"].items())
    assert checkpoint.read_document(path, "state") == {"lr": 0.1 + 0.2}
    assert oct((path / "model.safetensors").stat().st_mode) == oct((path / "state.json").stat().st_mode)


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    save(tmp_path, 100, keep=2)  # the same step again replaces it
    assert latest_valid(tmp_path) == tmp_path / "checkpoint-100"


def test_a_damaged_newer_one_does_not_cost_what_is_saved_after_it(tmp_path: Path) -> None:
    """A run that went back saves behind the damaged checkpoint: that one takes no valid one's place."""
    save(tmp_path, 10)
    (save(tmp_path, 20) / "model.safetensors").unlink()
    for step in (15, 18):
        save(tmp_path, step, keep=1)
        assert latest_valid(tmp_path, lambda message: None) == tmp_path / f"checkpoint-{step}"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-18", "checkpoint-20"]
    save(tmp_path, 20, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-20"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest", "missing", "extra", "empty", "swap"])
def test_a_damaged_newest_falls_back(tmp_path: Path, damage: str) -> None:
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    weights = newest / "model.safetensors"
    if damage == "truncate":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{")
    elif damage == "missing":
        weights.unlink()
    elif damage == "extra":
        (newest / "more.json").write_text("{}")
    elif damage == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        shutil.copy(older / "state.json", newest / "state.json")
    reports: list[str] = []
    assert latest_valid(tmp_path, reports.append) == older
    assert len(reports) == 1
    assert "checkpoint-2" in reports[0]


def test_another_format_is_named_not_taken_for_damage(tmp_path: Path) -> None:
    """No older checkpoint is silently used in its place; what carries no number is of the first format."""
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    values = checkpoint.json.loads(manifest.read_text())
    manifest.write_text(checkpoint.json.dumps(values | {"format": 99}))
    with pytest.raises(UserError, match=r"checkpoint-2 was written by another release.*99.*sessions\.jsonl"):
        latest_valid(tmp_path, pytest.fail)
    del values["format"]
    manifest.write_text(checkpoint.json.dumps(values))
    assert latest_valid(tmp_path, pytest.fail) == tmp_path / "checkpoint-2"


def test_all_damaged_is_an_error_none_is_not(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "nowhere") is None
    (save(tmp_path, 1) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="all 1 checkpoints"):
        latest_valid(tmp_path, lambda message: None)


class Malice:
    """Pickles as a command that makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "pytorch_model.bin", "state.pkl", "rng_state.pth", "training_args.bin"]
)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.promise("no-code")
def test_a_pickle_is_never_loaded(tmp_path: Path, name: str, listed: bool) -> None:
    """A pickle in a checkpoint, even one its manifest lists, or under a safe name: refused, not executed."""
    target = tmp_path / "owned"
    path = save(tmp_path / "run", 1)
    (path / name).write_bytes(pickle.dumps(Malice(target)))
    if listed:
        files = {file.name: checkpoint.fingerprint(file) for file in path.iterdir() if file.name != "manifest.json"}
        (path / "manifest.json").write_text(checkpoint.json.dumps({"step": 1, "files": files}))
    with pytest.raises(UserError, match="never pickles"):
        verify(path)
    disguised = tmp_path / "run" / "checkpoint-2"
    disguised.mkdir()
    torch.save(Malice(target), disguised / "model.safetensors")
    files = {"model.safetensors": checkpoint.fingerprint(disguised / "model.safetensors")}
    (disguised / "manifest.json").write_text(checkpoint.json.dumps({"step": 2, "files": files}))
    verify(disguised)  # whole, as far as checksums tell; but it is only ever read as safetensors
    with pytest.raises(UserError, match="not safetensors"):
        checkpoint.read_tensors(disguised, "model")
    assert not target.exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    big = {"model": {"a": torch.zeros(100_000)}}
    with largest_file(50_000), pytest.raises(UserError, match=r"earlier checkpoints are intact.*--resume"):
        save_checkpoint(tmp_path, 2, tensors=big, documents={}, keep=1)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "flush", full)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(tmp_path, 2, tensors=big, documents={}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name in (".writing-checkpoint-2-77", ".removing-checkpoint-0-77"):
        shutil.copytree(path, tmp_path / name)
    assert list_checkpoints(tmp_path) == [path]
    clean(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


class Toy(nn.Module):
    """One of each kind of parameter, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.queries = nn.Embedding(2, 4)
        self.level = nn.Parameter(torch.randn(2, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(self.linear(x)).sum() + (self.queries.weight * self.level).sum()).square()


def test_optimizer_round_trip_continues_exactly() -> None:
    """Three steps at once, or one, through files' types, then two in a new optimizer: the same parameters."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 3)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
        for x in inputs:
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()

    whole = Toy()
    begun = Toy()
    begun.load_state_dict(whole.state_dict())
    steps(whole, adamw(whole, 1e-2, 1e-2), inputs)
    optimizer = adamw(begun, 1e-2, 1e-2)
    steps(begun, optimizer, inputs[:1])
    tensors, document = checkpoint.pack_optimizer(optimizer, begun)
    document = checkpoint.json.loads(checkpoint.json.dumps(document))
    again = adamw(begun, 5.0, 5.0)
    checkpoint.unpack_optimizer(again, begun, tensors, document)
    assert again.param_groups[0]["betas"] == (0.9, 0.999)
    steps(begun, again, inputs[1:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), begun.parameters(), strict=True))

    begun.norm.requires_grad_(False)
    with pytest.raises(UserError, match="other parameters"):
        checkpoint.unpack_optimizer(adamw(begun, 1e-2, 1e-2), begun, tensors, document)


def test_weight_decay_spares_norms_biases_and_embeddings() -> None:
    model = Toy()
    names = {id(p): n for n, p in model.named_parameters()}
    spared, decayed = sorted(adamw(model, 1e-4, 1e-2).param_groups, key=lambda group: group["weight_decay"])
    assert [names[id(p)] for p in decayed["params"]] == ["linear.weight"]
    assert {names[id(p)] for p in spared["params"]} == {
        "level",
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "queries.weight",
    }
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-2, 0.0)
    (every,) = adamw(model, 1e-4, 1e-2, decay_all=True).param_groups
    assert len(every["params"]) == 6


def test_the_fused_optimizer_updates_as_the_plain_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3))
    other = copy.deepcopy(model)
    ours = adamw(model, 1e-2, 1e-2, decay_all=True)
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=1e-2, foreach=False, fused=False)
    for _ in range(20):
        x = torch.randn(16, 7)
        for network, optimizer in ((model, ours), (other, plain)):
            network(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_geometry_of_deformable_attention_and_the_backbone_learn_at_rates_of_their_own() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("sampling_offsets", "value_proj", "body")})
    names = {id(p): n for n, p in model.named_parameters()}
    groups = adamw(model, 1e-4, 1e-2, backbone=model["body"], backbone_lr=3e-5).param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    for name, rate in (("sampling_offsets", 1e-5), ("value_proj", 1e-4), ("body", 3e-5)):
        assert rates[f"{name}.weight"] == rates[f"{name}.bias"] == pytest.approx(rate)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["step", "constant", "cosine", "one-cycle"]), st.integers(1, 400), st.integers(0, 30))
def test_schedules_stay_in_range(schedule: str, steps: int, warmup: int) -> None:
    factor = lr_factor(schedule, steps, 2 / 3, warmup)
    values = [factor(step) for step in range(steps)]
    assert all(0 <= value <= 1 for value in values)
    if schedule == "step" and warmup == 0:
        drop = round(steps * 2 / 3)
        assert values == [1.0] * drop + [0.1] * (steps - drop)


def test_the_papers_drops() -> None:
    """300 k iterations with the drop at 200 k; 120 k at 80 k; 60 epochs at 40."""
    for steps, drop in ((300_000, 200_000), (120_000, 80_000), (60, 40)):
        factor = lr_factor("step", steps)
        assert (factor(drop - 1), factor(drop)) == (1.0, 0.1)


def test_a_logging_window_survives_a_checkpoint() -> None:
    """Means over a window that was interrupted equal the uninterrupted ones, bit for bit."""
    values = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).mul(1e3)

    def add(means: WindowMeans, rows: torch.Tensor) -> None:
        for row in rows:
            means.add({"a": row[0], "b": row[1]}, 0.5)
            means.add({"norm": row[2]})
            means.count += 1

    whole, begun, resumed = WindowMeans(), WindowMeans(), WindowMeans()
    add(whole, values)
    add(begun, values[:3])
    resumed.restore(checkpoint.json.loads(checkpoint.json.dumps(begun.state())), torch.device("cpu"))
    add(resumed, values[3:])
    expected = whole.drain()
    assert resumed.drain() == expected
    assert expected["norm"] == pytest.approx(float(values[:, 2].double().mean()), rel=1e-12)
    assert whole.drain() == {}
