"""Search for thresholds: space, hypermodel and oracles for KerasTuner; the space for Optuna.

    pip install '.[tuning]'      # in the checkout: KerasTuner, the default
    pip install '.[optuna]'      # Optuna

Neither is imported before a name that needs it is used.
"""

import importlib

_MODULES = {
    "ClipHyperModel": "hypermodel",
    "as_objective": "hypermodel",
    "make_oracle": "oracles",
    "suggest": "optuna_space",
    "calibrated_ranges": "space",
    "clip_hyperparameters": "space",
    "layer_groups": "space",
    "to_clipper": "space",
    "to_gate": "space",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0].replace("_", "-")
        raise ImportError(
            f"keras_gradclip.tuning.{name} needs {package}: pip install {package}."
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
