"""Data: `load` returns a data set by name, `Feed` its batches."""

from typing import Any

import tensorflow as tf

from recipes.data import images
from recipes.data.image_folder import IMAGE_FOLDER, image_folder_splits
from recipes.data.sets import LARGE_SHUFFLE_BUFFER, SMALL_SHUFFLE_BUFFER, Data, Split, normalise
from recipes.data.stream import Feed
from recipes.data.tfds import EMBEDDED, tfds_splits
from recipes.errors import DataError

__all__ = ["Data", "Feed", "Split", "load", "load_named"]
# Data sets not to mirror: digits and signs would change their meaning.
_NEVER_FLIPPED = ("mnist", "svhn", "omniglot", "sign", "gtsrb", "emnist")


def load_named(options: Any) -> Data:
    """The data set that the options of a run name."""
    names = ("data_dir", "image_size", "augment", "flip", "splits", "download", "on_bad_data")
    return load(options.dataset, **{name: getattr(options, name) for name in names})


def load(
    dataset: str = EMBEDDED,
    data_dir: str | None = None,
    image_size: int = 224,
    augment: str = "auto",
    flip: bool | None = None,
    splits: str | None = None,
    download: bool = False,
    on_bad_data: str = "refuse",
) -> Data:
    """A classification set, ready for a `Feed`.

    Images are float32 [image_size, image_size, 3] in -1..1, labels int64 scalars.

    Args:
        dataset: str, `mnist_embedded`, `image_folder` (then `data_dir` is laid out as class/file
            or split/class/file) or any TFDS name (`cifar10`, `imagenet2012:5.1.0`).
        data_dir: str or None, the folder that holds the prepared data set.
        image_size: int, side in pixels.
        augment: str, "imagenet" (a random crop of 8 to 100 % of the area, decoded alone; the
            evaluation crop is the centre of an image resized to 256/224), "shift" (pad by an
            eighth and crop; evaluation on the whole image), "none", or "auto": imagenet where
            images may be 96 pixels or more a side, else shift.
        flip: bool or None, mirror half of the training images; None: yes, except for digits,
            signs and augment "none".
        splits: str or None, "train,validation,test" in TFDS's slicing language; None: the set's
            own; a missing one gets a tenth of the training split. Splits must not share examples.
        download: bool, let TFDS download and prepare.
        on_bad_data: str, "refuse" or "skip", for unreadable files of an image folder.

    Raises:
        DataError: the data set is unknown, not prepared, or has no images with labels.
    """
    if files := dataset == IMAGE_FOLDER:
        if splits:
            raise DataError(
                f"splits={splits!r}: an image folder has none to name; lay it out as "
                "train/CLASS/FILE, with validation/ and test/ alike"
            )
        parts, class_names, note = image_folder_splits(data_dir, on_bad_data)
        buffer = parts[0].size  # all, for they are sorted by class; a path takes little memory
    else:
        parts, class_names, note, small = tfds_splits(dataset, data_dir, download, splits)
        buffer = SMALL_SHUFFLE_BUFFER if small else LARGE_SHUFFLE_BUFFER
    read = tf.io.read_file if files else tf.identity
    if augment == "auto":
        augment = "imagenet" if files or not small else "shift"
    if flip is None:
        flip = augment != "none" and not any(word in dataset.lower() for word in _NEVER_FLIPPED)
    decoding: dict[str, Any] = {"image_size": image_size, "augment": augment}

    # Elements are (image, label), or (path, label, EXIF orientation) from an image folder.
    def preprocess_train(element: Any, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, label, *turned = element
        pixels = images.decode_train(read(image), seed, image_size, augment, flip, *turned)
        return normalise(pixels), label

    def preprocess_eval(
        image: tf.Tensor, label: tf.Tensor, orientation: tf.Tensor | int = 1
    ) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = images.decode_eval(read(image), **decoding, orientation=orientation)
        return normalise(pixels), label

    train, validation, test = parts
    return Data(
        train,
        validation,
        test,
        preprocess_train,
        preprocess_eval,
        num_outputs=len(class_names),
        name=dataset,
        shuffle_buffer=buffer,
        note=note,
        class_names=class_names,
        decoding=decoding,
    )
