"""The commands that the documentation shows are commands that the program takes."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from siamese_detr import cli, load_config
from siamese_detr import demo as demonstration

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
SHOWN = PAGES | {"the end of the demonstration": inspect.getsource(demonstration).replace('"""', "")}


def commands(text: str) -> list[list[str]]:
    """The command lines in ``text``, without what starts them (an environment, a path, torchrun) and comments."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^.*?(?:siamese-detr|-m siamese_detr\.cli) ([a-z]+ .*)$", joined, re.MULTILINE)
    return [words for line in found if "`" not in line and (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("name", SHOWN)
def test_commands_shown_are_understood(name: str) -> None:
    for verb, *words in commands(SHOWN[name]):
        options = [word for word in words if word != "&"]
        config = cli.read_arguments(verb, load_config(verb), options)
        assert type(config) is load_config(verb)


def test_commands_are_found_at_all() -> None:
    verbs = {words[0] for words in commands(PAGES["README.md"])}
    assert verbs >= {"check", "propose", "pretrain", "finetune", "evaluate", "predict", "compare", "report", "export"}
    assert [words[0] for words in commands(SHOWN["the end of the demonstration"])] == [
        "pretrain",
        "finetune",
        "predict",
    ]
    assert any("--part" in words for words in commands(PAGES["clusters.md"]))


def test_every_promise_names_tests_that_exist() -> None:
    """In the pages ``test_file.py::test_name``, or ``::test_name`` of the file named before."""
    for page in PAGES.values():
        file = ROOT
        for name, test in re.findall(r"(test_\w+\.py)|::(test_\w+)", page):
            if name:
                file = ROOT / "tests" / name
                assert file.is_file(), file
            else:
                assert f"\ndef {test}(" in file.read_text(encoding="utf-8"), f"{file.name}::{test}"
    promises = [line for line in PAGES["reliability.md"].splitlines() if line.startswith("| ")][2:]
    assert len(promises) >= 30
    assert all("test_" in promise.rpartition(" | ")[2] for promise in promises)
