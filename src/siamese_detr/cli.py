"""``siamese-detr VERB``: the verbs' configurations from the shell. No logic of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import io
import itertools
import os
import select
import sys
from typing import Annotated, Any, get_origin, get_type_hints

from siamese_detr import VERBS, __version__, load_config, load_verb
from siamese_detr.errors import UserError
from siamese_detr.runtime.signals import EXIT_PREEMPTED, Preempted, stoppable

CONTINUED = ("propose", "pretrain", "finetune", "compare")
"""Commands that, started again, go on where they were."""
REFUSALS = {
    errno.ENOSPC: "make room and start it again (with --resume, where the command has it)",
    errno.EDQUOT: "make room and start it again (with --resume, where the command has it)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
}
"""What the user can do about an error of the operating system, where the code that met it does not say."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a user's mistake, or what the verb documents."""
    try:
        try:
            return dispatch(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # a reader that has gone is met here, and not when Python ends
    except Preempted as stop:
        print(f"siamese-detr: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED
    except UserError as error:
        print(f"siamese-detr: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not reader_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # Wherever the machine refuses: what was written before is whole (everything is written aside, then renamed).
        if error.errno not in REFUSALS:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"siamese-detr: error: {error.strerror}{where}; {REFUSALS[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("siamese-detr: interrupted", file=sys.stderr)
        return 130


def reader_gone() -> bool:
    """Whether nobody reads our output any more, as when head or less have seen enough: nothing is wrong then."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def dispatch(argv: list[str]) -> int:
    """Do what is asked for; the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in VERBS:
        from siamese_detr.config import nearest

        raise UserError(f"unknown command {name!r}{nearest(name, list(VERBS))}; the commands are {', '.join(VERBS)}")
    with stoppable() if name in CONTINUED else contextlib.nullcontext():
        run(name, rest)
    return 0


def run(name: str, argv: list[str]) -> Any:
    """Resolve the configuration of verb ``name`` from ``argv`` and call it."""
    config = read_arguments(name, load_config(name), argv)
    return load_verb(name)(config)


def read_arguments(name: str, config_class: type[Any], argv: list[str]) -> Any:
    """The configuration of verb ``name``: recipe, file and arguments.

    Raises:
        UserError: a mistake in them; one line.
        SystemExit: the help has been printed.
    """
    import tyro

    from siamese_detr.config import is_required, nearest, read_sources, recipe_names, validate, validate_values

    fields = dataclasses.fields(config_class)
    undecided = [field.name for field in fields if field.type == "bool | None"]
    names = [field.name for field in fields]
    # Bare words in front stand for the first fields: `propose photos store` is `propose --images photos --out store`.
    bare = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if bare > len(fields):
        bare = len(fields)
    named = [word for field, value in zip(fields, argv[:bare], strict=False) for word in (f"--{field.name}", value)]
    argv = named + argv[bare:]
    argv, sources = take_options(argv, tuple(name for name in ("--config", "--recipe") if name[2:] not in names))
    options = [word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")]
    for option in options:
        if option not in names and option.removeprefix("no_") not in names and option not in ("help", ""):
            near = nearest(option, names).replace("_", "-").replace("'", "--", 1).replace("'", "")
            raise UserError(f"unknown option --{option.replace('_', '-')}{near}; {seek_help(name)}")
    argv = spell_out(resume_flag(argv), undecided)
    values = read_sources(config_class, sources.get("--recipe"), sources.get("--config"))
    missing = {field.name: tyro.MISSING for field in fields if is_required(field) and field.name not in values}
    if not {"-h", "--help"} & set(argv) and (left := [key for key in missing if key not in options]):
        raise UserError(f"{' and '.join(f'--{key}' for key in left)} must be given; {seek_help(name)}")
    # Values from files are validated by the same types as arguments before they become the command line's defaults.
    files = " and ".join(sources.values())
    shown = with_flags(config_class, undecided)
    values = validate_values(config_class, values, files)
    # tyro makes an option of every entry of a mapping that is not empty, and takes no others.
    mappings = [name for name, kind in get_type_hints(config_class).items() if get_origin(kind) is dict]
    default = shown(**(values | {name: {} for name in mappings} | missing))
    recipes = recipe_names(config_class)
    about = inspect.cleandoc(config_class.__doc__ or VERBS[name][1]).partition("\nArgs:")[0].strip()
    required = " ".join(field.name.upper() for field in fields if is_required(field))
    description = f"{about}\n\nShort: siamese-detr {name} {required} [OPTIONS]. Also: --config FILE.yaml" + (
        f"; --recipe NAME, one of {', '.join(recipes)}, or a path" if recipes else ""
    )
    mistakes = io.StringIO()
    try:
        with contextlib.redirect_stderr(mistakes):
            config = tyro.cli(
                shown,
                prog=f"siamese-detr {name}",
                description=description,
                args=argv,
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(f"{one_line(mistakes.getvalue())}; {seek_help(name)}") from None
    kept = {name: values[name] for name in mappings if name in values and name not in options}
    return validate(config_class, {f.name: getattr(config, f.name) for f in fields} | kept, "arguments")


def with_flags(config_class: type[Any], undecided: list[str]) -> type[Any]:
    """``config_class``, in whose help the options that are yes, no or left to be decided look like any other flag."""
    import tyro

    if not undecided:
        return config_class
    types = {
        name: Annotated[bool | None, tyro.conf.arg(metavar=f"| --no-{name.replace('_', '-')}")] for name in undecided
    }
    content = {"__doc__": config_class.__doc__, "__module__": config_class.__module__, "__annotations__": types}
    made = type(config_class.__name__, (config_class,), {**content, **dict.fromkeys(undecided)})
    return dataclasses.dataclass(made)


def spell_out(argv: list[str], undecided: list[str]) -> list[str]:
    """``--square`` and ``--no-square`` with the value that tyro wants of an option that may also be left undecided."""
    words: list[str] = []
    for word, after in itertools.zip_longest(argv, argv[1:]):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name.removeprefix("no_") in undecided and after not in ("True", "False", "None"):
            words += [f"--{name.removeprefix('no_')}", str(not name.startswith("no_"))]
        else:
            words.append(word)
    return words


def resume_flag(argv: list[str]) -> list[str]:
    """``--resume auto``, as other tools spell it, is ``--resume``: the newest valid checkpoint, or the beginning."""
    words = [word.replace("--resume=auto", "--resume") for word in argv]
    return [word for before, word in itertools.pairwise(["", *words]) if (before, word) != ("--resume", "auto")]


def seek_help(name: str) -> str:
    return f"siamese-detr {name} --help lists the options"


def one_line(box: str) -> str:
    """The message in the frame that tyro draws around it."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    message = itertools.takewhile(lambda line: not line.startswith(("─", "For full help")), lines)
    return " ".join(message).rstrip(".") or "the arguments cannot be read"


def take_options(argv: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Split ``--name value`` and ``--name=value`` of ``names`` off ``argv``."""
    rest: list[str] = []
    taken: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in names:
            taken[name] = value if equals else next(words, "")
            if not taken[name]:
                raise UserError(f"{name} needs a value")
        else:
            rest.append(word)
    return rest, taken


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in VERBS.items()]
    return "\n".join(
        ["usage: siamese-detr VERB [options]", "", *lines, "", "siamese-detr VERB --help shows a verb's options."]
    )


if __name__ == "__main__":
    sys.exit(main())
