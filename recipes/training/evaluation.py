"""The classes of a run: their names, accuracies and confusion matrix."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from keras_gradclip.files import read_csv, read_json, replace_file, write_csv, write_json
from recipes.data import Data
from recipes.errors import RecipeError
from recipes.words import show_table

NAMES = ".classes.json"  # of `best.keras`: best.classes.json
CLASSES, CONFUSION = "classes.csv", "confusion.png"
_COUNTED = 2_000  # most classes with a confusion matrix, which needs memory
_PRINTED = 20  # most classes printed; the CSV file has all
_NUMBERED = 25  # most classes with numbers in the picture of the matrix
_NAMED = 120  # most classes that are all named in the picture
_COLUMNS = ("class", "images", "accuracy", "taken_for")


def write_names(model: Path, data: Data) -> None:
    """Writes the class names and decoding options that `recipes/predict.py` reads."""
    if data.decoding:
        content = {"classes": list(data.class_names), "decoding": dict(data.decoding)}
        write_json(model.with_suffix(NAMES), content)


def read_names(model: Path) -> tuple[list[str], Mapping[str, Any]]:
    """The class names of a model (empty if it has no classes), and `Data.decoding`.

    Raises:
        RecipeError: the file of names is missing or damaged.
    """
    path = model.with_suffix(NAMES)
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise RecipeError(
            f"{path} is missing, which has the names of the classes: copy it with the model, or "
            "have a run of an earlier version write it with --resume"
        ) from None
    except ValueError as error:
        raise RecipeError(str(error)) from None
    match content:
        case {"classes": [*names], "decoding": dict(decoding)} if all(
            isinstance(name, str) for name in names
        ):
            return names, decoding
    raise RecipeError(f"{path}: holds no 'classes' and 'decoding'")


class Confusion(keras.metrics.Metric):
    """A metric that counts images by true class (rows) and predicted class (columns).

    Its result is the accuracy.
    """

    def __init__(self, num_classes: int):
        super().__init__(name="confusion")
        self.counts = self.add_weight(shape=(num_classes, num_classes), initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch of labels [n] and probabilities [n, classes]."""
        guesses, size = tf.argmax(y_pred, axis=-1), self.counts.shape[0]
        counts = tf.math.confusion_matrix(tf.reshape(y_true, [-1]), guesses, size)
        self.counts.assign_add(tf.cast(counts, self.counts.dtype))

    def result(self) -> Any:
        """The share of correctly predicted images."""
        return keras.ops.trace(self.counts) / keras.ops.maximum(keras.ops.sum(self.counts), 1)


def evaluate(
    model: keras.Model, batches: Any, data: Data, folder: Path, loss: Any, metrics: Sequence[Any]
) -> dict[str, float]:
    """Evaluates a model, which it compiles with loss and metrics, over batches of (x, y).

    Of a classifier with at most 2,000 named classes it also writes `classes.csv` and
    `confusion.png`.
    """
    size, label = len(data.class_names), batches.element_spec[1]
    counted = 0 < size <= _COUNTED and model.output_shape[-1] == size and len(label.shape) == 1
    confusion = Confusion(size) if counted else None
    more = [confusion] if confusion else []
    model.compile(loss=loss, metrics=[*metrics, *more], jit_compile=False)
    scores = model.evaluate(batches, verbose=0, return_dict=True)
    if confusion:
        accuracy = scores.pop(confusion.name)
        counts = keras.ops.convert_to_numpy(confusion.counts).astype(int)
        title = f"{data.name}: {100 * accuracy:.1f} % of {counts.sum():,} test images are right"
        write_classes(folder, counts, data.class_names, title)
    return scores


def write_classes(folder: Path, counts: np.ndarray, names: Sequence[str], title: str) -> None:
    """Writes `classes.csv`, one row per class, and `confusion.png`.

    `counts` are images by true and predicted class, [classes, classes].
    """
    rows = []
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        images, right = row.sum(), row[i]
        wrong = np.where(np.arange(len(row)) == i, 0, row)
        share = f"{right / images:.4f}" if images else ""
        rows.append((name, images, share, names[int(wrong.argmax())] if wrong.any() else ""))
    write_csv(folder / CLASSES, _COLUMNS, rows)
    draw_confusion(counts, names, folder / CONFUSION, title)


def print_classes(folder: Path) -> None:
    """Prints the accuracy of each class, or for many classes where to find it."""
    rows = read_csv(folder / CLASSES, numbers=False)
    if len(rows) > _PRINTED:
        print(f"accuracy of {len(rows)} classes: {folder / CLASSES}, {folder / CONFUSION}")
    elif rows:
        for row in rows:
            row["accuracy"] = f"{100 * float(row['accuracy']):.1f} %" if row["accuracy"] else ""
        table = pd.DataFrame(rows).rename(columns={"taken_for": "taken for"})
        show_table(table, "test images by class")


def _short(name: str) -> str:
    """A name of at most 24 characters; names that end in numbers stay apart."""
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path, title: str) -> None:
    """Draws a confusion matrix; each row shows shares of its class."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(counts)
    side = min(3 + 0.45 * size, 14)  # inches
    figure = Figure(figsize=(side + 1.5, side), dpi=110)
    axis = figure.add_subplot()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # A square-root scale keeps rare mistakes visible.
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    figure.colorbar(image, ax=axis, label="% of the class", fraction=0.046, pad=0.02)
    ticks = range(0, size, -(-size // _NAMED))
    labels = [_short(names[i]) for i in ticks]
    font = min(9, 700 / len(labels))
    wide = len(labels) * max(map(len, labels)) > 40
    axis.set_yticks(ticks, labels, fontsize=font, parse_math=False)
    axis.set_xticks(ticks, labels, fontsize=font, parse_math=False, rotation=90 if wide else 0)
    axis.set(xlabel="predicted", ylabel="class")
    axis.set_title(title, fontsize=10, parse_math=False)
    if size <= _NUMBERED:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 35 else "black"
            text = f"{counts[row, column]:,}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks
        replace_file(path, lambda scratch: figure.savefig(scratch, bbox_inches="tight"))
