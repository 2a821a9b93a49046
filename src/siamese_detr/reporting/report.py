"""The verb ``report``: one self-contained HTML file about a run or a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from siamese_detr.config import verb
from siamese_detr.errors import UserError
from siamese_detr.files import write_text
from siamese_detr.messages import say
from siamese_detr.reporting.page import Missing, Page, render
from siamese_detr.reporting.report_config import ReportConfig
from siamese_detr.reporting.runs import read_config


@dataclass(frozen=True)
class ReportResult:
    """The HTML file, the kind of run it is about, and the parts left out, each with the reason."""

    page: Path
    kind: str
    missing: list[str]


@verb(ReportConfig)
def report(config: ReportConfig) -> ReportResult:
    """Write a self-contained HTML page about a run or a comparison.

    Returns:
        where the page is, and what it lacks.

    Raises:
        UserError: there is neither, or the page cannot be written.
    """
    if config.samples < 1 or config.max_images < 1:
        raise UserError(f"samples and max_images must be at least 1, not {config.samples} and {config.max_images}")
    run = Path(config.run).expanduser()
    kind = kind_of(run)
    page = make_page(run, kind, config)
    file = Path(config.out).expanduser() if config.out else run / "report.html"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, render(page))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    blocks = [block for section in page.sections for block in section.blocks]
    left_out = [f"{block.what}: {block.why}" for block in blocks if isinstance(block, Missing)]
    for line in left_out:
        say(f"left out: {line}")
    say(f"{kind}: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return ReportResult(file, kind, left_out)


def kind_of(run: Path) -> str:
    """The kind of a run directory, by the keys of its configuration.

    Raises:
        UserError: it is of no known kind.
    """
    config = read_config(run)
    if "inits" in config:
        return "comparison"
    if "method" in config and "images" in config:
        return "pre-training"
    if "train" in config:
        return "fine-tuning"
    raise UserError(
        f"{run} is neither a pre-training, a fine-tuning nor a comparison; give the output directory of one"
    )


def make_page(run: Path, kind: str, config: ReportConfig) -> Page:
    if kind == "comparison":
        from siamese_detr.reporting.comparison import comparison_page

        return comparison_page(run, config.samples)
    from siamese_detr.runtime.hardware import choose_device

    device = str(choose_device(config.device))
    if kind == "pre-training":
        from siamese_detr.reporting.pretraining import pretraining_page

        return pretraining_page(run, config.samples, device)
    from siamese_detr.reporting.finetuning import finetuning_page

    return finetuning_page(run, config.samples, config.max_images, config.threshold, device)
