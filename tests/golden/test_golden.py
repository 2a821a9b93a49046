"""One training step, and single functions, against numbers computed with the official code.

Everything agrees to a few units of float64's last place (the assertions allow 1e-10); the repository's gradients are
stored in float32.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from golden_cases import cases, replay, units
from siamese_detr.detection import boxes
from siamese_detr.pretext import losses
from siamese_detr.pretext.features import pool_regions
from siamese_detr.views.geometry import move_edges


@pytest.fixture(scope="module", params=cases(), ids=lambda case: case.folder.name)
def case(request):
    return request.param


ABSENT = {f"pred_feature_q2.layer_{layer}" for layer in (0, "last")}
"""Left out of the repository's case."""


def one_view(name):
    """The official name without the view, where there is only one."""
    return re.sub(r"_(on_)?[vq]\d|q\d\.", "", name)


def test_every_stage_of_the_forward_pass_and_every_loss(case):
    found, expected = replay(case.pretext(), case.features()), dict(case.tensors("outputs"))
    if not case.siamese:
        found, expected = ({one_view(name): value for name, value in x.items()} for x in (found, expected))
    common = found.keys() & expected.keys()
    for name in sorted(common):
        if found[name].is_floating_point():
            assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert torch.equal(found[name], expected[name]), name
    assert {name for name in found if re.match(r"loss(/|_total)|(hs|pred|match).*_q", name)} <= common | ABSENT


def test_gradients(case):
    pretext = case.pretext()
    pretext(case.features()).loss.backward()
    expected = case.translate("grads", pretext.detector)
    learned = {name: p for name, p in pretext.named_parameters() if p.requires_grad}
    assert learned.keys() == expected.keys()
    nothing = 1e-14 * case.tensors("outputs")["grad_total_norm"]
    for name, parameter in learned.items():
        official = expected[name].double()
        if official.norm() < nothing:  # analytically zero: noise
            assert parameter.grad.norm() < nothing, name
        else:
            tolerance = 1e-8 if expected[name].dtype == torch.float64 else 1e-6
            assert (parameter.grad - official).norm() < tolerance * official.norm(), name


def test_one_optimiser_step(case):
    pretext = case.pretext()
    learned = [parameter for parameter in pretext.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-4, weight_decay=1e-4)
    pretext(case.features()).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(learned, 0.1)
    assert_close(norm, case.tensors("outputs")["grad_total_norm"], rtol=1e-10, atol=1e-10)
    optimiser.step()
    state = pretext.state_dict()
    after = case.translate("params_after_adamw_step", pretext.detector)
    assert after
    for name, value in (after | case.translate("bn_buffers_after", pretext.detector)).items():
        assert_close(state[name], value, rtol=1e-9, atol=1e-9)


def test_single_precision(case):
    pretext, features = case.pretext().float(), case.features()
    features.maps = [level.float() for level in features.maps]
    for name in ("boxes", "query_boxes", "crop_features"):
        setattr(features, name, getattr(features, name).float())
    total = case.tensors("outputs")["loss_total_weighted"]
    assert_close(pretext(features).loss.double(), total, rtol=1e-4, atol=1e-4)


def test_generalized_iou():
    a, b = (boxes.box_corners(units()[f"giou/{name}_cxcywh"]) for name in "ab")
    assert_close(boxes.generalized_iou(a[:, None], b), units()["giou/out"])


def test_global_loss():
    pred, proj = (units()[f"contra/{name}"] for name in ("pred", "proj"))
    valid = torch.ones(2, len(pred), 1, dtype=torch.bool)
    both = losses.global_loss(torch.stack([pred, pred]), torch.stack([proj, proj]), losses.count(valid))
    assert_close(both, units()["contra/out"])


def test_region_features():
    features, boxes = units()["roialign/feat"], units()["roialign/boxes"]
    pooled = pool_regions([features], boxes[None], [32])
    assert_close(pooled.flatten(0, 2), units()["roialign/out_7x7_stride32"].mean((2, 3)))


def test_jittered_boxes_of_the_queries():
    unit = {name: units()[f"boxjitter/{name}"].numpy() for name in ("box", "size_hw", "out_v1", "out_v2")}
    draws = units()["boxjitter/randn_v1s0_v2s0_v1s1_v2s1"].numpy()
    offsets = 0.2 / (1 + np.exp(-draws)) - 0.1
    for sample, view in itertools.product(range(2), range(2)):
        height, width = unit["size_hw"][sample]
        moved = move_edges(unit["box"][sample], offsets[2 * sample + view], np.array([0, 0, width, height]))
        np.testing.assert_allclose(moved, unit[f"out_v{view + 1}"][sample], atol=1e-4)
