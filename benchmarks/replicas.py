"""Compares a clipping threshold on 1, 2 and 4 replicas in stock Keras and in this library.

    make replicas, or python benchmarks/replicas.py

One SGD step with learning rate 1 and a steep loss, under MirroredStrategy over logical CPU devices,
with the same global batch. A threshold of 0.1 should move no weight by more than 0.1.
"""

import argparse
from typing import Any

from recipes.command_line import import_tensorflow
from recipes.words import show_table

REPLICAS = (1, 2, 4)
THRESHOLD = 0.1


def main() -> None:
    """Prints the largest weight change of one step, by optimizer and number of replicas."""
    import_tensorflow()
    import keras
    import numpy as np
    import pandas as pd
    import tensorflow as tf

    import keras_gradclip as kgc

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * max(REPLICAS),
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 8)).astype("float32"), rng.normal(size=(16, 1)).astype("float32")

    def largest_change(replicas: int, make_optimizer: Any) -> str:
        devices = [f"CPU:{i}" for i in range(replicas)]
        # The default reduction fixes the number of devices for the rest of the process.
        reduction = tf.distribute.ReductionToOneDevice()
        with tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction).scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(1)]
            )
            model.compile(make_optimizer(), "mse", loss_weights=1e3)
        before = model.get_weights()
        model.fit(x, y, batch_size=16, verbose=0)
        after = model.get_weights()
        return f"{max(np.abs(a - b).max() for a, b in zip(after, before, strict=True)):.3f}"

    optimizers = {
        f"Keras clipvalue={THRESHOLD}": lambda: keras.optimizers.SGD(1.0, clipvalue=THRESHOLD),
        f"AbsoluteClip({THRESHOLD})": lambda: kgc.ClippedOptimizer(
            keras.optimizers.SGD(1.0), kgc.AbsoluteClip(THRESHOLD)
        ),
    }
    table = pd.DataFrame({"replicas": map(str, REPLICAS)})
    for name, make_optimizer in optimizers.items():
        table[name] = [largest_change(count, make_optimizer) for count in REPLICAS]
    title = f"Largest weight change of one step, threshold {THRESHOLD}, learning rate 1"
    show_table(table, title)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
