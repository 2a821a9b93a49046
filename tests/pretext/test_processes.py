"""Several processes give the loss and the gradients of one process with their joint batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from golden_cases import cases
from siamese_detr.detectors.research.checkpoint import normalise
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.pretext.siamese import SiamesePretext

pytestmark = pytest.mark.promise("processes")

CASE = cases()[0]
HEADS = "class_head.", "region_head.", "global_head."
OUT = CASE.tensors("outputs")


class Replay(nn.Module):
    """Stands for a detector: gives the official memory, decoder states and boxes of some images of the batch."""

    num_queries, hidden_size, num_levels, channels, strides = 20, 32, 1, [16], [32]

    def __init__(self, images: list[int]) -> None:
        super().__init__()
        self.images = images

    def encode(self, maps, pixel_mask):
        maps = torch.cat([OUT[f"memory_v{view}.level0"][self.images] for view in (1, 2)])
        return SimpleNamespace(tokens=maps.flatten(2).transpose(1, 2), shapes=[(5, 6)])

    def decode(self, memory, region_queries, query_mask=None):
        pairs = (2, 1), (1, 2)  # queries of view 2 on the memory of view 1, and the reverse
        states = torch.cat([OUT[f"hs_q{query}_on_v{view}"][:, self.images] for query, view in pairs], 1)
        boxes = [
            torch.cat([OUT[f"pred_boxes_q{query}.layer_{layer}"][self.images] for query, _ in pairs])
            for layer in (0, "last")
        ]
        return SimpleNamespace(states=states, boxes=torch.stack(boxes))


def part(images: list[int]) -> FrozenFeatures:
    """The features of some images."""
    everything = CASE.features()
    rows = images + [3 + image for image in images]
    return FrozenFeatures(
        maps=[level[rows] for level in everything.maps],
        pixel_mask=everything.pixel_mask[rows],
        sizes=everything.sizes[rows],
        boxes=everything.boxes[:, images],
        query_boxes=everything.query_boxes[:, images],
        crop_features=everything.crop_features[:, images],
    )


def heads(file: str) -> dict[str, torch.Tensor]:
    """The tensors of the pretext's heads in one of the case's files."""
    everything = CASE.translate_heads(normalise(CASE.tensors(file)))
    return {name: value for name, value in everything.items() if name.startswith(HEADS)}


def work(rank: int, folder: str) -> None:
    """One of two processes: the first has one image of the case's batch, the second two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    images = [[0], [1, 2]][rank]
    pretext = SiamesePretext(Replay(images), CASE.config()).double()
    pretext.load_state_dict(heads("state_dict"), strict=False)
    output = pretext(part(images))
    output.loss.backward()
    loss = output.loss.detach()
    dist.all_reduce(loss)
    gradients = {name: p.grad for name, p in pretext.named_parameters() if p.grad is not None}
    for gradient in gradients.values():
        dist.all_reduce(gradient)  # as DistributedDataParallel: the mean over processes
        gradient /= 2
    if rank == 0:
        buffers = {name: value for name, value in pretext.global_head.state_dict().items() if "running" in name}
        torch.save({"loss": loss / 2, "gradients": gradients, "buffers": buffers}, f"{folder}/result.pt")
    dist.destroy_process_group()


def test_two_processes_with_uneven_shares_reproduce_the_golden_step(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert_close(result["loss"], OUT["loss_total_weighted"])
    expected, after = heads("grads"), heads("bn_buffers_after")
    checked = 0  # 2 class, 4 region and 18 global parameters, save the five whose gradient is zero
    for name, gradient in result["gradients"].items():
        official = expected[name].double() if name.startswith(HEADS) else None
        if official is not None and official.norm() > 1e-10:
            assert (gradient - official).norm() < 1e-6 * official.norm(), name
            checked += 1
    assert checked == 19
    for name, value in result["buffers"].items():
        assert_close(value, after[f"global_head.{name}"])
