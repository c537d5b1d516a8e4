"""Camera frames and steering angles from a log of the Udacity simulator.

The format of `driving_log.csv`: one row per instant, in order of time, `center, left, right,
steering, throttle, brake, speed`, with or without that header; the first three are the image files
of the cameras. Steering is in the log's units: the simulator writes -1..1 for -25..25 degrees,
positive to the right.
"""

import csv
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

import numpy as np
import tensorflow as tf
from PIL import Image

from recipes.data import images
from recipes.data import sets as data
from recipes.data.image_folder import problems_of, report_bad
from recipes.errors import DataError

COLUMNS = ("center", "left", "right", "steering", "throttle", "brake", "speed")
_NEEDED = COLUMNS[:4]
# Part of the height cut off above (sky) and below (bonnet): Bojarski et al. 2016 feed such a strip.
_CROP_TOP, _CROP_BOTTOM = 0.35, 0.1
_GAP = 10  # frames between two parts of the split, one to two seconds
_FOLDS, _RIDGE = 5, 0.03


@dataclasses.dataclass(frozen=True)
class Frame:
    """One instant of a drive.

    Attributes:
        center, left, right: paths of the images.
        steering: float, in the log's units.
        row: int, the line of the log, counted from 1.
    """

    center: Path
    left: Path
    right: Path
    steering: float
    row: int

    @property
    def cameras(self) -> tuple[Path, Path, Path]:
        """The three images."""
        return self.center, self.left, self.right


def read_log(path: str | os.PathLike, on_bad_data: str = "refuse") -> list[Frame]:
    """The frames of a `driving_log.csv`, in order of time.

    Image paths may be relative or absolute, with slashes or backslashes, and may come from another
    machine: a missing file is searched for in `IMG/` and beside the log.

    Args:
        path: the log, or the folder that holds `driving_log.csv`.
        on_bad_data: "refuse" raises at rows with a missing column, a non-finite steering angle, or
            an image that is missing or cannot be decoded completely; "skip" lists these rows and
            leaves them out.

    Raises:
        DataError: bad rows, or no rows at all; names the file and the row.
    """
    path = Path(path)
    path = path / "driving_log.csv" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path} is not a file: point --data-dir at the log or at its folder")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file, skipinitialspace=True)
        try:
            rows = [[cell.strip() for cell in cells] for cells in reader]
        except csv.Error as error:
            raise DataError(f"{path}, row {reader.line_num}: {error}; not a driving log") from None
    columns: Sequence[str] = COLUMNS
    if rows and "steering" in (head := [cell.lower() for cell in rows[0]]):
        columns, rows[0] = head, []
        missing = [name for name in _NEEDED if name not in columns]
        if missing:
            raise DataError(f"{path}, row 1: the header has no column {missing[0]!r}")
    frames, problems = [], {}
    for row, cells in enumerate(rows, start=1):
        try:
            if any(cells):  # blank lines end many logs
                frames.append(_frame(cells, columns, path.parent, row))
        except DataError as error:
            problems[row] = str(error)
    bad = problems_of(image for frame in frames for image in frame.cameras)
    for frame in frames:
        if damaged := next((image for image in frame.cameras if image in bad), None):
            problems[frame.row] = f"{damaged}: {bad[damaged]}"
    lines = [f"{path}, row {row}: {problems[row]}" for row in sorted(problems)]
    report_bad(lines, on_bad_data, str(path))
    good = [frame for frame in frames if frame.row not in problems]
    if not good:
        raise DataError(f"{path} has no usable row")
    return good


def _frame(cells: Sequence[str], columns: Sequence[str], folder: Path, row: int) -> Frame:
    needed = 1 + max(columns.index(name) for name in _NEEDED)
    if len(cells) < needed:
        raise DataError(f"{len(cells)} columns where {needed} or more are needed")
    *views, text = (cells[columns.index(name)] for name in _NEEDED)
    try:
        steering = float(text)
    except ValueError:
        steering = math.nan
    if not abs(steering) <= np.finfo(np.float32).max:
        raise DataError(f"steering={text!r} is not a finite number")
    center, left, right = (_find_image(view, folder) for view in views)
    return Frame(center, left, right, steering, row)


def _find_image(text: str, folder: Path) -> Path:
    if not text:
        raise DataError("an image path is empty")
    name = PureWindowsPath(text).name  # splits at slashes and backslashes
    for path in (folder / text.replace("\\", "/"), folder / "IMG" / name, folder / name):
        try:
            if path.is_file():
                return path
        except OSError as error:  # such as a name that is too long
            raise DataError(f"image {text!r}: {error.strerror}") from None
    raise DataError(f"image {text!r} is neither there, nor in IMG/, nor beside the log")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drive(data.Data):
    """A drive to train on, and the data for its report.

    Attributes:
        parts: the frames of the training, validation and test split, in order of time, before any
            were left out.
        correction: float, in the log's units, added to the left camera's angle and subtracted
            from the right's.
    """

    parts: tuple[list[Frame], list[Frame], list[Frame]]
    correction: float

    @property
    def mean_angle(self) -> float:
        """The mean over all training frames: the best constant for the squared error."""
        return float(np.mean([frame.steering for frame in self.parts[0]]))


def load(
    data_dir: str | os.PathLike,
    image_shape: tuple[int, int] = (64, 64),
    correction: float | None = None,
    keep_straight: float = 1.0,
    stretches: int = 4,
    on_bad_data: str = "refuse",
) -> Drive:
    """A drive as training data: x float32 [height, width, 3] in -1..1, y float32 [1].

    Training uses all three cameras, with `correction` added to the left one's angle and subtracted
    from the right one's, and mirrors half of the images together with the angle. Validation and
    test use every frame of the centre camera unchanged.

    Args:
        data_dir: the log or its folder.
        image_shape: (height, width) in pixels, after the sky and the bonnet are cut off.
        correction: in the log's units; `None` fits it to the training part (`fit_correction`).
        keep_straight: share, in 0..1, of the training frames with an angle of exactly 0 to keep;
            in a log driven by keyboard they are two thirds or more.
        stretches: see `split_by_time`.
        on_bad_data: "refuse" or "skip", see `read_log`.

    Raises:
        DataError: see `read_log`; also fewer than 30 usable rows.
    """
    frames = read_log(data_dir, on_bad_data)
    if len(frames) < 30:
        raise DataError(f"{data_dir} has {len(frames)} usable rows: a drive needs 30 or more")
    parts = split_by_time(frames, stretches)
    if correction is None:
        correction = fit_correction(parts[0])
    added = (0, correction, -correction)
    train = [
        (path, frame.steering + angle)
        for frame in thin_straight(parts[0], keep_straight)
        for path, angle in zip(frame.cameras, added, strict=True)
    ]
    validation, test = ([(f.center, f.steering) for f in part] for part in parts[1:])
    return Drive(
        train=_as_split(train),
        validation=_as_split(validation),
        test=_as_split(test),
        preprocess_train=functools.partial(_training_example, image_shape=image_shape),
        preprocess_eval=lambda path, angle: (road(path, image_shape), angle[None]),
        num_outputs=1,
        name=f"drive ({Path(data_dir).name})",
        decoding={"image_shape": list(image_shape)},
        parts=parts,
        correction=correction,
    )


def _training_example(
    element: tuple[tf.Tensor, tf.Tensor], seed: tf.Tensor, image_shape: tuple[int, int]
) -> tuple[tf.Tensor, tf.Tensor]:
    path, angle = element
    x = road(path, image_shape)
    flip_seed, light_seed = tf.unstack(tf.random.split(seed, 2))
    mirrored = tf.random.stateless_uniform([], flip_seed) < 0.5
    x = tf.where(mirrored, tf.reverse(x, [1]), x)
    light = tf.random.stateless_uniform([], light_seed, -0.2, 0.2)
    return tf.clip_by_value(x + light, -1.0, 1.0), tf.where(mirrored, -angle, angle)[None]


def road(path: tf.Tensor, image_shape: Sequence[int]) -> tf.Tensor:
    """Returns an image file without sky and bonnet, float32 [height, width, 3] in -1..1."""
    pixels = images.decode(tf.io.read_file(path))
    rows = tf.cast(tf.shape(pixels)[0], tf.float32)
    top, bottom = tf.cast(rows * _CROP_TOP, tf.int32), tf.cast(rows * _CROP_BOTTOM, tf.int32)
    strip = pixels[top : tf.shape(pixels)[0] - bottom]
    return data.normalise(tf.image.resize(strip, image_shape, antialias=True))


def split_by_time(frames: list, stretches: int = 4) -> tuple[list, list, list]:
    """Splits each stretch of the drive in time: 80 % training, 10 % validation, 10 % test.

    Neighbouring frames are nearly identical, so a random split would test on training data. For
    the same reason up to `_GAP` frames between two parts are left out. Several stretches are used
    because the last fifth of a drive is one piece of road in one direction.

    Args:
        frames: in order of time.
        stretches: pieces of equal length; fewer if a piece would have less than 30 frames.

    Returns:
        The three parts, each in order of time.
    """
    stretches = max(1, min(stretches, len(frames) // 30))
    parts: tuple[list, list, list] = ([], [], [])
    for i in range(stretches):
        start, end = (len(frames) * k // stretches for k in (i, i + 1))
        first, second = (start + (end - start) * k // 10 for k in (8, 9))
        gap = min(_GAP, (end - start) // 60)
        begin = start + gap if i else start
        parts[0].extend(frames[begin : first - gap])
        parts[1].extend(frames[first : second - gap])
        parts[2].extend(frames[second:end])
    return parts


def thin_straight(frames: list[Frame], keep: float) -> list[Frame]:
    """Removes all but a share `keep` of the frames with an angle of exactly 0, evenly in time."""
    straight = np.cumsum([frame.steering == 0 for frame in frames])
    kept = np.floor(straight * keep) > np.floor((straight - 1) * keep)
    return [f for f, stays in zip(frames, kept, strict=True) if f.steering != 0 or stays]


def fit_correction(frames: Sequence[Frame]) -> float:
    """Fits the angle to add for a side camera from the log itself.

    Ridge regression on small grey images of all three cameras, with two targets: the angle, and the
    camera's side (1 for left, -1 for right). On held-out centre images the first prediction, p₀, is
    the angle without any correction, and the second, p₁, estimates the car's offset. The correction
    is how much this driver steers per offset: the c with the least squared error of p₀ + c·p₁,
    Σ p₁(y - p₀) / Σ p₁². Blocks in time are held out in turn.

    Args:
        frames: in order of time.

    Returns:
        c, or 0 if it is negative, in the log's units.
    """
    with ThreadPoolExecutor() as pool:
        views = [
            np.stack(list(pool.map(_features, paths)))
            for paths in zip(*(frame.cameras for frame in frames), strict=True)
        ]
    angles = np.array([frame.steering for frame in frames])
    targets = [np.stack([angles, np.full_like(angles, side)], axis=1) for side in (0, 1, -1)]
    block = np.arange(len(frames)) * 4 * _FOLDS // len(frames) % _FOLDS
    slope = square = 0.0
    for k in range(_FOLDS):
        x = np.concatenate([view[block != k] for view in views])
        y = np.concatenate([target[block != k] for target in targets])
        gram = x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1])
        p0, p1 = (views[0][block == k] @ np.linalg.solve(gram, x.T @ y)).T
        slope += float(p1 @ (angles[block == k] - p0))
        square += float(p1 @ p1)
    return max(0.0, slope / square) if square else 0.0


def _features(path: Path) -> np.ndarray:
    """The odd part of a small grey image of the road, float64 [220].

    An angle changes sign when the image is mirrored, so it depends on the odd part only.
    """
    with Image.open(path) as image:
        height = image.height
        box = (0, int(height * _CROP_TOP), image.width, height - int(height * _CROP_BOTTOM))
        grey = image.convert("L").crop(box).resize((40, 11), Image.Resampling.BOX)
    pixels = np.asarray(grey, "float64")
    pixels = (pixels - pixels.mean()) / (pixels.std() + 1e-6)
    return ((pixels - pixels[:, ::-1]) / 2)[:, :20].ravel()


def _as_split(examples: list[tuple[Path, float]]) -> data.Split:
    paths, angles = zip(*examples, strict=True)
    columns = ([str(path) for path in paths], np.array(angles, "float32"))
    return data.Split(tf.data.Dataset.from_tensor_slices(columns), len(examples))
