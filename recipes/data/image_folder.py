"""Folders of images: files by split and class; a damaged file is named.

Each image is decoded once before training, so that a truncated file costs a line at the start and
not a crash in epoch 7.
"""

import collections
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf

from recipes.data import images
from recipes.data.sets import Split
from recipes.errors import DataError, first_line

IMAGE_FOLDER = "image_folder"  # the name of the set
_FORMATS = ("BMP", "GIF", "JPEG", "PNG")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif"}
Row = tuple[str, int]
_SHOWN = 10  # problems listed one by one; the rest are counted


def image_problem(path: str | Path) -> str | None:
    """Why an image file cannot be trained on, or None where it can; all of its pixels are read.

    TensorFlow decodes it, as it does in training. PIL knows the format and has the better words.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format not in _FORMATS:  # PIL knows more of them than TensorFlow
                wanted = ", ".join(_FORMATS)
                return f"is {image.format} by its content, and must be one of {wanted}"
            pixels = words = None
            try:
                pixels = images.decode(tf.io.read_file(str(path))).numpy()
            except tf.errors.OpError as error:
                words = re.sub(r"^\{\{.*?\}\} *| *\[Op:.*", "", first_line(error))
            same = pixels is not None and pixels.shape[:2] == (image.height, image.width)
            if image.format in ("BMP", "GIF") or not same:  # PIL notices more damage in these
                image.load()
            if pixels is not None and image.format == "BMP":
                # TensorFlow takes the numbers of a palette for grey levels.
                same = np.array_equal(pixels, np.asarray(image.convert("RGB")))
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # PIL's decoders raise whatever they stumble over
        return first_line(error)
    if words:
        return f"TensorFlow cannot decode it: {words}; save it anew, e.g. as PNG"
    return None if same else "TensorFlow decodes it to another image; save it anew, e.g. as PNG"


def report_bad(problems: Sequence[str], on_bad_data: str, what: str) -> None:
    """Prints the problems and goes on ("skip"), or raises with the first of them ("refuse").

    Args:
        problems: one line each, starting with file and row.
        on_bad_data: str, "skip" or "refuse".
        what: str, the source, for the message.

    Raises:
        DataError: `on_bad_data` is "refuse" and there is a problem, or an unknown word.
    """
    if on_bad_data not in ("skip", "refuse"):
        raise DataError(f"on-bad-data={on_bad_data!r} is neither 'skip' nor 'refuse'")
    if not problems:
        return
    count = f"{len(problems)} bad {'entry' if len(problems) == 1 else 'entries'} in {what}"
    if on_bad_data == "refuse":
        raise DataError(
            f"{problems[0]} ({count}; mend the data, or leave such entries out with "
            "--on-bad-data skip)"
        )
    lines = [f"skipped: {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"skipped: {len(problems) - _SHOWN} more")
    print("\n".join([*lines, f"warning: {count}, skipped"]), file=sys.stderr)


def readable_images(rows: Sequence[Row], on_bad_data: str, what: str) -> list[Row]:
    """The rows whose image decodes.

    Args:
        rows: pairs of an image's path and its label.
        on_bad_data: "skip" or "refuse", see `report_bad`.
        what: str, the source, for the message.
    """

    def problem_of(row: Row) -> str | None:
        problem = image_problem(row[0])
        return f"{row[0]}: {problem}" if problem else None

    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        found = list(pool.map(problem_of, rows))
    report_bad([problem for problem in found if problem], on_bad_data, what)
    return [row for row, problem in zip(rows, found, strict=True) if problem is None]


def image_folder_splits(root: str | None, on_bad_data: str) -> tuple[list[Split], int, str]:
    """Train, validation and test splits of (path, label) from split/class/file folders.

    Without a `validation` (or `val`) folder every tenth training image of each class is held
    out, and without a `test` folder another tenth: the same ones each time. Classes are the
    folders of `train` in alphabetical order.

    Returns:
        The splits, the number of classes, and what was held out, in words.

    Raises:
        DataError: no such folder, no classes, or an unreadable image under "refuse".
    """
    if not root:
        raise DataError("dataset='image_folder' needs --data-dir, laid out as split/class/file")
    base = Path(root)
    if not (base / "train").is_dir():
        raise DataError(f"data-dir={root!r} has no folder 'train' (wanted: train/CLASS/FILE)")
    classes = sorted(folder.name for folder in (base / "train").iterdir() if folder.is_dir())
    if len(classes) < 2:
        raise DataError(f"{base / 'train'} holds {len(classes)} class folders: two are needed")

    def rows(split: str) -> list[Row]:
        folder = base / split
        unknown = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name not in classes)
        if unknown:
            raise DataError(f"{folder} has a class that train has not: {unknown[0]!r}")
        return [
            (str(path), label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).glob("*"))
            if path.suffix.lower() in _SUFFIXES
        ]

    def checked(split: str) -> list[Row]:
        return readable_images(rows(split), on_bad_data, str(base / split))

    train = checked("train")
    parts, held_out = [], []
    for role, names in (("validation", ("validation", "val")), ("test", ("test",))):
        folder = next((name for name in names if (base / name).is_dir()), None)
        if folder:
            parts.append(checked(folder))
        else:
            taken, train = _tenth(train, first=10 if role == "validation" else 5)
            parts.append(taken)
            held_out.append(role)
    validation, test = parts
    empty = set(range(len(classes))) - {label for _, label in (*train, *validation)}
    if len(empty) < len(classes) and empty:
        raise DataError(
            f"the class {classes[min(empty)]!r} of {base / 'train'} holds no images: add some, or "
            "remove its folder"
        )
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if not part:
            raise DataError(f"{base}: no images for the {name} split")
    note = f"{' and '.join(held_out)}: held out of train/" if held_out else ""
    return [_split(part) for part in (train, validation, test)], len(classes), note


def _tenth(rows: Sequence[Row], first: int) -> tuple[list[Row], list[Row]]:
    """Every tenth row of each class, from the `first` on, and the others."""
    tenths: list[Row] = []
    others: list[Row] = []
    counts: collections.Counter[int] = collections.Counter()
    for row in rows:
        counts[row[1]] += 1
        (tenths if counts[row[1]] % 10 == first % 10 else others).append(row)
    return tenths, others


def _split(rows: Sequence[Row]) -> Split:
    paths, labels = zip(*rows, strict=True)
    dataset = tf.data.Dataset.from_tensor_slices((list(paths), tf.constant(labels, dtype=tf.int64)))
    return Split(dataset, len(rows))
