"""Files that are written whole or not at all: text, JSON and CSV."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def replace_file(path: PathLike, write: Callable[[str], object]) -> None:
    """Calls `write(scratch)` on a name beside `path`, then moves the file into its place.

    A crash, a full disk or a kill leaves the file that was there before. The scratch name keeps
    the suffix, which writers choose their format by, and is this process's own.
    """
    path = Path(path)
    scratch = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(str(scratch))
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    # The new name itself is on the disk only when the folder is; not every system can do that.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in UTF-8 with plain newlines."""

    def write(scratch: str) -> None:
        with open(scratch, "w", encoding="utf-8", newline="") as file:
            file.write(text)

    replace_file(path, write)


def write_json(
    path: PathLike, content: object, default: Callable[..., object] | None = None
) -> None:
    """Writes a JSON file; `default` turns what JSON does not know into what it does."""
    write_text(path, json.dumps(content, indent=2, default=default) + "\n")


def read_json(path: PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON; names the file and, where known, the line.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error})") from None
    except (ValueError, RecursionError) as error:  # no text, too deep, or a number too long
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_csv(
    path: PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, object] | Sequence[object]]
) -> None:
    """Writes a CSV file: a head and a line a row, values by column or in its order."""

    def write(scratch: str) -> None:
        with open(scratch, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in rows:
                values = [row.get(c, "") for c in columns] if isinstance(row, Mapping) else row
                writer.writerow(values)

    replace_file(path, write)


def append_csv(path: PathLike, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Adds lines to a CSV file, and the head to a new one.

    A last line that a kill or a full disk has cut off goes first.
    """
    _end_last_line(path)
    fresh = not Path(path).exists() or not Path(path).stat().st_size
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows] if fresh else rows)


def _end_last_line(path: PathLike) -> None:
    """Removes an incomplete last line; terminates a complete one."""
    if not Path(path).exists():
        return
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read() in (b"", b"\n"):
            return
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        head, last = (_fields(line.decode(errors="replace")) for line in (lines[0], lines[-1]))
        if len(lines) > 1 and len(last) == len(head) > 0:
            file.write(b"\r\n")
        else:
            file.truncate(size - len(lines[-1]))


def _fields(line: str) -> list[str]:
    """The fields of a line; none of what the `csv` module cannot read."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def read_csv(
    path: PathLike, numbers: bool = True, needs: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of a CSV file, with `numbers` as floats; [] where there is no file.

    A last line that was cut off by a kill is left out.

    Raises:
        ValueError: it is not text, lacks one of the columns that the caller `needs`, or a line has
            more or fewer fields than the head.
    """
    if not Path(path).exists():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file ({error})") from None
    if not lines:
        return []
    head, *rows = lines
    missing = [name for name in needs if name not in head]
    if missing:
        raise ValueError(f"{path}: the first line has no column {missing[0]!r}")
    if rows and len(rows[-1]) < len(head):
        rows.pop()
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise ValueError(
                f"{path}, line {number}: {len(row)} fields, and {len(head)} in the first line"
            )
    read: Callable[[str], float | str] = _number if numbers else str
    return [{name: read(value) for name, value in zip(head, row, strict=True)} for row in rows]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
