"""The task of the driving recipes: options, data, loss, and a report with pictures."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from recipes.errors import RecipeError
from recipes.training.options import Option, Options, flag_of

if TYPE_CHECKING:  # --help need not wait for TensorFlow
    from recipes.data.driving_log import Drive

RENDERED = "rendered"  # the rendered drive or signs
CURVE = 0.05  # angles beyond it, in the log's units, count as curves
PARTS = ("train", "validation", "test")
LOG_STYLE = {"color": "0.55", "linewidth": 0.8, "label": "log"}
MODEL_STYLE = {"color": "tab:red", "linewidth": 1.0, "label": "model"}
SETTINGS = {
    "dataset": RENDERED,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_epochs": 0.5,
    "weight_decay": 1e-2,
    "clipper": "norm",
    "max_norm": 0.1,
    "scope": "global",
    "epochs": 4,
    # The rate ends at 0. A few hundred frames of validation tell less than that: they took epochs
    # whose batch normalisation was still far off on other frames.
    "select_best": "last",
}


def options(image_width: int) -> tuple[Option, ...]:
    """The options that only driving recipes have; `image_width` is a default in pixels."""
    data = "data"  # their heading in --help
    return (
        Option("image_width", int, image_width, "width in pixels; its height is image-size", data),
        Option(
            "correction",
            float,
            None,
            "added to the left camera's angle and subtracted from the right's (default: fitted)",
            data,
            low=0,
        ),
        Option(
            "keep_straight",
            float,
            1.0,
            "share of the training frames with an angle of exactly 0 to keep",
            data,
            low=0,
            high=1,
        ),
        Option(
            "stretches",
            int,
            4,
            "pieces of the drive, each split in time: 80 % training, 10 % validation, 10 % test",
            data,
            low=1,
        ),
        Option(
            "huber_delta",
            float,
            0.05,
            "Huber loss: errors up to it count squared, larger ones linearly",
            above=0,
        ),
        Option("dead_zone", float, None, "has no effect any more", low=0),
    )


def load(options: argparse.Namespace) -> "Drive":
    """Loads the frames and angles of a log, or of the rendered drive."""
    from recipes.data import driving_log, rendered

    if options.dataset != RENDERED:
        raise RecipeError(
            f"--dataset {options.dataset}: the task steering reads a driving_log.csv; name its "
            "folder with --data-dir, or choose --task signs"
        )
    for name in ("dead_zone", "splits", "augment", "flip", "download", "label_smoothing"):
        if getattr(options, name) != getattr(Options, name, None):
            print(f"warning: {flag_of(name)} has no effect on steering", file=sys.stderr)
    return driving_log.load(
        options.data_dir or rendered.rendered_drive(),
        (options.image_size, options.image_width),
        options.correction,
        options.keep_straight,
        options.stretches,
        options.on_bad_data,
    )


def huber(options: argparse.Namespace):
    """The loss of the angle (Huber 1964)."""
    import keras

    return keras.losses.Huber(delta=options.huber_delta)


def metrics() -> list:
    """Mean absolute error, and mean squared error, in the units of the log."""
    import keras

    return [
        keras.metrics.MeanAbsoluteError(name="mae"),
        keras.metrics.MeanSquaredError(name="mse"),
    ]


# ---------------------------------------------------------------------------------- the report


def report(result) -> list[tuple[str, str]]:
    """Rows for the closing table; also writes files to the run's folder.

    `steering.csv` has the errors, `angles.csv` the true and predicted angle at each frame;
    `drive.png` and `frames.png` show them.

    Args:
        result: the result of a run on a `Drive`; the kept model is read from its folder.
    """
    import keras

    from keras_gradclip.files import write_csv

    if not result.kept:
        return []
    drive, folder = result.data, Path(result.output)
    model = keras.saving.load_model(folder / "best.keras", compile=False)
    errors, rows = [], []
    for name, frames in zip(PARTS, drive.parts, strict=True):
        predictions = predict(model, drive, frames)
        angles = np.array([frame.steering for frame in frames])
        errors.append({"part": name, **scores(angles, predictions, drive.mean_angle)})
        for frame, prediction in zip(frames, predictions, strict=True):
            rows.append((frame.row, name, frame.steering, float(prediction)))
    draw_frames(drive.parts[2], predictions, folder / "frames.png")  # of the last part, the test
    rows.sort()
    write_csv(folder / "steering.csv", list(errors[0]), errors)
    write_csv(folder / "angles.csv", ("row", "part", "angle", "answer"), rows)
    draw_angles(rows, folder / "drive.png", result.recipe)
    table = [
        ("mean errors", "in the log's units (in brackets: those of constant predictions)"),
        ("side cameras corrected by", f"{drive.correction:.3f}"),
    ]
    for row in errors[1:]:
        table += _lines(row)
    return table


def _lines(row: dict) -> list[tuple[str, str]]:
    """The rows of the closing table on a part."""

    def beside(metric, digits=4, more=""):
        model, mean = (f"{row[name]:.{digits}f}" for name in (metric, f"{metric}_mean"))
        return f"{model} (mean angle {mean}{more})"

    part = row["part"]
    return [
        (f"absolute error, {part}", beside("mae", more=f", straight on {row['mae_zero']:.4f}")),
        (f"  in curves (beyond {CURVE})", beside("curve_mae")),
        ("  on straights", beside("straight_mae")),
        (f"squared error, {part}", beside("mse", 5)),
        (f"R², {part}", f"{row['r2']:.3f}"),
    ]


def predict(model, drive: "Drive", frames: Sequence) -> np.ndarray:
    """The model's predictions for the centre camera, float32 [frames]."""
    import tensorflow as tf

    paths = tf.data.Dataset.from_tensor_slices(
        ([str(f.center) for f in frames], np.zeros(len(frames), "float32"))
    )
    images = paths.map(drive.preprocess_eval, num_parallel_calls=tf.data.AUTOTUNE)
    return model.predict(images.batch(64), verbose=0)[:, 0]


def scores(angles: np.ndarray, predictions: np.ndarray, mean_angle: float) -> dict[str, float]:
    """Errors of the model and of constant predictions, in the units of the log.

    Args:
        angles: float [frames], the log's.
        predictions: float [frames], the model's.
        mean_angle: the mean over the training frames.

    Returns:
        `mae`, `mse`; both with `_mean`, for the constant `mean_angle`; `mae_zero`, for the constant
        0, the median of many logs and so the best constant for the absolute error; `r2`, 1 - mse /
        variance of `angles`, NaN if that is 0; `curves`, a count; `curve_mae` and `straight_mae`
        above and below `CURVE`, NaN without frames.
    """
    error, constant = np.abs(angles - predictions), np.abs(angles - mean_angle)
    curve = np.abs(angles) > CURVE
    variance = float(np.var(angles))

    def mean(values):
        return float(np.mean(values)) if len(values) else float("nan")

    return {
        "frames": len(angles),
        "mae": mean(error),
        "mae_mean": mean(constant),
        "mae_zero": mean(np.abs(angles)),
        "mse": mean(error**2),
        "mse_mean": mean(constant**2),
        "r2": 1 - mean(error**2) / variance if variance else float("nan"),
        "curves": int(curve.sum()),
        "curve_mae": mean(error[curve]),
        "curve_mae_mean": mean(constant[curve]),
        "straight_mae": mean(error[~curve]),
        "straight_mae_mean": mean(constant[~curve]),
    }


def draw_angles(rows: Sequence[tuple[int, str, float, float]], path: Path, title: str) -> None:
    """Draws the log's and the model's angle over the drive as a PNG file.

    Each of the `rows` is (row of the log, part, angle, prediction), in the order of the log.
    """
    from matplotlib.figure import Figure

    lines = np.array_split(np.arange(len(rows)), max(1, min(6, len(rows) // 200)))
    figure = Figure(figsize=(14, 1 + 2 * len(lines)), layout="constrained", dpi=100)
    figure.suptitle(f"{title}: the log's angle and the model's (test orange, validation blue)")
    for axis, line in zip(figure.subplots(len(lines), squeeze=False)[:, 0], lines, strict=True):
        at, parts, angles, predictions = zip(*(rows[i] for i in line), strict=True)
        gap = np.diff(at, prepend=at[0]) > 1  # no line across frames outside the split
        for values, style in ((angles, LOG_STYLE), (predictions, MODEL_STYLE)):
            axis.plot(at, np.where(gap, np.nan, values), **style)
        for part, colour in (("validation", "tab:blue"), ("test", "tab:orange")):
            where = np.array(parts) == part
            axis.fill_between(at, -1, 1, where=where, color=colour, alpha=0.2, linewidth=0)
        axis.set_ylim(-1.05, 1.05)
        axis.set_xlim(at[0], at[-1])
        axis.set_ylabel("angle")
    axis.legend(loc="lower right", fontsize="small")
    axis.set_xlabel("row of the log")
    figure.savefig(path)


def draw_frames(frames: Sequence, predictions: np.ndarray, path: Path, count: int = 12) -> None:
    """Draws frames as a PNG file, the log's angle as a green needle, the model's as a red one.

    Half of the frames are the sharpest turn of each time span, half are evenly spaced.
    """
    from matplotlib.figure import Figure

    sharp = np.abs([frame.steering for frame in frames])
    groups = [g for g in np.array_split(np.arange(len(frames)), count // 2) if len(g)]
    chosen = sorted({int(i) for g in groups for i in (g[np.argmax(sharp[g])], g[len(g) // 2])})
    rows = -(-len(chosen) // 3)
    figure = Figure(figsize=(10, 2 * rows), layout="constrained", dpi=100)
    figure.suptitle("frames of the test part: the log's angle green, the model's red", size=10)
    for axis, i in zip(figure.subplots(rows, 3, squeeze=False).flat, chosen, strict=False):
        frame, prediction = frames[i], float(predictions[i])
        with Image.open(frame.center) as image:
            axis.imshow(image)
            x, y = image.width / 2, image.height - 1
        for angle, colour, width in ((frame.steering, "#30e030", 4), (prediction, "#ff3020", 2)):
            turn = np.deg2rad(90 * np.clip(angle, -1, 1))
            tip = (x + y / 2 * np.sin(turn), y - y / 2 * np.cos(turn))
            axis.plot((x, tip[0]), (y, tip[1]), color=colour, linewidth=width)
        axis.set_title(
            f"row {frame.row}: log {frame.steering:+.2f}, model {prediction:+.2f}", size=8
        )
    for axis in figure.axes:
        axis.set_axis_off()
    figure.savefig(path)
