"""What verbs say goes through the logger ``siamese_detr``, and ``quiet`` leaves it out."""

from __future__ import annotations

import logging

import siamese_detr
from tiny_finetuning import learned


def test_messages_go_to_the_logger_and_quiet_leaves_them_out(capfd, tmp_path):
    result, labels = learned()
    capfd.readouterr()
    options = {"model": str(result.out), "labels": str(labels), "workers": 0}
    siamese_detr.evaluate(**options, out=str(tmp_path / "metrics.json"), quiet=True)
    assert capfd.readouterr() == ("", "")

    lines: list[str] = []
    logger = logging.getLogger("siamese_detr")
    handlers, mine = logger.handlers[:], logging.Handler()
    mine.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    try:
        logger.handlers[:] = [mine]
        siamese_detr.evaluate(**options, out=str(tmp_path / "metrics.json"))
    finally:
        logger.handlers[:] = handlers
    assert any(line.startswith("metrics in ") for line in lines)
    assert capfd.readouterr().err == ""
