"""Compares a clipping threshold on 1, 2 and 4 replicas in stock Keras and in this library.

    python recipes/tools/replicas.py

One SGD step with learning rate 1 and a steep loss, under MirroredStrategy over logical CPU devices,
with the same global batch. A threshold of 0.1 should move no weight by more than 0.1.
"""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    from recipes.command_line import Parser, exit_status, import_tensorflow
    from recipes.plugin import files
    from recipes.tools import study
    from recipes.training.folder import file_named
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

REPLICAS = (1, 2, 4)
THRESHOLD = 0.1


def largest_changes(replicas: int) -> tuple[float, float]:
    """The largest weight change of one step: (Keras's clipvalue, AbsoluteClip)."""
    import_tensorflow()
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_gradclip as kgc

    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 8)).astype("float32"), rng.normal(size=(16, 1)).astype("float32")

    def change(optimizer: Callable[[], Any]) -> float:
        with strategy.scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(1)]
            )
            model.compile(optimizer(), "mse", loss_weights=1e3)
        before = model.get_weights()
        model.fit(x, y, batch_size=16, verbose=0)
        return max(np.abs(a - b).max() for a, b in zip(model.get_weights(), before, strict=True))

    stock = change(lambda: keras.optimizers.SGD(1.0, clipvalue=THRESHOLD))
    ours = change(
        lambda: kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(THRESHOLD))
    )
    return float(stock), float(ours)


def measure(path: Path) -> None:
    """Prints the table and writes it to `path`."""
    import pandas as pd

    # Separate processes, because TensorFlow's collective operations fix their group's size.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        rows = [(n, *pool.apply(largest_changes, (n,))) for n in REPLICAS]
    names = ("replicas", f"Keras clipvalue={THRESHOLD}", f"AbsoluteClip({THRESHOLD})")
    study.show(
        pd.DataFrame([(str(n), f"{a:.3f}", f"{b:.3f}") for n, a, b in rows], columns=names),
        f"Largest weight change of one step, threshold {THRESHOLD}, learning rate 1",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_csv(path, ("replicas", "keras_clipvalue", "absolute_clip"), rows)
    print(f"written to {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit status: 0; 2 for an invalid flag; 130 after Ctrl-C."""
    parser = Parser("python recipes/tools/replicas.py", __doc__)
    parser.add_argument(
        "--output", default="runs/replicas.csv", help="the table's file (default: %(default)s)"
    )
    return exit_status(lambda: measure(file_named(parser.parse_args(argv).output)))


if __name__ == "__main__":
    sys.exit(main())
