"""A check of the installation: versions, devices, a trial update, Keras's private names."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from collections.abc import Iterable

import keras
import numpy as np

from keras_gradclip import __version__, _compat, _host
from keras_gradclip.clippers import AbsoluteClip
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

#: Packages that bring a part of the plugin to life, and which.
EXTRAS = {
    "jinja2": "report",
    "matplotlib": "report",
    "tensorboard": "ClipMonitor(tensorboard=True)",
    "keras-tuner": "keras_gradclip.tuning",
}
#: Variables of the environment that change what a run does.
ENVIRONMENT = ("KERAS_BACKEND", "KERAS_HOME", "TF_CONFIG", "TF_XLA_FLAGS", "XLA_FLAGS")


def diagnose() -> str:
    """A text about the installation, for a reader and for a bug report."""
    variables = [f"{n}={os.environ[n]}" for n in ENVIRONMENT if os.environ.get(n)]
    sections = {
        "Versions": _versions(),
        "Devices": keras.distribution.list_devices() or ["none found"],
        "Settings": [f"dtype policy {keras.config.dtype_policy().name}", *variables],
        "A trial update": trial_update(),
        "Where it reaches into Keras, and why": _private_names(),
    }
    return "\n".join(
        line
        for title, lines in sections.items()
        for line in (title, *(f"  {text}" for text in lines), "")
    ).rstrip()


def _versions() -> Iterable[str]:
    yield f"keras_gradclip {__version__}, backend {keras.backend.backend()}"
    for name, version in _host.host_versions().items():
        oldest, newest = (".".join(map(str, v)) for v in _host.TESTED[name])
        yield f"{name} {version} (tested: {oldest} to {newest})"
    yield f"NumPy {np.__version__}"
    for package, part in EXTRAS.items():
        yield f"{package} {_version(package)} (for {part})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def trial_update() -> list[str]:
    """Train one step with a clip at 0.1, and compare the weight with what it must be."""
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


def _private_names() -> Iterable[str]:
    """What `_compat` holds, by the first line of each docstring."""
    for name, part in vars(_compat).items():
        if getattr(part, "__module__", None) == _compat.__name__ and not name.startswith("_"):
            yield f"{name}: {(inspect.getdoc(part) or '').partition(chr(10))[0]}"
