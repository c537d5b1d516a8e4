"""Which threshold? A search space, a hypermodel and oracles for KerasTuner, the space for Optuna.

    pip install keras-gradclip[tuning]      # KerasTuner, the default
    pip install keras-gradclip[optuna]      # Optuna

Nothing of either is loaded before a name that needs it is used.
"""

import importlib
from typing import Any

_EXTRAS = {"keras_tuner": "tuning", "scipy": "tuning", "sklearn": "tuning", "optuna": "optuna"}
_MODULES = {
    "ClipHyperModel": "hypermodel",
    "as_objective": "hypermodel",
    "make_oracle": "oracles",
    "suggest": "optuna_space",
    "calibrated_ranges": "space",
    "clip_hyperparameters": "space",
    "from_clipper": "space",
    "layer_groups": "space",
    "to_clipper": "space",
    "to_gate": "space",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise ImportError(
            f"keras_gradclip.tuning.{name} needs {error.name}: "
            f"pip install 'keras-gradclip[{extra}]'."
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
