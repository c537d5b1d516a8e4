"""The number of the plugin's functions and files that an update passes from `fit` to the weight.

A reader of an update has to open them. They are counted in the first step of `fit`, which traces,
with model and optimizer built before or in it; comprehensions and generators do not count. The
numbers must not rise: `PYTHONPATH=. python tests/test_path.py [absolute|update_ratio|norm]` prints
them, and the functions in the order of their first call.
"""

import gc
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_gradclip as kgc

PACKAGE = str(Path(kgc.__file__).parent)
NESTED = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
if keras.backend.backend() != "tensorflow":
    pytest.skip("counted on TensorFlow, which has the most of them", allow_module_level=True)


def passed(fit):
    """The functions of the package that run while `fit()` does, as "file name"."""
    seen = {}

    def look(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name not in NESTED:
            seen[code] = f"{code.co_filename.removeprefix(PACKAGE + '/')} {code.co_qualname}"

    # The numbers are those of a new process, whatever tests ran before in this one.
    gc.collect()
    for name, module in [*sys.modules.items()]:
        if name.startswith(kgc.__name__):
            for function in vars(module).values():
                getattr(function, "cache_clear", bool)()
    sys.setprofile(look)
    try:
        fit()
    finally:
        sys.setprofile(None)
    return list(seen.values())


def model_of(cls):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(5, activation="tanh", name="hidden")(inputs)
    return cls(inputs, keras.layers.Dense(3, name="head")(hidden))


CLIPPERS = {
    "absolute": kgc.AbsoluteClip(0.1),
    "update_ratio": kgc.UpdateRatioClip(),
    "norm": kgc.NormClip(),  # in a ClippedModel
}
#: Functions and files with everything built; functions with the build inside.
MOST = {"absolute": (45, 11, 78), "update_ratio": (65, 13, 117), "norm": (80, 12, 121)}


def counted(name, is_built):
    if name == "norm":
        model = model_of(kgc.ClippedModel)
        model.compile("adam", "mse", clipper=CLIPPERS[name])
    else:
        model = model_of(keras.Model)
        model.compile(kgc.ClippedOptimizer("adam", CLIPPERS[name]), "mse")
    if is_built:
        model.optimizer.build(model.trainable_variables)
    x, y = np.ones((8, 6), "float32"), np.ones((8, 3), "float32")
    return passed(lambda: model.fit(x, y, batch_size=8, verbose=0))


@pytest.mark.parametrize("name", MOST)
def test_an_update_gets_no_longer(name):
    most, most_files, most_with_build = MOST[name]
    seen = counted(name, is_built=True)
    files = {function.split()[0] for function in seen}
    assert len(seen) <= most and len(files) <= most_files, "\n".join(seen)
    seen = counted(name, is_built=False)
    assert len(seen) <= most_with_build, "\n".join(seen)


if __name__ == "__main__":
    for name in sys.argv[1:] or MOST:
        for is_built in (True, False):
            seen = counted(name, is_built)
            files = {function.split()[0] for function in seen}
            print(name, "built" if is_built else "new", len(seen), "in", len(files))
            print("   ", "\n    ".join(seen) if sys.argv[1:] else "")
