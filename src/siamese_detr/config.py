"""One typed dataclass per verb is its Python signature, its command line and its YAML file.

A verb's configuration inherits those of the components it uses; each class documents and checks its own fields. Values
come from, each overriding the one before: the defaults, a recipe (a YAML file shipped in ``siamese_detr/recipes``, or a
path), a configuration file, and the arguments given. All of them are validated by the same types.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, get_args, get_origin, get_type_hints

import pydantic
import yaml

from siamese_detr.errors import UserError
from siamese_detr.files import write_text
from siamese_detr.messages import quietly, say

Config = TypeVar("Config")
VerbConfig = TypeVar("VerbConfig", bound="Options")
Result = TypeVar("Result", covariant=True)
SYNONYMS = {
    "learning_rate": ("lr",),
    "conf": ("threshold",),
    "confidence": ("threshold",),
    "model": ("init",),
    "weights": ("model", "init"),
    "imgsz": ("image_size",),
    "batch": ("batch_size",),
    "output": ("out",),
    "train": ("finetune", "pretrain"),
    "detect": ("predict",),
}
"""What other tools call an option or a command -> what it is called here."""


class Options:
    """Base of configurations that are put together: after construction, every class checks the fields it defines.

    A class's ``check`` raises :class:`UserError` for values that make no sense. Its ``idle`` yields fields that have no
    effect beside the values of others, and why; :func:`resolve` refuses those that the user gives.

    COMMON: the options that ``--help`` shows first; none: all.
    recipe_used: the recipe that values come from, for hints at what to run next.
    """

    COMMON: ClassVar[tuple[str, ...]] = ()
    recipe_used: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        for kind in reversed(type(self).__mro__):
            if "check" in vars(kind):
                vars(kind)["check"](self)

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> type[Self]:
        """The class that has the options which ``values`` call for, such as those of a plug-in."""
        return cls


class Verb(Protocol[Result]):
    """A function of one configuration, callable with its fields as arguments. Made by :func:`verb`."""

    config_class: type

    def __call__(
        self, *args: Any, config: str | Path | None = None, recipe: str | None = None, **options: Any
    ) -> Result: ...


def verb(config_class: type[VerbConfig]) -> Callable[[Callable[[VerbConfig], Result]], Verb[Result]]:
    """Decorate ``def propose(config: ProposeConfig)`` so that it takes the fields, a ``config`` file and a ``recipe``.
    Keyword-only parameters are for objects that only Python can give.

    The result is callable as ``propose("photos", out="store")``, ``propose(ProposeConfig(...))`` or
    ``propose(config="run.yaml", recipe="laptop", out="store")``; ``help`` shows its arguments. Raises
    :class:`UserError` for unknown keys or wrong types.
    """
    names = [field.name for field in ordered(config_class)]

    def decorate(function: Callable[..., Result]) -> Verb[Result]:
        beside = {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}

        # A true function, because only of those `help` and editors show the signature.
        @functools.wraps(function)
        def call(*args: Any, config: str | Path | None = None, recipe: str | None = None, **options: Any) -> Result:
            quiet = options.pop("quiet", False)
            objects = {name: options.pop(name) for name in beside if name in options}
            if len(args) == 1 and isinstance(args[0], config_class):
                if config is not None or recipe is not None or options:
                    raise TypeError("give either a configuration object or its fields, not both")
                with quietly(quiet):
                    return function(args[0], **objects)
            if len(args) > len(names):
                raise TypeError(f"{call.__name__}() takes at most {len(names)} positional arguments")
            given = dict(zip(names, args, strict=False))
            if twice := given.keys() & options.keys():
                raise TypeError(f"{', '.join(sorted(twice))} given twice")
            if "recipe" in names and recipe is not None:  # the verb applies it itself
                options, recipe = options | {"recipe": recipe}, None
            with quietly(quiet):
                return function(resolve(config_class, given | options, recipe, config), **objects)

        made: Any = call
        made.config_class = config_class
        made.__signature__ = signature(config_class, inspect.signature(function).return_annotation, beside.values())
        made.__doc__ = document(function, config_class)
        return made

    return decorate


def signature(config_class: type, result: Any, beside: Iterable[inspect.Parameter] = ()) -> inspect.Signature:
    """The fields of a configuration as parameters, the files that can give their values, and what is beside these."""
    types = get_type_hints(config_class)
    fields = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if is_required(field) else default_of(field),
            annotation=types[field.name],
        )
        for field in ordered(config_class)
    ]
    sources = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | Path | None)
        for name in ("config", "recipe")
        if name not in types
    ]
    sources.append(inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool))
    return inspect.Signature([*fields, *sources, *beside], return_annotation=result)


def document(function: Callable, config_class: type) -> str:
    """The docstring of a verb: the function's own, with the arguments that its configuration explains."""
    about, *rest = re.split(r"(?=\n\n(?:Returns|Raises):)", inspect.cleandoc(function.__doc__ or ""), maxsplit=1)
    about, _, beside = about.partition("\n\nArgs:\n")
    texts = [f"{name}: {text}" for name, (_, text) in explained(config_class).items()]
    arguments = "\n".join(textwrap.fill(text, 120, initial_indent=" " * 4, subsequent_indent=" " * 8) for text in texts)
    names = "".join(f"{name}, " for name in recipe_names(config_class))
    sources = [
        "config: path of a YAML file with values for these arguments.",
        f"recipe: values that those of ``config`` and the arguments override: {names}or the path of a YAML file.",
        "quiet: leave out messages, tables and progress bars.",
    ]
    own = {field.name for field in dataclasses.fields(config_class)}
    lines = [f"    {line}" for line in sources if line.partition(":")[0] not in own]
    return "\n".join([f"{about}\n\nArgs:\n{arguments}", *lines, *filter(None, [beside])]) + "".join(rest)


def explained(config_class: type) -> dict[str, tuple[type, str]]:
    """Field -> the class that documents it, and its text there; the fields of the verb itself first."""
    texts: dict[str, tuple[type, str]] = {}
    for kind in config_class.__mro__:
        arguments = inspect.cleandoc(vars(kind).get("__doc__") or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n(?=    \w)", arguments):
            name, _, text = entry.strip().partition(":")
            texts.setdefault(name, (kind, " ".join(text.split())))
    return {field.name: texts.get(field.name, (config_class, "")) for field in ordered(config_class)}


def ordered(config_class: type) -> list[dataclasses.Field]:
    """The fields of a configuration: those that may be given by position first, then by name only."""
    return sorted(dataclasses.fields(config_class), key=lambda field: bool(field.kw_only))


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def recipe_names(config_class: type) -> list[str]:
    """The shipped recipes for a verb: files ``<verb>-<name>.yaml`` in ``siamese_detr/recipes``."""
    prefix = recipe_prefix(config_class)
    files = resources.files("siamese_detr").joinpath("recipes").iterdir()
    return sorted(
        file.name[len(prefix) : -5] for file in files if file.name.startswith(prefix) and file.name.endswith(".yaml")
    )


def recipe_prefix(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config").lower() + "-"


def read_sources(config_class: type[Options], recipe: str | None, config: str | Path | None) -> dict[str, Any]:
    """The values of a recipe (by name or path) overridden by those of a configuration file (YAML)."""
    values: dict[str, Any] = {}
    if recipe is not None:
        text, source = read_recipe(config_class, recipe)
        values |= parse_yaml(config_class, text, source)
    if config is not None:
        values |= parse_yaml(config_class, read_text(Path(config)), str(config))
    return values


def read_recipe(config_class: type, recipe: str) -> tuple[str, str]:
    """The text of a recipe (by name or path), and what to call it."""
    if recipe in (names := recipe_names(config_class)):
        file = resources.files("siamese_detr").joinpath("recipes", f"{recipe_prefix(config_class)}{recipe}.yaml")
        return file.read_text(encoding="utf-8"), f"recipe {recipe}"
    if Path(recipe).is_file():
        return read_text(Path(recipe)), recipe
    known = f"the recipes are {', '.join(names)}" if names else "this command has no recipes"
    raise UserError(f"unknown recipe {recipe!r}{nearest(recipe, names)}; {known}, or give the path of a YAML file")


def recipe_comment(config_class: type, recipe: str) -> str:
    """What a recipe says about itself: the comment it begins with."""
    text, _ = read_recipe(config_class, recipe)
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read configuration {path}: {error}") from error


def parse_yaml(config_class: type[Options], text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold `key: value` lines, not a {type(values).__name__}")
    check_keys(config_class.variant(values), values, source)
    return values


def check_keys(config_class: type, values: Mapping[Any, Any], source: str) -> None:
    names = [field.name for field in dataclasses.fields(config_class)]
    for key in values:
        if key not in names:
            known = nearest(str(key), names) or f"; valid keys: {', '.join(names)}"
            raise UserError(f"unknown key {key!r} in {source}{known}")


def nearest(word: str, words: Iterable[str], form: Callable[[str], str] = repr) -> str:
    """``" (did you mean X?)"`` for the most similar of ``words``, or an empty string."""
    words = list(words)
    names = [name for name in SYNONYMS.get(word.replace("-", "_"), ()) if name in words]
    for spelling in (word.replace("-", "_"), word):
        names = names or difflib.get_close_matches(spelling, words, n=1)
    return f" (did you mean {' or '.join(map(form, names))}?)" if names else ""


def resolve(
    config_class: type[VerbConfig],
    given: Mapping[str, Any],
    recipe: str | None = None,
    config: str | Path | None = None,
    form: Callable[[str], str] = str,
) -> VerbConfig:
    """The configuration from its sources.

    Args:
        config_class: what to make.
        given: the user's own values; they must have an effect.
        recipe: name or path of a recipe, whose values without effect are left out.
        config: configuration file; its values without effect are reported and left out.
        form: how messages write the name of an option.

    Raises:
        UserError: an unknown key, a wrong value, or an option given that has no effect.
    """
    config_class = config_class.variant(given)
    base = read_sources(config_class, recipe, None)
    file = read_sources(config_class, None, config)
    config_class = config_class.variant({**base, **file, **given})
    check_keys(config_class, given, "arguments")
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise UserError(f"{form('steps')} and {form('epochs')} both say how long to train: give one of them")
    steps = {"steps": None} if given.get("epochs") is not None else {}  # those of a file or recipe: the user's win
    source = " and ".join(map(str, filter(None, (recipe, config))))
    values = validate_values(config_class, base | file, source) | steps
    for name, value in given.items():
        values |= validate_values(config_class, {name: value}, "arguments", form)
    made = validate(config_class, values, "arguments", form)
    refuse_idle(made, given, form)
    idle = idle_options(made)
    for name, why in idle.items():
        if name in file and file[name] != plain(default_value(config_class, name)):
            say(f"{name} in {config} has no effect: {why}")
    made = validate(config_class, {key: value for key, value in values.items() if key not in idle}, source, form)
    vars(made)["recipe_used"] = recipe
    return made


def idle_options(config: Any) -> dict[str, str]:
    """Fields that have no effect in ``config`` -> why, as its classes say."""
    kinds = [kind for kind in type(config).__mro__ if "idle" in vars(kind)]
    return {name: why for kind in kinds for names, why in vars(kind)["idle"](config) for name in names}


def refuse_idle(config: Any, given: Iterable[str], form: Callable[[str], str] = str) -> None:
    """Raise :class:`UserError` if one of the options ``given`` has no effect, and another value than its default."""
    for name, why in idle_options(config).items():
        if name in given and getattr(config, name) != default_value(type(config), name):
            raise UserError(f"{form(name)} has no effect: {why}; leave it out")


def effective(config: Any) -> dict[str, Any]:
    """The values that have an effect, as YAML holds them."""
    idle = idle_options(config)
    return {name: value for name, value in plain(config).items() if name not in idle}


def default_value(config_class: type, name: str) -> Any:
    """The default of a field; :data:`dataclasses.MISSING` if it must be given."""
    return next(default_of(field) for field in ordered(config_class) if field.name == name)


def validate(
    config_class: type[Config], values: Mapping[str, Any], source: str, form: Callable[[str], str] = str
) -> Config:
    """Build ``config_class`` from ``values``; :class:`UserError` names the first wrong key and what it must be."""
    if left := [field.name for field in ordered(config_class) if is_required(field) and field.name not in values]:
        raise UserError(f"{' and '.join(map(form, left))} {'is' if len(left) == 1 else 'are'} required")
    return config_class(**validate_values(config_class, values, source, form))


def validate_values(
    config_class: type, values: Mapping[str, Any], source: str, form: Callable[[str], str] = str
) -> dict[str, Any]:
    """``values`` converted to the types of the fields they name."""
    check_keys(config_class, values, source)
    types = get_type_hints(config_class)
    return {key: validate_value(form(key), value, types[key], source) for key, value in values.items()}


def validate_value(key: str, value: Any, kind: Any, source: str) -> Any:
    """``value`` as a ``kind``; ``key`` and ``source`` say in messages where it comes from."""
    try:
        value = pydantic.TypeAdapter(kind).validate_python(str(value) if isinstance(value, PurePath) else value)
    except pydantic.ValidationError as error:
        raise UserError(f"{key}={value!r} in {source} is not valid: {error.errors()[0]['msg']}") from error
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}={value!r} in {source} is not valid: it holds a zero byte")
    return value


def check_numbers(
    config: Any, *, positive: Sequence[str] = (), not_negative: Sequence[str] = (), shares: Sequence[str] = ()
) -> None:
    """Raise :class:`UserError`, naming the setting, for numbers out of their range; None and "auto" pass.

    Args:
        config: the object whose fields are looked at.
        positive: fields that must be above 0.
        not_negative: fields that must be 0 or more.
        shares: fields that must be between 0 and 1.
    """
    for names, fits, wanted in (
        (positive, lambda value: value > 0, "above 0"),
        (not_negative, lambda value: value >= 0, "0 or more"),
        (shares, lambda value: 0 <= value <= 1, "between 0 and 1"),
    ):
        for name in names:
            value = getattr(config, name)
            if value not in (None, "auto") and not (fits(value) and value < math.inf):
                raise UserError(f"{name} must be {wanted}, not {value}")
    if getattr(config, "seed", 0) >= 2**63:
        raise UserError(f"seed must be below 2**63, not {config.seed}")


def plain(value: Any) -> Any:
    """A configuration, or a value in one, as YAML holds it."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in ordered(type(value))}
    if isinstance(value, Mapping):
        return {key: plain(content) for key, content in value.items()}
    return [plain(content) for content in value] if isinstance(value, (tuple, list)) else value


def write_config(config: Any, path: str | Path) -> None:
    """Write what has an effect in a configuration as YAML, readable back with ``--config``."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), yaml.safe_dump(effective(config), sort_keys=False))
