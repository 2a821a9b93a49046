"""The fine-tuning criterion against a slow float64 re-computation and against Transformers' own losses."""

from __future__ import annotations

import itertools
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from siamese_detr.detection.criterion import CriterionConfig, SetCriterion, match, matching_cost
from siamese_detr.detection.matching import NonFiniteError
from siamese_detr.detectors.structures import Edges, Predictions, Targets


def predictions(kind: str, counts: list[int], layers: int = 3, queries: int = 5, classes: int = 4, seed: int = 0):
    random = np.random.default_rng(seed)
    channels = classes + (kind == "softmax")
    logits = torch.tensor(random.normal(0, 2, (layers, len(counts), queries, channels)))
    boxes = torch.tensor(random.uniform(0.05, 0.6, (layers, len(counts), queries, 4)))
    most = max(counts, default=0)
    labels = torch.full((len(counts), most), -1)
    sought = torch.zeros(len(counts), most, 4, dtype=torch.float64)
    for row, count in enumerate(counts):
        labels[row, :count] = torch.tensor(random.integers(0, classes, count))
        sought[row, :count] = torch.tensor(random.uniform(0.1, 0.5, (count, 4)))
    return logits, boxes, Targets(labels, sought)


def slow_giou(a: np.ndarray, b: np.ndarray) -> float:
    def corners(box):
        return box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2

    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = corners(a), corners(b)
    shared = max(min(ax2, bx2) - max(ax1, bx1), 0) * max(min(ay2, by2) - max(ay1, by1), 0)
    union = a[2] * a[3] + b[2] * b[3] - shared
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return shared / union - (hull - union) / hull


def slow_loss(logits, boxes, targets, c: CriterionConfig) -> float:
    """One number at a time, every assignment tried."""
    counts = targets.valid.sum(1).tolist()
    total = 0.0
    for layer in range(len(logits)):
        class_sum = class_norm = l1 = giou = 0.0
        for image, count in enumerate(counts):
            z, b = logits[layer, image].numpy(), boxes[layer, image].numpy()
            labels, sought = targets.classes[image, :count].tolist(), targets.boxes[image, :count].numpy()
            sigmoid = 1 / (1 + np.exp(-z))
            softmax = np.exp(z) / np.exp(z).sum(1, keepdims=True)

            def cost(q, t):
                if c.kind == "softmax":
                    p = -softmax[q, labels[t]]
                else:
                    s = sigmoid[q, labels[t]]
                    p = -c.alpha * (1 - s) ** 2 * math.log(s + 1e-8) + (1 - c.alpha) * s**2 * math.log(1 - s + 1e-8)
                overlap = slow_giou(b[q], sought[t])
                return c.class_cost * p + c.box_cost * abs(b[q] - sought[t]).sum() - c.giou_cost * overlap

            used = min(count, len(z))
            best = min(
                (
                    (queries, chosen)
                    for chosen in itertools.combinations(range(count), used)
                    for queries in itertools.permutations(range(len(z)), used)
                ),
                key=lambda pair: sum(cost(q, t) for q, t in zip(*pair, strict=True)),
            )
            given_label = {}
            for q, t in zip(*best, strict=True):
                given_label[q] = labels[t]
                l1 += abs(b[q] - sought[t]).sum()
                giou += 1 - slow_giou(b[q], sought[t])
            for q in range(len(z)):
                if c.kind == "softmax":
                    weight = 1.0 if q in given_label else c.no_object_weight
                    class_sum -= weight * math.log(softmax[q, given_label.get(q, z.shape[1] - 1)])
                    class_norm += weight
                else:
                    for k in range(z.shape[1]):
                        s = sigmoid[q, k]
                        positive = given_label.get(q) == k
                        class_sum -= c.alpha * (1 - s) ** 2 * math.log(s) if positive else 0
                        class_sum -= 0 if positive else (1 - c.alpha) * s**2 * math.log(1 - s)
        n = max(sum(counts), 1)
        class_loss = class_sum / (class_norm if c.kind == "softmax" else n)
        total += c.class_weight * class_loss + c.box_weight * l1 / n + c.giou_weight * giou / n
    return total


@pytest.mark.parametrize("kind", ["softmax", "focal"])
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_equals_the_obvious_computation(kind, counts, seed):
    logits, boxes, targets = predictions(kind, counts, layers=2, queries=3, seed=seed)  # also more targets than queries
    config = CriterionConfig.of(kind)
    ours = SetCriterion(config)(Predictions(logits, boxes), targets).loss
    assert ours.item() == pytest.approx(slow_loss(logits, boxes, targets, config), rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_equals_the_stock_loss(kind):
    logits, boxes, targets = predictions(kind, [2, 0, 4], queries=7)
    logits, boxes = logits.float(), boxes.float()
    labels = [
        {"class_labels": c[v], "boxes": b[v].float()}
        for c, b, v in zip(targets.classes, targets.boxes, targets.valid, strict=True)
    ]
    class_weight = {"softmax": 1, "focal": 2}[kind]  # the papers'; the stock focal loss has 1
    stock = types.SimpleNamespace(
        class_cost=class_weight, bbox_cost=5, giou_cost=2, num_labels=4, eos_coefficient=0.1, focal_alpha=0.25,
        auxiliary_loss=True, decoder_layers=3, bbox_loss_coefficient=5, giou_loss_coefficient=2,
    )  # fmt: skip
    loss = ForObjectDetectionLoss if kind == "softmax" else DeformableDetrForObjectDetectionLoss
    _, terms, _ = loss(logits[-1], labels, "cpu", boxes[-1], stock, logits, boxes)
    ours = SetCriterion(CriterionConfig.of(kind))(Predictions(logits, boxes), targets)
    last = {"loss_class": "loss_ce", "loss_box": "loss_bbox", "loss_giou": "loss_giou"}
    for name, theirs in last.items():
        assert ours.terms[name].item() == pytest.approx(terms[theirs].item(), rel=1e-5)
    total = sum(
        weight * terms[name + suffix]
        for name, weight in [("loss_ce", class_weight), ("loss_bbox", 5), ("loss_giou", 2)]
        for suffix in ("", "_0", "_1")
    )
    assert ours.loss.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_perfect_predictions_cost_nothing_and_the_order_of_images_does_not_matter(kind):
    logits, boxes, targets = predictions(kind, [2, 3])
    criterion = SetCriterion(CriterionConfig.of(kind))
    perfect = torch.full_like(logits, -50)
    if kind == "softmax":
        perfect[..., -1] = 50
    for image, count in enumerate([2, 3]):
        for t in range(count):
            boxes[:, image, t] = targets.boxes[image, t]
            perfect[:, image, t] = -50
            perfect[:, image, t, targets.classes[image, t]] = 50
    assert criterion(Predictions(perfect, boxes), targets).loss.item() == pytest.approx(0, abs=1e-6)
    mirrored = Targets(targets.classes.flip(0), targets.boxes.flip(0))
    assert criterion(Predictions(logits.flip(1), boxes.flip(1)), mirrored).loss.item() == pytest.approx(
        criterion(Predictions(logits, boxes), targets).loss.item(), rel=1e-12
    )


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_every_layer_gets_gradient_and_padding_none_of_it(kind):
    logits, boxes, targets = predictions(kind, [1, 3])
    more = Targets(
        torch.cat([targets.classes, torch.full((2, 2), -1)], 1),
        torch.cat([targets.boxes, torch.rand(2, 2, 4, dtype=torch.float64)], 1),
    )
    gradients = []
    for labels in (targets, more):
        z, b = logits.clone().requires_grad_(), boxes.clone().requires_grad_()
        SetCriterion(CriterionConfig.of(kind))(Predictions(z, b), labels).loss.backward()
        assert (z.grad.flatten(1).abs().sum(1) > 0).all()
        assert (b.grad.flatten(1).abs().sum(1) > 0).all()
        gradients.append((z.grad, b.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_images_without_boxes_have_a_finite_loss():
    for kind in ("softmax", "focal"):
        logits, boxes, targets = predictions(kind, [0, 0])
        output = SetCriterion(CriterionConfig.of(kind))(Predictions(logits, boxes), targets)
        assert output.loss.isfinite()
        assert output.terms["loss_box"] == 0


def test_more_targets_than_queries():
    logits, boxes, targets = predictions("focal", [6, 1], queries=3)
    matches = match(logits, boxes, targets, CriterionConfig.of("focal"))
    assert (matches[:, 0] >= 0).sum(1).tolist() == [3, 3, 3]
    assert (matches[:, 1, 0] >= 0).all()
    assert matching_cost(logits, boxes, targets, CriterionConfig.of("focal")).shape == (3, 2, 3, 6)


def test_a_nan_is_named():
    logits, boxes, targets = predictions("focal", [2, 1])
    logits[1, 1, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"\[1\]"):
        SetCriterion(CriterionConfig.of("focal"))(
            Predictions(logits, boxes), Targets(targets.classes * 0, targets.boxes)
        )


def batch_of(kind: str, rows: slice) -> tuple[Predictions, Targets]:
    """Some images of one batch; "varifocal" is D-FINE, with edge distributions and denoising queries."""
    logits, boxes, targets = predictions(kind, [4, 0, 1, 2])
    part = Targets(targets.classes[rows], targets.boxes[rows])
    if kind != "varifocal":
        return Predictions(logits[:, rows], boxes[:, rows]), part
    random = torch.Generator().manual_seed(3)
    edges = torch.randn(2, 4, 5, 4, 9, generator=random, dtype=torch.float64)
    bins = torch.tensor([4.0]), torch.tensor([0.5])
    distributions = Edges(edges[:, rows], boxes[0, rows], *bins)
    assigned = torch.cat((torch.where(targets.valid, torch.arange(4), -1), torch.full((4, 1), -1)), 1)[rows]
    noisy = Predictions(logits.flip(0)[:, rows], boxes.flip(0)[:, rows], distributions, assigned=assigned)
    return Predictions(logits[:, rows], boxes[:, rows], distributions, denoising=noisy), part


def share_of_loss(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loss = SetCriterion(CriterionConfig.of(kind))(*batch_of(kind, slice(rank * 2, rank * 2 + 2))).loss
    Path(folder, f"{rank}.json").write_text(json.dumps(loss.item()))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["softmax", "focal", "varifocal"])
def test_two_processes_average_to_the_loss_of_one(kind, tmp_path):
    mp.start_processes(share_of_loss, args=(kind, str(tmp_path)), nprocs=2, start_method="spawn")
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    whole = SetCriterion(CriterionConfig.of(kind))(*batch_of(kind, slice(4))).loss.item()
    assert sum(losses) / 2 == pytest.approx(whole, rel=1e-6)
