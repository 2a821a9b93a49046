"""The suite every detector family passes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from siamese_detr.detectors import FAMILIES, load_detector
from siamese_detr.detectors.build import adapter_class
from siamese_detr.errors import UserError
from siamese_detr.pretext import build_pretext
from tiny_detectors import (
    CASES,
    QUERIES,
    UNMASKED,
    WIDTH,
    every_detector,
    fitting_side,
    gradients_in_half_precision_are_numbers,
    region_queries,
    tiny_batch,
    tiny_detector,
    tiny_targets,
)


def test_every_family_is_tried():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


@every_detector
def test_without_regions_it_is_the_stock_model(case):
    detector = tiny_detector(case).eval()
    images, mask = tiny_batch(padded=case not in UNMASKED, side=fitting_side(detector))
    with torch.no_grad():
        ours = detector(images, mask)
        stock = detector.model(images, pixel_mask=mask.long())
    assert torch.equal(ours.boxes[-1], stock.pred_boxes)
    assert torch.equal(ours.logits[-1], stock.logits)


@every_detector
def test_shrink_and_perturb_moves_all_but_the_backbone_towards_new_initial_values(case):
    present, new, halfway = tiny_detector(case), tiny_detector(case), tiny_detector(case)
    torch.manual_seed(1)
    new.shrink_and_perturb(0.0)
    torch.manual_seed(1)
    halfway.shrink_and_perturb(0.5)
    backbone = {id(parameter) for parameter in present.backbone.parameters()}
    moved = set()
    pairs = zip(present.model.named_parameters(), new.model.parameters(), halfway.model.parameters(), strict=True)
    for (name, old), start, between in pairs:
        assert_close(between, (old + start) / 2)
        if not torch.equal(old, start):
            moved.add(name)
            assert id(old) not in backbone or "projector" in name
    assert any("decoder.layers" in name for name in moved)


def stock_layers(detector, images: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits and boxes (layers, B, Q, ·) that the stock model gives its loss."""
    layers = []

    def note(logits, labels, device, boxes, config, every_logits, every_boxes, *proposed, **named):
        batch_first = "enc_topk_bboxes" in named
        proposed = proposed or (named.get("enc_topk_logits"), named.get("enc_topk_bboxes"))
        for last, every, first in zip((logits, boxes), (every_logits, every_boxes), proposed, strict=True):
            every = last[None] if every is None else every.transpose(0, 1) if batch_first else every
            layers.append(every if first is None else torch.cat((first[None], every)))
        return last.sum(), {}, []

    # With auxiliary losses, stock DETR and Conditional DETR normalise what a layer gives to the next one.
    detector.config.auxiliary_loss = detector.family not in ("detr", "conditional-detr")
    detector.config.num_denoising = 0
    detector.model.loss_function = note
    detector.model(images, pixel_mask=mask.long(), labels=[])
    return layers


@every_detector
def test_gradients_are_those_of_the_stock_model(case):
    """So they stop where those do, between a layer's box and the next one's reference."""
    detector = tiny_detector(case).train()
    images, mask = tiny_batch(padded=case not in UNMASKED, side=fitting_side(detector))
    detector.set_trainable(backbone=False, class_head=True)
    theirs = stock_layers(detector, images, mask)
    predicted = detector(images, mask)
    ours = [x[-len(y) :] for x, y in zip((predicted.logits, predicted.boxes), theirs, strict=True)]
    gradients = []
    for outputs in (ours, theirs):
        random = torch.Generator().manual_seed(4)
        sum((x * torch.randn(x.shape, generator=random)).sum() for x in outputs).backward()
        gradients.append({name: p.grad for name, p in detector.named_parameters() if p.grad is not None})
        detector.zero_grad()
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_close(*gradients, rtol=1e-3, atol=5e-3)


@every_detector
def test_layers_teach_nothing_to_the_proposals_they_start_from(case):
    if not adapter_class(CASES[case][0]).selects_queries:
        return
    detector = tiny_detector(case)
    images, mask = tiny_batch()
    decoded = detector.decode(detector.encode(detector.features(images, mask), mask), region_queries())
    (decoded.states[1:].square().sum() + decoded.boxes[1:].square().sum()).backward()
    proposing = {name for name, p in detector.named_parameters() if name.startswith("model.model.enc_")}
    assert proposing
    gradients = {name: detector.get_parameter(name).grad for name in proposing}
    assert not {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}


@every_detector
def test_shapes_are_those_promised(case):
    detector = tiny_detector(case)
    images, mask = tiny_batch(side=fitting_side(detector))
    maps = detector.features(images, mask)
    assert [x.shape[1] for x in maps] == detector.channels
    assert [round(images.shape[3] / x.shape[3]) for x in maps] == detector.strides
    memory = detector.encode(maps, mask)
    assert memory.tokens.shape == (*memory.mask.shape, WIDTH)
    assert memory.mask.shape[1] == sum(height * width for height, width in memory.shapes)
    assert memory.pooled().shape == (3, WIDTH * len(memory.shapes))
    decoded = detector.decode(memory, region_queries())
    assert decoded.states.shape == (detector.num_layers, 3, QUERIES, WIDTH)
    assert decoded.boxes.shape == (detector.num_layers, 3, QUERIES, 4)


@every_detector
def test_every_image_uses_its_own_queries(case):
    detector = tiny_detector(case).double().eval()
    images, mask = tiny_batch()
    images, queries, order = images.double(), region_queries().double(), torch.tensor([2, 0, 1])
    with torch.no_grad():
        plain = detector.decode(detector.encode(detector.features(images, mask), mask), queries)
        maps = detector.features(images[order], mask[order])
        permuted = detector.decode(detector.encode(maps, mask[order]), queries[order])
        other = queries.clone()
        other[0] += 1
        changed = detector.decode(detector.encode(detector.features(images, mask), mask), other)
    assert_close(permuted.boxes, plain.boxes[:, order], rtol=1e-9, atol=1e-9)
    assert_close(permuted.states, plain.states[:, order], rtol=1e-9, atol=1e-9)
    assert_close(changed.states[:, 1:], plain.states[:, 1:], rtol=0, atol=0)
    assert (changed.states[-1, 0] - plain.states[-1, 0]).abs().max() > 1e-3


def fill(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A map (B, C, h, w) with 3 in the cells that the mask (B, H, W) says are padding."""
    inside = torch.nn.functional.interpolate(mask[:, None].float(), size=x.shape[-2:]).bool()
    assert not inside.all()
    return torch.where(inside, x, 3.0)


@every_detector
def test_nothing_leaks_from_under_the_padding_mask(case):
    detector = tiny_detector(case).eval()
    images, mask = tiny_batch()
    with torch.no_grad():
        maps = detector.features(images, mask)
        noisy = images + 5 * torch.randn(images.shape) * ~mask[:, None]
        for clean, dirty in zip(maps, detector.features(noisy, mask), strict=True):
            assert torch.equal(clean, dirty)
        plain = detector.encode(maps, mask)
        # Cells of the maps that lie under the mask: whatever is there, the rest of the encoder's output is the same.
        if CASES[case][0] == "deformable-detr":
            # The group norm of its projections sees the whole map, as the stock model's does: fill what they give.
            hooks = [x.register_forward_hook(lambda _, __, x: fill(x, mask)) for x in detector.model.model.input_proj]
            memory = detector.encode(maps, mask)
            for hook in hooks:
                hook.remove()
        else:
            memory = detector.encode([fill(x, mask) for x in maps], mask)
        assert_close(memory.tokens[memory.mask], plain.tokens[plain.mask], rtol=1e-4, atol=1e-5)
        assert_close(memory.pooled(), plain.pooled(), rtol=1e-4, atol=1e-5)
        junk = dataclasses.replace(plain, tokens=torch.where(plain.mask[..., None], plain.tokens, torch.tensor(7.0)))
        if case not in UNMASKED:
            decoded, dirty = (detector.decode(x, region_queries()) for x in (plain, junk))
            assert_close(dirty.boxes, decoded.boxes, rtol=1e-4, atol=1e-5)


@every_detector
def test_every_part_learns_but_backbone_and_class_head(case):
    detector = tiny_detector(case)
    images, mask = tiny_batch()
    queries = region_queries().requires_grad_()
    decoded = detector.decode(detector.encode(detector.features(images, mask), mask), queries)
    weights = torch.randn(decoded.states.shape, generator=torch.Generator().manual_seed(4))
    ((decoded.states * weights).sum() + decoded.boxes.square().sum()).backward()
    learned = {name for name, parameter in detector.named_parameters() if parameter.grad is not None}
    assert learned == set(detector.trainable_names())
    still = {n for n, p in detector.named_parameters() if p.grad is not None and not p.grad.any()}
    # The content of DETR's and Conditional DETR's queries is zero at first: the first self-attention sees nothing.
    assert not {name for name in still if "decoder.layers.0.self_attn" not in name}
    assert queries.grad is not None
    assert queries.grad.any(dim=-1).all()
    for part in ("backbone", "class_heads"):
        assert not any(parameter.requires_grad for parameter in getattr(detector, part).parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_detector
def test_gradients_in_half_precision_are_numbers_in_spite_of_padding(case, dtype):
    gradients_in_half_precision_are_numbers(case, "cpu", dtype)


@every_detector
def test_half_precision_stays_close_in_large_images(case):
    """Their maps have hundreds of columns, too many for eight bits to say where a token is and what it attends to."""
    detector = tiny_detector(case).train()
    random = torch.Generator().manual_seed(2)
    for name, parameter in detector.named_parameters():
        if "sampling_offsets.bias" in name:
            parameter.data = torch.randn(parameter.shape, generator=random)
    side = detector.square_side
    height, width = (-(-896 // side) * side,) * 2 if side else (64, 2400)
    images, mask = torch.randn(1, 3, height, width, generator=random), torch.ones(1, height, width, dtype=torch.bool)

    with torch.no_grad():
        maps = detector.features(images, mask)
        memory = detector.encode(maps, mask)
        states = detector.decode(memory, region_queries(1)).states
        with torch.autocast("cpu", torch.bfloat16):
            coarse = detector.encode(maps, mask)
            coarse_states = detector.decode(memory, region_queries(1)).states
    assert (coarse.tokens - memory.tokens).norm() <= 0.06 * memory.tokens.norm()
    assert (coarse_states - states).norm() <= 0.04 * states.norm()


@pytest.mark.parametrize("case", ["deformable-detr", "lw-detr", "rf-detr"])
def test_shares_inside_are_exact_in_half_precision(case):
    detector = tiny_detector(case)
    images, mask = tiny_batch(padded=False, side=3 * fitting_side(detector))
    mask[:, mask.shape[1] // 3 :] = False
    with torch.no_grad():
        maps = detector.features(images, mask)
        exact = detector.encode(maps, mask).extra["valid_ratios"]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(detector.encode(maps, mask).extra["valid_ratios"], exact)
    assert_close(exact[0, 0], torch.tensor([1, 1 / 3]), rtol=0, atol=0.02)


@every_detector
def test_a_frozen_backbone_stays_as_it_is(case):
    detector = tiny_detector(case, dropout=0.1)
    detector.train()
    assert not any(module.training for module in detector.backbone.modules())
    before = {name: value.clone() for name, value in detector.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-2)
    images, mask = tiny_batch()
    for _ in range(2):
        optimizer.zero_grad()
        decoded = detector.decode(detector.encode(detector.features(images, mask), mask), region_queries())
        (decoded.states.sum() + decoded.boxes.sum()).backward()
        optimizer.step()
    after = detector.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_detector
def test_fine_tuning_unfreezes_backbone_and_class_head(case):
    detector = tiny_detector(case)
    detector.set_trainable(backbone=True, class_head=True)
    predicted = detector(*tiny_batch(padded=False), tiny_targets())
    loss = predicted.logits.sum() + predicted.boxes.sum()
    if predicted.denoising is not None:
        loss = loss + predicted.denoising.logits.sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in detector.class_heads.parameters())
    assert any(parameter.grad is not None for parameter in detector.backbone.parameters())
    constants = {id(parameter) for parameter in detector.constants()}
    assert all(p.requires_grad or id(p) in constants for p in detector.parameters())


def test_batch_norms_of_a_learning_backbone_keep_their_averages():
    """Ours are frozen for good; a stored detector may have PyTorch's."""
    detector = tiny_detector("detr")
    detector.backbone.norm = torch.nn.BatchNorm2d(3)
    detector.set_trainable(backbone=True, class_head=True)
    detector.train()
    assert detector.backbone.training
    assert not detector.backbone.norm.training


@every_detector
def test_weights_arrive_in_a_detector_for_other_classes(case, tmp_path):
    detector = tiny_detector(case, classes=1)
    detector.save(tmp_path, shortest_edge=fitting_side(detector), square=True)
    same = load_detector(tmp_path)
    state = detector.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())
    assert same.class_names == ["object"]
    assert same.load_report.missing == same.load_report.unexpected == same.load_report.remade == ()

    tuned = load_detector(tmp_path, ["cat", "dog"])
    report = tuned.load_report
    assert report.missing == report.unexpected == ()
    remade = {f"model.{name}" for name in report.remade}
    heads = {id(parameter) for layer in tuned.class_layers for parameter in layer.parameters()}
    assert {n for n, p in tuned.named_parameters(remove_duplicate=False) if id(p) in heads} == remade
    for name, value in tuned.state_dict().items():
        if name in remade:
            assert value.shape != state[name].shape
        else:
            assert torch.equal(value, state[name]), name
    assert tuned.class_names == ["cat", "dog"]
    if tuned.class_loss != "softmax":
        assert_close(torch.sigmoid(tuned.class_heads[0].bias), torch.full((2,), 0.01))
    assert not any(parameter.requires_grad for parameter in tuned.backbone.parameters())


@every_detector
def test_queries_may_be_kept_from_each_other(case):
    detector = tiny_detector(case).eval()
    images, mask = tiny_batch(padded=False)
    groups = torch.arange(QUERIES) // 4
    alone = groups[:, None] == groups
    queries = region_queries()
    other = queries.clone()
    other[:, :4] += 1
    with torch.no_grad():
        memory = detector.encode(detector.features(images, mask), mask)
        if case in ("lw-detr", "rf-detr"):
            with pytest.raises(ValueError, match="takes no query_mask"):
                detector.decode(memory, queries, alone)
            with pytest.raises(UserError, match="cannot keep queries from each other"):
                build_pretext("up-detr", detector)
            return
        free = detector.decode(memory, queries, torch.ones(QUERIES, QUERIES, dtype=torch.bool))
        assert_close(free.states, detector.decode(memory, queries).states, rtol=1e-4, atol=1e-5)
        masked, changed = (detector.decode(memory, x, alone).states for x in (queries, other))
    assert_close(masked[:, :, 4:], changed[:, :, 4:], rtol=0, atol=1e-5)
    assert (masked[-1, :, :4] - changed[-1, :, :4]).abs().max() > 1e-3
    assert (masked[-1] - free.states[-1]).abs().max() > 1e-4


@every_detector
def test_it_learns_a_few_images(case):
    detector = tiny_detector(case)
    images, mask = (x[:2, ..., :64, :64] for x in tiny_batch())
    features, queries = detector.features(images, mask), region_queries(2)
    target = torch.rand(2, QUERIES, 4, generator=torch.Generator().manual_seed(5)) * 0.4 + 0.3
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=5e-3)
    errors = []
    for _ in range(25):
        optimizer.zero_grad()
        error = (detector.decode(detector.encode(features, mask), queries).boxes - target).abs().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]


def test_wrong_number_of_region_queries():
    detector = tiny_detector("conditional-detr")
    memory = detector.encode(detector.features(*tiny_batch()), tiny_batch()[1])
    with pytest.raises(ValueError, match="region_queries"):
        detector.decode(memory, region_queries()[:, 1:])


def test_pooled_memory_averages_valid_tokens_only():
    detector = tiny_detector("deformable-detr")
    images, mask = tiny_batch()
    memory = detector.encode(detector.features(images, mask), mask)
    start = 0
    for level, (height, width) in enumerate(memory.shapes):
        tokens = memory.tokens[2, start : start + height * width][memory.mask[2, start : start + height * width]]
        assert_close(memory.pooled()[2, level * WIDTH : (level + 1) * WIDTH], tokens.mean(0))
        start += height * width


@pytest.mark.parametrize("case", ["rt-detr", "d-fine", "lw-detr", "rf-detr"])
def test_an_image_too_small_for_the_queries_is_refused_in_one_line(case):
    detector = tiny_detector(case, num_queries=500)
    side = 2 * (detector.square_side or 32)
    with pytest.raises(UserError, match=r"gives \d+ tokens, too few for 500 queries: use a larger image_size"):
        detector(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))
