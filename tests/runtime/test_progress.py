"""What a run says of its progress where there is no terminal."""

from __future__ import annotations

import pytest

from siamese_detr.runtime import progress


def test_lines_take_the_place_of_the_bar(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.ProgressBar("pretrain", 500, 100) as bar:
        for step in range(101, 161):
            now[0] += 2.0
            bar.step(step)
            bar.step(step, 8.5 if step == 120 else None)  # what is logged of a step comes on top
        bar.say("AP 12.3")
    assert capsys.readouterr().err.splitlines() == [
        "pretrain: step 110 of 500, 13 min left",
        "pretrain: step 140 of 500, loss 8.5, 12 min left",
        "AP 12.3",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (700, "12 min"), (12000, "3 h 20 min")])
def test_durations_are_for_people(seconds, text):
    assert progress.duration(seconds) == text
