"""Several processes give the loss and the gradients of one process with their joint batch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from golden_siamese import golden, golden_config, golden_features
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.pretext.siamese import SiamesePretext


class Replay(nn.Module):
    """Stands for a detector: gives the golden memory, decoder states and boxes of some images of the batch."""

    num_queries, hidden_size, num_levels, channels, strides = 20, 32, 1, [16], [32]

    def __init__(self, images: list[int]) -> None:
        super().__init__()
        self.images = images

    def encode(self, maps, pixel_mask):
        return SimpleNamespace(tokens=golden()["out/memory"][:, self.images].flatten(0, 1), shapes=[(5, 6)])

    def decode(self, memory, region_queries, query_mask=None):
        states, boxes = (golden()[f"out/{name}"][:, :, self.images].flatten(1, 2) for name in ("states", "boxes"))
        return SimpleNamespace(states=states, boxes=boxes)


def part(images: list[int]) -> FrozenFeatures:
    """The golden features of some images."""
    everything = golden_features()
    rows = images + [3 + image for image in images]
    return FrozenFeatures(
        maps=[level[rows] for level in everything.maps],
        pixel_mask=everything.pixel_mask[rows],
        sizes=everything.sizes[rows],
        boxes=everything.boxes[:, images],
        query_boxes=everything.query_boxes[:, images],
        crop_features=everything.crop_features[:, images],
    )


def work(rank: int, folder: str) -> None:
    """One of two processes: the first has one image of the golden batch, the second two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    images = [[0], [1, 2]][rank]
    pretext = SiamesePretext(Replay(images), golden_config()).double()
    heads = {f"weight/{name}": value for name, value in pretext.state_dict().items()}
    pretext.load_state_dict({name[7:]: golden().get(name, value) for name, value in heads.items()})
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
    assert_close(result["loss"], golden()["out/loss"])
    checked = 0  # 2 class, 4 region and 18 global parameters, save the five whose gradient is zero
    for name, gradient in result["gradients"].items():
        if f"grad/{name}" in golden():
            expected = golden()[f"grad/{name}"].double()
            assert (gradient - expected).norm() < 1e-6 * expected.norm(), name
            checked += 1
    assert checked == 19
    for name, value in result["buffers"].items():
        assert_close(value, golden()[f"after_step/global_head.{name}"])
