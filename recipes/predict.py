"""Predicts the class of each image with a model that a recipe has trained.

    python recipes/predict.py runs/alexnet photo.jpg
    python recipes/predict.py birds.keras garden/*.jpg

Prints one line per image: the three likeliest classes with their probabilities, or the steering
angle of a driving recipe's model. Images are decoded as in the run's evaluation and turned as EXIF
says.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from recipes.command_line import Parser, exit_status, import_tensorflow
    from recipes.errors import RecipeError, plain_errors
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")

_SHOWN = 3  # classes per image


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status is that of `recipes.command_line.exit_status`."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def work() -> None:
        parser = Parser("predict.py", __doc__, usage="predict.py RUN IMAGE ...")
        parser.add_argument(
            "run", metavar="RUN", help="folder of a run, or a .keras file beside its .classes.json"
        )
        parser.add_argument("images", metavar="IMAGE", nargs="+", help="JPEG, PNG, GIF or BMP file")
        arguments = parser.parse_args(argv)
        images = [_existing(name) for name in arguments.images]
        for line in predict(_model_of(Path(arguments.run)), images):
            print(line)

    return exit_status(work, argv)


def _existing(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        raise RecipeError(f"{name} is a folder: name its images, such as {path / '*.jpg'}")
    if not path.is_file():
        raise RecipeError(f"{name}: no such file")
    return path


def _model_of(run: Path) -> Path:
    if run.is_dir():
        if not (run / "best.keras").is_file():
            raise RecipeError(
                f"{run} has no best.keras: it is not the folder of a run, or the run has kept no "
                "epoch so far"
            )
        return run / "best.keras"
    if not run.is_file() or run.suffix != ".keras":
        raise RecipeError(f"{run} is neither the folder of a run nor a .keras file")
    return run


def predict(model_path: Path, paths: Sequence[Path]) -> list[str]:
    """A line of text for each image: its likeliest classes, or the steering angle.

    Args:
        model_path: a `.keras` file of a run, with its class names beside it.
        paths: the images.

    Raises:
        RecipeError: a file is damaged or missing, or the model and the names do not match.
    """
    import_tensorflow()  # after the flags are checked
    import keras
    import numpy as np
    import tensorflow as tf

    from recipes.data import driving_log, images, sets
    from recipes.data.image_folder import exif_orientation, image_problem
    from recipes.training.evaluation import read_names

    names, decoding = read_names(model_path)
    for path in paths:
        if problem := image_problem(path):
            raise RecipeError(f"{path}: {problem}")

    def decode(path: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
        if not names:
            return driving_log.road(path, **decoding)
        encoded = tf.io.read_file(path)
        return sets.normalise(images.decode_eval(encoded, **decoding, orientation=orientation))

    files = ([os.fsencode(path) for path in paths], [exif_orientation(path) for path in paths])
    with plain_errors():
        batches = tf.data.Dataset.from_tensor_slices(files).map(decode).batch(32)
        model = keras.models.load_model(model_path, compile=False)
        outputs = model.predict(batches, verbose=0)
    if outputs.shape[-1] != (len(names) or 1):
        raise RecipeError(
            f"{model_path} has {outputs.shape[-1]} outputs, and the file of its class names "
            f"{len(names)}: they do not belong together"
        )
    if not names:
        return [f"{p}: steering angle {y[0]:+.4f}" for p, y in zip(paths, outputs, strict=True)]
    return [
        f"{path}: "
        + ", ".join(f"{names[i]} {100 * row[i]:.1f} %" for i in np.argsort(-row)[:_SHOWN])
        for path, row in zip(paths, outputs, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
