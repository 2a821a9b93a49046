"""Verbs: one dataclass is the Python signature, the command line and the YAML file."""

from __future__ import annotations

import inspect
import os
import pydoc
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import siamese_detr
from siamese_detr import VERBS, Command, cli
from siamese_detr.config import Options, verb, write_config
from siamese_detr.errors import UserError


@dataclass
class ToyConfig(Options):
    """A toy.

    Args:
        images: a folder.
        steps: how many.
        method: which.
        sides: lengths.
        resume: go on.
        square: stretch; default: it depends.
        further: anything.
    """

    images: str
    steps: int = 3
    method: Literal["a", "b"] = "a"
    sides: tuple[int, ...] = (1, 2)
    resume: bool = False
    square: bool | None = None
    further: dict[str, int | str] = field(default_factory=dict)


@verb(ToyConfig)
def toy(config: ToyConfig) -> ToyConfig:
    """Return the configuration.

    Raises:
        UserError: never.
    """
    return config


def test_python_calls() -> None:
    assert toy("x", steps=4) == toy(images="x", steps=4) == toy(ToyConfig("x", steps=4)) == ToyConfig("x", 4)
    assert list(inspect.signature(toy).parameters)[:2] == ["images", "steps"]


def test_pythons_help_shows_the_arguments_and_what_they_mean() -> None:
    said = " ".join(pydoc.plain(pydoc.render_doc(toy)).split())
    assert "toy(images: str, steps: int = 3, method: Literal['a', 'b'] = 'a'" in said.replace("( ", "(")
    order = ["Return the configuration.", "Args: images: a folder. steps: how many.", "config: path", "Raises:"]
    assert sorted(order, key=said.index) == order


def test_every_verb_is_a_documented_function_of_the_package() -> None:
    assert set(VERBS) < set(siamese_detr.__all__)
    for name in VERBS:
        function = getattr(siamese_detr, name)
        assert inspect.isroutine(function)
        explained = [line.split(":")[0].strip() for line in function.__doc__.splitlines() if line.startswith("    ")]
        assert set(inspect.signature(function).parameters) <= set(explained)


def test_file_is_overridden_by_arguments(tmp_path: Path) -> None:
    write_config(ToyConfig("x", steps=9, sides=(5,)), tmp_path / "c.yaml")
    assert toy(config=tmp_path / "c.yaml") == ToyConfig("x", steps=9, sides=(5,))
    assert toy(config=tmp_path / "c.yaml", steps=1).steps == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stepps": 1}, ["stepps", "did you mean 'steps'"]),
        ({"steps": "many"}, ["steps", "many"]),
        ({"method": "c"}, ["method", "'a' or 'b'"]),
        ({"recipe": "nope"}, ["recipe", "nope"]),
        ({"config": "/nowhere.yaml"}, ["/nowhere.yaml"]),
    ],
)
def test_mistakes_are_named(options: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        toy(images="x", **options)
    assert all(word in str(caught.value) for word in words)


def test_missing_required() -> None:
    with pytest.raises(UserError, match="images is required"):
        toy()


def test_yaml_mistakes_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("stepz: 1\n")
    with pytest.raises(UserError, match=r"stepz.*c\.yaml.*steps"):
        toy(images="x", config=path)
    for text in ("a: [\n", "a: " + "[" * 10_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"c\.yaml is not valid YAML"):
            toy(images="x", config=path)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen: list[ToyConfig] = []

    @verb(ToyConfig)
    def toy(config: ToyConfig) -> None:
        seen.append(config)

    monkeypatch.setattr(cli, "VERBS", {"toy": Command(__name__, __name__, "a toy")})
    monkeypatch.setattr(cli, "load_verb", lambda name: toy)
    monkeypatch.setattr(cli, "load_config", lambda name: ToyConfig)
    assert cli.main(["toy", "photos", "--steps", "5", "--resume", "--sides", "7", "8"]) == 0
    assert seen.pop() == ToyConfig("photos", 5, "a", (7, 8), True)
    for word, value in (("--square", True), ("--no-square", False), ("--square=True", True)):
        assert cli.main(["toy", "photos", word, "--steps", "4"]) == 0
        assert seen.pop() == ToyConfig("photos", 4, square=value)
    with pytest.raises(SystemExit):
        cli.main(["toy", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--square, --no-square" in said
    assert "-h, --help" in said
    assert "stretch; default: it depends" in said
    write_config(ToyConfig("x", steps=9), tmp_path / "c.yaml")
    assert cli.main(["toy", f"--config={tmp_path / 'c.yaml'}", "--method", "b"]) == 0
    assert seen.pop() == ToyConfig("x", 9, "b")
    (tmp_path / "partial.yaml").write_text("sides: [3]\n")
    assert cli.main(["toy", "--config", str(tmp_path / "partial.yaml"), "--images", "y"]) == 0
    assert seen.pop() == ToyConfig("y", sides=(3,))
    (tmp_path / "partial.yaml").write_text("further: {a: 1, b: 2}\n")
    for words, expected in (
        ([], {"a": 1, "b": 2}),
        (["--further", "c", "x"], {"c": "x"}),
        (["--further"], {}),
        (["--further.b", "3", "--further.c=x"], {"a": 1, "b": 3, "c": "x"}),
    ):
        assert cli.main(["toy", "y", "--config", str(tmp_path / "partial.yaml"), *words]) == 0
        assert seen.pop() == ToyConfig("y", further=expected)
    (tmp_path / "partial.yaml").write_text("steps: many\n")
    assert cli.main(["toy", "photos", "--config", str(tmp_path / "partial.yaml")]) == 2
    assert "steps='many'" in capsys.readouterr().err
    for arguments, words in (
        (["photos", "--stepps", "5"], ["--stepps", "did you mean --steps?"]),
        (["photos", "--no-resum"], ["--no-resum", "unknown option"]),
        (["photos", "--steps", "many"], ["many", "--steps"]),
        (["photos", "--steps"], ["--steps"]),
        (["photos", "--method", "c"], ["'c'", "--method", "'a' or 'b'"]),
        (["--steps", "5"], ["--images is required"]),
        (["-images", "x"], ["did you mean --images?"]),
        (["--images", "x", "y"], ["unexpected 'y'", "--images is given as well"]),
        (["photos", "--further", "a"], ["--further takes pairs"]),
        (["--images", "a\0b"], ["zero byte"]),
    ):
        assert cli.main(["toy", *arguments]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "siamese-detr toy --help" in message
        assert all(word in message for word in words), message
    assert cli.main(["toi"]) == 2
    assert "did you mean 'toy'" in capsys.readouterr().err


def test_no_command_loads_pytorch_to_print_its_help() -> None:
    program = "import sys, siamese_detr as s; list(map(s.load_config, s.VERBS)); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("set_by_user", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(set_by_user: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if set_by_user is not None:
        environment["OMP_WAIT_POLICY"] = set_by_user
    program = "import os, siamese_detr; print(os.environ['OMP_WAIT_POLICY'])"
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, capture_output=True, text=True
    )
    assert printed.stdout.strip() == expected
