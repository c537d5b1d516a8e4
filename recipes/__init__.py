"""One short file per network over one shared training package."""

import importlib.util
import os
import sys
import time
from pathlib import Path

#: When this process began, but for Python itself: TensorFlow's import alone takes seconds.
STARTED = time.monotonic()
# Before TensorFlow is imported: its start-up notes bury the one line that matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

_NEEDED = ("keras", "tensorflow", "tensorflow_datasets", "matplotlib", "mlxtend", "PIL", "rich")


def _use_environment() -> None:
    """Starts a command of this checkout again in its `.venv` where this Python lacks packages.

    Every documented command so works as it is printed, whatever `python` is. Where there is no
    `.venv`, one line says how to get it.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    root = Path(__file__).resolve().parents[1]
    program = sys.argv[0] if sys.argv else ""
    is_command = program == "-m" or Path(program).resolve().parent.is_relative_to(root)
    if not missing or not is_command:
        return
    environment = root / ".venv"
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment.resolve():
        print(f"note: {sys.executable} lacks {missing[0]}: using {python}", file=sys.stderr)
        os.execv(python, [str(python), *sys.orig_argv[1:]])
    print(
        f"error: {sys.executable} lacks {missing[0]}: run `make venv` in {root} once, then the "
        "same command",
        file=sys.stderr,
    )
    sys.exit(2)


_use_environment()
