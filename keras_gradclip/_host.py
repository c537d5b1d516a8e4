"""The versions that this package was tested with: docs/tested.md says with what result."""

from __future__ import annotations

import platform
import re
import sys
import warnings

import keras

# The oldest and the newest minor versions that `make test-matrix` has passed on.
TESTED = {
    "Python": ((3, 11), (3, 13)),
    "Keras": ((3, 12), (3, 16)),
    "TensorFlow": ((2, 19), (2, 22)),
}


def host_versions() -> dict[str, str]:
    """Name and version of Python, Keras and, where it is the backend, TensorFlow."""
    versions = {"Python": platform.python_version(), "Keras": keras.__version__}
    if keras.backend.backend() == "tensorflow":
        versions["TensorFlow"] = sys.modules["tensorflow"].__version__
    return versions


def warn_if_untested(versions: dict[str, str]) -> None:
    """Warn, once for all of them, of `versions` outside `TESTED`."""
    outside = []
    for name, version in versions.items():
        oldest, newest = TESTED[name]
        numbers = re.findall(r"\d+", version)
        if len(numbers) < 2 or not oldest <= (int(numbers[0]), int(numbers[1])) <= newest:
            outside.append(
                f"{name} {version} (tested: {'.'.join(map(str, oldest))} to "
                f"{'.'.join(map(str, newest))})"
            )
    if outside:
        warnings.warn(
            f"keras_gradclip was not tested with {', '.join(outside)}; it goes on. If something "
            "fails, install a tested version.",
            UserWarning,
            stacklevel=3,
        )
