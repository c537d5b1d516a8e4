"""Evidence for clippers: trains networks × clippers × learning rates × seeds.

    python recipes/tools/evidence.py                      # small: ten minutes on two idle cores
    python recipes/tools/evidence.py --preset full --data-dir FOLDER --output docs/results

Writes `evidence.csv` (a row a run, with all that tells it from the others), `evidence.md` (a table
a study), one picture a study, and one for readers in a hurry (`evidence.png`) into `--output`. The
same command again goes on where it was interrupted; `--tables` only draws. A run is `diverged` when
its loss became NaN or infinite (in means it counts as guessing), `at chance` when its test accuracy
is about that of guessing, else `learned`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: the folder above recipes/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import keras_gradclip as kgc
from keras_gradclip.files import append_csv, read_csv
from recipes.command_line import Parser, exit_status
from recipes.errors import DataError, RecipeError, plain_errors
from recipes.tools._studies import (
    CALIBRATED,
    CALIBRATED_RATIO,
    COLUMNS,
    HEADLINE,
    HEADLINE_STUDIES,
    KEY,
    NONE,
    PRESETS,
    SEARCHED,
    Study,
)
from recipes.tools._yardstick import searched
from recipes.training.folder import folder_named
from recipes.training.recipe import at_chance

CLASSES = 10


def small_vgg(side: int, channels: int, width: int = 8):
    """Six convolutions in three stages of `width`, 2·`width`, 4·`width`; no batch normalisation."""
    import keras
    from keras import layers

    stack = [keras.Input((side, side, channels))]
    for filters in (width, 2 * width, 4 * width):
        for _ in range(2):
            stack.append(layers.Conv2D(filters, 3, padding="same", activation="relu", **_HE))
        stack.append(layers.MaxPooling2D())
    stack += [layers.Flatten(), layers.Dense(128, "relu", **_HE), layers.Dense(CLASSES)]
    return keras.Sequential(stack)


def lenet5(side: int, channels: int):
    """LeNet-5 with ReLU and max pooling."""
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((side, side, channels)),
            layers.Conv2D(6, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, "relu"),
            layers.Dense(84, "relu"),
            layers.Dense(CLASSES),
        ]
    )


_HE = {"kernel_initializer": "he_normal"}
NETWORKS: dict[str, Callable] = {"small_vgg": small_vgg, "lenet5": lenet5}


def make_optimizer(name: str, rate):
    """A Keras optimizer: "momentum" (0.9), "sgd" without it, "adamw"."""
    import keras

    if name == "adamw":
        return keras.optimizers.AdamW(rate)
    return keras.optimizers.SGD(rate, momentum={"momentum": 0.9, "sgd": 0.0}[name])


def load_images(name: str, side: int, data_dir: str) -> tuple[np.ndarray, ...]:
    """Training images and labels, test images and labels.

    Images are float32 `[n, side, side, channels]`, averaged down to `side` and standardised by
    the training images' mean and deviation; labels are int64 `[n]`.

    Raises:
        DataError: `data_dir` does not hold the set.
    """
    import tensorflow_datasets as tfds

    from recipes.data.mnist_embedded import MnistEmbedded

    if name == "mnist_embedded":
        builder, splits = MnistEmbedded(), ("train", "validation+test")
    else:
        try:
            builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
            splits = ("train", "test")
            builder.as_dataset(split=splits[0])
        except (AssertionError, tfds.core.DatasetNotFoundError) as error:
            raise DataError(
                f"--data-dir {data_dir} holds no prepared {name}: name the folder that does"
            ) from error
    train, test = (
        tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1)) for split in splits
    )
    images = []
    for part in (train, test):
        x = part["image"].astype("float32")
        fold = x.shape[1] // side
        x = x[:, : fold * side, : fold * side].reshape(len(x), side, fold, side, fold, -1)
        images.append(x.mean((2, 4)))
    mean, deviation = images[0].mean((0, 1, 2)), images[0].std((0, 1, 2))
    x, x_test = ((part - mean) / deviation for part in images)
    return x, train["label"], x_test, test["label"]


def scheduled(study: Study, rate: float, examples: int):
    """The learning rate, or the schedule that the study has from it."""
    import keras

    if study.schedule == "constant":
        return rate
    steps = study.epochs * -(-examples // study.batch_size)
    return keras.optimizers.schedules.CosineDecay(rate, steps)


def run(study: Study, clipper, rate: float, seed: int, images) -> dict:
    """Trains once; the columns that the run decides."""
    import keras

    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    x, y, x_test, y_test = images
    rng = np.random.default_rng(seed)
    noisy = rng.random(len(y)) < study.label_noise
    y = np.where(noisy, rng.integers(0, CLASSES, len(y)), y)
    model = NETWORKS[study.network](*x.shape[2:])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if clipper in (CALIBRATED, CALIBRATED_RATIO):
        plain = kgc.ClippedOptimizer(
            make_optimizer(study.optimizer, scheduled(study, rate, len(x))), None
        )
        model.compile(plain, loss, jit_compile=False)
        found = kgc.calibrate(model, (x, y), steps=79, batch_size=study.batch_size)
        clipper = found.clip_map("norm" if clipper == CALIBRATED else "update_ratio")
    inner = make_optimizer(study.optimizer, scheduled(study, rate, len(x)))
    clipper = None if clipper == NONE else clipper
    optimizer = kgc.ClippedOptimizer(inner, clipper, telemetry=8)
    # Compiling with XLA would take longer than the training does.
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    started = time.monotonic()
    history = model.fit(
        x,
        y,
        batch_size=study.batch_size,
        epochs=study.epochs,
        verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN()],
    )
    train_loss = history.history["loss"][-1]
    finite = math.isfinite(train_loss) and all(np.isfinite(w).all() for w in model.get_weights())
    accuracy = model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1] if finite else math.nan
    status = "learned" if finite else "diverged"
    if finite and at_chance(accuracy, 1 / CLASSES):
        status = "at chance"
    return {
        "status": status,
        "test_accuracy": f"{accuracy:.4f}",
        "train_loss": f"{train_loss:.4g}",
        "clip_fraction": f"{optimizer.read_telemetry()['clip_fraction']:.4f}",
        "seconds": f"{time.monotonic() - started:.1f}",
    }


def read(path: Path) -> list[dict]:
    """The rows of an `evidence.csv`, as text; none if there is none.

    Raises:
        RecipeError: it is another table, or damaged.
    """
    with plain_errors():
        rows = read_csv(path, numbers=False, needs=COLUMNS)
    try:
        for row in rows:
            float(row["learning_rate"]), float(row["test_accuracy"]), int(row["seed"])
    except ValueError as error:
        raise RecipeError(f"{path}: {error}; mend it, or name another --output") from None
    return rows


def accuracy_of(row: dict) -> float:
    """Test accuracy in %; guessing where the run diverged."""
    return 100 / CLASSES if row["status"] == "diverged" else 100 * float(row["test_accuracy"])


def by_cell(rows: list[dict]) -> dict[str, dict[float, list[dict]]]:
    """The rows of a study: clipper to learning rate to runs, in the order of the rows."""
    cells: dict[str, dict[float, list[dict]]] = {}
    for row in rows:
        cells.setdefault(row["clipper"], {}).setdefault(float(row["learning_rate"]), []).append(row)
    return cells


def table(rows: list[dict]) -> str:
    """Markdown: a line a clipper, a column a learning rate; mean and (lowest to highest)."""
    rates = sorted({float(row["learning_rate"]) for row in rows})
    seeds = len({row["seed"] for row in rows})
    lines = [
        "| clipper | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]
    for clipper, of_clipper in by_cell(rows).items():
        cells = []
        for rate in rates:
            runs = of_clipper.get(rate, [])
            scores = [accuracy_of(r) for r in runs]
            if len(scores) > 1:
                text = f"{statistics.fmean(scores):.1f} ({min(scores):.1f}–{max(scores):.1f})"
            else:
                text = "".join(f"{score:.1f}" for score in scores)
            for status in ("diverged", "at chance"):
                count = sum(r["status"] == status for r in runs)
                text += f", {count} of {len(runs)} {status}" if count else ""
            text += f", {len(runs)} of {seeds} seeds" if 0 < len(runs) < seeds else ""
            cells.append(text)
        lines.append(f"| `{clipper}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Accuracy over learning rate: a line (the mean) and a band (the seeds) a clipper."""
    from matplotlib.figure import Figure

    cells = by_cell(rows)
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    axis = figure.subplots()
    colours = iter([f"C{k}" for k in range(10) if k != 7] * len(cells))
    for number, (clipper, of_clipper) in enumerate(cells.items()):
        rates = sorted(of_clipper)
        scores = [[accuracy_of(row) for row in of_clipper[rate]] for rate in rates]
        color = "black" if clipper == NONE else next(colours)
        style = "--" if clipper == NONE else ("-", ":")[number > 9]
        label = re.sub(r", (eps|alpha|warmup_steps|option)=[^,)]*", "", clipper)
        means = [statistics.fmean(s) for s in scores]
        axis.plot(rates, means, style, marker="o", markersize=3, label=label, color=color)
        low, high = [min(s) for s in scores], [max(s) for s in scores]
        axis.fill_between(rates, low, high, alpha=0.08, linewidth=0, color=color)
    axis.set(xscale="log", xlabel="learning rate", ylabel="test accuracy, %")
    figure.suptitle(title, fontsize="medium")
    axis.grid(alpha=0.3)
    if len(cells) > 6:
        figure.legend(loc="outside right center", fontsize="x-small")
    else:
        axis.legend(loc="best", fontsize="small", framealpha=0.6)
    figure.savefig(path, dpi=110)


def report(studies: tuple[Study, ...], rows: list[dict], output: Path) -> None:
    """`evidence.md` and a picture for each study that has rows."""
    parts = []
    for study in studies:
        order = {str(clipper): k for k, clipper in enumerate(study.clippers)}
        mine = [row for row in rows if row["study"] == study.name]
        mine.sort(key=lambda row: order.get(row["clipper"], len(order)))
        if not mine:
            continue
        seeds = sorted({int(row["seed"]) for row in mine})
        title = (
            f"{study.name}: {study.network}, {study.data}, {study.optimizer}, {study.schedule} "
            f"learning rate, {study.epochs} epochs of batch {study.batch_size}"
        )
        parts.append(
            f"## {title}\n\nTest accuracy in %, mean (lowest–highest) of the seeds {seeds}.\n\n"
            f"{table(mine)}\n"
        )
        draw(mine, output / f"evidence-{study.name}.png", title)
    (output / "evidence.md").write_text("\n".join(parts), encoding="utf-8")
    order = {str(clipper): k for k, clipper in enumerate(HEADLINE)}
    few = [r for r in rows if r["study"] in HEADLINE_STUDIES and r["clipper"] in order]
    if few:
        few.sort(key=lambda row: order[row["clipper"]])
        title = "Six convolutions without normalisation, CIFAR-10 subset, SGD with momentum"
        draw(few, output / "evidence.png", title)


def parse(argv) -> argparse.Namespace:
    parser = Parser(prog="evidence", description=__doc__)
    names = sorted({study.name for studies in PRESETS.values() for study in studies})
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--studies", nargs="+", choices=names, help="some of the preset's alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the preset's")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="folder")
    parser.add_argument("--data-dir", default="runs/data", help="folder of the TFDS data sets")
    parser.add_argument("--threads", type=int, help="processor threads (default: all)")
    parser.add_argument("--tables", action="store_true", help="train nothing, only draw")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """The exit status: see `recipes.command_line.exit_status`."""
    more = "; the same command goes on from here"
    return exit_status(lambda: _studies(parse(argv)), interrupted=more)


def _studies(arguments: argparse.Namespace) -> None:
    studies = PRESETS[arguments.preset]
    for flag, values, least in (("seeds", arguments.seeds, 0), ("threads", arguments.threads, 1)):
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                raise RecipeError(f"--{flag} {value}: must be {least} or more")
    folder_named(str(arguments.output))
    if arguments.threads:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
        tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "evidence.csv"
    for study in () if arguments.tables else studies:
        if arguments.studies is None or study.name in arguments.studies:
            if arguments.seeds:
                study = dataclasses.replace(study, seeds=tuple(arguments.seeds))
            train(study, path, arguments.data_dir)
    report(studies, read(path), arguments.output)
    print(f"results in {path} and {arguments.output / 'evidence.md'}")


def _searched(study: Study, rate: float, images, file: Path):
    import keras

    keras.utils.set_random_seed(study.seeds[0])

    def make_model():
        keras.backend.clear_session()
        model = NETWORKS[study.network](*images[0].shape[2:])
        optimizer = make_optimizer(study.optimizer, scheduled(study, rate, len(images[0])))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
        return model

    key, of_trials = f"{study.name}, {rate:g}", (study.epochs, study.batch_size)
    return searched(file, key, make_model, images[:2], *of_trials) or NONE


def train(study: Study, path: Path, data_dir: str) -> None:
    """The runs of a study that have no row yet."""
    done = {tuple(row[k] for k in KEY) for row in read(path)}
    missing = [(key, c) for key, c in study.runs() if tuple(key[k] for k in KEY) not in done]
    if not missing:
        return
    name, _, side = study.data.partition("@")
    images = load_images(name, int(side), data_dir)
    for number, (key, clipper) in enumerate(missing, start=1):
        rate, seed = float(key["learning_rate"]), int(key["seed"])
        if clipper == SEARCHED:
            clipper = _searched(study, rate, images, path.with_name("evidence-search.json"))
        row = key | run(study, clipper, rate, seed, images)
        append_csv(path, COLUMNS, [[row[column] for column in COLUMNS]])
        cell = f"{study.name}: {row['clipper']} at {row['learning_rate']}, seed {row['seed']}"
        score = "" if row["status"] == "diverged" else f", {accuracy_of(row):.1f} %"
        print(f"{number} of {len(missing)}, {cell}: {row['status']}{score}, {row['seconds']} s")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
