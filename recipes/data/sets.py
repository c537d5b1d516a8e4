"""Data for the recipes: any TFDS classification set, an image folder, or embedded MNIST.

The training order is a pure function of (seed, epoch, step): `train_stream(..., start_step=k)`
yields exactly the batches that an uninterrupted run sees from step k on, augmentation included.
That is what makes a killed and resumed run end with the same weights.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from recipes.errors import DataError

EMBEDDED = "mnist_embedded"
IMAGE_FOLDER = "image_folder"
# Beside the runs, out of version control; safe to delete.
DEFAULT_CACHE = Path(__file__).resolve().parents[2] / "runs" / "data"
_SMALL_SHUFFLE_BUFFER = 50_000  # examples of small encoded images: the whole set fits
_LARGE_SHUFFLE_BUFFER = 8_192  # examples of encoded photographs, about 1 GB
# Test labels of imagenet2012 are withheld: report on its validation split, validate on 1 % of
# the training split.
_SPLITS = {"imagenet2012": ("train[:99%]", "train[99%:]", "validation")}
# Mirrored digits and signs change or lose their meaning.
_NEVER_FLIPPED = ("mnist", "svhn", "omniglot", "sign", "gtsrb", "emnist")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split in storage order.

    Attributes:
        dataset: `tf.data.Dataset` of elements of any structure, finite, not batched, in the same
            order at each iteration, cheap to skip (still encoded where possible).
        size: int, the number of elements.
    """

    dataset: tf.data.Dataset
    size: int


@dataclasses.dataclass(frozen=True)
class Data:
    """What a recipe trains on.

    Attributes:
        train, validation, test: `Split`.
        preprocess_train: `(element, seed) -> (x, y)`; `seed` is an int64 [2] tensor, unique to
            this example and epoch, for stateless random ops.
        preprocess_eval: `(element) -> (x, y)`.
        num_outputs: int, classes of a classifier, or values predicted.
        name: str, for tables and file heads.
        shuffle_buffer: int, examples held to shuffle from.
    """

    train: Split
    validation: Split
    test: Split
    preprocess_train: Callable
    preprocess_eval: Callable
    num_outputs: int
    name: str
    shuffle_buffer: int = _SMALL_SHUFFLE_BUFFER


@dataclasses.dataclass(frozen=True)
class Part:
    """What one worker of several takes of the data.

    Attributes:
        worker, workers: int, its place and their number.
        replicas: int, devices of all workers together, the same number on each.
    """

    worker: int = 0
    workers: int = 1
    replicas: int = 1


WHOLE = Part()


def steps_per_epoch(split: Split, batch_size: int, limit: int | None = None) -> int:
    """Full batches in one epoch (the remainder differs from epoch to epoch and is dropped)."""
    steps = split.size // batch_size
    if steps == 0:
        raise DataError(
            f"batch-size={batch_size} is larger than the {split.size} training examples: "
            "choose a smaller one"
        )
    return min(steps, limit) if limit else steps


def train_stream(
    data: Data,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    steps: int | None = None,
    part: Part = WHOLE,
) -> tf.data.Dataset:
    """Endless batches of (x, y), shuffled and augmented, from global step `start_step` on.

    Args:
        data: `Data`.
        batch_size: int, the global batch, split over the replicas by the strategy.
        seed: int, fixes the order and the augmentation.
        start_step: int, steps (batches) of the run already done.
        steps: int or None, steps an epoch; default `steps_per_epoch`.
        part: `Part` of every batch that this worker computes; each batch then has the size of one
            replica's.
    """
    steps = steps or steps_per_epoch(data.train, batch_size)
    first_epoch, first_step = divmod(start_step, steps)
    base = data.train.dataset
    buffer = max(1, min(data.shuffle_buffer, data.train.size))

    def one_epoch(epoch):
        # Sets the seed of this function's graph alone: the order depends on `seed`, not on the
        # caller's global seed as well (and TensorFlow cannot combine a global 0 with a tensor).
        tf.random.set_seed(1)
        # Seeds of neighbouring epochs must not collide with those of a neighbouring `seed`.
        order = tf.random.stateless_uniform(
            [2], tf.stack([tf.constant(seed, tf.int64), epoch]), None, None, tf.int64
        )
        shuffled = base.shuffle(buffer, seed=order[0], reshuffle_each_iteration=False)
        numbered = shuffled.enumerate().take(steps * batch_size)
        done = tf.where(epoch == first_epoch, first_step * batch_size, 0)
        mine = _share(numbered.skip(tf.cast(done, tf.int64)), part)
        return mine.map(lambda index, element: (tf.stack([order[1], index]), element))

    epochs = tf.data.Dataset.range(first_epoch, tf.int64.max)
    stream = epochs.flat_map(one_epoch)
    stream = stream.map(
        lambda example_seed, element: data.preprocess_train(element, example_seed),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    stream = stream.batch(batch_size // part.replicas, drop_remainder=True)
    return stream.prefetch(tf.data.AUTOTUNE).with_options(_options())


def eval_batches(data: Data, split: Split, batch_size: int, part: Part = WHOLE) -> tf.data.Dataset:
    """Batches of (x, y) of a whole split in storage order, the last one possibly smaller.

    With a `part`, this worker's examples in batches for its replicas, as many on every worker and
    none of them empty: some layers cannot compute nothing.
    """
    examples = _share(split.dataset, part).map(
        data.preprocess_eval, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    batches, count = examples.batch(batch_size), -(-split.size // batch_size)
    if part != WHOLE:
        sizes = _part_sizes(split.size, batch_size, part)
        batches, count = batches.rebatch(sizes), len(sizes)
    batches = batches.prefetch(tf.data.AUTOTUNE)
    return batches.apply(tf.data.experimental.assert_cardinality(count)).with_options(_options())


def _part_sizes(size: int, batch_size: int, part: Part) -> list[int]:
    """The sizes of the batches of one worker's devices in turn, as even as can be.

    Args:
        size: int, examples of all workers together.
        batch_size: int, the global batch, which none of the steps exceeds.
        part: `Part`.

    Raises:
        DataError: fewer examples than devices.
    """
    local = part.replicas // part.workers
    most, least = -(-size // part.workers), size // part.workers
    steps = -(-most // (local * (batch_size // part.replicas)))
    if least < steps * local:
        raise DataError(
            f"{size} examples to evaluate are too few for {part.replicas} devices at "
            f"--batch-size {batch_size}: use fewer devices or a larger batch"
        )
    mine = len(range(part.worker, size, part.workers))
    each, more = divmod(mine, steps * local)
    return [each + 1] * more + [each] * (steps * local - more)


def _share(dataset: tf.data.Dataset, part: Part) -> tf.data.Dataset:
    """Every `workers`-th example, before anything costly is done to it."""
    return dataset if part.workers == 1 else dataset.shard(part.workers, part.worker)


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # By examples, not by files: small sets have fewer files than there are workers.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return options


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
    """A classification set, ready for `train_stream` and `eval_batches`.

    Images leave as float32 [image_size, image_size, 3] in -1..1, labels as int64 scalars.

    Args:
        dataset: str, `mnist_embedded`, `image_folder` (then `data_dir` is laid out as
            split/class/file) or any TFDS name (`cifar10`, `imagenet2012:5.1.0`).
        data_dir: str or None, the folder that holds the prepared data set.
        image_size: int, side in pixels.
        augment: str, "imagenet" (a random crop of 8 to 100 % of the area, decoded alone; the
            evaluation crop is the centre of an image resized to 256/224), "shift" (pad by an
            eighth and crop; evaluation on the whole image), "none", or "auto": imagenet where
            images may be 96 pixels or more a side, else shift.
        flip: bool or None, mirror half of the training images; None: yes, but for digits and
            signs or with augment "none".
        splits: str or None, "train,validation,test" in TFDS's slicing language; None: the set's
            own, with a tenth of the training split held out where there is no validation split.
        download: bool, let TFDS download and prepare.
        on_bad_data: str, "refuse" or "skip", for unreadable files of an image folder.

    Raises:
        DataError: the data set is unknown, not prepared, or has no images with labels.
    """
    if dataset == IMAGE_FOLDER:
        from recipes.data.image_folder import image_folder_splits

        parts, num_classes = image_folder_splits(data_dir, on_bad_data)
        train, validation, test = parts
        read, small = _read_file, False
    else:
        builder = _builder(dataset, data_dir, download)
        image_key, label_key, num_classes, small = _features(builder)
        train, validation, test = _tfds_splits(builder, image_key, label_key, splits, data_dir)
        read = None
    if augment == "auto":
        augment = "shift" if small else "imagenet"
    if flip is None:
        lower = dataset.lower()
        flip = augment != "none" and not any(word in lower for word in _NEVER_FLIPPED)

    def preprocess_train(element, seed):
        encoded, label = element
        encoded = read(encoded) if read else encoded
        image = decode_train(encoded, seed, image_size, augment, flip)
        return normalise(image), label

    def preprocess_eval(encoded, label):
        encoded = read(encoded) if read else encoded
        return normalise(decode_eval(encoded, image_size, augment)), label

    return Data(
        train=train,
        validation=validation,
        test=test,
        preprocess_train=preprocess_train,
        preprocess_eval=preprocess_eval,
        num_outputs=num_classes,
        name=dataset,
        shuffle_buffer=_SMALL_SHUFFLE_BUFFER if small or read else _LARGE_SHUFFLE_BUFFER,
    )


# ------------------------------------------------------------------------------------- images


def normalise(image: tf.Tensor) -> tf.Tensor:
    """Pixels 0..255 of any dtype to float32 in -1..1, the same for every data set."""
    return tf.cast(image, tf.float32) / 127.5 - 1.0


def decode_train(encoded, seed, image_size: int, augment: str, flip: bool) -> tf.Tensor:
    """One training image: float32 [image_size, image_size, 3] in 0..255.

    Args:
        encoded: scalar string tensor, a JPEG, PNG, BMP or GIF file.
        seed: int64 [2] tensor for the stateless random ops.
        image_size: int, side in pixels.
        augment: str, "imagenet", "shift" or "none" (see `load`).
        flip: bool, mirror half of the images.
    """
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    if augment == "imagenet":
        image = _decode_random_crop(encoded, crop_seed)
        image = tf.image.resize(image, [image_size, image_size])
    else:
        image = tf.image.resize(_decode(encoded), [image_size, image_size])
        if augment == "shift":
            border = max(1, image_size // 8)
            edge = [[border, border], [border, border], [0, 0]]
            image = tf.pad(image, edge, mode="SYMMETRIC")
            image = tf.image.stateless_random_crop(image, [image_size, image_size, 3], crop_seed)
    if flip:
        image = tf.image.stateless_random_flip_left_right(image, flip_seed)
    return tf.ensure_shape(image, [image_size, image_size, 3])


def decode_eval(encoded, image_size: int, augment: str) -> tf.Tensor:
    """One evaluation image, float32 [image_size, image_size, 3] in 0..255.

    With augment "imagenet": the standard crop, the central image_size pixels after the shorter
    side was resized to image_size · 256 / 224; otherwise the whole image, resized.
    """
    image = _decode(encoded)
    if augment == "imagenet":
        shape = tf.cast(tf.shape(image)[:2], tf.float32)
        # The centre first, then one resize: the same pixels at less cost.
        side = tf.reduce_min(shape) * (224.0 / 256.0)
        side = tf.maximum(tf.cast(tf.round(side), tf.int32), 1)
        top, left = tf.unstack((tf.shape(image)[:2] - side) // 2)
        image = tf.image.crop_to_bounding_box(image, top, left, side, side)
    image = tf.image.resize(image, [image_size, image_size])
    return tf.ensure_shape(image, [image_size, image_size, 3])


def _decode(encoded) -> tf.Tensor:
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def _decode_random_crop(encoded, seed) -> tf.Tensor:
    """A random box of 8 to 100 % of the area and aspect 3:4 to 4:3 (Szegedy et al., 2014)."""

    def box(shape):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        return begin, size

    def jpeg():
        # Decodes the pixels of the box alone, about half the work of a whole photograph.
        begin, size = box(tf.image.extract_jpeg_shape(encoded))
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        return tf.image.decode_and_crop_jpeg(encoded, window, channels=3)

    def other():
        image = _decode(encoded)
        begin, size = box(tf.shape(image))
        return tf.slice(image, begin, size)

    image = tf.cond(tf.io.is_jpeg(encoded), jpeg, other)
    return tf.ensure_shape(image, [None, None, 3])


def _read_file(path) -> tf.Tensor:
    return tf.io.read_file(path)


# --------------------------------------------------------------------------------------- TFDS


def _builder(dataset: str, data_dir: str | None, download: bool):
    import tensorflow_datasets as tfds

    if data_dir is not None and not Path(data_dir).is_dir() and not download:
        raise DataError(f"data-dir={data_dir!r} is not a folder: give the one that holds {dataset}")
    if dataset == EMBEDDED:
        from recipes.data.mnist_embedded import prepared_builder

        return prepared_builder(data_dir or os.environ.get("TFDS_DATA_DIR") or DEFAULT_CACHE)
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        names = [EMBEDDED, IMAGE_FOLDER, *tfds.list_builders(with_community_datasets=False)]
        close = difflib.get_close_matches(dataset, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()"
        raise DataError(f"dataset={dataset!r} is not a TFDS name: {hint}") from None
    except Exception as error:  # TFDS raises a dozen kinds for a bad version or config
        raise DataError(f"dataset={dataset!r}: {_first_line(error)}") from error
    if download:
        try:
            builder.download_and_prepare()
        except Exception as error:  # network, checksum, missing packages: all end here
            raise DataError(
                f"dataset={dataset!r} could not be downloaded: {_first_line(error)}"
            ) from error
    return builder


def _features(builder) -> tuple[str, str, int, bool]:
    """(image key, label key, classes, images surely under 96 pixels)."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    keys = builder.info.supervised_keys
    image = keys[0] if keys and keys[0] in images else next(iter(images), None)
    label = keys[1] if keys and keys[1] in labels else next(iter(labels), None)
    if image is None or label is None:
        raise DataError(
            f"dataset={builder.name!r} has features {sorted(features)}: a recipe needs an image "
            "and a class label"
        )
    height, width, _ = features[image].shape
    small = height is not None and width is not None and max(height, width) < 96
    return image, label, features[label].num_classes, small


def _tfds_splits(builder, image_key, label_key, splits, data_dir) -> list[Split]:
    names = _split_names(builder, splits)
    parts = []
    for role, name in zip(("train", "validation", "test"), names, strict=True):
        parts.append(_tfds_split(builder, name, image_key, label_key, data_dir))
        if parts[-1].size == 0:
            raise DataError(f"dataset={builder.name!r}: the {role} split {name!r} is empty")
    return parts


def _split_names(builder, splits: str | None) -> tuple[str, ...]:
    if splits:
        names = tuple(part.strip() for part in splits.split(","))
        if len(names) != 3:
            raise DataError(f"splits={splits!r} must name three: train,validation,test")
        return names
    if builder.name in _SPLITS:
        return _SPLITS[builder.name]
    known = set(builder.info.splits)
    if {"train", "validation", "test"} <= known:
        return ("train", "validation", "test")
    if {"train", "test"} <= known:
        return ("train[:90%]", "train[90%:]", "test")
    if {"train", "validation"} <= known:
        return ("train[:90%]", "train[90%:]", "validation")
    if known and "train" not in known:
        raise DataError(
            f"dataset={builder.name!r} has no train split but {sorted(known)}: name three "
            "with --splits"
        )
    return ("train[:80%]", "train[80%:90%]", "train[90%:]")


def _tfds_split(builder, name, image_key: str, label_key: str, data_dir) -> Split:
    import tensorflow_datasets as tfds

    # One reader at a time: the order of the examples must not depend on timing.
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    try:
        dataset = builder.as_dataset(
            split=name,
            decoders={image_key: tfds.decode.SkipDecoding()},
            shuffle_files=False,
            read_config=config,
        )
    except AssertionError:
        folder = data_dir or str(Path(builder.data_dir).parent.parent)
        raise DataError(
            f"dataset={builder.name!r} is not prepared in {folder}: point --data-dir at a folder "
            "that holds it, or add --download"
        ) from None
    except (ValueError, KeyError) as error:
        raise DataError(f"dataset={builder.name!r}, split {name!r}: {_first_line(error)}") from None
    size = int(dataset.cardinality())
    return Split(dataset.map(lambda example: (example[image_key], example[label_key])), size)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
