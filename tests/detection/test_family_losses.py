"""Each family's losses against those of its stock model, which computes them from the same images and labels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForObjectDetection
from transformers.loss.loss_deimv2 import Deimv2Loss

from siamese_detr.detection.criterion import CriterionConfig, CriterionOutput, SetCriterion
from siamese_detr.detectors import DetectorAdapter, load_detector
from siamese_detr.detectors.loading import LoadReport
from siamese_detr.detectors.structures import Predictions, Targets
from tiny_detectors import CASES, UNMASKED, fitting_side, tiny_batch, tiny_detector, tiny_targets

LAST_ONLY = ("detr", "conditional-detr")
"""Families in which Transformers' auxiliary losses change what the decoder computes."""


def trained(case: str) -> DetectorAdapter:
    detector = tiny_detector(case, reduced=False).train()
    detector.set_trainable(backbone=False, class_head=True)
    detector.config.auxiliary_loss = case not in LAST_ONLY
    return detector


def our_loss(case: str, detector: DetectorAdapter, targets: Targets) -> CriterionOutput:
    torch.manual_seed(0)
    images, mask = tiny_batch(padded=case not in UNMASKED, side=fitting_side(detector))
    predictions = detector(images, mask, targets)
    if case in LAST_ONLY:
        predictions = Predictions(predictions.logits[-1:], predictions.boxes[-1:])
    config = CriterionConfig.of(detector.class_loss)
    if config.kind == "focal":
        config = dataclasses.replace(config, class_weight=1.0)  # ours is 2, as in the papers
    return SetCriterion(config)(predictions, targets)


def stock_loss(case: str, detector: DetectorAdapter, targets: Targets) -> torch.Tensor:
    torch.manual_seed(0)
    images, mask = tiny_batch(padded=case not in UNMASKED, side=fitting_side(detector))
    labels = [
        {"class_labels": classes[inside], "boxes": boxes[inside]}
        for classes, boxes, inside in zip(targets.classes, targets.boxes, targets.valid, strict=True)
    ]
    if "class_cost" in detector.config.to_dict() and detector.class_loss == "focal":
        detector.config.class_cost = 2
    return detector.model(images, pixel_mask=mask.long(), labels=labels).loss


def gradients(detector: DetectorAdapter, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    detector.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


def paired_loss(logits, labels, device, boxes, config, classes, coordinates, **rest):
    """Transformers' terms for D-FINE's family, over the union of all layers' matches as in the papers' codes.

    Its own loss pairs each layer's edges with the boxes of the layer before, and skips the last layers.
    """

    def layers(outputs: tuple[torch.Tensor, ...]) -> list[dict[str, torch.Tensor]]:
        scores, corners, edges, references = (x.transpose(0, 1) for x in outputs)
        teacher = {"teacher_corners": edges[-1], "teacher_logits": scores[-1]}
        rows = zip(scores[1:], corners[1:], edges, references, strict=True)
        names = ("logits", "pred_boxes", "pred_corners", "ref_points")
        refined = [dict(zip(names, row, strict=True)) | teacher for row in rows]
        return [{"logits": scores[0], "pred_boxes": corners[0]}, *refined]

    meta = rest["denoising_meta_values"]
    outputs = classes, coordinates.clamp(0, 1), rest["predicted_corners"], rest["initial_reference_points"]
    noisy, plain = zip(*(x.split(meta["dn_num_split"], 2) for x in outputs), strict=True)
    *earlier, last = layers(plain)
    proposed = {"logits": rest["enc_topk_logits"], "pred_boxes": rest["enc_topk_bboxes"]}
    last |= {"auxiliary_outputs": [*earlier, proposed], "dn_auxiliary_outputs": layers(noisy)}
    for name, value in dict(weight_loss_mal=1.0, mal_alpha=None, use_dense_one_to_one=True).items():
        setattr(config, name, value)
    criterion = Deimv2Loss(config)
    if config.model_type == "d_fine":
        criterion.losses[0] = "vfl"
        criterion.weight_dict["loss_vfl"] = config.weight_loss_vfl
    else:
        criterion.gamma = 1.5  # the paper's; Transformers' default is 2
    terms = criterion({**last, "denoising_meta_values": meta}, labels)
    return sum(terms.values()), terms, None


@pytest.mark.parametrize("case", ["d-fine", "deimv2"])
def test_edges_learn_as_by_the_stock_terms(case):
    detector, targets = trained(case), tiny_targets()
    output = our_loss(case, detector, targets)
    detector.model.loss_function = paired_loss
    theirs = stock_loss(case, detector, targets)
    assert output.loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_close(gradients(detector, output.loss), gradients(detector, theirs), rtol=1e-3, atol=1e-4)
    assert output.terms["loss_local"] > 0


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("d-fine", "deimv2")])
def test_loss_and_gradients_are_those_of_the_stock_model(case):
    detector, targets = trained(case), tiny_targets()
    ours, theirs = our_loss(case, detector, targets).loss, stock_loss(case, detector, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_close(gradients(detector, ours), gradients(detector, theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns_with_and_without_boxes(case):
    """Processes wait for the gradient of every parameter."""
    detector = trained(case)
    detector.set_trainable(backbone=True, class_head=True)
    names = set(detector.trainable_names())
    for targets in (tiny_targets(), tiny_targets((0, 0, 0))):
        output = our_loss(case, detector, targets)
        assert output.loss.isfinite()
        learned = gradients(detector, output.loss)
        last_only = {name for name in names - learned.keys() if case in LAST_ONLY}
        assert learned.keys() | last_only == names


def test_what_an_older_detector_lacks_for_denoising_is_added(tmp_path):
    old = tiny_detector("rt-detr", classes=1)
    del old.model.model.denoising_class_embed
    old.config.num_denoising = 0
    old.save(tmp_path)
    detector = load_detector(tmp_path, ["cat", "dog"])
    assert detector(*tiny_batch(padded=False), tiny_targets(classes=2)).denoising is None
    added = detector.complete()
    assert {name: tuple(detector.model.get_parameter(name).shape) for name in added} == {
        "model.denoising_class_embed.weight": (3, 32)
    }
    assert detector(*tiny_batch(padded=False), tiny_targets(classes=2)).denoising is not None
    detector.save(tmp_path)
    assert load_detector(tmp_path).load_report == LoadReport((), (), ())


def test_groups_of_queries_differ_and_are_kept(tmp_path):
    """Those that fine-tuning adds to a pre-trained detector, too. A prediction needs the first alone."""
    detector = tiny_detector("lw-detr", classes=1)
    detector.save(tmp_path)
    before = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    detector = load_detector(tmp_path)
    assert detector.config.group_detr == 1
    assert "model.enc_output.12.weight" in detector.complete()
    assert detector.complete() == []
    detector.save(tmp_path)
    again = load_detector(tmp_path)
    assert again.config.group_detr == 13
    assert again.load_report == LoadReport((), (), ())
    images, mask = tiny_batch(padded=False, side=fitting_side(again))
    predictions = again(images, mask)
    assert predictions.groups == 13
    states = predictions.boxes[-1].unflatten(1, (13, -1))
    assert all((states[:, 0] - states[:, group]).abs().max() > 1e-3 for group in range(1, 13))
    with torch.no_grad():
        after = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()(images)
        assert_close(after.pred_boxes, before(images).pred_boxes, rtol=0, atol=0)
