"""Keras on JAX: what a clip costs a step, and what it saves.

    python benchmarks/gpu.py                     # on a GPU, with JAX for it
    make bench-jax                                     # the same at toy size, on a CPU

First, a small network in float32, whose step shows what comes on top of the arithmetic: our clip
beside Keras's `clipvalue` and `optax.clip` in the same loop.
Second, step times of ResNet-50 in mixed precision: no clip, each clipper, and the monitor, in turn;
ratios within each round, and beside them the floor: the bytes that the clip must move over the
measured bandwidth of a copy.
Third, a short training at a learning rate that is too high, with and without a clip: CIFAR-10 from
`--data FILE.npz` (x_train, y_train, x_test, y_test), or made-up images of ten classes.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import keras
import numpy as np

import keras_gradclip as kgc

try:
    import optax
except ImportError:  # a GPU machine may not have it
    optax = None

CLIPPERS = {
    "no clip": lambda: None,
    "AbsoluteClip": lambda: kgc.AbsoluteClip(0.1),
    "ExponentialClip": lambda: kgc.ExponentialClip(0.7, gamma=0.1),
    "NormClip layer": lambda: kgc.NormClip(1.0),
    "NormClip global": lambda: kgc.NormClip(1.0, scope="global"),
    "AdaptiveClip": lambda: kgc.AdaptiveClip(0.01),
    "AdaClip": lambda: kgc.AdaClip(),
}
#: Bytes a parameter that the clip alone must read and write in float32, if nothing is fused.
BYTES = {"AbsoluteClip": 8, "ExponentialClip": 12, "NormClip layer": 12, "NormClip global": 12}


def network(image: int) -> keras.Model:
    """ResNet-50 for ten classes."""
    return keras.applications.ResNet50(weights=None, classes=10, input_shape=(image, image, 3))


def compiled(image: int, clipper, learning_rate: float, mixed: bool, schedule_steps: int = 0):
    """A compiled model; "no clip" is a plain Keras model with a plain optimizer."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")
    body = network(image)
    rate = learning_rate
    if schedule_steps:
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, schedule_steps)
    sgd = keras.optimizers.SGD(rate, momentum=0.9)
    model = keras.Model(body.inputs, body.outputs)
    arguments = {"clipper": clipper} if clipper is not None else {}
    if clipper is not None:
        model = kgc.ClippedModel(body.inputs, body.outputs)
    model.compile(sgd, "sparse_categorical_crossentropy", metrics=["accuracy"], **arguments)
    return model


def copy_bandwidth() -> float:
    """Bytes a second of a copy of 256 MiB, read and write counted."""
    x = jnp.ones((64 << 20,), "float32")
    copy = jax.jit(lambda x: x + 1.0)
    copy(x).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(seconds)


def small_network(optimizer, model_class=keras.Model, **arguments):
    """Three convolutions on 32×32 pixels."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
    x = inputs = keras.Input((32, 32, 3))
    for filters in (32, 64, 128):
        x = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = keras.layers.MaxPooling2D()(x)
    outputs = keras.layers.Dense(10, "softmax")(keras.layers.Flatten()(x))
    model = model_class(inputs, outputs)
    model.compile(optimizer, "sparse_categorical_crossentropy", **arguments)
    return model


def sgd(base=keras.optimizers.SGD, **arguments):
    """The optimizer of all small networks."""
    return base(1e-3, momentum=0.9, **arguments)


class OptaxClippedSGD(keras.optimizers.SGD):
    """`optax.clip` in front of Keras's update."""

    def apply(self, grads, trainable_variables=None):
        """Clip, then update."""
        grads, _ = optax.clip(THRESHOLD).update(list(grads), optax.EmptyState())
        super().apply(grads, trainable_variables)


THRESHOLD = 0.1
SMALL = {
    "Keras clipvalue": lambda: small_network(sgd(clipvalue=THRESHOLD)),
    "no clip": lambda: small_network(sgd()),
    "optax.clip": lambda: small_network(sgd(OptaxClippedSGD)),
    "AbsoluteClip": lambda: small_network(kgc.ClippedOptimizer(sgd(), kgc.AbsoluteClip(THRESHOLD))),
    "AbsoluteClip, with its figures": lambda: small_network(
        sgd(), kgc.ClippedModel, clipper=kgc.AbsoluteClip(THRESHOLD)
    ),
}


def small_steps(options) -> list[dict]:
    """Rows of step times of the small network, over two others: medians of ratios in a round."""
    runs = {name: make() for name, make in SMALL.items() if optax or "optax" not in name}
    rng = np.random.default_rng(0)
    count = options.small_batch * options.small_steps
    x = rng.normal(size=(count, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, count)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for k in range(options.small_rounds + 1):
        turn = k % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            runs[name].fit(x, y, batch_size=options.small_batch, shuffle=False, verbose=0)
            if k:  # the first round compiles
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name in names:
        row = {"contestant": name}
        for base in ("Keras clipvalue", "optax.clip"):
            if base not in seconds:
                continue
            ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
            low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            row[f"over {base}"] = f"{median:.3f} ({low:.3f} to {high:.3f})"
        rows.append(row)
    return rows


class EpochSeconds(keras.callbacks.Callback):
    """How long each epoch took."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)


def step_times(options) -> list[dict]:
    """Rows of step times: ratios to no clip, medians over the rounds."""
    rng = np.random.default_rng(0)
    count = options.batch * options.steps
    x = rng.normal(size=(count, options.image, options.image, 3)).astype("float32")
    y = rng.integers(0, 10, count)
    runs = {}
    for name, make in CLIPPERS.items():
        runs[name] = compiled(options.image, make(), 1e-3, mixed=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(options.rounds + 1):
        for name, model in runs.items():
            start = time.perf_counter()
            model.fit(x, y, batch_size=options.batch, verbose=0)
            if k:  # the first round compiles
                seconds[name].append((time.perf_counter() - start) / options.steps)
        print(f"round {k} of {options.rounds}", flush=True)
    # A fit with another callback compiles anew, so each of these is one long fit.
    watched = runs["NormClip layer"]
    pair = {"long fit, NormClip layer": [], "long fit, with ClipMonitor": []}
    with tempfile.TemporaryDirectory() as folder:
        pair["long fit, with ClipMonitor"] = [kgc.ClipMonitor(folder)]
        for name, callbacks in pair.items():
            timer = EpochSeconds()
            watched.fit(
                x, y, batch_size=options.batch, epochs=options.rounds + 1, verbose=0,
                callbacks=[timer, *callbacks],
            )  # fmt: skip
            seconds[name] = [s / options.steps for s in timer.seconds[1:]]
    bandwidth = copy_bandwidth()
    parameters = sum(int(np.prod(v.shape)) for v in watched.trainable_variables)
    base = statistics.median(seconds["no clip"])
    rows = []
    for name, taken in seconds.items():
        against = "long fit, NormClip layer" if name.startswith("long fit") else "no clip"
        ratio = [a / b for a, b in zip(taken, seconds[against], strict=True)]
        floor = BYTES.get(name, 0) * parameters / bandwidth / base
        rows.append({
            "contestant": name,
            "against": against,
            "step, ratio": f"{statistics.median(ratio):.4f}",
            "spread": f"{min(ratio):.4f} to {max(ratio):.4f}",
            "floor if nothing is fused": f"{1 + floor:.4f}" if floor else "",
        })  # fmt: skip
    return rows


def data(options):
    """CIFAR-10 from a file, or images made of ten templates, shifts and noise."""
    if options.data:
        with np.load(options.data) as file:
            return [
                (file[f"x_{part}"].astype("float32") / 127.5 - 1.0, file[f"y_{part}"].reshape(-1))
                for part in ("train", "test")
            ]
    rng = np.random.default_rng(0)
    templates = rng.normal(size=(10, 32, 32, 3))

    def made(n):
        y = rng.integers(0, 10, n)
        x = 0.3 * templates[y] + rng.normal(size=(n, 32, 32, 3))
        shift = rng.integers(-2, 3, (n, 2))
        return np.stack(
            [np.roll(i, s, (0, 1)) for i, s in zip(x, shift, strict=True)]
        ).astype("float32"), y  # fmt: skip

    return made(options.examples), made(options.examples // 5)


def trainings(options) -> list[dict]:
    """Accuracy after a short training, by learning rate, with and without a clip."""
    (x, y), test = data(options)
    steps = options.epochs * -(-len(x) // options.batch)
    rows = []
    for rate in options.rates:
        for name in ("no clip", "NormClip global", "AbsoluteClip"):
            model = compiled(32, CLIPPERS[name](), rate, mixed=True, schedule_steps=steps)
            history = model.fit(
                x, y, batch_size=options.batch, epochs=options.epochs, verbose=0,
                callbacks=[keras.callbacks.TerminateOnNaN()],
            ).history  # fmt: skip
            loss, accuracy = model.evaluate(*test, batch_size=options.batch, verbose=0)
            rows.append({
                "learning rate": rate, "contestant": name, "test accuracy": f"{accuracy:.3f}",
                "test loss": f"{loss:.3g}", "largest training loss": f"{max(history['loss']):.3g}",
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def show(title: str, rows: list[dict], path: Path) -> None:
    """A plain table and a CSV; the environment on a GPU machine may have neither rich nor more."""
    columns = list(rows[0])
    widths = [max(len(str(r[c])) for r in [dict(zip(columns, columns, strict=True)), *rows])
              for c in columns]  # fmt: skip
    print(f"\n{title}")
    for r in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(r[c]).ljust(w) for c, w in zip(columns, widths, strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


PARTS = {
    "small": ("train step of a small network", small_steps, "jax-small.csv"),
    "steps": ("train step of ResNet-50", step_times, "gpu-steps.csv"),
    "training": ("short training", trainings, "gpu-training.csv"),
}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="of the three, as said above")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image", type=int, default=224, help="height and width for step times")
    parser.add_argument("--steps", type=int, default=50, help="train steps in a row")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5, help="of the short training")
    parser.add_argument("--examples", type=int, default=20000, help="made-up training images")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 1.0, 4.0])
    parser.add_argument("--small-batch", type=int, default=32, help="of the small network")
    parser.add_argument("--small-steps", type=int, default=50, help="its train steps in a row")
    parser.add_argument("--small-rounds", type=int, default=12)
    parser.add_argument("--data", help="an .npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    device = jax.devices()[0]
    versions = f"Keras {keras.__version__}, JAX {jax.__version__}"
    print(f"{device.device_kind} ({device.platform}), {versions}")
    for part in options.only or PARTS:
        title, measure, name = PARTS[part]
        show(title, measure(options), options.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
