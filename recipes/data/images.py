"""Decoding, cropping and mirroring of image files."""

import tensorflow as tf


def decode_train(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    image_size: int,
    augment: str,
    flip: bool,
    orientation: tf.Tensor | int = 1,
) -> tf.Tensor:
    """One training image: float32 [image_size, image_size, 3] in 0..255.

    Args:
        encoded: scalar string tensor, a JPEG, PNG, BMP or GIF file.
        seed: int64 [2] tensor for the stateless random ops.
        image_size: int, side in pixels.
        augment: str, "imagenet", "shift" or "none" (see `load`).
        flip: bool, mirror half of the images.
        orientation: the EXIF orientation, see `upright`.
    """
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    image = _decode_random_crop(encoded, crop_seed) if augment == "imagenet" else decode(encoded)
    image = tf.image.resize(upright(image, orientation), [image_size, image_size])
    if augment == "shift":
        border = max(1, image_size // 8)
        edge = [[border, border], [border, border], [0, 0]]
        image = tf.pad(image, edge, mode="SYMMETRIC")
        image = tf.image.stateless_random_crop(image, [image_size, image_size, 3], crop_seed)
    if flip:
        image = tf.image.stateless_random_flip_left_right(image, flip_seed)
    return tf.ensure_shape(image, [image_size, image_size, 3])


def decode_eval(
    encoded: tf.Tensor, image_size: int, augment: str, orientation: tf.Tensor | int = 1
) -> tf.Tensor:
    """One evaluation image, float32 [image_size, image_size, 3] in 0..255.

    With augment "imagenet": the standard crop, the central image_size pixels after the shorter
    side was resized to image_size · 256 / 224; otherwise the whole image, resized. `orientation`
    as in `upright`.
    """
    image = upright(decode(encoded), orientation)
    if augment == "imagenet":
        shape = tf.cast(tf.shape(image)[:2], tf.float32)
        # Crop first, then resize once: the same pixels at less cost.
        side = tf.reduce_min(shape) * (224.0 / 256.0)
        side = tf.maximum(tf.cast(tf.round(side), tf.int32), 1)
        top, left = tf.unstack((tf.shape(image)[:2] - side) // 2)
        image = tf.image.crop_to_bounding_box(image, top, left, side, side)
    image = tf.image.resize(image, [image_size, image_size])
    return tf.ensure_shape(image, [image_size, image_size, 3])


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a file to uint8 [height, width, 3], for training and for the check before it.

    Raises:
        tf.errors.InvalidArgumentError: the file is damaged, or of an unknown format.
    """
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])


def upright(image: tf.Tensor, orientation: tf.Tensor | int) -> tf.Tensor:
    """Turns and mirrors an image [height, width, 3] by its EXIF tag, which TensorFlow ignores.

    Args:
        image: the stored image.
        orientation: the EXIF tag of that name, 1 to 8; 1: already upright.
    """
    if isinstance(orientation, int) and orientation == 1:
        return image
    quarters = tf.gather([0, 0, 0, 2, 2, 3, 3, 1, 1], orientation)  # counter-clockwise
    mirrored = tf.gather([False, False, True, False, True, True, False, True, False], orientation)
    turned = tf.image.rot90(image, quarters)
    return tf.ensure_shape(
        tf.cond(mirrored, lambda: tf.reverse(turned, [1]), lambda: turned), [None, None, 3]
    )


def _decode_random_crop(encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A random box of 8 to 100 % of the area and aspect 3:4 to 4:3 (Szegedy et al., 2014)."""

    def box(shape: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
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

    def jpeg() -> tf.Tensor:
        # Decodes only the pixels of the box, about half the work of a whole photograph.
        begin, size = box(tf.image.extract_jpeg_shape(encoded))
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        return tf.image.decode_and_crop_jpeg(encoded, window, channels=3)

    def other() -> tf.Tensor:
        image = decode(encoded)
        begin, size = box(tf.shape(image))
        return tf.slice(image, begin, size)

    image = tf.cond(tf.io.is_jpeg(encoded), jpeg, other)
    return tf.ensure_shape(image, [None, None, 3])
