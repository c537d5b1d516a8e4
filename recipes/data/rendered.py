"""A rendered drive and rendered traffic signs: data for the driving recipes without a download.

Each is drawn on the first call, into the recipes' cache. Same arguments, same files.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from keras_gradclip.files import write_csv
from recipes.data.driving_log import COLUMNS

# Not under version control; safe to delete.
CACHE = Path(__file__).resolve().parents[2] / "runs" / "data"
# The angle that the driver adds for a side camera's view, in the log's units.
SIDE_CORRECTION = 0.2
_WIDTH, _HEIGHT = 160, 80
_FOCAL, _HORIZON, _CAMERA_HEIGHT = 80.0, 30, 1.4  # pixels, row, metres
_HALF_ROAD = 3.5  # metres
_SIDE_CAMERA = 0.8  # metres from the centre camera
# The driver: steering = sum of these times curvature (1/m), offset (m) and heading (rad).
# The gain of the offset makes SIDE_CORRECTION correct at _SIDE_CAMERA metres.
_CURVATURE_GAIN, _OFFSET_GAIN, _HEADING_GAIN = 20.0, SIDE_CORRECTION / _SIDE_CAMERA, 1.0


def rendered_drive() -> Path:
    """The folder of the embedded drive, rendered on the first call."""
    return _cached("driving_rendered-1", render_drive)


def rendered_signs() -> Path:
    """The folder of the embedded signs, rendered on the first call."""
    return _cached("signs_rendered-1", render_signs)


def _cached(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the cache, filled by `make(folder)` on the first call.

    Several processes may call this at once: the first to finish moves its result into place.
    """
    target = CACHE / name
    if not target.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=CACHE) as scratch:
            made = Path(scratch) / "made"
            make(made)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(target)
    return target


def render_drive(folder: str | os.PathLike, frames: int = 1000, seed: int = 0) -> Path:
    """Draws a drive on a winding road and writes it as the simulator would.

    A flat road in perspective with changing curvature, on which the car sways; the driver follows
    the bend and steers back to the middle. Same arguments, same files.

    Args:
        folder: gets `driving_log.csv` and `IMG/`, JPEG files of 160 x 80 pixels.
        frames: the number of frames, one per metre of road.
        seed: random seed of the road, the swaying, the light and the noise.

    Returns:
        The path of the log.
    """
    folder = Path(folder)
    (folder / "IMG").mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)  # its stream never changes, unlike default_rng's
    curvature = 0.012 * _wave(rng, frames, (60, 90, 140))
    offset = 1.0 * _wave(rng, frames, (35, 50, 80))
    heading = np.gradient(offset)  # radians, one frame per metre
    light = 1 + 0.15 * _wave(rng, frames, (70, 200))
    steering = (_CURVATURE_GAIN * curvature - _OFFSET_GAIN * offset - _HEADING_GAIN * heading).clip(
        -1, 1
    )
    cameras = {"center": 0.0, "left": -_SIDE_CAMERA, "right": _SIDE_CAMERA}
    rows = []
    for i in range(frames):
        names = [f"IMG/{camera}_{i:05d}.jpg" for camera in cameras]
        rows.append([*names, f"{steering[i]:.5f}", 0.5, 0, 15])
        for name, shift in zip(names, cameras.values(), strict=True):
            pixels = _scene(i, curvature[i], offset[i] + shift, heading[i], light[i], rng)
            Image.fromarray(pixels).save(folder / name, quality=90)
    write_csv(folder / "driving_log.csv", COLUMNS, rows)
    return folder / "driving_log.csv"


def _wave(rng, frames: int, periods: tuple[int, ...]) -> np.ndarray:
    """A smooth function of time in about -1..1: a sine for each period (in frames)."""
    time = np.arange(frames)[:, None]
    phase = rng.uniform(0, 2 * np.pi, len(periods))
    weight = rng.uniform(0.5, 1, len(periods))
    return (np.sin(2 * np.pi * time / np.array(periods) + phase) * weight).sum(1) / weight.sum()


def _scene(metres, curvature, offset, heading, light, rng) -> np.ndarray:
    """The view of a camera `offset` metres right of the road's middle, uint8 [80, 160, 3]."""
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


_RED, _WHITE, _BLUE, _YELLOW, _BLACK = "#c8102e", "#f4f4f0", "#0b4ea2", "#f2c300", "#202020"
# The shapes of each sign, drawn one over the other, in units of its radius. A disc: its radius; a
# bar: its corners x0, y0, x1, y1; a polygon: corners, rotation in degrees, radius; an arrow: -1 to
# the left, 1 to the right.
SIGNS: dict[str, list[tuple]] = {
    "stop": [("polygon", _RED, 8, 22.5, 1), ("bar", _WHITE, -0.6, -0.2, 0.6, 0.2)],
    "yield": [("polygon", _RED, 3, 90, 1), ("polygon", _WHITE, 3, 90, 0.55)],
    "no_entry": [("disc", _RED, 1), ("bar", _WHITE, -0.7, -0.18, 0.7, 0.18)],
    "speed_limit": [
        ("disc", _RED, 1),
        ("disc", _WHITE, 0.75),
        ("bar", _BLACK, -0.35, -0.35, -0.05, 0.35),
        ("bar", _BLACK, 0.1, -0.35, 0.4, 0.35),
    ],
    "priority": [("polygon", _WHITE, 4, 0, 1), ("polygon", _YELLOW, 4, 0, 0.75)],
    "turn_left": [("disc", _BLUE, 1), ("arrow", _WHITE, -1)],
    "turn_right": [("disc", _BLUE, 1), ("arrow", _WHITE, 1)],
    "parking": [
        ("bar", _BLUE, -0.85, -0.85, 0.85, 0.85),
        ("bar", _WHITE, -0.35, -0.6, -0.1, 0.6),
        ("bar", _WHITE, -0.1, -0.6, 0.35, 0.05),
    ],
}


def render_signs(folder: str | os.PathLike, per_class: int = 60, seed: int = 0) -> Path:
    """Draws eight kinds of traffic signs on cluttered backgrounds, as an image folder.

    Args:
        folder: gets `train/`, `validation/` (a sixth) and `test/` (a sixth), each with one folder
            per class of PNG files with 48 x 48 pixels.
        per_class: the number of images of each class.
        seed: random seed of sizes, places, light and background.

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
    middle, radius = rng.uniform(20, 28, 2), rng.uniform(12, 18)

    def at(*points):
        return [tuple(middle + radius * np.array(point)) for point in points]

    for shape, colour, *sizes in SIGNS[sign]:
        if shape == "disc":
            (r,) = sizes
            draw.ellipse(at((-r, -r), (r, r)), colour)
        elif shape == "bar":
            draw.rectangle(at(sizes[:2], sizes[2:]), colour)
        elif shape == "polygon":
            corners, turn, r = sizes
            angles = np.deg2rad(turn) + 2 * np.pi * np.arange(corners) / corners
            draw.polygon(at(*zip(r * np.cos(angles), r * np.sin(angles), strict=True)), colour)
        else:
            (side,) = sizes
            draw.line(at((-0.6 * side, 0), (0.3 * side, 0)), colour, width=4)
            draw.polygon(at((0.75 * side, 0), (0.15 * side, -0.45), (0.15 * side, 0.45)), colour)
    light = rng.uniform(0.6, 1.15)
    pixels = np.asarray(image, "float32") * light + rng.normal(0, 8, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))
