"""Shared parts of all commands: the parser, exit status and one-line errors."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from recipes.errors import RecipeError, RunFailed, first_line
from recipes.plugin import command_line

SET_UP = "run `make venv` and .venv/bin/python, or pip install -e '.[recipes,tuning]'"
_LONGEST_LINE = 1_000


class Parser(command_line.Parser):
    """A parser that raises `RecipeError` on mistakes."""

    mistake = RecipeError


def import_tensorflow() -> None:
    """Imports TensorFlow and Keras without their notes; these are shown if the import fails.

    TF_CPP_MIN_LOG_LEVEL does not affect the notes of the C++ libraries.
    """
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            import keras  # noqa: F401
            import tensorflow

            tensorflow.get_logger().setLevel("ERROR")  # no hints where several models are trained
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            if failed:
                held.seek(0)
                os.write(2, held.read())


def exit_status(
    work: Callable[[], int | None],
    argv: Sequence[str] = (),
    *,
    interrupted: str = "",
) -> int:
    """Runs a command; every expected failure ends with one line `error: ...`.

    Args:
        work: the command; its result is the status, None is 0. The notes of an error that it raises
            are added to the line.
        argv: its arguments; with `--traceback` a traceback precedes the line.
        interrupted: text to add to the line after Ctrl-C.

    Returns:
        The exit status: 0; 1 for a run that failed; 2 for a mistake in flags, config or data;
        130 after Ctrl-C.
    """
    command_line.escape_output()
    try:
        return work() or 0
    except (Exception, KeyboardInterrupt) as error:
        ending = _ending(error)
        if ending is None:
            raise
        message, status = ending
        more = interrupted if isinstance(error, KeyboardInterrupt) else ""
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"error: {_one_line(message + more + notes)}", file=sys.stderr)
        return status


def _ending(error: BaseException) -> tuple[str, int] | None:
    """The message on an expected failure, and the exit status; None for any other."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, RecipeError):
        return str(error), 1 if isinstance(error, RunFailed) else 2
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is missing: {SET_UP}", 2
    if isinstance(error, OSError):
        name = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{name}", 1
    tensorflow_errors = getattr(sys.modules.get("tensorflow"), "errors", None)
    if tensorflow_errors and isinstance(error, tensorflow_errors.OpError):
        return _tensorflow_line(error), 1
    return None


def _one_line(message: str) -> str:
    """A message without line breaks and NULs; the middle of a long one is cut."""
    line = " ".join(message.split("\n")).replace("\0", "\\0").strip()
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def _tensorflow_line(error: BaseException) -> str:
    """The line with the cause in TensorFlow's report about a graph."""
    noise = ("Graph execution error", "Detected at node", "File ", "[[", "<stack traces", "(")
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(noise)]
    return telling[-1] if telling else first_line(error)
