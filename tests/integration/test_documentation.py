"""The commands that the documentation shows are commands that the program takes."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from siamese_detr import cli, demonstration, load_config

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
# The commands of extending.md need the package that the page shows: test_extending.py installs it.
SHOWN = {name: page for name, page in PAGES.items() if name != "extending.md"} | {
    "the end of the demonstration": inspect.getsource(demonstration).replace('"""', "")
}


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


def test_every_promise_is_held_by_tests() -> None:
    """Each name in brackets in docs/reliability.md is the argument of some tests' marker, and the other way round."""
    promised = set(re.findall(r"\*\* \[([a-z-]+)\]", PAGES["reliability.md"]))
    tests = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("**/test_*.py"))
    held = {name for text in tests for name in re.findall(r'mark\.promise\("([a-z-]+)"\)', text)}
    assert len(promised) >= 14
    assert promised == held
