"""``report``: pages of real (tiny) runs, read as text, and opened in a browser as wide as a desk's and a phone's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

import siamese_detr
from headless_browser import Browser, find_browser
from siamese_detr.comparison.summary import CellResult, Curve, to_json
from siamese_detr.errors import UserError
from siamese_detr.reporting.charts import line_chart
from siamese_detr.reporting.comparison import meaning, starting_point
from siamese_detr.reporting.page import Grid, Page, Section, Table, render
from siamese_detr.reporting.pictures import Album, Box
from siamese_detr.scenes import make_scenes

TINY = {"num_queries": 10, "hidden_size": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "ffn_size": 16}
LONG = "siamese:discrimination=none,short_sides=[80,96]"


class Reader(HTMLParser):
    """What a page refers to and how it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.unnamed: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.add(tag)
        self.references += [
            v or "" for k, v in attributes if k in ("href", "src", "srcset", "action", "data", "xlink:href")
        ]
        self.references += re.findall(r"url\(([^)]*)\)", values.get("style") or "")
        if values.get("id"):
            self.ids.append(values["id"] or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if (values.get("role") == "img" and not values.get("aria-label")) or (tag == "img" and not values.get("alt")):
            self.unnamed.append(tag)


def check_markup(file: Path) -> Reader:
    text = file.read_text()
    reader = Reader()
    reader.feed(text)
    inside = [r.strip("'\"") for r in reader.references]
    assert all(r.startswith(("#", "data:image/jpeg;base64,", "data:,")) for r in inside)
    assert {r[1:] for r in inside if r.startswith("#")} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert not re.search(r"@import|<script[^>]+src|xmlns", text)
    assert reader.unnamed == []
    assert reader.headings[0] == 1
    assert reader.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(reader.headings, reader.headings[1:], strict=False))
    return reader


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pre-training, a fine-tuning from it, and a comparison's results."""
    folder = tmp_path_factory.mktemp("runs")
    make_scenes(folder / "train", 6, seed=1)
    make_scenes(folder / "val", 6, seed=2)
    with contextlib.chdir(folder):  # the pages are made elsewhere
        siamese_detr.pretrain(
            images="train",
            out="pretrained",
            view_size=64,
            num_regions=3,
            steps=2,
            batch_size=2,
            workers=0,
            log_every=1,
            global_hidden_size=8,
            global_size=8,
            global_predictor_size=4,
            device="cpu",
            progress=False,
            **TINY,
        )
        siamese_detr.finetune(
            train="train.json",
            val="val.json",
            model="pretrained",
            out="finetuned",
            epochs=1,
            batch_size=3,
            image_size=64,
            square=True,
            workers=0,
            log_every=1,
            device="cpu",
            progress=False,
        )
    compared = folder / "compared"
    compared.mkdir()
    cells = [
        CellResult(
            init,
            fraction,
            seed,
            "k",
            "done",
            "",
            {"AP": ap + seed / 50, "AP50": 2 * ap},
            history(ap),
            40,
            60.0,
            "../finetuned",
        )
        for init, fraction, ap in (
            ("backbone", 0.01, 0.05),
            ("backbone", 1.0, 0.3),
            (LONG, 0.01, 0.1),
            (LONG, 1.0, 0.33),
        )
        for seed in (0, 1)
    ]
    cells[-1] = dataclasses.replace(cells[-1], status="failed", reason="out of memory <on GPU 0>", metrics={})
    (compared / "results.json").write_text(json.dumps(to_json(cells)))
    values = {"inits": ["backbone", LONG], "images": "photos", "val": str(folder / "val.json")}
    (compared / "config.yaml").write_text(yaml.safe_dump(values))
    return {kind: folder / kind for kind in ("pretrained", "finetuned", "compared")}


def history(ap: float) -> list[dict[str, float]]:
    return [{"epoch": e, "step": 10 * e, "AP": ap * e / 3, "AP50": ap} for e in (1, 2, 3)]


def test_pretraining_page(runs: dict[str, Path], tmp_path: Path) -> None:
    result = siamese_detr.report(run=str(runs["pretrained"]), out=str(tmp_path / "page.html"), samples=2)
    assert (result.kind, result.missing) == ("pre-training", [])
    check_markup(result.page)
    text = result.page.read_text()
    for term in ("Total loss", "L1", "GIoU", "Region discrimination", "Global discrimination"):
        assert f'aria-label="Line chart. {term}' in text or f"{term}" in text
    for part in ("Image 2, view 2", "Layer 2: IoU", "Image 1, before pre-training", "best proposals"):
        assert part in text
    # Each photograph is stored once: two views and one whole image per sample.
    assert text.count("data:image/jpeg") == 2 * 2 + 2


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_predictions_are_computed_on_the_device_asked_for(runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="device 'abacus'"):
        siamese_detr.report(run=str(runs[kind]), out=str(tmp_path / "page.html"), samples=1, device="abacus")


def test_what_is_missing_is_left_out_with_a_reason(runs: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "run"
    broken.mkdir()
    values = yaml.safe_load((runs["pretrained"] / "config.yaml").read_text())
    values["proposals"] = str(tmp_path / "gone")
    (broken / "config.yaml").write_text(yaml.safe_dump(values))
    result = siamese_detr.report(run=str(broken))
    assert result.page == broken / "report.html"
    assert any("gone" in line for line in result.missing)
    assert any("log.jsonl" in line for line in result.missing)
    assert "left out" in check_and_read(result.page)


def check_and_read(file: Path) -> str:
    check_markup(file)
    return file.read_text()


def test_finetuning_page(runs: dict[str, Path], tmp_path: Path) -> None:
    result = siamese_detr.report(
        run=str(runs["finetuned"]), out=str(tmp_path / "page.html"), threshold=0.001, device="cpu"
    )
    assert (result.kind, result.missing) == ("fine-tuning", [])
    text = check_and_read(result.page)
    for part in ("AP per class", "Precision against recall", "Confusion matrix", "Best", "Worst", "quality 0."):
        assert part in text


def test_comparison_page(runs: dict[str, Path], tmp_path: Path) -> None:
    result = siamese_detr.report(run=str(runs["compared"]), out=str(tmp_path / "page.html"))
    assert result.kind == "comparison"
    text = check_and_read(result.page)
    assert "<strong>11.0 ± 1.4 (20.0)</strong>" in text
    assert "out of memory &lt;on GPU 0&gt;" in text
    assert "AP against labels" in text
    assert "by Siamese DETR with discrimination none, short_sides [80,96]" in text
    assert "Convergence with 1 % of the labels" in text
    # The same photos, once each, from every start; the labels first.
    assert text.count("data:image/jpeg") == 4
    assert text.count(f"{LONG}: ") >= 4
    assert "labels: " in text
    assert not any(line.startswith("Pictures") for line in result.missing)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("scratch", "every weight random"),
        ("backbone", "pre-trained backbone, random Transformer"),
        ("detreg", "pre-trained backbone, random Transformer, then pre-trained without labels by DETReg"),
        ("scratch+siamese", "every weight random, then pre-trained without labels by Siamese DETR"),
        ("siamese:iou=0.3", "by Siamese DETR with num_queries 20, iou 0.3"),
        ("coco", "the detector in coco"),
        ("siamese+self-training", "also learns from the unlabelled images (self-training)"),
        ("backbone+longer", "as many more steps as pre-training has (the control of equal compute)"),
        ("coco+up-detr", "the detector in coco, then pre-trained without labels by UP-DETR"),
        ("wide", "the detector in coco, then pre-trained without labels by Siamese DETR with iou 0.7"),
    ],
)
def test_initialisations_are_explained(name: str, told: str) -> None:
    pretrain_at = {"siamese": {"num_queries": 20}, "wide": {"method": "siamese", "init": "coco", "iou": 0.7}}
    assert meaning(starting_point(name, pretrain_at)).endswith(told)


def test_a_folder_without_a_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml"):
        siamese_detr.report(run=str(tmp_path))
    (tmp_path / "config.yaml").write_text("colour: blue\n")
    with pytest.raises(UserError, match="neither"):
        siamese_detr.report(run=str(tmp_path))


CHECKS = {
    "overflow": "document.documentElement.scrollWidth - window.innerWidth",
    # Photographs are decoded in their own time, also after the page is loaded.
    "broken": """(async () => {
        const broken = () => [...document.querySelectorAll('use[href^="#photo"]')].filter(u =>
            !document.querySelector(u.getAttribute('href')) || u.getBoundingClientRect().width < 1).length;
        for (let i = 0; i < 400 && broken(); i++) await new Promise(done => setTimeout(done, 50));
        return broken();
    })()""",
    "spilling": """[...document.querySelectorAll('figure svg, p, dl, h1, h2, h3, nav')].filter(e =>
        e.getBoundingClientRect().right > innerWidth + 1).length""",
    # Text that runs out of the place it has.
    "cut": """[...document.querySelectorAll('p, dt, dd, h1, h2, h3, th, td, figcaption, summary, nav li')].filter(e =>
        e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.trim())""",
    # Contrast of all text against the background behind it (WCAG: 4.5), pictures' own tags aside.
    "faint": """(() => {
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const parse = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data]; };
        const linear = v => v <= 10 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
        const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
        const behind = e => {
            let colour = [255, 255, 255];
            const above = [];
            for (; e; e = e.parentElement) above.unshift(e);
            for (const x of above) {
                const c = parse(getComputedStyle(x).backgroundColor), a = c[3] / 255;
                colour = colour.map((v, i) => v * (1 - a) + c[i] * a);
            }
            return colour;
        };
        const bad = [];
        for (const e of document.querySelectorAll('h1,h2,h3,p,a,dt,dd,td,th,caption,figcaption,summary,.chart text')) {
            const style = getComputedStyle(e);
            const a = light(parse(e.closest('svg') ? style.fill : style.color)), b = light(behind(e));
            const text = e.textContent.trim();
            if (text && (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5) bad.push(text);
        }
        return bad.slice(0, 5);
    })()""",
}


@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed (Debian: apt install chromium)")
def test_in_a_browser(runs: dict[str, Path], tmp_path: Path) -> None:
    pages = {
        name: siamese_detr.report(
            run=str(run), out=str(tmp_path / f"{name}.html"), samples=2, threshold=0.001, device="cpu"
        ).page
        for name, run in runs.items()
    }
    with Browser(find_browser() or "", tmp_path / "profile") as browser:
        for name, page in pages.items():
            for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
                where = f"{name} at {width} px" + ", dark" * dark
                visit = browser.visit(page, width=width, dark=dark, scripts=CHECKS)
                assert visit.requests == [], where
                assert visit.complaints == [], where
                assert visit.values == {"overflow": 0, "broken": 0, "spilling": 0, "cut": [], "faint": []}, where


def test_text_is_escaped_and_figures_keep_to_themselves(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    album = Album(longest=32)
    photo = album.add(np.zeros((40, 60, 3), np.uint8))
    picture = photo.draw([Box((-5, -5, 90, 90), "#fff", evil)], evil, evil)
    curve = Curve(evil, [1.0, 2.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0])
    nothing = Curve("nothing", [], [], [], [])
    charts = [line_chart(evil, "x", "y", curves) for curves in ([curve, curve], [curve, nothing], [nothing])]
    table = Table(evil, [evil], [[evil]])
    page = Page(evil, evil, [Section(evil, [Grid([picture, *charts]), table])], album.markup())
    file = tmp_path / "page.html"
    file.write_text(render(page))
    reader = check_markup(file)
    assert "script" not in reader.tags
    assert 'width="60" height="40"' in file.read_text()
