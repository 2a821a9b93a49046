"""One step of Siamese DETR, and single functions, against numbers computed with the official code.

Everything agrees to a few units of float64's last place (the assertions allow 1e-10); gradients were stored in float32.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from golden_siamese import golden, golden_features, golden_pretext, negligible_gradients
from siamese_detr.pretext import losses
from siamese_detr.pretext.features import pool_regions
from siamese_detr.views.geometry import move_edges


def close(actual, name, tolerance=1e-10):
    assert_close(actual, golden()[f"out/{name}"], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def step():
    """A pretext module after the backward pass of the golden step, its features and its output."""
    pretext, features = golden_pretext(), golden_features()
    output = pretext(features)
    output.loss.backward()
    return pretext, features, output


def test_every_stage_of_the_forward_pass():
    pretext, features = golden_pretext(), golden_features()
    memory = pretext.detector.encode(features.maps, features.pixel_mask)
    close(memory.mask.unflatten(0, (2, 3)), "mask")
    close(memory.tokens.unflatten(0, (2, 3)), "memory")
    queries = pretext.queries(features)
    close((queries + pretext.detector.model.model.query_position_embeddings.weight).float(), "queries", 1e-6)
    decoded = pretext.detector.decode(memory, queries.flip(0).flatten(0, 1))
    close(decoded.states.unflatten(1, (2, 3)), "states")
    close(decoded.boxes.unflatten(1, (2, 3)), "boxes")
    close(pretext.class_head(decoded.states).unflatten(1, (2, 3)), "logits")
    close(features.targets, "targets")
    pooled = memory.tokens.mean(1).unflatten(0, (2, 3))
    predictions, projections = pretext.global_head(pooled)
    close(projections, "projections")
    close(predictions, "predictions")


def test_matches_and_losses_of_every_layer_and_direction():
    pretext, features = golden_pretext(), golden_features()
    memory = pretext.detector.encode(features.maps, features.pixel_mask)
    decoded = pretext.detector.decode(memory, pretext.queries(features).flip(0).flatten(0, 1))
    answers = pretext.answer(decoded, features)
    assert torch.equal(answers.matches, golden()["out/matches"])
    for name, value in answers.terms.items():
        close(value, name)
    said = pretext.region_head(answers.states)
    region = losses.region_loss(said, features.crop_features.flip(0), answers.valid, answers.counts)
    close(region, "loss_region")


def test_total_and_reported_terms(step):
    _, _, output = step
    close(output.loss, "loss")
    close(output.terms["loss_global"], "loss_global")
    for name in ("loss_cls", "loss_box", "loss_giou", "loss_region"):
        expected = golden()[f"out/{name}"].mean(1)
        assert_close(output.terms[f"{name}_0"], expected[0])
        assert_close(output.terms[name], expected[1])
    assert len(output.terms) == 9


def test_gradients(step):
    pretext, _, _ = step
    seen = 0
    for name, parameter in pretext.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        seen += 1
        if name in negligible_gradients():
            assert parameter.grad.abs().max() < 1e-12, name
        else:
            expected = golden()[f"grad/{name}"].double()
            assert (parameter.grad - expected).norm() < 1e-6 * expected.norm(), name
    assert seen == sum(name.startswith("grad/") for name in golden()) + len(negligible_gradients())


def test_one_optimiser_step():
    pretext = golden_pretext()
    learned = [parameter for parameter in pretext.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-4, weight_decay=1e-4)
    pretext(golden_features()).loss.backward()
    close(torch.nn.utils.clip_grad_norm_(learned, 0.1), "grad_norm")
    optimiser.step()
    state = pretext.state_dict()
    for name, expected in golden().items():
        if name.startswith("after_step/"):
            assert_close(state[name.removeprefix("after_step/")], expected, rtol=1e-9, atol=1e-9)


def test_single_precision():
    pretext, features = golden_pretext().float(), golden_features()
    features.maps = [level.float() for level in features.maps]
    for name in ("boxes", "query_boxes", "crop_features"):
        setattr(features, name, getattr(features, name).float())
    assert_close(pretext(features).loss.double(), golden()["out/loss"], rtol=1e-4, atol=1e-4)


def test_generalized_iou():
    a, b = (losses.box_corners(golden()[f"unit/giou/{name}_cxcywh"]) for name in "ab")
    assert_close(losses.generalized_iou(a[:, None], b), golden()["unit/giou/out"])


def test_global_loss():
    pred, proj = (golden()[f"unit/contra/{name}"] for name in ("pred", "proj"))
    valid = torch.ones(2, len(pred), 1, dtype=torch.bool)
    both = losses.global_loss(torch.stack([pred, pred]), torch.stack([proj, proj]), losses.count(valid))
    assert_close(both, golden()["unit/contra/out"])


def test_region_features():
    features, boxes = golden()["unit/roialign/feat"], golden()["unit/roialign/boxes"]
    pooled = pool_regions([features], boxes[None], [32])
    assert_close(pooled.flatten(0, 2), golden()["unit/roialign/out_7x7_stride32"].mean((2, 3)))


def test_jittered_boxes_of_the_queries():
    unit = {name: golden()[f"unit/boxjitter/{name}"].numpy() for name in ("box", "size_hw", "out_v1", "out_v2")}
    draws = golden()["unit/boxjitter/randn_v1s0_v2s0_v1s1_v2s1"].numpy()
    offsets = 0.2 / (1 + np.exp(-draws)) - 0.1
    for sample, view in itertools.product(range(2), range(2)):
        height, width = unit["size_hw"][sample]
        moved = move_edges(unit["box"][sample], offsets[2 * sample + view], np.array([0, 0, width, height]))
        np.testing.assert_allclose(moved, unit[f"out_v{view + 1}"][sample], atol=1e-4)
