"""A recipe that trains in a second: one dense layer on random images.

`STARTS` in the environment names a file that gets a line for each run. `HANG` names a file with a
number: the first run to start after so many writes its process id into `HANG.taken` and never
ends, until it is killed.
"""

import os
import sys
import time
from pathlib import Path

from recipes.training import Recipe, main


def build(num_outputs, image_size, model_class, options):
    """Three dense layers."""
    import keras

    inputs = keras.Input((image_size, image_size, 3))
    x = keras.layers.Flatten()(inputs)
    x = keras.layers.Dense(8, "relu", name="first")(x)
    x = keras.layers.Dense(8, "relu", name="second")(x)
    outputs = keras.layers.Dense(num_outputs, "softmax", name="predictions")(x)
    return model_class(inputs, outputs)


def load_data(options):
    """64 random images of two classes that differ in brightness."""
    import numpy as np
    import tensorflow as tf

    from recipes.data.sets import Data, Split

    if "HANG" in os.environ:
        _hang(Path(os.environ["HANG"]))
    if "STARTS" in os.environ:
        with open(os.environ["STARTS"], "a", encoding="utf-8") as file:
            file.write(f"{options.clipper} {options.learning_rate} {options.seed}\n")
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    side = options.image_size
    images = rng.random((64, side, side, 3), "float32") + 0.5 * labels[:, None, None, None]
    elements = {"image": images.astype("float32"), "label": labels}
    split = Split(tf.data.Dataset.from_tensor_slices(elements), 64)

    def pair(element, seed=None):
        return element["image"], element["label"]

    return Data(split, split, split, pair, pair, 2, "brightness")


def _hang(flag):
    starts = Path(os.environ["STARTS"])
    done = len(starts.read_text(encoding="utf-8").splitlines()) if starts.exists() else 0
    if done < int(flag.read_text()):
        return
    try:
        with open(f"{flag}.taken", "x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    time.sleep(600)


RECIPE = Recipe(
    name="brightness",
    build=build,
    load_data=load_data,
    settings={
        "image_size": 8,
        "epochs": 1,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "threshold": 0.1,
        "tensorboard": False,
    },
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
