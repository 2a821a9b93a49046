"""``siamese-detr VERB``: the verbs' configurations from the shell. No logic of its own."""

from __future__ import annotations

import argparse
import contextlib
import errno
import inspect
import os
import re
import sys
import textwrap
import types
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from siamese_detr import VERBS, __version__, load_config, load_verb
from siamese_detr.errors import UserError
from siamese_detr.runtime.signals import EXIT_PREEMPTED, Preempted, stoppable
from siamese_detr.runtime.streams import drop_output, prepare_streams, reader_gone

REFUSALS = {
    errno.ENOSPC: "free disk space and start it again (with --resume, where the command has it)",
    errno.EDQUOT: "free disk space and start it again (with --resume, where the command has it)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
}
"""What the user can do about an error of the operating system, where the code that met it does not say."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a user's mistake, or what the verb documents."""
    prepare_streams()
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
        drop_output()
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


def dispatch(argv: list[str]) -> int:
    """Do what is asked for; the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name == "recipes":
        print(recipes(rest))
        return 0
    if name not in VERBS:
        from siamese_detr.config import nearest

        known = [*VERBS, "recipes"]
        raise UserError(f"unknown command {name!r}{nearest(name, known)}; the commands are {', '.join(known)}")
    with stoppable() if VERBS[name].continued else contextlib.nullcontext():
        run(name, rest)
    return 0


def recipes(names: list[str]) -> str:
    """The shipped recipes, a line each; or, of those named, the whole content for every verb that has them."""
    from siamese_detr.config import nearest, read_recipe, recipe_comment, recipe_names

    shipped = [(verb, name) for verb in VERBS for name in recipe_names(load_config(verb))]
    if unknown := [name for name in names if name not in {name for _, name in shipped}]:
        known = sorted({name for _, name in shipped})
        raise UserError(f"there is no recipe {unknown[0]!r}{nearest(unknown[0], known)}; there are {', '.join(known)}")
    if names:
        texts = [(verb, name, read_recipe(load_config(verb), name)[0]) for verb, name in shipped if name in names]
        return "\n".join(f"# siamese-detr {verb} --recipe {name}\n{text}" for verb, name, text in texts).rstrip()
    lines = []
    for verb, name in shipped:
        about = " ".join(recipe_comment(load_config(verb), name).split("\n\n")[0].split()).partition(". ")[0]
        lines.append(f"{verb} --recipe {name}")
        lines += textwrap.wrap(f"{about.rstrip('.')}.", 80, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(
        [*lines, "", "siamese-detr recipes NAME prints one; copy it to a file to change it", "(--recipe FILE)."]
    )


def run(name: str, argv: list[str]) -> Any:
    """Resolve the configuration of verb ``name`` from ``argv`` and call it."""
    config = read_arguments(name, load_config(name), argv)
    result = load_verb(name)(config)
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # several processes would wait for each other
    if getattr(config, "pages", False) and config.replay is None and alone:
        try:
            load_verb("report")(run=config.out, device=config.device)
        except UserError as error:  # the detector is there
            print(f"siamese-detr: no report: {error}", file=sys.stderr)
    return result


def read_arguments(name: str, config_class: type[Any], argv: list[str]) -> Any:
    """The configuration of verb ``name``: recipe, file and arguments.

    Raises:
        UserError: a mistake in them; one line.
        SystemExit: the help has been printed.
    """
    from siamese_detr.config import is_required, ordered, read_sources, resolve

    kinds = get_type_hints(config_class)
    flags = {name for name, kind in kinds.items() if bool in (kind, *get_args(kind)) and get_origin(kind) is not dict}
    mappings = {name for name, kind in kinds.items() if get_origin(kind) is dict}
    argv = spell_alike(argv, flags)
    parser = Parser(name, config_class, [word for word in argv if word.startswith("--") and "." in word], mappings)
    parsed, rest = parser.parse_known_args(argv)
    given = vars(parsed)
    if (kind := config_class.variant(given)) is not config_class:  # with the options of a plug-in
        return read_arguments(name, kind, argv)
    sources = {key: given.pop(key, None) for key in ("recipe", "config") if key not in kinds}
    files = read_sources(config_class, sources.get("recipe"), sources["config"])
    if (kind := config_class.variant(files | given)) is not config_class:
        return read_arguments(name, kind, argv)
    if given.pop("help", False):
        parser.describe(files)
        print(parser.format_help(), end="")
        raise SystemExit(0)
    print_only = given.pop("print_config", False)
    for word in rest:
        if word.startswith("-") and not re.fullmatch(r"-[\d.]+", word):
            parser.unknown(word)
    fields = ordered(config_class)
    if len(rest) > len(fields):
        parser.error(f"unexpected {rest[len(fields)]!r}")
    for field, word in zip(fields, rest, strict=False):
        if field.name in given:
            parser.error(f"unexpected {word!r}: {option(field.name)} is given as well")
        given[field.name] = word
    for key in [key for key in given if "." in key]:
        head, _, path = key.partition(".")
        value = [scalar(word) for word in given.pop(key)]
        *owner, last = path.rsplit(".", 1) if get_args(kinds[head])[1:] and is_nested(kinds[head]) else [path]
        mapping = given.setdefault(head, {k: dict(v) if owner else v for k, v in (files.get(head) or {}).items()})
        for part in owner:
            mapping = mapping.setdefault(part, {})
        mapping[last.replace("-", "_")] = value[0] if len(value) == 1 else value
    for key in [key for key in given if key in mappings and isinstance(given[key], list)]:
        words = given[key]
        if len(words) % 2 or (words and is_nested(kinds[key])):
            parser.error(f"{option(key)} takes pairs of a name and a value; or give --{key}.NAME VALUE")
        given[key] = {word: scalar(value) for word, value in zip(words[::2], words[1::2], strict=True)}
    given = {
        key: None if value == "None" and type(None) in get_args(kinds[key]) else value for key, value in given.items()
    }
    if print_only:  # what must still be given stands there in capitals
        given = {f.name: f.name.upper() for f in fields if is_required(f) and f.name not in files} | given
    try:
        config = resolve(config_class, given, form=option, **sources)
    except UserError as error:
        raise UserError(f"{error}; {parser.hint}") from None
    if print_only:
        print(explained_yaml(config))
        raise SystemExit(0)
    return config


def explained_yaml(config: Any) -> str:
    """The values that have an effect, as YAML with a comment before each, to edit and read back with ``--config``."""
    import yaml

    from siamese_detr.config import effective, explained

    lines = []
    for name, value in effective(config).items():
        text = explained(type(config))[name][1]
        lines += textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")
        lines.append(yaml.safe_dump({name: value}, sort_keys=False).rstrip())
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """The options of a verb, of which only those given appear in the result; types are left to the configuration.

    Args:
        name: the verb.
        config_class: its configuration.
        dotted: words such as ``--finetune.lr``, which set an entry of a mapping.
        mappings: the fields that are mappings.
    """

    def __init__(self, name: str, config_class: type[Any], dotted: list[str], mappings: set[str]) -> None:
        from siamese_detr.config import explained, is_required, ordered, recipe_names

        fields, texts = ordered(config_class), explained(config_class)
        required = " ".join(field.name.upper() for field in fields if is_required(field))
        super().__init__(
            prog=f"siamese-detr {name}",
            usage=f"siamese-detr {name} {required} [OPTIONS]",
            description=inspect.cleandoc(config_class.__doc__ or "").partition("\nArgs:")[0],
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            add_help=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        )
        self.hint = f"siamese-detr {name} --help lists the options"
        self.fields = fields
        kinds = get_type_hints(config_class)
        common = config_class.COMMON
        first = sorted((f for f in fields if f.name in common), key=lambda f: common.index(f.name))
        groups = {"": self.add_argument_group("common options" if common else "options")}
        for field in [*first, *(field for field in fields if field not in first)]:
            owner, text = texts[field.name]
            title = "" if field in first or not common else group_title(owner, config_class)
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            groups[title].add_argument(option(field.name), dest=field.name, help=text, **shape(kinds[field.name]))
        groups[""].add_argument("--config", metavar="FILE", help="YAML file with values for these options.")
        if "recipe" not in kinds:
            names = ", ".join(recipe_names(config_class)) or "none is shipped"
            groups[""].add_argument("--recipe", metavar="NAME", help=f"values to start from: {names}; or a YAML file.")
        groups[""].add_argument(
            "--print-config", action="store_true", help="print these options as YAML, to edit and give as --config."
        )
        groups[""].add_argument("-h", "--help", action="store_true", help="Show this help.")
        for word in dict.fromkeys(word.partition("=")[0] for word in dotted):
            if word[2:].partition(".")[0].replace("-", "_") in mappings:
                head, _, path = word[2:].partition(".")
                dest = f"{head.replace('-', '_')}.{path}"
                groups[""].add_argument(word, dest=dest, nargs="+", help=argparse.SUPPRESS)

    def describe(self, values: Mapping[str, Any]) -> None:
        """Add the defaults to the help, those of a recipe or file where there is one."""
        from siamese_detr.config import default_of, is_required

        fields = {field.name: field for field in self.fields}
        for action in self._actions:
            field = fields.get(action.dest)
            if field is None or action.help is argparse.SUPPRESS:
                continue
            text = (action.help or "").replace("%", "%%")
            value = values.get(field.name, None if is_required(field) else default_of(field))
            if is_required(field) and field.name not in values:
                text += " (required)"
            elif value not in (None, (), {}, []) and value is not False:
                shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
                text += f" (default: {str(shown).replace('%', '%%')})"
            action.help = text

    def unknown(self, word: str) -> NoReturn:
        from siamese_detr.config import nearest

        names = [*(field.name for field in self.fields), "config", "recipe"]
        bare = word.lstrip("-").partition("=")[0].replace("-", "_")
        near = option(bare) if bare in names else ""
        near = f" (did you mean {near}?)" if near else nearest(bare, names, option)
        self.error(f"unknown option {word.partition('=')[0]}{near}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.hint}")


def option(name: str) -> str:
    """A field as an option of the command line."""
    return "--" + name.replace("_", "-")


def group_title(owner: type, config_class: type) -> str:
    """The heading of the options that ``owner`` documents: what its docstring begins with."""
    if owner is config_class:
        return "more options"
    return inspect.cleandoc(owner.__doc__ or owner.__name__).partition("\n")[0].partition(";")[0].rstrip(".").lower()


def shape(kind: Any) -> dict[str, Any]:
    """How an option of this type is written, for argparse."""
    if get_origin(kind) in (Union, types.UnionType):
        first, *others = [part for part in get_args(kind) if part is not type(None)]
        if several := [part for part in others if get_origin(part) is tuple]:
            return shape(several[0])
        words = "".join(f"|{word}" for part in others if get_origin(part) is Literal for word in get_args(part))
        return shape(first) if not words else shape(first) | {"metavar": shape(first)["metavar"] + words}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"metavar": "{" + ",".join(map(str, get_args(kind))) + "}"}
    if get_origin(kind) is dict:
        return {"nargs": "*", "metavar": "NAME VALUE"}
    if get_origin(kind) is not None:  # a tuple or list
        return {"nargs": "*", "metavar": getattr(get_args(kind)[0], "__name__", "value").upper()}
    return {"metavar": getattr(kind, "__name__", "value").upper()}


def is_nested(kind: Any) -> bool:
    """Whether the values of a mapping type are mappings."""
    return get_origin(get_args(kind)[1]) is dict


def scalar(text: str) -> int | float | bool | str:
    """A word in a mapping: a number, True or False if it reads so."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def spell_alike(argv: list[str], flags: set[str]) -> list[str]:
    """Options with dashes for underscores, and ``--square False`` or ``--resume auto`` as the flags they are."""
    words: list[str] = []
    for word in argv:
        last = words[-1][2:].replace("-", "_") if words and words[-1].startswith("--") else ""
        if last in flags and word in ("True", "False", "None", "auto"):
            words[-1:] = {"False": [f"--no-{words[-1][2:]}"], "None": []}.get(word, words[-1:])
            continue
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            head, dot, path = name.partition(".")
            name = head.replace("_", "-") + dot + path
            if equals and name[2:].replace("-", "_") in flags and value in ("True", "False", "None", "auto"):
                words += {"False": [f"--no-{name[2:]}"], "None": []}.get(value, [name])
                continue
        words.append(name + equals + value)
    return words


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in VERBS.items()]
    return "\n".join(
        [
            "usage: siamese-detr VERB [options]",
            "",
            *lines,
            f"  {'recipes':<{width}}  the shipped settings, by name",
            "",
            "siamese-detr VERB --help shows a verb's options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
