"""How many functions of ours a gradient passes from `fit` to the weight, and in how many files.

What the next reader of an update has to open. Counted in the first step of `fit`, which builds and
traces; a few more where other layers live in the process. The numbers only ever go down: they are
far above the aim, 45 functions in 12 files for a plain clip, and 80 in 16 for a `ClippedModel`.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_gradclip as kgc

PACKAGE = str(Path(kgc.__file__).parent)
if keras.backend.backend() != "tensorflow":
    pytest.skip("counted on TensorFlow, which has the most of them", allow_module_level=True)


def passed(fit):
    """The code objects of the package that run while `fit()` does."""
    seen = set()

    def look(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.add(frame.f_code)

    sys.setprofile(look)
    try:
        fit()
    finally:
        sys.setprofile(None)
    return seen


def model_of(cls):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(5, activation="tanh", name="hidden")(inputs)
    return cls(inputs, keras.layers.Dense(3, name="head")(hidden))


PLAIN = {"absolute": kgc.AbsoluteClip(0.1), "update_ratio": kgc.UpdateRatioClip()}
MOST = {"absolute": (190, 20), "update_ratio": (252, 20), "norm": (262, 23)}


@pytest.mark.parametrize("name", MOST)
def test_an_update_gets_no_longer(name):
    if name == "norm":
        model = model_of(kgc.ClippedModel)
        model.compile("adam", "mse", clipper=kgc.NormClip())
    else:
        model = model_of(keras.Model)
        model.compile(kgc.ClippedOptimizer("adam", PLAIN[name]), "mse")
    x, y = np.ones((8, 6), "float32"), np.ones((8, 3), "float32")
    seen = passed(lambda: model.fit(x, y, batch_size=8, verbose=0))
    files = sorted({code.co_filename.removeprefix(PACKAGE) for code in seen})
    functions, most_files = MOST[name]
    names = "\n".join(
        sorted(f"{c.co_filename.removeprefix(PACKAGE)} {c.co_qualname}" for c in seen)
    )
    assert len(seen) <= functions and len(files) <= most_files, (
        f"{len(seen)} in {len(files)}:\n{names}"
    )
