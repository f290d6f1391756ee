"""Tables of settings, a row for each picture, and ranges of whole numbers.

    prompt,seed,ladder.strategy        {"prompt": "a lake", "ladder": {"steps": [20, 15]}}
    a lake at dawn,7,sdedit            {"prompt": "a hill", "shot": "sc010"}

Columns are settings, those in groups by their names with dots; what else there is are names of the
table's own. A line that cannot be read is the mistake of its row alone.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from engine.parsing import UserError, flat

Values = dict[str, Any]
"""settings by their names with dots, and names of one's own"""

_RANGE = r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?"
_RANGES = re.compile(f"{_RANGE}(,{_RANGE})*")


def is_ranges(text: str) -> bool:
    """Whether `text` looks like `1-9:2,20`, if only by a single number."""
    return _RANGES.fullmatch(text) is not None


def parse_ranges(text: str) -> list[int]:
    """The whole numbers of `1-9:2,20`: from 1 to 9 by twos, and 20.

    Raises:
        UserError: it is none.
    """
    if not _RANGES.fullmatch(text):
        raise UserError(f"{text!r} is no range of whole numbers; write one such as 1-9:2,20")
    numbers: list[int] = []
    for part in text.split(","):
        first, last, stride = re.findall(_RANGE, part)[0]
        if int(last or first) < int(first):
            raise UserError(f"{part!r} has no numbers; write the smaller one first")
        numbers += range(int(first), int(last or first) + 1, int(stride or 1))
    return numbers


def read_table(path: Path) -> Iterator[tuple[str, Values | UserError]]:
    """(where it is, what it says) of every row of a table; empty cells say nothing."""
    readers: dict[str, Callable[[Iterable[str]], Iterator[tuple[int, Values | UserError]]]] = {
        ".csv": partial(_read_cells, dialect="excel"),
        ".tsv": partial(_read_cells, dialect="excel-tab"),
        ".jsonl": _read_objects,
    }
    if path.suffix.lower() not in readers:
        known = ", ".join(readers)
        raise UserError(f"{path}: no table that can be read; a file of one of {known} would work")
    try:
        # Spreadsheets begin their files with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in readers[path.suffix.lower()](lines):
                yield f"{path}, line {number}", row
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: {reason}; give the path of a readable table") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def _read_cells(lines: Iterable[str], dialect: str) -> Iterator[tuple[int, Values | UserError]]:
    reader = csv.DictReader(lines, dialect=dialect, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                said = (
                    f"has not the {count} cells of the first line; put text with commas in quotes"
                )
                yield reader.line_num, UserError(said)
            else:
                yield reader.line_num, {name.strip(): cell for name, cell in row.items() if cell}
    except csv.Error as error:
        yield reader.line_num, UserError(f"{error}; text that has quotes wants them doubled")


def _read_objects(lines: Iterable[str]) -> Iterator[tuple[int, Values | UserError]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield number, flat(row) if isinstance(row, dict) else UserError("is no JSON object")
        except ValueError as error:
            yield number, UserError(f"is no JSON object ({error})")
