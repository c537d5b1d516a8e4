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
    """Imports TensorFlow and Keras without the messages of their C++ libraries.

    TF_CPP_MIN_LOG_LEVEL does not affect these messages. They are shown if the import fails.
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
            import tensorflow  # noqa: F401

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
    interrupted: str | Callable[[], str] = "",
    hint: Callable[[], str] = lambda: "",
) -> int:
    """Runs a command; every expected failure ends with one line `error: ...`.

    Args:
        work: the command; its result is the status, None is 0.
        argv: its arguments; with `--traceback` a traceback precedes the line.
        interrupted: text to add to the line after Ctrl-C, or a function that returns it.
        hint: text to add to errors that do not come from the flags.

    Returns:
        The exit status: 0; 1 for a run that failed; 2 for a mistake in flags, config or data;
        130 after Ctrl-C.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        more = interrupted() if callable(interrupted) else interrupted
        message, status = f"interrupted{more}", 130
    except RecipeError as error:
        message = str(error)
        status = 1 if isinstance(error, RunFailed) else 2
    except ModuleNotFoundError as error:
        message, status = f"{error.name} is missing: {SET_UP}", 2
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        message, status = f"{error.strerror or error}{name}{hint()}", 1
    except Exception as error:
        if not _is_tensorflow_error(error):
            raise
        message, status = f"{_tensorflow_line(error)}{hint()}", 1
    if "--traceback" in argv:
        traceback.print_exc()
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return status


def _one_line(message: str) -> str:
    """A message without line breaks and NULs; the middle of a long one is cut."""
    line = " ".join(message.split("\n")).replace("\0", "\\0").strip()
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def _is_tensorflow_error(error: Exception) -> bool:
    if "tensorflow" not in sys.modules:
        return False
    import tensorflow as tf

    return isinstance(error, tf.errors.OpError)


def _tensorflow_line(error: Exception) -> str:
    """The line with the cause in TensorFlow's report about a graph."""
    noise = ("Graph execution error", "Detected at node", "File ", "[[", "<stack traces", "(")
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(noise)]
    return telling[-1] if telling else first_line(error)
