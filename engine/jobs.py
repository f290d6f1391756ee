"""A job of many pictures: lists, ranges and tables of settings, of which each row is a picture.

    output: "outputs/{index:04d}_{prompt}.png"
    steps: 30                                       # whatever rows do not say is said once
    pictures:
      - prompt: [a lake at dawn, a hill in fog]     # every combination of lists, and of ranges
        seed: 1-9:2,20                              #   of whole numbers: 1, 3, 5, 7, 9, 20
        size: [1024x768, 4096x2048]                 # width x height
      - rows: shots.csv                             # a table (.csv, .tsv, .jsonl): columns are
        steps: 50                                   #   settings, such as ladder.strategy
      - frame: 1-48                                 # a name of one's own, for use in texts
        ladder: {strategy: sdedit, upscale: "plates/{frame:04d}.png"}

In all texts of such a job `{name}` stands for a setting of that row, for a name of one's own, or
for the row's number (`index`, from 1); after a colon comes how Python is to format it. A name that
no text uses is taken for a setting that is misspelt. Flags win over rows. A row that is wrong keeps
its mistake to itself, so that the others can be painted.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from engine.config import Settings
from engine.parsing import (
    Flag,
    Given,
    UserError,
    flat,
    gather,
    judge,
    leaves,
    model_at,
    nested,
    parse_yaml,
    suggest,
)
from engine.tables import Values, is_ranges, parse_ranges, read_table

FLAGS = {
    "pictures": Flag(
        "FILE",
        "A table (.csv, .tsv or .jsonl) with a row for each of many pictures, or what a file would "
        "say of them: '{seed: 1-9}'.",
    ),
    "only": Flag("ROWS", "Which of many pictures to paint, by their numbers: 3,7-9."),
}
JOB_WIDE = ("plan", "progress", "timeout_s", "stall_s", "device", "mesh.image")
_PROMPTS = ("prompt", "negative_prompt")
_NAME = re.compile(r"\{([A-Za-z_][\w.]*)(?::([^{}]*))?\}")
_LONGEST_SLUG = 60


@dataclass(frozen=True)
class Row:
    """One picture of a job.

    Attributes:
        index: its number, from 1; 0 where a job is a single picture.
        place: where it was asked for, for people.
        settings: those of the picture, or a mistake in its stead.
    """

    index: int
    place: str
    settings: Settings | UserError

    def __str__(self) -> str:
        return f"picture {self.index} ({self.place})" if self.index else self.place


@dataclass(frozen=True)
class Job:
    """What a command line asks for.

    Attributes:
        rows: at least one, of which at least one has settings.
        many: whether there is a list of pictures, if only of one.
    """

    rows: tuple[Row, ...]
    many: bool

    @property
    def settings(self) -> Settings:
        """Some row's: what is of the whole job is the same in all."""
        return next(row.settings for row in self.rows if isinstance(row.settings, Settings))


def read_job(
    argv: Sequence[str] | None = None, read: Callable[[Path], dict[str, Any]] | None = None
) -> Job:
    """The pictures that a command line (default: sys.argv[1:]) and its `--config` file ask for.

    Rows go on where an interrupted job has stopped, and leave finished pictures alone, unless
    `resume` is said to be false.

    Raises:
        UserError: a mistake in what is not of one row alone, or in every row.
    """
    given = gather(Settings, argv, read, FLAGS)
    values = dict(given.values)
    entries = values.pop("pictures", None)
    entries = given.others.get("pictures", entries)
    if entries is None:
        if "only" in given.others:
            raise UserError("--only: goes with many pictures, and this job is one; leave it out")
        return Job((Row(0, "", judge(Settings, given.over(values), given)),), many=False)
    rows = _rows(entries, flat(values), given)
    _refuse_same_output(rows)
    return Job(tuple(_chosen(rows, given.others.get("only"))), many=True)


# --- from entries to rows -------------------------------------------------------------------------


def _rows(entries: Any, base: Values, given: Given) -> list[Row]:
    numbered = enumerate(_expanded(entries), start=1)
    rows = [_row(index, place, base, said, given) for index, (place, said) in numbered]
    if not rows:
        raise UserError("pictures: there are none; write a list of settings, or name a table")
    mistakes = [row for row in rows if isinstance(row.settings, UserError)]
    if len(mistakes) == len(rows):  # most likely it is in what they have in common
        raise UserError(f"{mistakes[0]}: {mistakes[0].settings}")
    return rows


def _expanded(entries: Any) -> Iterator[tuple[str, Values | UserError]]:
    """(where it was asked for, what it says) of every row."""
    if isinstance(entries, str):
        is_spelt_out = entries.lstrip().startswith(("{", "["))
        entries = parse_yaml(entries, "pictures") if is_spelt_out else {"rows": entries}
    if isinstance(entries, Mapping):
        entries = [entries]
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise UserError("pictures: not a list of settings; write '- prompt: a lake' below it")
    for number, entry in enumerate(entries, start=1):
        values = flat(entry)
        table = values.pop("rows", None)
        for choice in _combinations(values):
            if table is None:
                yield f"pictures, entry {number}", choice
                continue
            for place, row in read_table(Path(str(table))):
                yield place, row if isinstance(row, UserError) else {**choice, **row}


def _combinations(values: Values) -> Iterator[Values]:
    """Every combination of what lists and ranges in an entry offer."""
    offers = [_offers(name, value) for name, value in values.items()]
    for choice in itertools.product(*offers):
        row: Values = {}
        for part in choice:
            row |= part
        yield row


def _offers(name: str, value: Any) -> list[Values]:
    if name == "size":
        return [{"size": size} for size in (value if isinstance(value, list) else [value])]
    is_number = _KINDS.get(name, "whole") == "whole"
    if isinstance(value, str) and is_number and is_ranges(value):
        return [{name: number} for number in parse_ranges(value)]
    takes_lists = _KINDS.get(name) == "list"
    if isinstance(value, list) and (not takes_lists or any(isinstance(v, list) for v in value)):
        if not value:
            raise UserError(f"pictures: {name}: an empty list makes no pictures; leave it out")
        return [{name: item} for item in value]
    return [{name: value}]


# --- one row --------------------------------------------------------------------------------------


def _row(index: int, place: str, base: Values, said: Values | UserError, given: Given) -> Row:
    try:
        if isinstance(said, UserError):
            raise said
        row = _spelt_out(said)
        own = {name: value for name, value in row.items() if name not in _KINDS}
        flags = {".".join(keys): value for keys, value in given.flags.items()}
        values = {"resume": True, **base, **row, **flags}
        for name in own:
            del values[name]
        filled = _filled(values, {"index": index, **own})
        return Row(index, place, judge(Settings, nested(filled), given))
    except UserError as mistake:
        return Row(index, place, mistake)


def _spelt_out(row: Values) -> Values:
    """`row` with its size as width and height, and with nothing that only a whole job can have."""
    for name in JOB_WIDE:
        if name in row:
            raise UserError(f"{name}: is of the whole job; say it outside of pictures")
    if "size" not in row:
        return row
    rest = {name: value for name, value in row.items() if name != "size"}
    if not (found := re.fullmatch(r"(\d+)\s*x\s*(\d+)", str(row["size"]))):
        raise UserError(f"size: {row['size']!r} is no size; write width x height: 1024x768")
    return {"width": int(found[1]), "height": int(found[2]), **rest}


def _filled(values: Values, own: Values) -> Values:
    """`values` with every `{name}` in a text replaced.

    Raises:
        UserError: a text has an unknown name, or no text has one of one's own.
    """
    names, used = {**_DEFAULTS, **values, **own}, {"index"}

    def fill(name: str, text: Any) -> Any:
        def value_of(found: re.Match[str]) -> str:
            other, spec = found.groups()
            if other not in names:
                hint = suggest(other, list(names), "write a setting, or a name of the row")
                raise UserError(f"{name}: {found[0]}: unknown name; {hint}")
            used.add(other)
            return _formatted(found[0], names[other], spec, name == "output" and other in _PROMPTS)

        return _NAME.sub(value_of, text) if isinstance(text, str) else text

    filled = {name: fill(name, value) for name, value in values.items() if name != "output"}
    names |= filled  # a file may be named by a prompt that is made of names itself
    if "output" in values:
        filled["output"] = fill("output", values["output"])
    for name in own.keys() - used:
        raise UserError(
            f"{name}: unknown key; {suggest(name, list(_KINDS), 'use it in a text')}; a name of "
            f"your own must be used, such as in output: '{{{name}}}.png'"
        )
    return filled


def _formatted(field: str, value: Any, spec: str | None, as_slug: bool) -> str:
    if as_slug:
        value = re.sub(r"\W+", "_", str(value)).strip("_")[:_LONGEST_SLUG]
    if spec and isinstance(value, str) and re.fullmatch(r"\d+", value):
        value = int(value)  # a cell of a table
    try:
        return format(value, spec or "")
    except (TypeError, ValueError) as error:
        raise UserError(f"{field}: {value!r} cannot be written so ({error})") from None


# --- all rows -------------------------------------------------------------------------------------


def _refuse_same_output(rows: Iterable[Row]) -> None:
    """Of two pictures under one name, the later one would replace the other."""
    seen: dict[Path, int] = {}
    for row in rows:
        if isinstance(row.settings, UserError):
            continue
        for file in _files_of(row.settings):
            if (other := seen.setdefault(file, row.index)) != row.index:
                raise UserError(
                    f"output: pictures {other} and {row.index} would both be {file.name}; name "
                    "them apart, such as outputs/{index:04d}.png"
                )


def _files_of(settings: Settings) -> Iterator[Path]:
    """What is written for a picture, that no other one may be written over."""
    yield settings.output.absolute()
    if settings.file.view:
        yield settings.output.with_suffix(".dzi").absolute()
    if settings.checkpoint.folder is not None:  # in which names alone tell pictures apart
        yield settings.checkpoint.folder.absolute() / f"the checkpoint of {settings.output.name}"


def _chosen(rows: Sequence[Row], only: str | None) -> Iterator[Row]:
    if only is None:
        yield from rows
        return
    wanted = dict.fromkeys(parse_ranges(only))
    for index in wanted:
        if not 1 <= index <= len(rows):
            raise UserError(f"--only: there is no picture {index}; they are 1 to {len(rows)}")
        yield rows[index - 1]


def _kind(keys: tuple[str, ...]) -> str:
    """Whether a setting takes a list, a whole number, or something else."""
    annotation = model_at(Settings, keys[:-1]).model_fields[keys[-1]].annotation
    if get_origin(annotation) is tuple:
        return "list"
    return "whole" if annotation is int else "other"


_DEFAULTS = flat(Settings.model_construct().model_dump(mode="json"))
_KINDS = {".".join(keys): _kind(keys) for keys in leaves(Settings)}
