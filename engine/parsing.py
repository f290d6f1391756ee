"""A pydantic model from a YAML file and the command line, and errors that help.

Three libraries, one job each. PyYAML reads the file, tyro splits the command line and prints
`--help`, pydantic judges the values of both in a single pass. So a value is held to the same rules
wherever it comes from, and a mistake is answered by one sentence that names the place, the setting,
what is wrong and what would work:

    configs/night.yaml: heigth: unknown key; did you mean 'height'?
    --height: 250 px is not a positive multiple of 8; 248 or 256 would work

Flags win over the file, the file wins over the defaults. A setting whose type is itself a pydantic
model is a group: `output: {format: png}` in the file, `--output.format png` on the command line.
Several numbers are a YAML list, or on the command line words with commas: `--ladder.steps 20,15`.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

PROG = "python -m engine.generate"


class UserError(ValueError):
    """A user's mistake: one sentence that says what is wrong and what would work."""


@dataclass(frozen=True)
class Given:
    """What a user gave, not judged yet.

    Attributes:
        flags: those that were typed, with the keys of the setting that each one names.
        values: what is in the file, a tree; and the file's name, if one was given.
        others: flags that are no settings.
    """

    flags: Mapping[tuple[str, ...], str]
    values: dict[str, Any]
    file: str | None
    others: Mapping[str, str]

    def over(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` with what the flags say instead."""
        for keys, value in self.flags.items():
            put(values, keys, value)
        return values


@dataclass(frozen=True)
class Flag:
    """A flag that is no setting, as `--help` shows it."""

    metavar: str
    help: str


def parse(
    model: type[M],
    argv: Sequence[str] | None = None,
    read: Callable[[Path], dict[str, Any]] | None = None,
    prog: str = PROG,
) -> M:
    """The settings of a command line (default: sys.argv[1:]) and of the `--config` file in it.

    `read` is how the file is read, by default as YAML; `prog` is what `--help` calls the program.
    Raises UserError for every mistake. `--help` prints help and raises SystemExit(0).
    """
    given = gather(model, argv, read, prog=prog)
    return judge(model, given.over(given.values), given)


def gather(
    model: type[BaseModel],
    argv: Sequence[str] | None = None,
    read: Callable[[Path], dict[str, Any]] | None = None,
    others: Mapping[str, Flag] | None = None,
    prog: str = PROG,
) -> Given:
    """What a command line and the `--config` file in it say; `others` are flags to take as well.

    Raises:
        UserError: a flag that is unknown or has no value, a file that cannot be read.
    """
    flags = _read_flags(model, argv, others or {}, prog)
    file = flags.pop((_CONFIG,), None)
    flags.pop((_LOCAL_RANK,), None)
    found = {name: flags.pop((name,)) for name in others or {} if (name,) in flags}
    values = {} if file is None else (read or read_yaml)(Path(file))
    return Given(flags, values, file, found)


def judge(model: type[M], values: Mapping[str, Any], given: Given) -> M:
    """The settings that `values` come to.

    Raises:
        UserError: the first mistake in them, with the flag or the key of the file that has it.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(first, given.flags, given.file)
        raise UserError(f"{place}{sentence(model, first)}") from None


# --- the command line -----------------------------------------------------------------------------

# Flags that are no settings. Some launchers (torch.distributed.launch, DeepSpeed) append a
# --local_rank; the engine asks the process group instead, so the flag is accepted and ignored.
_CONFIG = "config"
_LOCAL_RANK = "local_rank"


class _Words(tuple[str, ...]):
    """The words after a flag, as they were typed; tells a typed value from a default."""


def _read_flags(
    model: type[BaseModel], argv: Sequence[str] | None, others: Mapping[str, Flag], prog: str
) -> dict[tuple[str, ...], str]:
    """The flags that were typed: {('output', 'format'): 'png'} for `--output.format png`.

    tyro gets a type in which every setting takes any number of words and nothing can be wrong with
    them. It thus never prints a many-lined complaint and exits; pydantic judges the words later.
    """
    import tyro

    typed: Any
    typed, unknown = tyro.cli(
        _words_type(model, **_flags_that_are_no_settings(others, prog == PROG)),
        prog=prog,
        description=model.__doc__,
        args=argv,
        return_unknown_args=True,
    )
    flags = {keys: _one_word(model, keys, words) for keys, words in _typed_words(typed)}
    if unknown:
        raise UserError(_unknown_flag(model, unknown[0].partition("=")[0], others))
    return flags


def _words_type(model: type[BaseModel], **extra: Any) -> type:
    """A dataclass with the model's fields and defaults, which takes words for values."""
    fields = dict(extra)
    for name, info in model.model_fields.items():
        if group := _group(info.annotation):
            words: Any = _words_type(group)
            fields[name] = (words, field(default_factory=words))
        else:
            default = info.get_default(call_default_factory=True)
            hint = "(optional)" if default in (None, ()) else None
            words = _words(_metavar(info.annotation), info.description, hint)
            fields[name] = (words, field(default=default))
    return make_dataclass(model.__name__, [(name, *spec) for name, spec in fields.items()])


def _flags_that_are_no_settings(others: Mapping[str, Flag], pictures: bool) -> dict[str, Any]:
    told = "Settings to start from; flags win over the file."
    told += " A finished picture will do too." if pictures else ""
    config = _words("FILE.yaml", told, "(optional)")
    local_rank = _words("INT", "Accepted and ignored, since some launchers add it.", "")
    words = {name: _words(flag.metavar, flag.help, "(optional)") for name, flag in others.items()}
    words |= {_CONFIG: config, _LOCAL_RANK: local_rank}
    return {name: (word, field(default=None)) for name, word in words.items()}


def _words(metavar: str, description: str | None, hint: str | None = None) -> Any:
    """A type of which tyro knows the look in `--help`, and nothing else."""
    import tyro

    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=_Words,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )
    return Annotated[Any, spec, tyro.conf.arg(help=description, help_behavior_hint=hint)]


def _metavar(annotation: Any) -> str:
    """How a value's type is shown in `--help`: INT, {auto,cpu}, or FLOAT,FLOAT,..."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return ",".join([_metavar(arguments[0])] * 2) + ",..."
    if origin in (Annotated, UnionType, Union):  # the latter two with None
        return _metavar(arguments[0])
    return f"{{{','.join(arguments)}}}" if arguments else str(annotation.__name__).upper()


def _typed_words(typed: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in vars(typed).items():
        if isinstance(value, _Words):
            yield (*above, name), value
        elif hasattr(value, "__dataclass_fields__"):
            yield from _typed_words(value, (*above, name))


def _one_word(model: type[BaseModel], keys: tuple[str, ...], words: _Words) -> str:
    info = model_at(model, keys[:-1]).model_fields.get(keys[-1])
    if not words and info is not None and info.annotation is bool:
        return "true"
    if not words:
        raise UserError(f"{_flag(keys)}: the value is missing; write {_flag(keys)}=VALUE")
    if len(words) > 1:
        quoted = " ".join(words)
        raise UserError(
            f"{_flag(keys)}: takes one value but got {len(words)}; "
            f"put it in quotes: {_flag(keys)} {quoted!r}"
        )
    return words[0]


def _unknown_flag(model: type[BaseModel], token: str, others: Mapping[str, Flag]) -> str:
    if not token.startswith("-"):
        return f"{token!r}: not a flag; settings are given as --name value, --help lists them"
    names = [(_CONFIG,), *((name,) for name in others), *leaves(model)]
    known = [_flag(keys) for keys in names]
    return f"{token}: unknown flag; {suggest(token.replace('_', '-'), known, '--help lists them')}"


def _flag(keys: tuple[str, ...]) -> str:
    return "--" + ".".join(keys).replace("_", "-")


# --- the file -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses a key that is set twice; PyYAML would let the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"{name} is set a second time; keep one of the two"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises UserError if it cannot be read or is none."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        siblings = [str(near) for near in sorted(file.parent.glob("*.y*ml"))]
        hint = suggest(str(file), siblings, "give the path of a YAML file")
        raise UserError(f"--config: {file} does not exist; {hint}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--config: {file}: {reason}; give a readable YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    if values is None:  # an empty file, or comments only
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a list of settings; write lines such as 'height: 256'")
    return {str(key): value for key, value in values.items()}


def parse_yaml(text: str, place: str) -> Any:
    """What a YAML text says; `place` is where it stands. Raises UserError if it is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{place}: {_yaml_problem(error)}") from None
    except ValueError as error:  # YAML takes 2026-13-01 for a date and fails to build it
        raise UserError(f"{place}: {error}; put text that looks like a date in quotes") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "not YAML"
    return f"line {mark.line + 1}: {problem}" if mark else "not YAML; remove control characters"


def put(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set a leaf of nested mappings. A file that has no mapping there is for pydantic to judge."""
    *groups, last = keys
    node: Any = tree
    for group in groups:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            return
    node[last] = value


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by their names with dots."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{above}{name}.")
        else:
            leaves[f"{above}{name}"] = list(value) if isinstance(value, tuple) else value
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flat`."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        put(tree, tuple(name.split(".")), value)
    return tree


# --- the sentence ---------------------------------------------------------------------------------


def _place(error: ErrorDetails, flags: Mapping[tuple[str, ...], str], file: str | None) -> str:
    """Where the user wrote what is wrong: a flag, or a key of the file."""
    keys = tuple(str(key) for key in error["loc"])
    for flag in flags:
        if keys[: len(flag)] == flag:
            return f"{_flag(flag)}: "
    return "".join(f"{part}: " for part in (file, ".".join(keys)) if part)


def sentence(model: type[BaseModel], error: ErrorDetails) -> str:
    """Pydantic's error in the house's words; a new kind of field may bring a new line here."""
    limits = error.get("ctx", {})
    value = "an empty value" if error["input"] is None else repr(error["input"])
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            known = list(model_at(model, error["loc"][:-1]).model_fields)
            every = f"the keys are {', '.join(known)}"
            return f"unknown key; {suggest(str(error['loc'][-1]), known, every)}"
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{value} is not a whole number; write one such as 8"
        case "float_parsing" | "float_type" | "finite_number":
            return f"{value} is not a finite number; write one such as 4.5"
        case "string_type" | "path_type":
            return f"{value} is not text; put it in quotes"
        case "literal_error":
            return f"{value} is not known; {limits['expected']} would work"
        case "greater_than":
            return f"{error['input']} is too small; more than {limits['gt']:g} would work"
        case "greater_than_equal":
            return f"{error['input']} is too small; {limits['ge']:g} or more would work"
        case "less_than_equal":
            return f"{error['input']} is too large; {limits['le']} or less would work"
        case "model_type":
            return f"{value} is not a group of settings; write them below it, indented"
        case "value_error":
            return str(limits["error"])
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}"


def suggest(word: str, known: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def _group(annotation: Any) -> type[BaseModel] | None:
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_model else None


def model_at(model: type[BaseModel], keys: Sequence[str | int]) -> type[BaseModel]:
    """The model in which the last of `keys` names a setting."""
    for key in keys:
        info = model.model_fields.get(str(key))
        model = (info and _group(info.annotation)) or model
    return model


def leaves(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of every setting, those in groups with the group's before them."""
    for name, info in model.model_fields.items():
        if group := _group(info.annotation):
            yield from leaves(group, (*above, name))
        else:
            yield (*above, name)
