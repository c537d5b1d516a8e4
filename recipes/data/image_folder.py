"""Folders of images: files by class, or by split and class; a damaged file is named.

Each image is decoded once before training, so that a truncated file is reported at the start and
does not end a run in epoch 7.
"""

import contextlib
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import ExifTags, Image, UnidentifiedImageError

from recipes.data import images
from recipes.data.sets import Split
from recipes.errors import DataError, first_line
from recipes.words import counted

IMAGE_FOLDER = "image_folder"  # the data set's name
_FORMATS = ("BMP", "GIF", "JPEG", "PNG")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif"}
_UNREAD = {".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".tif", ".tiff", ".webp"}
_VALIDATION, _TEST = ("validation", "val"), ("test",)  # names of their folders
Row = tuple[bytes, int, int]  # path, label, EXIF orientation
_SHOWN = 10  # problems listed; the rest are counted


def image_problem(path: str | Path) -> str | None:
    """The problem of an image file, or None; decodes all of its pixels.

    TensorFlow decodes it as in training. PIL tells the format and has clearer messages.
    """
    try:
        with Image.open(path) as image:
            if image.format not in (*_FORMATS, "MPO"):  # MPO: a JPEG followed by others
                wanted = ", ".join(_FORMATS)
                return f"is {image.format} by its content, and must be one of {wanted}"
            pixels = words = None
            try:
                pixels = images.decode(tf.io.read_file(os.fsencode(path))).numpy()
            except tf.errors.OpError as error:
                words = re.sub(r"^\{\{.*?\}\} *| *\[Op:.*", "", first_line(error))
            same = pixels is not None and pixels.shape[:2] == (image.height, image.width)
            if image.format in ("BMP", "GIF") or not same:  # PIL detects more damage in these
                image.load()
            if pixels is not None and image.format == "BMP":
                # TensorFlow reads palette indices as grey levels.
                same = np.array_equal(pixels, np.asarray(image.convert("RGB")))
    except FileNotFoundError:
        return "no such file"
    except UnidentifiedImageError:
        return "cannot identify image file"
    except Exception as error:  # PIL's decoders raise many types
        return getattr(error, "strerror", None) or first_line(error)
    if words:
        return f"TensorFlow cannot decode it: {words}; save it again, e.g. as PNG"
    return (
        None if same else "TensorFlow decodes it to a different image; save it again, e.g. as PNG"
    )


def problems_of(paths: Iterable[Path]) -> dict[Path, str]:
    """The paths of image files that have a problem, and the text of `image_problem`."""
    paths = list(paths)
    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        found = zip(paths, pool.map(image_problem, paths), strict=True)
        return {path: problem for path, problem in found if problem}


def report_bad(problems: Sequence[str], on_bad_data: str, what: str) -> None:
    """Prints the problems found in `what` ("skip"), or raises a DataError ("refuse")."""
    if not problems:
        return
    count = f"{len(problems)} bad {'entry' if len(problems) == 1 else 'entries'} in {what}"
    if on_bad_data == "refuse":
        raise DataError(
            f"{problems[0]} ({count}; repair the data, or leave such entries out with "
            "--on-bad-data skip)"
        )
    lines = [f"skipped: {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"skipped: {len(problems) - _SHOWN} more")
    print("\n".join([*lines, f"warning: {count}, skipped"]), file=sys.stderr)


def exif_orientation(path: str | Path) -> int:
    """The EXIF orientation of a readable image file, 1 to 8: see `recipes.data.images.upright`."""
    with Image.open(path) as image, contextlib.suppress(Exception):  # PIL's parser of EXIF
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in range(1, 9) else 1
    return 1


def image_folder_splits(
    root: str | None, on_bad_data: str
) -> tuple[list[Split], tuple[str, ...], str]:
    """Train, validation and test splits of (path, label, EXIF orientation) from folders of files.

    The layout is SPLIT/CLASS/FILE if a folder `train` contains folders, else CLASS/FILE. Without a
    `validation` (or `val`) folder every tenth training image of each class is held out, and without
    a `test` folder another tenth: always the same ones, and at least one of a class of four or
    more. Classes are in alphabetical order. Names that begin with a dot are ignored.

    Returns:
        The splits, the class names, and a description of what was held out.

    Raises:
        DataError: no such folder, no classes, or an unreadable image under "refuse".
    """
    if not root:
        raise DataError(f"dataset={IMAGE_FOLDER!r} needs --data-dir, a folder of CLASS/FILE")
    base = Path(root)
    if not base.is_dir():
        raise DataError(f"data-dir={root!r} is not a folder")
    by_split = bool(_folders(base / "train"))
    home = base / "train" if by_split else base
    classes = _folders(home)
    like_splits = {"train", *_VALIDATION, *_TEST}.intersection(classes if not by_split else ())
    if len(classes) < 2 or len(like_splits) == len(classes):
        found = counted(len(classes), "class folder")
        if like_splits:
            found = "splits without class folders"
        names = f" ({', '.join(classes)})" if classes else ""
        raise DataError(
            f"{home} holds {found}{names}: two classes are needed, as CLASS/FILE or "
            "train/CLASS/FILE"
        )
    if like_splits:
        names = ", ".join(sorted(like_splits))
        role = "a class, since it holds" if len(like_splits) == 1 else "classes, since they hold"
        print(f"warning: {home}: {names} read as {role} no folders", file=sys.stderr)

    def rows(folder: Path) -> list[Row]:
        unknown = sorted(set(_folders(folder)) - set(classes))
        if unknown:
            raise DataError(f"{folder} has a class that train lacks: {unknown[0]!r}")
        return _readable(folder, classes, on_bad_data)

    train = rows(home)
    empty = set(range(len(classes))) - {label for _, label, _ in train}
    if not train:
        raise DataError(
            f"{home}: no images in its class folders, such as {classes[0]!r}: they are read as "
            "CLASS/FILE or train/CLASS/FILE (in small letters), and no deeper"
        )
    if empty:
        raise DataError(
            f"the class {classes[min(empty)]!r} of {home} holds no images: add some, or remove its "
            "folder"
        )
    parts, held_out, unread = [], [], set(_folders(base)) - {home.name} if by_split else set()
    for role, spelt, first in (("validation", _VALIDATION, 10), ("test", _TEST, 5)):
        folders = [base / name for name in spelt if by_split and (base / name).is_dir()]
        if folders:
            parts.append(rows(folders[0]))
            unread.discard(folders[0].name)
        else:
            taken, train = _tenth(train, first)
            parts.append(taken)
            held_out.append(role)
    if unread:
        print(
            f"warning: {base}: not read: {', '.join(sorted(unread))}; the splits are train, "
            "validation (or val) and test",
            file=sys.stderr,
        )
    for role, part in zip(("train", "validation", "test"), (train, *parts), strict=True):
        if not part:
            raise DataError(
                f"{base}: no images for the {role} split: add some, four of a class at least, or a "
                f"folder {role}/CLASS/FILE"
            )
    note = f"{' and '.join(held_out)}: held out of {home.name}/" if held_out else ""
    # Shuffled once: with `--limit-steps` the first batches have every class.
    parts = [[part[i] for i in np.random.default_rng(0).permutation(len(part))] for part in parts]
    return [_split(part) for part in (train, *parts)], tuple(classes), note


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; empty if it does not exist."""
    return sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())


def _readable(folder: Path, classes: Sequence[str], on_bad_data: str) -> list[Row]:
    """The valid images of CLASS/FILE, sorted by class and name; reports the others."""
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).glob("[!.]*"))
    ]
    unread = Counter(s for path, _ in files if (s := path.suffix.lower()) in _UNREAD)
    if unread:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        print(
            f"warning: {folder}: {counts} left out: {', '.join(_FORMATS)} are read", file=sys.stderr
        )

    files = [(path, label) for path, label in files if path.suffix.lower() in _SUFFIXES]
    problems = problems_of(path for path, _ in files)
    report_bad([f"{p}: {text}" for p, text in problems.items()], on_bad_data, str(folder))
    return [
        (os.fsencode(path), label, exif_orientation(path))
        for path, label in files
        if path not in problems
    ]


def _tenth(rows: Sequence[Row], first: int) -> tuple[list[Row], list[Row]]:
    """Splits off every tenth row of each class from the `first` on, or the last of three."""
    taken: set[Row] = set()
    for _, group in itertools.groupby(rows, key=lambda row: row[1]):
        members = list(group)
        taken.update(members[first - 1 :: 10] or members[2:][-1:])
    return [row for row in rows if row in taken], [row for row in rows if row not in taken]


def _split(rows: Sequence[Row]) -> Split:
    paths, labels, turned = zip(*rows, strict=True)
    columns = (list(paths), np.array(labels, np.int64), np.array(turned, np.int32))
    return Split(tf.data.Dataset.from_tensor_slices(columns), len(rows))
