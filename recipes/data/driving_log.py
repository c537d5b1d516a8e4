"""Camera frames and steering angles: the Udacity simulator's log, and a rendered drive like it.

The format of `driving_log.csv`: a row an instant, in the order of time, `center, left, right,
steering, throttle, brake, speed`, with or without that header; the first three are the files of
the three cameras. Steering is in the log's units: the simulator writes -1..1 for -25..25 degrees,
positive to the right.
"""

import contextlib
import csv
import dataclasses
import math
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw

from recipes.data import sets as data
from recipes.data.image_folder import image_problem, report_bad
from recipes.errors import DataError

COLUMNS = ("center", "left", "right", "steering", "throttle", "brake", "speed")
RENDERED = "rendered"
# What the side cameras see asks for this much more steering towards the middle, in log units.
DEFAULT_CORRECTION = 0.2
# Part of the height cut off above (sky) and below (bonnet): Bojarski et al. 2016 feed such a strip.
_CROP_TOP, _CROP_BOTTOM = 0.35, 0.1


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


def read_log(path: str | os.PathLike, on_bad_data: str = "refuse") -> list[Frame]:
    """The frames of a `driving_log.csv`, in the order of time.

    Image paths may be relative or absolute, with slashes or backslashes, and may come from another
    machine: a file that is not where the log says is sought in `IMG/` and beside the log.

    Args:
        path: the log, or the folder that holds `driving_log.csv`.
        on_bad_data: "refuse" raises at rows with a missing column, a steering angle that is no
            finite number, or an image that is absent or cannot be decoded to its end; "skip"
            leaves these rows out and lists them.

    Raises:
        DataError: bad rows (refused), or no rows at all; names the file and the row.
    """
    path = Path(path)
    path = path / "driving_log.csv" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path} is not a file: point --data-dir at the log or at its folder")
    frames, problems = [], []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        columns = dict(zip(COLUMNS, range(len(COLUMNS)), strict=True))
        for row, cells in enumerate(csv.reader(file, skipinitialspace=True), start=1):
            cells = [cell.strip() for cell in cells]
            if row == 1 and "steering" in [cell.lower() for cell in cells]:
                columns = {cell.lower(): i for i, cell in enumerate(cells)}
                missing = [c for c in COLUMNS[:4] if c not in columns]
                if missing:
                    raise DataError(f"{path}, row 1: the header has no column {missing[0]!r}")
                continue
            if not any(cells):
                continue  # blank lines end many logs
            try:
                frames.append(_frame(cells, columns, path.parent, row))
            except DataError as error:
                problems.append((row, str(error)))
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
        found = list(pool.map(_image_problem, frames))
    problems += [(f.row, text) for f, text in zip(frames, found, strict=True) if text]
    lines = [f"{path}, row {row}: {text}" for row, text in sorted(problems)]
    report_bad(lines, on_bad_data, str(path))
    good = [f for f, text in zip(frames, found, strict=True) if text is None]
    if not good:
        raise DataError(f"{path} has no usable row")
    return good


def _frame(cells: list[str], columns: dict[str, int], folder: Path, row: int) -> Frame:
    needed = max(columns[name] for name in COLUMNS[:4])
    if len(cells) <= needed:
        raise DataError(f"{len(cells)} columns where {needed + 1} or more are needed")
    text = cells[columns["steering"]]
    try:
        steering = float(text)
    except ValueError:
        steering = math.nan
    if not math.isfinite(steering):
        raise DataError(f"steering={text!r} is not a finite number")
    images = [_find_image(cells[columns[name]], folder) for name in COLUMNS[:3]]
    return Frame(*images, steering=steering, row=row)


def _find_image(text: str, folder: Path) -> Path:
    if not text:
        raise DataError("an image path is empty")
    name = PureWindowsPath(text).name  # splits at slashes and backslashes alike
    candidates = [folder / text.replace("\\", "/"), folder / "IMG" / name, folder / name]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(f"image {text!r} is neither there, nor in IMG/, nor beside the log")
    return found


def _image_problem(frame: Frame) -> str | None:
    for path in (frame.center, frame.left, frame.right):
        problem = image_problem(path)
        if problem:
            return f"{path}: {problem}"
    return None


def load(
    data_dir: str | os.PathLike | None = None,
    image_size: int = 64,
    correction: float = DEFAULT_CORRECTION,
    on_bad_data: str = "refuse",
) -> data.Data:
    """A drive as training data: x float32 [image_size, image_size, 3] in -1..1, y float32 [1].

    The first 80 % of the drive train, the next 10 % validate, the last 10 % test: frames next to
    each other are nearly the same image, so a random split would test on what it trained on.
    Training sees all three cameras, the left one's angle raised and the right one's lowered by
    `correction`, and mirrors half of the images with the angle's sign; validation and test see
    the centre camera as it is.

    Args:
        data_dir: the log or its folder; `None` renders a drive (`render_drive`).
        image_size: side in pixels, after the sky and the bonnet are cut off.
        correction: in the log's units.
        on_bad_data: "refuse" or "skip", see `read_log`.

    Raises:
        DataError: see `read_log`; also fewer than 30 usable rows.
    """
    if not math.isfinite(correction) or correction < 0:
        raise DataError(f"correction={correction} must be a finite number of 0 or more")
    rendered = data_dir is None
    frames = read_log(rendered_drive() if rendered else data_dir, on_bad_data)
    if len(frames) < 30:
        raise DataError(f"{data_dir} has {len(frames)} usable rows: a drive needs 30 or more")
    parts = split_by_time(frames)
    train = [
        (path, angle)
        for f in parts[0]
        for path, angle in (
            (f.center, f.steering),
            (f.left, f.steering + correction),
            (f.right, f.steering - correction),
        )
    ]
    others = [[(f.center, f.steering) for f in part] for part in parts[1:]]

    def image(path):
        return _strip(tf.io.decode_image(tf.io.read_file(path), 3, expand_animations=False))

    def _strip(pixels):
        height = tf.cast(tf.shape(pixels)[0], tf.float32)
        top, bottom = (
            tf.cast(height * _CROP_TOP, tf.int32),
            tf.cast(height * _CROP_BOTTOM, tf.int32),
        )
        strip = pixels[top : tf.shape(pixels)[0] - bottom]
        return data.normalise(tf.image.resize(strip, [image_size, image_size]))

    def preprocess_train(element, seed):
        path, angle = element
        x = image(path)
        flip_seed, light_seed = tf.unstack(tf.random.split(seed, 2))
        mirrored = tf.random.stateless_uniform([], flip_seed) < 0.5
        x = tf.where(mirrored, tf.reverse(x, [1]), x)
        light = tf.random.stateless_uniform([], light_seed, -0.2, 0.2)
        return tf.clip_by_value(x + light, -1.0, 1.0), tf.where(mirrored, -angle, angle)[None]

    def preprocess_eval(path, angle):
        return image(path), angle[None]

    train, validation, test = (_as_split(examples) for examples in (train, *others))
    return data.Data(
        train=train,
        validation=validation,
        test=test,
        preprocess_train=preprocess_train,
        preprocess_eval=preprocess_eval,
        num_outputs=1,
        name=f"drive ({'rendered' if rendered else Path(data_dir).name})",
    )


def split_by_time(frames: list) -> tuple[list, list, list]:
    """The first 80 %, the next 10 % and the last 10 % of a list in the order of time."""
    first, second = len(frames) * 8 // 10, len(frames) * 9 // 10
    return frames[:first], frames[first:second], frames[second:]


def _as_split(examples: list[tuple[Path, float]]) -> data.Split:
    paths = [str(path) for path, _ in examples]
    angles = np.array([angle for _, angle in examples], "float32")
    return data.Split(tf.data.Dataset.from_tensor_slices((paths, angles)), len(examples))


def mean_baseline(drive: data.Data, split: data.Split) -> float:
    """Mean absolute error, in the log's units, of always answering the mean training angle.

    The mean over the training examples, side cameras with their correction included: the best
    constant that the network could have learned.
    """
    mean = np.mean([angle for _, angle in drive.train.dataset.as_numpy_iterator()])
    return float(np.mean([abs(angle - mean) for _, angle in split.dataset.as_numpy_iterator()]))


# ---------------------------------------------------------------------------- rendered scenes

_WIDTH, _HEIGHT = 160, 80
_FOCAL, _HORIZON, _CAMERA_HEIGHT = 80.0, 30, 1.4  # pixels, row, metres
_HALF_ROAD = 3.5  # metres
_SIDE_CAMERA = 0.8  # metres from the centre camera
# The driver: steering = sum of these times curvature (1/m), offset (m) and heading (rad).
# The gain on the offset makes DEFAULT_CORRECTION the right answer to _SIDE_CAMERA metres.
_CURVATURE_GAIN, _OFFSET_GAIN, _HEADING_GAIN = 20.0, DEFAULT_CORRECTION / _SIDE_CAMERA, 1.0


def render_drive(folder: str | os.PathLike, frames: int = 1000, seed: int = 0) -> Path:
    """Draws a drive on a winding road and writes it as the simulator would.

    A flat road in perspective, of changing curvature, on which the car sways; the angle is a
    driver's that steers with the bend and back to the middle. Same arguments, same files.

    Args:
        folder: gets `driving_log.csv` and `IMG/`, JPEG files of 160 x 80 pixels.
        frames: instants, a metre of road each.
        seed: of the road, the swaying, the light and the noise.

    Returns:
        The path of the log.
    """
    folder = Path(folder)
    (folder / "IMG").mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)  # its stream is frozen, default_rng's is not
    curvature = 0.012 * _wave(rng, frames, (60, 90, 140))
    offset = 1.0 * _wave(rng, frames, (35, 50, 80))
    heading = np.gradient(offset)  # radians, as a frame is a metre
    light = 1 + 0.15 * _wave(rng, frames, (70, 200))
    steering = (_CURVATURE_GAIN * curvature - _OFFSET_GAIN * offset - _HEADING_GAIN * heading).clip(
        -1, 1
    )
    log = folder / "driving_log.csv"
    with log.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i in range(frames):
            cells = []
            for camera, shift in (
                ("center", 0.0),
                ("left", -_SIDE_CAMERA),
                ("right", _SIDE_CAMERA),
            ):
                name = f"IMG/{camera}_{i:05d}.jpg"
                pixels = _scene(i, curvature[i], offset[i] + shift, heading[i], light[i], rng)
                Image.fromarray(pixels).save(folder / name, quality=90)
                cells.append(name)
            writer.writerow([*cells, f"{steering[i]:.5f}", "0.5", "0", "15"])
    return log


def _wave(rng, frames: int, periods: tuple[int, ...]) -> np.ndarray:
    """A smooth function of time in about -1..1: a sine for each period (in frames)."""
    time = np.arange(frames)[:, None]
    phase = rng.uniform(0, 2 * np.pi, len(periods))
    weight = rng.uniform(0.5, 1, len(periods))
    return (np.sin(2 * np.pi * time / np.array(periods) + phase) * weight).sum(1) / weight.sum()


def _scene(metres, curvature, offset, heading, light, rng) -> np.ndarray:
    """uint8 [80, 160, 3]: what a camera `offset` metres right of the middle of the road sees."""
    row = np.arange(_HORIZON + 1, _HEIGHT)[:, None]
    distance = _FOCAL * _CAMERA_HEIGHT / (row - _HORIZON)
    middle = curvature * distance**2 / 2 - heading * distance - offset
    across = (np.arange(_WIDTH)[None] - _WIDTH / 2) * distance / _FOCAL - middle  # metres
    along = distance + metres
    ground = np.where(((along // 4) % 2 == 0)[..., None], [70, 120, 50], [80, 132, 58])
    ground = np.broadcast_to(ground, (*across.shape, 3)).astype("float32").copy()
    ground[np.abs(across) < _HALF_ROAD] = (95, 95, 100)
    ground[np.abs(np.abs(across) - _HALF_ROAD) < 0.15] = (230, 230, 225)
    ground[(np.abs(across) < 0.12) & ((along // 3) % 2 == 0)] = (225, 200, 80)
    sky = np.linspace([120, 170, 225], [200, 220, 240], _HORIZON + 1)[:, None]
    image = np.concatenate([np.broadcast_to(sky, (_HORIZON + 1, _WIDTH, 3)), ground])
    noise = rng.normal(0, 5, (*image.shape[:2], 1))
    return (image * light + noise).clip(0, 255).astype("uint8")


def rendered_drive() -> Path:
    """The folder of the embedded drive, rendered on the first call."""
    return _once("driving_rendered-1", render_drive)


SIGNS = (
    "stop",
    "yield",
    "no_entry",
    "speed_limit",
    "priority",
    "turn_left",
    "turn_right",
    "parking",
)


def render_signs(folder: str | os.PathLike, per_class: int = 60, seed: int = 0) -> Path:
    """Draws eight kinds of traffic sign before clutter, as an image folder.

    Args:
        folder: gets `train/`, `validation/` (a sixth) and `test/` (a sixth), each with a folder a
            class, PNG files of 48 x 48 pixels.
        per_class: images of each class.
        seed: of the sizes, places, light and background.

    Returns:
        `folder`.
    """
    folder, rng = Path(folder), np.random.RandomState(seed)
    held_out = max(1, per_class // 6)
    for sign in SIGNS:
        for i in range(per_class):
            split = "test" if i < held_out else "validation" if i < 2 * held_out else "train"
            target = folder / split / sign
            target.mkdir(parents=True, exist_ok=True)
            _draw_sign(sign, rng).save(target / f"{i:04d}.png")
    return folder


def _draw_sign(sign: str, rng) -> Image.Image:
    size = 48
    clutter = rng.randint(40, 200, (6, 6, 3)).astype("uint8")
    image = Image.fromarray(clutter).resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    cx, cy = rng.uniform(20, 28, 2)
    r = rng.uniform(12, 18)

    def polygon(corners, turn, radius, fill):
        angles = np.deg2rad(turn) + 2 * np.pi * np.arange(corners) / corners
        points = [(cx + radius * np.cos(a), cy + radius * np.sin(a)) for a in angles]
        draw.polygon(points, fill=fill)

    def disc(radius, fill):
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=fill)

    def bar(x0, y0, x1, y1, fill):
        draw.rectangle((cx + x0 * r, cy + y0 * r, cx + x1 * r, cy + y1 * r), fill=fill)

    red, white, blue, yellow, black = "#c8102e", "#f4f4f0", "#0b4ea2", "#f2c300", "#202020"
    if sign == "stop":
        polygon(8, 22.5, r, red)
        bar(-0.6, -0.2, 0.6, 0.2, white)
    elif sign == "yield":
        polygon(3, 90, r, red)
        polygon(3, 90, 0.55 * r, white)
    elif sign == "no_entry":
        disc(r, red)
        bar(-0.7, -0.18, 0.7, 0.18, white)
    elif sign == "speed_limit":
        disc(r, red)
        disc(0.75 * r, white)
        bar(-0.35, -0.35, -0.05, 0.35, black)
        bar(0.1, -0.35, 0.4, 0.35, black)
    elif sign == "priority":
        polygon(4, 0, r, white)
        polygon(4, 0, 0.75 * r, yellow)
    elif sign == "parking":
        bar(-0.85, -0.85, 0.85, 0.85, blue)
        bar(-0.35, -0.6, -0.1, 0.6, white)
        bar(-0.1, -0.6, 0.35, 0.05, white)
    else:
        side = -1 if sign == "turn_left" else 1
        disc(r, blue)
        draw.line((cx - side * 0.6 * r, cy, cx + side * 0.3 * r, cy), fill=white, width=4)
        tip = [(0.75, 0), (0.15, -0.45), (0.15, 0.45)]
        draw.polygon([(cx + side * x * r, cy + y * r) for x, y in tip], fill=white)
    pixels = np.asarray(image, "float32") * rng.uniform(0.6, 1.15) + rng.normal(
        0, 8, (size, size, 3)
    )
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def rendered_signs() -> Path:
    """The folder of the embedded signs, rendered on the first call."""
    return _once("signs_rendered-1", render_signs)


def _once(name: str, render) -> Path:
    # Several processes may start at once: each renders aside, the first to finish moves it here.
    target = data.DEFAULT_CACHE / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        render(scratch / name)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(scratch / name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not target.is_dir():
        raise DataError(f"{target} cannot be written: free some space, or give --data-dir")
    return target
