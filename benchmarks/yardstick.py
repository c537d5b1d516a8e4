"""The yardstick of a study: the best of a search's trials, at the study's own learning rate."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import keras_gradclip as kgc
from keras_gradclip.files import read_json, write_json

TRIALS = 20
#: Thresholds on the gradient alone, so that the update ratio is measured by what it is not.
CLIPPERS = ("none", "absolute", "exponential", "norm")


def searched(
    file: Path,
    key: str,
    make_model: Callable[[], Any],
    images: tuple[np.ndarray, np.ndarray],
    epochs: int,
    batch_size: int,
) -> Any:
    """The clipper of the best of `TRIALS` trials, one run each; None where not clipping was best.

    The trials are scored by the accuracy on the last tenth of the training images, on which they
    are not trained; the first trial has no clipper.

    Args:
        file: JSON in which what was found is kept, and from which it is taken the next time.
        key: what tells this search from the others in `file`.
        make_model: makes a compiled model without a clipper, with an accuracy.
        images: training images and labels.
        epochs: of a trial.
        batch_size: of a trial.
    """
    known = read_json(file) if file.exists() else {}
    if key not in known:
        known[key] = _search(make_model, images, epochs, batch_size)
        write_json(file, known)
    return None if known[key]["clipper"] is None else kgc.get(known[key]["clipper"])


def _search(make_model, images, epochs: int, batch_size: int) -> dict[str, Any]:
    import keras_tuner as kt

    from keras_gradclip.tuning.hypermodel import ClipHyperModel
    from keras_gradclip.tuning.oracles import make_oracle
    from keras_gradclip.tuning.space import clip_hyperparameters, to_clipper

    x, y = images
    held_out = len(x) // 10
    space = kt.HyperParameters()
    clip_hyperparameters(space, CLIPPERS)
    objective = kt.Objective("val_accuracy", "max")
    oracle = make_oracle("random", objective, TRIALS, seed=1, hyperparameters=space)
    hypermodel = ClipHyperModel(lambda hp: make_model(), objective)
    # A tuner keeps the weights of every epoch, and talks.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        tuner = kt.Tuner(oracle, hypermodel, directory=folder, project_name="trials")
        tuner.search(
            x[:-held_out],
            y[:-held_out],
            validation_data=(x[-held_out:], y[-held_out:]),
            epochs=epochs,
            batch_size=batch_size,
            verbose=0,
        )
        [best] = oracle.get_best_trials(1)
    clipper = to_clipper(best.hyperparameters.values)
    return {
        "clipper": None if clipper is None else kgc.serialize(clipper),
        "val_accuracy": best.score if math.isfinite(best.score) else None,
    }
