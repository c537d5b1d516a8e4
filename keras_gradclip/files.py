"""Atomic writes of text, JSON and CSV files, and their readers."""

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
    """Calls `write(scratch)` with a temporary path beside `path`, then renames that file to `path`.

    After a crash, a full disk or a kill, the old file is still there. The temporary path has the
    same suffix, by which writers choose a format, and belongs to this process.
    """
    path = Path(path)
    scratch = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(str(scratch))
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(scratch):
            error.filename = str(path)
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    # The renaming is on the disk only once the folder is; not every system can do that.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in UTF-8 with plain newlines."""
    replace_file(path, lambda scratch: Path(scratch).write_text(text, "utf-8", newline=""))


def write_json(
    path: PathLike, content: object, default: Callable[..., object] | None = None
) -> None:
    """Writes a JSON file; `default` converts objects that JSON does not support."""
    write_text(path, json.dumps(content, indent=2, default=default) + "\n")


def read_json(path: PathLike) -> Any:
    """The content of a JSON file; raises a ValueError if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error})") from None
    except (ValueError, RecursionError) as error:  # binary, too deep, or a number too long
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_csv(
    path: PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, object] | Sequence[object]]
) -> None:
    """Writes a CSV file with a header; each row maps columns to values or lists the values."""

    def write(scratch: str) -> None:
        with open(scratch, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in rows:
                values = [row.get(c, "") for c in columns] if isinstance(row, Mapping) else row
                writer.writerow(values)

    replace_file(path, write)


def append_csv(path: PathLike, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Appends rows to a CSV file, with a header if it is new.

    Removes an incomplete last line, left by a kill or a full disk.
    """
    _end_last_line(path)
    with open(path, "a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows if file.tell() else [columns, *rows])


def _end_last_line(path: PathLike) -> None:
    """Removes a last line that lacks fields; terminates one that lacks only the newline."""
    if not Path(path).exists():
        return
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read() in (b"", b"\n"):
            return
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        ends = (line.decode(errors="replace") for line in (lines[0], lines[-1]))
        header, last = (next(csv.reader([line]), []) for line in ends)
        if len(lines) > 1 and len(last) == len(header) > 0:
            file.write(b"\r\n")
        else:
            file.truncate(size - len(lines[-1]))


def read_csv(
    path: PathLike, numbers: bool = True, needs: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of a CSV file without an incomplete last line; [] if there is no file.

    With `numbers`, numbers are floats. Raises a ValueError if the file is not CSV, lacks a column
    in `needs`, or a line has more or fewer fields than the header.
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
    header, *rows = lines
    missing = [name for name in needs if name not in header]
    if missing:
        raise ValueError(f"{path}: the first line has no column {missing[0]!r}")
    if rows and len(rows[-1]) < len(header):
        rows.pop()
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} fields, and {len(header)} in the first line"
            )
    read: Callable[[str], float | str] = _number if numbers else str
    return [{name: read(value) for name, value in zip(header, row, strict=True)} for row in rows]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
