"""Data sets of TFDS: builders, features and splits; and the embedded digits."""

import difflib
import itertools
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from recipes.data.image_folder import IMAGE_FOLDER
from recipes.data.mnist_embedded import MnistEmbedded
from recipes.data.sets import Split
from recipes.errors import DataError, first_line

EMBEDDED = "mnist_embedded"
# Test labels of imagenet2012 are withheld: report on its validation split, validate on 1 % of
# the training split.
_SPLITS = {"imagenet2012": ("train[:99%]", "train[99%:]", "validation")}


_ROLES = ("train", "validation", "test")


def tfds_splits(
    dataset: str, data_dir: str | None, download: bool, splits: str | None
) -> tuple[list[Split], tuple[str, ...], str, bool]:
    """Train, validation and test splits of (encoded image, label); the arguments are `load`'s.

    Returns:
        The splits, the class names, the names of the splits if unusual, and whether the images are
        known to be under 96 pixels.

    Raises:
        DataError: the data set is unknown, not prepared, or has no images with labels; or a split
            is empty, unknown, or shares examples.
    """
    builder = _builder(dataset, data_dir, download)
    features = dict(builder.info.features.items())
    keys = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    image, label = (
        next((key for key in [*keys, *features] if isinstance(features.get(key), kind)), None)
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    if image is None or label is None:
        raise DataError(
            f"dataset={builder.name!r} has features {sorted(features)}: a recipe needs an image "
            "and a class label"
        )
    names = _split_names(builder, splits)
    parts = [_split(builder, name, image, label, data_dir) for name in names]
    for role, name, part in zip(_ROLES, names, parts, strict=True):
        if part.size == 0:
            raise DataError(f"dataset={builder.name!r}: the {role} split {name!r} is empty")
    for one, other in itertools.combinations(names, 2):
        if splits and _share(builder, one, other):
            raise DataError(
                f"splits={','.join(names)!r}: {one!r} and {other!r} share examples: test on "
                "others than the model was trained on or chosen by. Split one in two, such as "
                "'train[:90%],train[90%:],test'"
            )
    note = "" if names == _ROLES else f"its {', '.join(names)}"
    classes = features[label].names or [str(i) for i in range(features[label].num_classes)]
    height, width, _ = features[image].shape
    is_small = height is not None and width is not None and max(height, width) < 96
    return parts, tuple(classes), note, is_small


def _builder(dataset: str, data_dir: str | None, download: bool) -> Any:
    if dataset == EMBEDDED:
        # Runs of older versions may name the folder of the digits.
        if data_dir is not None and not (Path(data_dir) / EMBEDDED).is_dir():
            raise DataError(
                f"data-dir={data_dir!r}: {EMBEDDED} needs no folder; to train on images of your "
                f"own add --dataset {IMAGE_FOLDER}"
            )
        return MnistEmbedded()
    if data_dir is not None and not Path(data_dir).is_dir() and not download:
        raise DataError(f"data-dir={data_dir!r} is not a folder: give the one that holds {dataset}")
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
    except Exception as error:  # TFDS raises a dozen kinds for a bad version or config
        no_name = isinstance(error, tfds.core.DatasetNotFoundError)
        if no_name or first_line(error).startswith("Parsing builder name"):
            names = [EMBEDDED, IMAGE_FOLDER, *tfds.list_builders(with_community_datasets=False)]
            close = difflib.get_close_matches(dataset, names, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()"
            raise DataError(f"dataset={dataset!r} is not a TFDS name: {hint}") from None
        raise DataError(f"dataset={dataset!r}: {first_line(error)}") from error
    if download:
        try:
            builder.download_and_prepare()
        except Exception as error:  # network, checksum, missing packages: all end here
            raise DataError(
                f"dataset={dataset!r} could not be downloaded: {first_line(error)}"
            ) from error
    return builder


def _share(builder: Any, one: str, other: str) -> bool:
    """True if two splits, in TFDS's slicing language, share an example."""

    def ranges(name: str) -> list[tuple[str, range]]:
        known = builder.info.splits
        parts = tfds.core.ReadInstruction.from_spec(name).to_absolute(known)
        return [
            (p.splitname, range(known[p.splitname].num_examples)[p.from_ : p.to]) for p in parts
        ]

    return any(
        split == split_2 and max(a.start, b.start) < min(a.stop, b.stop)
        for (split, a), (split_2, b) in itertools.product(ranges(one), ranges(other))
    )


def _split_names(builder: Any, splits: str | None) -> tuple[str, ...]:
    if splits:
        names = tuple(part.strip() for part in splits.split(","))
        if len(names) != 3:
            raise DataError(f"splits={splits!r} must name three: train,validation,test")
        return names
    if builder.name in _SPLITS:
        return _SPLITS[builder.name]
    known = set(builder.info.splits)
    if known.issuperset(_ROLES):
        return _ROLES
    for test in ("test", "validation"):
        if {"train", test} <= known:
            return ("train[:90%]", "train[90%:]", test)
    if known and "train" not in known:
        raise DataError(
            f"dataset={builder.name!r} has no train split but {sorted(known)}: name three "
            "with --splits"
        )
    return ("train[:80%]", "train[80%:90%]", "train[90%:]")


def _split(builder: Any, name: str, image_key: str, label_key: str, data_dir: str | None) -> Split:
    # A single reader, so that the order of examples does not depend on timing.
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    try:
        dataset = builder.as_dataset(
            split=name,
            decoders={image_key: tfds.decode.SkipDecoding()},
            shuffle_files=False,
            read_config=config,
        )
    except (AssertionError, ValueError, KeyError) as error:
        if isinstance(error, AssertionError) or not builder.info.splits:
            folder = data_dir or str(Path(builder.data_dir).parent.parent)
            raise DataError(
                f"dataset={builder.name!r} is not prepared in {folder}: point --data-dir at a "
                "folder that holds it, or add --download"
            ) from None
        raise DataError(f"dataset={builder.name!r}, split {name!r}: {first_line(error)}") from None
    size = int(dataset.cardinality())
    return Split(dataset.map(lambda example: (example[image_key], example[label_key])), size)
