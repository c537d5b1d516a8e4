"""Errors that end a recipe in one clear line instead of a traceback."""

import contextlib
from collections.abc import Iterator


class RecipeError(Exception):
    """A mistake in the arguments or the environment; its message is all the user needs."""


class DataError(RecipeError):
    """A data set that is missing, misspelt, damaged or of the wrong kind."""


class RunFailed(RecipeError):
    """A valid request that failed."""


class WorkerLost(RunFailed):
    """A worker died, hangs, or never started."""


class TrainingDiverged(RunFailed):
    """The loss or the weights became NaN or infinite.

    Attributes:
        step: int, the zero-based step of the run at which it was detected.
        layer: str or None, the layer where the first non-finite gradient appeared.
    """

    def __init__(self, message: str, step: int, layer: str | None = None):
        super().__init__(message)
        self.step = step
        self.layer = layer


def first_line(error: BaseException) -> str:
    """The first line of an error's message that tells something, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0] == "in user code:":  # TensorFlow's; the error is below its stack
        return lines[-1]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns a library's ValueErrors and TypeErrors about the user's values into a RecipeError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RecipeError(first_line(error)) from error
