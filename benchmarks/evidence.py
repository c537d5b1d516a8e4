"""Evidence for clippers: trains networks × clippers × learning rates × seeds.

    python benchmarks/evidence.py                      # small: ten minutes on two idle cores
    python benchmarks/evidence.py --preset full --data-dir FOLDER --output docs/results

Writes `evidence.csv` (a row a run, with all that tells it from the others), `evidence.md` (a table
a study), one picture a study, and one for readers in a hurry (`evidence.png`) into `--output`. The
same command again goes on where it was interrupted; `--tables` only draws. A run is `diverged` when
its loss became NaN or infinite (in means it counts as guessing), `at chance` when its test accuracy
is about that of guessing, else `learned`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a script: TensorFlow without its notes
    from recipes.command_line import import_tensorflow

    import_tensorflow()

import numpy as np
import pandas as pd

import keras_gradclip as kgc
from benchmarks.studies import (
    CALIBRATED,
    CALIBRATED_RATIO,
    HEADLINE,
    HEADLINE_STUDIES,
    KEY,
    NONE,
    PRESETS,
    SEARCHED,
    Study,
)
from benchmarks.yardstick import searched
from recipes.command_line import Parser, exit_status
from recipes.errors import DataError, RecipeError
from recipes.tools import study as runner
from recipes.training.folder import folder_named
from recipes.training.recipe import at_chance
from recipes.words import show_table

CLASSES = 10
#: What a run decides.
RESULTS = ("status", "test_accuracy", "train_loss", "clip_fraction", "seconds")
NUMBERS = ("learning_rate", "test_accuracy", "seed")
PACE = 3.0  # seconds an epoch, with its share of the start


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


def scored(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with their test accuracy in %; guessing where a run diverged."""
    return rows.assign(score=(100 * rows["test_accuracy"]).fillna(100 / CLASSES))


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a clipper, a column a learning rate; mean and (lowest–highest)."""
    seeds = rows["seed"].nunique()

    def cell(runs: pd.DataFrame) -> str:
        fewer = f", {len(runs)} of {seeds} seeds" if len(runs) < seeds else ""
        return runner.summary(runs) + fewer

    return runner.cross_table(rows, "clipper", "learning_rate", cell)


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown; the first column is left-aligned, the others right-aligned."""
    head = "| " + " | ".join(table.columns) + " |\n|---|" + "---:|" * (len(table.columns) - 1)
    return "\n".join([head, *("| " + " | ".join(row) + " |" for row in table.to_numpy())])


def label(clipper: str) -> str:
    """A clipper in a legend, without its rarer parameters."""
    return re.sub(r", (eps|alpha|warmup_steps|option)=[^,)]*", "", clipper)


def report(studies: Sequence[Study], rows: pd.DataFrame, output: Path) -> None:
    """`evidence.md` and a picture for each study that has rows."""

    def sorted_by(clippers, mine: pd.DataFrame) -> pd.DataFrame:
        order = [str(clipper) for clipper in clippers]
        return mine.sort_values("clipper", key=lambda c: c.map(order.index), kind="stable")

    def draw(name: str, mine: pd.DataFrame, title: str) -> None:
        measures = {"score": "test accuracy, %"}
        runner.draw(output / name, mine, title, measures, guess=100 / CLASSES, label=label)

    rows, parts = scored(rows), []
    for study in studies:
        mine = sorted_by(study.clippers, rows[rows["study"] == study.name])
        if mine.empty:
            continue
        seeds = sorted(mine["seed"].astype(int).unique().tolist())
        title = (
            f"{study.name}: {study.network}, {study.data}, {study.optimizer}, {study.schedule} "
            f"learning rate, {study.epochs} epochs of batch {study.batch_size}"
        )
        lines = table(mine.assign(clipper="`" + mine["clipper"] + "`"))
        parts.append(
            f"## {title}\n\nTest accuracy in %, mean (lowest–highest) of the seeds {seeds}.\n\n"
            f"{markdown(lines)}\n"
        )
        draw(f"evidence-{study.name}.png", mine, title)
    (output / "evidence.md").write_text("\n".join(parts), encoding="utf-8")
    few = rows["study"].isin(HEADLINE_STUDIES) & rows["clipper"].isin(map(str, HEADLINE))
    if few.any():
        title = "Six convolutions without normalisation, CIFAR-10 subset, SGD with momentum"
        draw("evidence.png", sorted_by(HEADLINE, rows[few]), title)


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
    file = runner.StudyFile(arguments.output / "evidence.csv", KEY, RESULTS, NUMBERS)
    file.read()
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in studies if arguments.studies is None or s.name in arguments.studies]
    if not arguments.tables:
        seeds = tuple(arguments.seeds or ())
        chosen = [dataclasses.replace(s, seeds=seeds or s.seeds) for s in chosen]
        train(file, chosen, arguments.data_dir)
    rows = file.read()
    report(studies, rows, arguments.output)
    for study in chosen:
        mine = rows[rows["study"] == study.name]
        if len(mine):
            show_table(
                table(scored(mine)), f"{study.name}: test accuracy in %, mean (lowest–highest)"
            )
    print(f"results in {file.path} and {arguments.output / 'evidence.md'}")


def train(file: runner.StudyFile, studies: Sequence[Study], data_dir: str) -> pd.DataFrame:
    """The runs of studies that have no row yet; the rows of all."""
    images = functools.cache(load_images)

    def job(study: Study, clipper, key: dict, others: float | None) -> dict:
        name, _, side = study.data.partition("@")
        rate, seed = float(key["learning_rate"]), int(key["seed"])
        data = images(name, int(side), data_dir)
        if clipper == SEARCHED:
            clipper = _searched(study, rate, data, file.path.with_name("evidence-search.json"))
        return run(study, clipper, rate, seed, data)

    cells = [
        runner.Cell(
            key,
            f"{study.name}: {key['clipper']} at {key['learning_rate']}, seed {key['seed']}",
            functools.partial(job, study, clipper, key),
            study.epochs,
        )
        for study in studies
        for key, clipper in study.runs()
    ]
    return file.run(cells, outcome, PACE)


def outcome(row: runner.Row) -> str:
    """What the log says of a run."""
    score = "" if row["status"] == "diverged" else f", {100 * float(row['test_accuracy']):.1f} %"
    return row["status"] + score


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


if __name__ == "__main__":
    sys.exit(main())
