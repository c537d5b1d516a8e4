"""A check of the installation: versions, devices, settings and a trial update."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import keras
import numpy as np

from keras_gradclip import __version__
from keras_gradclip.clippers import AbsoluteClip
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

BACKENDS = ("tensorflow", "jax", "torch", "numpy")
OPTIONAL = ("jinja2", "matplotlib", "tensorboard", "keras-tuner")  # report, monitor, search
#: Environment variables that change what a run does.
ENVIRONMENT = ("KERAS_BACKEND", "KERAS_HOME", "TF_CONFIG", "TF_XLA_FLAGS", "XLA_FLAGS")


def diagnose() -> str:
    """A text about the installation, for bug reports."""
    return "\n".join(
        [
            f"keras_gradclip {__version__}, Python {platform.python_version()}, "
            f"Keras {keras.__version__}, backend {keras.backend.backend()}",
            *(f"{package} {_version(package)}" for package in BACKENDS + OPTIONAL),
            f"devices: {', '.join(keras.distribution.list_devices()) or 'none found'}",
            f"dtype policy {keras.config.dtype_policy().name}",
            *(f"{name}={os.environ[name]}" for name in ENVIRONMENT if os.environ.get(name)),
            *trial_update(),
        ]
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def trial_update() -> list[str]:
    """Trains one step with a clip at 0.1 and checks the resulting weight."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(ClippedOptimizer(keras.optimizers.SGD(1.0), AbsoluteClip(0.1)), "mse")
    model.set_weights([np.array([[2.0]])])
    model.fit(np.ones((4, 1)), np.zeros((4, 1)), batch_size=4, epochs=1, verbose=0)
    weight = float(model.get_weights()[0][0, 0])
    verdict = "ok" if abs(weight - 1.9) < 1e-3 else "WRONG"
    step = "by XLA" if model.jit_compile else "without XLA"
    return [
        f"{verdict}: a gradient of 4, clipped to 0.1, moved a weight from 2 to {weight:.4g}",
        f"train step compiled {step}; inner update compiled: {model.optimizer.compiled}",
    ]
