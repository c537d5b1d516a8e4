"""The folder of a run or a search: its name, its lock, its options and its tables."""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recipes.errors import RecipeError, RunFailed
from recipes.plugin import files
from recipes.training import multiworker
from recipes.training import options as opts
from recipes.training.options import Options
from recipes.training.recipe import Recipe

RUNS = Path("runs")
CONFIG = "config.json"
BACKUP = "backup.npz"
HISTORY = "history.csv"
LAYERS = "layers.csv"
BEST = "best.keras"
CLASSES = "best.classes.json"
RESULT = "result.json"
MONITOR = "monitor"
LOCK = ".lock"
# Options that may change when a run is resumed: they do not affect the steps.
_FREE_ON_RESUME = {
    "epochs",
    "backup_every",
    "keep_backup",
    "tensorboard",
    "monitor",
    "worker_timeout",
}


def folder_named(name: str, flag: str = "--output") -> Path:
    """The folder named by a flag, which may not exist yet.

    Raises:
        RecipeError: the name is invalid, or belongs to a file.
    """
    if "\0" in name:
        raise RecipeError(f"{flag} {name!r}: a NUL character cannot be in a name")
    if not name:
        raise RecipeError(f"{flag} {name!r}: an empty name; leave out {flag} to have one chosen")
    path = Path(name)
    try:
        there = next((p for p in (path, *path.parents) if p.exists()), Path())
    except OSError as error:  # such as a name that is too long
        raise RecipeError(f"{flag} {name}: {error.strerror}; choose another") from None
    if not there.is_dir():
        raise RecipeError(f"{flag} {name}: {there} is a file, and not an empty folder")
    if not os.access(there, os.W_OK):
        raise RecipeError(f"{flag} {name}: {there} cannot be written; choose another")
    return path


def open_run(recipe: Recipe, parsed: opts.Parsed) -> tuple[Options, Path]:
    """The options and the folder of a new or resumed run.

    By default a new run creates the next free folder (`runs/resnet50`, `runs/resnet50-2`, ...), so
    that nothing is overwritten or shared with a run that starts at the same time. A folder given by
    `--output` must be empty or missing. `--resume` uses the newest default folder, or `--output`.
    """
    options, output = parsed.options, parsed.options.output
    folder = RUNS / recipe.name if output is None else folder_named(output)
    if options.resume:
        return _reopen(recipe, parsed)
    if options.strategy == "multiworker" and not multiworker.read_cluster().is_chief:
        # Only the chief checks that the folder is free; it may exist by now.
        return options, folder
    if output:
        if folder.exists() and not _is_empty(folder):
            raise RecipeError(
                f"--output {folder} is not an empty folder: name another, or resume its run with "
                "--resume"
            )
        return options, folder
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return options, folder
        except FileExistsError:
            number += 1
            folder = RUNS / f"{recipe.name}-{number}"


def _reopen(recipe: Recipe, parsed: opts.Parsed) -> tuple[Options, Path]:
    folder = Path(parsed.options.output) if parsed.options.output else _newest(recipe)
    path = folder / CONFIG
    if not path.exists():
        raise RecipeError(f"--resume: no run in {folder} (it has no {CONFIG})")
    saved = opts.read_config(path, recipe)
    options = opts.resolve(recipe, saved, {**parsed.config, **parsed.given})
    before, now = (opts.with_defaults(recipe, values) for values in (saved, options.saved))
    if changed := differences(before, now, _FREE_ON_RESUME):
        raise RecipeError(
            f"--resume: the run in {folder} was started with other values of {changed}; leave them "
            "out, or start a new run"
        )
    return options, folder


def _newest(recipe: Recipe) -> Path:
    """The default folder with the highest number: `runs/resnet50` is the first."""

    def number(folder: Path) -> int:
        tail = folder.name.removeprefix(recipe.name).removeprefix("-")
        return int(tail or 1) if not tail or tail.isdigit() else 0

    folders = [f for f in RUNS.glob(f"{recipe.name}*") if number(f) and (f / CONFIG).exists()]
    if not folders:
        raise RecipeError(f"--resume: no run of {recipe.name} in {RUNS}/; name it with --output")
    return max(folders, key=number)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> str:
    """The options that differ from those of an earlier run, except those `free` to change.

    Such as `"learning_rate (0.1, now 0.2), seed (0, now 1)"`; "" if nothing differs. A name that
    only one of the two has comes from a different version, and is no difference.
    """
    names = sorted(name for name in now.keys() & before.keys() if name not in free)
    changed = [name for name in names if before[name] != now[name]]
    return ", ".join(f"{name} ({before[name]!r}, now {now[name]!r})" for name in changed)


@contextlib.contextmanager
def locked(folder: Path, kind: str = "run") -> Iterator[None]:
    """Creates and locks the folder of a run or search until the context, or the process, ends.

    Raises:
        RecipeError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RecipeError(
            f"{folder} is in use by another {kind}: wait for it, or name another --output"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
            raise
    try:
        for scratch in folder.glob(".partial-*"):  # left by a killed process
            scratch.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Locks a run's folder, and removes it after an error before the first backup.

    Raises:
        RecipeError: another process holds the lock, or the folder holds a run and `resume` is
            False.
    """
    with locked(folder):
        if not resume and (folder / CONFIG).exists():
            raise RecipeError(
                f"{folder} holds a run already: name another folder, or resume it with --resume"
            )
        try:
            yield
        except BaseException as error:
            keeps = resume or isinstance(error, RunFailed)
            if not keeps and _is_empty(folder, CONFIG, CLASSES):
                shutil.rmtree(folder)
                if folder.parent == RUNS:
                    with contextlib.suppress(OSError):  # not empty
                        RUNS.rmdir()
            raise


def _is_empty(folder: Path, *besides: str) -> bool:
    """True if a folder is empty but for the files `besides` and leftovers of a kill."""
    names = {entry.name for entry in folder.iterdir()} - {LOCK, *besides}
    return all(name.startswith(".partial-") for name in names)


def read_history(
    path: str | os.PathLike[str], needed: Sequence[str] = (), last: float = math.inf
) -> list[dict[str, Any]]:
    """The rows of a run's `history.csv` or `layers.csv`, without empty cells.

    Epochs are counted from 1; version 0.1 counted from 0.

    Args:
        path: the file; without one there are no rows.
        needed: columns that must hold numbers, besides "epoch".
        last: the last epoch to return; a resumed run repeats the later ones.

    Raises:
        RecipeError: the file is damaged; names it and the line.
    """
    try:
        rows = files.read_csv(path)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    rows = [{name: value for name, value in row.items() if value != ""} for row in rows]
    for line, row in enumerate(rows, 2):
        for name in ("epoch", *needed):
            if not isinstance(row.get(name), float):
                raise RecipeError(
                    f"{path}, line {line}: no number in the column {name!r}: restore the file, or "
                    "start a new run"
                )
    if rows and rows[0]["epoch"] == 0:
        rows = [{**row, "epoch": row["epoch"] + 1} for row in rows]
    return [row for row in rows if row["epoch"] <= last]


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `history.csv` or `layers.csv` atomically, with counts as integers."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    counts = {"epoch", "skipped"}
    lines = [
        {k: int(v) if k in counts and isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    files.write_csv(path, columns, lines)


def read_seconds(path: Path) -> float:
    """The duration of the run of a `result.json`.

    Raises:
        RecipeError: the file is damaged.
    """
    content = opts.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("seconds"), (int, float)):
        raise RecipeError(f"{path}: has no number 'seconds'; delete the file and --resume")
    return float(content["seconds"])
