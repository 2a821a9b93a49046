"""Backbones by name, path and configuration."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import ConvNextConfig, Dinov2Config, SwinConfig

from siamese_detr.detectors import build_detector, resolve_backbone
from siamese_detr.detectors.backbones import Backbone
from siamese_detr.errors import UserError

SMALL = dict(hidden_size=32, heads=4, encoder_layers=1, decoder_layers=2, ffn_size=32, num_queries=5)


def detector(backbone, family="detr", **options):
    return build_detector(family, backbone, **{**SMALL, **options})


def image(height=96, width=128):
    x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return x, torch.ones(1, height, width, dtype=torch.bool)


def test_the_default_computes_what_timms_network_does():
    """In particular, every activation is there, and batch norm's epsilon is the network's."""
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(resolve_backbone("efficientnet-lite0").weights)
    ours = detector("efficientnet-lite0", "deformable-detr")
    assert ours.strides == [8, 16, 32]
    assert ours.channels == [40, 112, 320]
    with torch.no_grad():
        expected = network.eval().forward_intermediates(image()[0], intermediates_only=True)[-3:]
        for got, wanted in zip(ours.features(*image()), expected, strict=True):
            assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_the_default_recognises_a_cat():
    """Weights and normalisation belong together, and in this order."""
    data = pytest.importorskip("skimage.data")
    backbone = resolve_backbone("efficientnet-lite0")
    assert_close(torch.tensor(backbone.image_mean), torch.full((3,), 127 / 255))
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(backbone.weights)
    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None] / 255
    pixels = (photo - backbone.image_mean[0]) / backbone.image_std[0]
    with torch.no_grad():
        best = network.eval()(torch.nn.functional.interpolate(pixels, (224, 224), mode="bilinear")).argmax().item()
    assert 281 <= best <= 285  # ImageNet's five house cats


def test_dilation_doubles_the_resolution_of_the_last_map():
    assert detector("efficientnet-lite0").strides == [32]
    dilated = detector("efficientnet-lite0", dilation=True)
    assert dilated.strides == [16]
    assert dilated.features(*image())[0].shape == (1, 320, 6, 8)
    with pytest.raises(UserError, match="cannot be dilated"):
        detector("efficientnet-lite0", "rt-detr", dilation=True)


def test_random_weights_are_asked_for_and_warned_about():
    with pytest.warns(UserWarning, match="random weights"):
        first = detector("random:resnet18", seed=0)
    with pytest.warns(UserWarning, match="random weights"):
        second = detector("random:resnet18", seed=0)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(value, second.backbone.state_dict()[name])
    # The network's own initialisation, not the one Transformers would overwrite it with.
    assert first.backbone.get_parameter("layer1.0.conv1.weight").std() > 0.04


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet5O", "'resnet50'"), ("random:resnt18", "'resnet18'"), ("efficientnet_lite0x", "'efficientnet_lite0'")],
)
def test_unknown_names_get_a_suggestion(name, hint):
    with pytest.raises(UserError, match=f"unknown backbone .*{hint}"):
        resolve_backbone(name)


def test_without_a_network_downloads_end_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nobody/no-such-model", "no-such-host/convnext"):
        with pytest.raises(UserError, match=r"weights cannot be had .*efficientnet-lite0"):
            resolve_backbone(name)

    def unreachable(*arguments, **keywords):
        assert keywords["pretrained"]
        raise ConnectionError("Network is unreachable")

    backbone = resolve_backbone("resnet18.a1_in1k")
    config = backbone.config([32])
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match="Network is unreachable"):
        backbone.load_into(torch.nn.Identity(), config)


@pytest.fixture(scope="module")
def resnet18():
    return {k: v for k, v in timm.create_model("resnet18").state_dict().items() if not k.endswith("tracked")}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "module.encoder_q.", "encoder.", "module.base_encoder."]
)
@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_resnet_files_of_all_wrappings(resnet18, prefix, nest, tmp_path):
    state = {prefix + name: value for name, value in resnet18.items()}
    if "encoder_q" in prefix:
        state |= {f"module.encoder_k.{name}": value + 1 for name, value in resnet18.items()}
        state |= {"module.queue": torch.zeros(3)}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "resnet.pth")
    backbone = resolve_backbone(str(tmp_path / "resnet.pth"))
    assert backbone.network == "resnet18"
    assert backbone.image_mean == (0.485, 0.456, 0.406)
    assert all(torch.equal(backbone.weights[name], value) for name, value in resnet18.items())


def test_a_resnet_file_is_loaded_and_gaps_are_named(resnet18, tmp_path):
    save_file(resnet18, tmp_path / "resnet.safetensors")
    loaded = detector(str(tmp_path / "resnet.safetensors"))
    for name, value in loaded.backbone.state_dict().items():
        assert torch.equal(value, resnet18[name])
    gappy = {name: value for name, value in resnet18.items() if name != "layer3.0.bn2.running_var"}
    save_file(gappy, tmp_path / "gappy.safetensors")
    with pytest.raises(UserError, match=r"1 of \d+ tensors .*layer3\.0\.bn2\.running_var"):
        detector(str(tmp_path / "gappy.safetensors"))


@pytest.mark.parametrize(("network", "depth"), [("resnet34", 34), ("resnet50", 50), ("resnet101", 101)])
def test_depth_is_seen_from_the_tensors(network, depth, tmp_path):
    with torch.device("meta"):
        names = timm.create_model(network).state_dict()
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "r.pth")
    assert resolve_backbone(str(tmp_path / "r.pth")).network == f"resnet{depth}"


def test_unusable_files_are_explained(tmp_path, resnet18):
    file = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="no such file"):
        resolve_backbone(str(file))
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        resolve_backbone(str(file))
    torch.save({"epoch": 3}, file)
    with pytest.raises(UserError, match="no tensors in it"):
        resolve_backbone(str(file))
    torch.save({"blocks.0.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="no ResNet in it"):
        resolve_backbone(str(file))
    torch.save({name: value for name, value in resnet18.items() if not name.startswith("layer4")}, file)
    with pytest.raises(UserError, match="another depth than 18, 26"):
        resolve_backbone(str(file))
    torch.save({"state_dict": resnet18, "hook": print}, file)
    with pytest.raises(UserError, match="never loaded"):
        resolve_backbone(str(file))


@pytest.mark.parametrize(
    ("config", "families"),
    [
        (ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]), ["detr", "deformable-detr", "rt-detr"]),
        (SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], window_size=4), ["deformable-detr"]),
        (Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70), ["detr", "dab-detr"]),
    ],
    ids=["convnext", "swin", "dinov2"],
)
def test_transformers_backbones(config, families, tmp_path):
    for family in families:
        ours = detector(config, family).eval()
        assert ours.strides in ([32], [8, 16, 32], [14])
        images, mask = image()
        with torch.no_grad():
            boxes, stock = ours(images, mask).boxes, ours.model(images, pixel_mask=mask.long()).pred_boxes
        assert torch.equal(boxes[-1], stock)


def test_networks_that_cannot_give_the_maps_say_so():
    vit = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=70)
    with pytest.raises(UserError, match=r"strides \[14\], but the detector wants 8, 16, 32"):
        detector(vit, "deformable-detr")
    assert detector(vit, "deformable-detr", num_feature_levels=1).strides == [14]
    with pytest.raises(UserError, match="images of any size"):
        Backbone("swin", "swin_tiny_patch4_window7_224").config([32])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Backbone("c", "convnext_atto").config([8, 32]).out_indices == [1, 3]
    for family in ("lw-detr", "rf-detr"):
        with pytest.raises(UserError, match="ViT of its own"):
            detector("efficientnet-lite0", family)


@pytest.mark.parametrize(("heads", "options"), [(4, {}), (8, {"num_feature_levels": 1})])
def test_every_detector_loads_its_backbone(heads, options):
    expected = timm.create_model("tf_efficientnet_lite0").state_dict().keys()
    for family in ("dab-detr", "deformable-detr", "d-fine"):
        ours = detector("efficientnet-lite0", family, heads=heads, **(options if family == "deformable-detr" else {}))
        weights = resolve_backbone("efficientnet-lite0").weights
        module = getattr(ours.backbone, "_backbone", ours.backbone)
        assert set(module.state_dict()) <= set(expected)
        for name, value in module.state_dict().items():
            assert torch.equal(value, weights[name])
