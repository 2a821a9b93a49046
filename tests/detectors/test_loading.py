"""Loading: every form in which detectors were ever saved, for every verb; and what is said of what cannot be loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from fnmatch import fnmatch

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from siamese_detr.detectors import build_detector, load_detector
from siamese_detr.detectors.detr import DetrAdapter
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.evaluation.predict import predict
from siamese_detr.interchange.export import export
from tiny_detectors import tiny_backbone, tiny_detector

CLASSES = ["ant", "bee", "cow"]
OLD_PROCESSOR = {
    "feature_extractor_type": "DetrFeatureExtractor",
    "format": "coco_detection",
    "do_resize": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": 96,
    "max_size": 160,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A DETR with a backbone of timm, as it is saved today."""
    folder = tmp_path_factory.mktemp("loading") / "detr"
    sizes = dict(hidden_size=32, heads=4, encoder_layers=1, decoder_layers=2, ffn_size=32, num_queries=5)
    with pytest.warns(UserWarning, match="random weights"):
        detector = build_detector("detr", "random:test_resnet", class_names=CLASSES, seed=0, **sizes)
    detector.save(folder, shortest_edge=96, longest_edge=160)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "detr")


def change(file, removed=(), **values):
    """Change values of a JSON file."""
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in stored.items() if k not in removed} | values))


def outputs(source):
    """What the two entrances compute: the adapter for training, the stock model for evaluation."""
    with warnings.catch_warnings(action="ignore"):
        trained, evaluated = load_detector(source).eval(), Detector.load(source, "cpu")
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = trained(pixels, torch.ones(1, 64, 96, dtype=torch.bool))
        stock = evaluated.model(pixels)
    torch.testing.assert_close(stock.logits, predicted.logits[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stock.pred_boxes, predicted.boxes[-1], rtol=1e-4, atol=1e-5)
    assert trained.class_names == evaluated.class_names
    assert trained.input_size == {k: v for k, v in dict(evaluated.processor.size).items() if v is not None}
    return predicted.logits, predicted.boxes


def to_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def to_shards(folder, suffix):
    """Two files and their index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(state)}
    for file in set(files.values()):
        part = {name: value for name, value in state.items() if files[name] == file}
        save_file(part, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


WEIGHTS = {
    "pytorch_model.bin": to_bin,
    "sharded safetensors": lambda folder: to_shards(folder, "safetensors"),
    "sharded bin": lambda folder: to_shards(folder, "bin"),
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_weights_of_every_form_load(original, saved, form):
    WEIGHTS[form](saved)
    for ours, same in zip(outputs(saved), outputs(original), strict=True):
        assert torch.equal(ours, same)


def named(folder, **values):
    """Name the backbone as configurations did before `backbone_config`."""
    change(folder / "config.json", ["backbone_config"], backbone="test_resnet", **values)


FORMS = {
    "timm's backbone by name": lambda folder: named(folder, backbone_config=None, use_timm_backbone=True),
    "backbone_kwargs null": lambda folder: named(folder, use_timm_backbone=True, backbone_kwargs=None),
    "backbone_kwargs": lambda folder: named(
        folder,
        use_timm_backbone=True,
        use_pretrained_backbone=True,
        backbone_kwargs={"out_indices": [4], "in_chans": 3},
    ),
    "both spellings": lambda folder: change(
        folder / "config.json", backbone="resnet50", use_timm_backbone=True, backbone_kwargs={"out_indices": [1]}
    ),
    "old processor": lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(OLD_PROCESSOR)),
    "no label2id": lambda folder: change(folder / "config.json", ["label2id"]),
    "label2id alone": lambda folder: change(folder / "config.json", ["id2label"]),
    "names as a list": lambda folder: change(folder / "config.json", ["label2id"], id2label=CLASSES),
    "damaged provenance": lambda folder: (folder / "siamese_detr.json").write_text("{"),
    "provenance of another kind": lambda folder: (folder / "siamese_detr.json").write_text("[1]"),
}


@pytest.mark.parametrize("form", FORMS)
def test_configurations_of_every_age_load(original, saved, form, monkeypatch):
    """Without a word to the network."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    FORMS[form](saved)
    for ours, same in zip(outputs(saved), outputs(original), strict=True):
        assert torch.equal(ours, same)
    detector = Detector.load(saved, "cpu")
    assert detector.class_names == CLASSES
    size = {name: side for name, side in dict(detector.processor.size).items() if side is not None}
    assert size == {"shortest_edge": 96, "longest_edge": 160}


def test_classes_without_names_are_numbered(saved):
    change(saved / "config.json", ["id2label", "label2id"])
    outputs(saved)
    assert Detector.load(saved, "cpu").class_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert load_detector(saved, CLASSES[:2]).class_names == CLASSES[:2]
    change(saved / "config.json", id2label={"0": "ant", "2": "cow"})
    assert load_detector(saved).class_names == ["ant", "LABEL_1", "cow"]


@pytest.mark.parametrize(("case", "size"), [("detr", {"shortest_edge": 800, "longest_edge": 1333}), ("rt-detr", 640)])
def test_without_an_image_processor_the_models_defaults_are_taken(tmp_path, case, size):
    tiny_detector(case).save(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=r"preprocessor_config\.json is missing: taking its model's defaults"):
        loaded = load_detector(tmp_path)
    assert loaded.input_size == (size if isinstance(size, dict) else {"height": size, "width": size})


def test_a_damaged_provenance_is_reported(saved):
    (saved / "siamese_detr.json").write_text("{")
    with pytest.warns(UserWarning, match=r"siamese_detr\.json"):
        assert load_detector(saved).provenance == {"family": "detr"}


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50"])
def test_backbones_of_transformers_are_named_without_the_network(saved, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change(saved / "config.json", ["backbone_config"], backbone=f"microsoft/{name}", use_timm_backbone=False)
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load the weights"):  # the configuration is fine
        load_detector(saved)


def test_every_verb_takes_an_old_directory(saved, tmp_path):
    to_bin(saved)
    named(saved, use_timm_backbone=True, backbone_kwargs=None)
    (saved / "preprocessor_config.json").write_text(json.dumps(OLD_PROCESSOR))
    Image.new("RGB", (90, 70), "red").save(tmp_path / "red.png")
    assert predict(model=str(saved), images=str(tmp_path / "red.png"), out=str(tmp_path / "found")).results
    result = export(model=str(saved), out=str(tmp_path / "new"))
    assert result.difference < 1e-6
    stored = json.loads((tmp_path / "new" / "config.json").read_text())
    assert stored["backbone_config"]["backbone"] == "test_resnet"
    assert (tmp_path / "new" / "model.safetensors").exists()


@pytest.mark.parametrize("form", ["safetensors", *WEIGHTS])
def test_names_on_the_hub_come_from_the_cache(saved, tmp_path, form, monkeypatch):
    """As `huggingface_hub` lays it out; without one, one line says what to do."""
    WEIGHTS.get(form, lambda folder: None)(saved)
    repository = tmp_path / "hub" / "models--someone--detector"
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # HF_HOME, read at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_detector("someone/detector").class_names == Detector.load("someone/detector").class_names == CLASSES
    with pytest.raises(
        UserError, match=r"^there is no folder someone/else, and the Hugging Face Hub .* HF_HUB_OFFLINE"
    ):
        load_detector("someone/else")
    with pytest.raises(UserError, match="no such file or folder"):
        load_detector("/no/such/directory")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_only_what_is_needed_is_downloaded(saved, weights, monkeypatch):
    if weights == "pytorch_model.bin":
        to_bin(saved)
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert not any(fnmatch(file, pattern) for file in ("training_args.bin", "a.h5") for pattern in allow_patterns)
        fitting = [file for pattern in allow_patterns for file in saved.glob(pattern)]
        copy = saved.parent / "cache"
        copy.mkdir(exist_ok=True)
        for file in fitting:
            shutil.copy(file, copy)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_detector("someone/detector").class_names == CLASSES
    assert asked == ["someone/detector"] * (1 if weights == "model.safetensors" else 2)
    assert (saved.parent / "cache" / weights).exists()


@pytest.mark.parametrize("case", ["deformable-detr-refined", "rt-detr", "rt-detr-v2", "d-fine"])
def test_detectors_as_the_hub_has_them_take_other_classes(case, tmp_path):
    """With class heads of their own in every layer, and an embedding of the classes for denoising."""
    tiny = tiny_detector(case)
    tiny.save(tmp_path / "hub")
    config = tiny.config
    if hasattr(config, "num_denoising"):
        config.num_denoising = 100
    state = type(tiny.model)(config).state_dict()
    state = {name: v + 0.01 * torch.rand_like(v) if v.is_floating_point() else v for name, v in state.items()}
    state |= {name: state.get(f"model.decoder.{name}", value) for name, value in state.items()}
    state = {name: value.clone() for name, value in state.items()}
    save_file(state, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path / "hub")
    detector = load_detector(tmp_path / "hub", ["one", "two"])
    heads = {parameter for layer in detector.class_layers for parameter in layer.parameters()}
    assert {len(parameter) for parameter in heads} <= {2, 3}  # with "no object" in the embedding
    others = {name: v for name, v in detector.model.named_parameters(remove_duplicate=False) if v not in heads}
    assert all(torch.equal(value, state[name]) for name, value in others.items())
    detector.save(tmp_path / "again")
    assert outputs(tmp_path / "again")[0].shape[-1] == 2


class ToyAdapter(DetrAdapter):
    """As another package would add it: a family of its own on a stock model."""

    family = "toy-detr"


def test_another_package_adds_a_family(monkeypatch):
    added = {"toy-detr": ToyAdapter, "broken-detr": object}
    monkeypatch.setattr("siamese_detr.plugins.load", lambda group: added if group == "siamese_detr.detectors" else {})
    assert isinstance(build_detector("toy-detr", tiny_backbone(), hidden_size=32, heads=4), ToyAdapter)
    with pytest.raises(UserError, match=r"unknown detector 'toy-det'.*did you mean 'toy-detr'"):
        build_detector("toy-det", tiny_backbone())
    with pytest.raises(UserError, match="plug-in for 'broken-detr' detectors is no DetectorAdapter"):
        build_detector("broken-detr", tiny_backbone())


WRONG = [None, True, -1, 0.5, 10**12, "word", [1], {"x": -1}]


def attempt(source):
    """Load a detector and use it; returns what was said if that is refused."""
    try:
        with warnings.catch_warnings(action="ignore"):
            detector = Detector.load(source, "cpu")
        inputs = detector.processor(images=[Image.new("RGB", (50, 40))], return_tensors="pt")
        detector.processor.post_process_object_detection(detector.model(**inputs), threshold=0.0)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_wrong_values_end_in_one_line(saved, file):
    """Or the detector works nevertheless."""
    content = (saved / file).read_text()
    messages = []
    for i, key in enumerate(json.loads(content)):
        for value in (WRONG[i % len(WRONG)], WRONG[(i + 3) % len(WRONG)]):
            change(saved / file, **{key: value})
            messages.append(attempt(saved))
            (saved / file).write_text(content)
    refused = [message for message in messages if message is not None]
    assert len(refused) > len(messages) / 5
    assert all(str(saved) in message and "\n" not in message for message in refused)
    for text in ("", "[1, 2]", "[" * 100_000, "\xff"):
        (saved / file).write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=f"cannot read .*{file}"):
            load_detector(saved)
