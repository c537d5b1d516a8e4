"""Arithmetic on one gradient, or on a list of them.

Everything here is written on `keras.ops`; where a backend has one fused operation for what
`keras.ops` does in two passes, the dispatch is in this module and nowhere else.

A *gradient* is a dense tensor, or a `tf.IndexedSlices` (the gradient of an embedding: some rows
of the variable). The functions here take both; sparse gradients are expected without duplicate
rows (`aggregation.merge_duplicate_rows`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import backend, ops

# exp(80) = 5.5e34 still fits float32: a larger exponent would turn a zero gradient into
# 0 * inf = NaN, and thresholds beyond it clip nothing anyway.
MAX_EXPONENT = 80.0

# Far below any useful threshold, far above float32's subnormal numbers.
TINY = 1e-30


def is_sparse(gradient: Any) -> bool:
    """Whether `gradient` is a `tf.IndexedSlices` (told by its fields: TensorFlow may be absent)."""
    return hasattr(gradient, "dense_shape") and hasattr(gradient, "indices")


def read(value: Any) -> Any:
    """The present value of a variable, as a tensor; tensors and numbers as they are.

    `keras.ops.convert_to_tensor` hands a TensorFlow variable through, to be read whenever it is
    used: after an assignment that would be the new value.
    """
    if isinstance(value, keras.Variable):
        value = value.value
    if backend.backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(value, tf.Variable):
            return tf.convert_to_tensor(value)
    return value


def values(gradient: Any) -> Any:
    """The dense values of a gradient: itself, or the rows that a sparse gradient holds."""
    return gradient.values if is_sparse(gradient) else ops.convert_to_tensor(gradient)


def with_values(gradient: Any, new: Any) -> Any:
    """`gradient` with `new` in place of its values."""
    if is_sparse(gradient):
        return type(gradient)(new, gradient.indices, gradient.dense_shape)
    return new


def matching_weight(variable: Any, gradient: Any) -> Any:
    """The part of `variable` that lines up with `values(gradient)`."""
    weight = ops.convert_to_tensor(read(variable))
    return ops.take(weight, gradient.indices, axis=0) if is_sparse(gradient) else weight


def clip_symmetric(x: Any, limit: Any) -> Any:
    """clip(x, -limit, limit), `limit` a scalar or a tensor of x's shape; NaN stays NaN."""
    limit = ops.cast(limit, x.dtype)
    if backend.backend() == "tensorflow" and _one_pass_clip_keeps_nan():
        import tensorflow as tf

        # One pass over x where ops.clip runs a minimum and a maximum.
        return tf.raw_ops.ClipByValue(t=x, clip_value_min=-limit, clip_value_max=limit)
    return ops.clip(x, -limit, limit)


@functools.cache
def _one_pass_clip_keeps_nan() -> bool:
    """TensorFlow's GPU kernel of ClipByValue uses CUDA's min and max, which drop a NaN."""
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def float32(x: Any) -> Any:
    """`x` in float32 (no operation where it already is)."""
    return ops.cast(x, "float32")


def sum_of_squares(x: Any) -> Any:
    """The sum of x², a float32 scalar whatever x's dtype: float16 overflows at 256² ."""
    x = float32(x)
    if backend.backend() == "tensorflow":
        import tensorflow as tf

        return 2.0 * tf.nn.l2_loss(x)  # one pass, no temporary
    return ops.sum(ops.square(x))


def rms(x: Any) -> Any:
    """The root mean square of `x`, a float32 scalar."""
    size = 1
    for dim in x.shape:
        size *= int(dim)
    return ops.sqrt(sum_of_squares(x) / max(size, 1))


def max_abs(x: Any) -> Any:
    """The largest |x|, a float32 scalar; 0 for an empty tensor."""
    return ops.max(float32(ops.abs(x)), initial=0.0)


def exp_of(beta: Any, weight: Any) -> Any:
    """exp(β·W) in float32, kept finite."""
    return ops.exp(ops.minimum(beta * float32(weight), MAX_EXPONENT))


def scale(x: Any, factor: Any) -> Any:
    """x·factor, taken in float32 and returned in x's dtype."""
    return ops.cast(float32(x) * factor, x.dtype)


def fraction_over(x: Any, limit: Any, size: int) -> Any:
    """The number of elements of x with |x| > limit, over `size`; a float32 scalar.

    `size` is the variable's: the rows that a sparse gradient does not hold are not clipped.
    """
    over = ops.abs(x) > ops.cast(limit, x.dtype)
    return ops.sum(float32(over)) / max(size, 1)


def clip_factor(norm: Any, max_norm: Any) -> Any:
    """min(1, max_norm/norm); 0 where the norm is not finite.

    A factor of 0 keeps one infinite element from spoiling its whole scope: the finite gradients
    beside it become 0 and only the element itself becomes NaN, where `global_clipnorm` of Keras
    makes every gradient NaN.
    """
    factor = max_norm / ops.maximum(ops.maximum(norm, max_norm), TINY)
    return ops.where(ops.isfinite(norm), factor, ops.zeros_like(factor))


def ratio(before: Any, after: Any) -> Any:
    """before/after; 0 where `after` is 0 and 1 where the ratio is not finite."""
    safe = ops.where(after > 0, after, ops.ones_like(after))
    result = ops.where(after > 0, before / safe, ops.zeros_like(after))
    return ops.where(ops.isfinite(result), result, ops.ones_like(result))


def all_finite(gradients: Sequence[Any]) -> Any:
    """A boolean scalar: every element of every gradient is finite (None entries are ignored)."""
    flags = [ops.all(ops.isfinite(values(g))) for g in gradients if g is not None]
    return ops.all(ops.stack(flags))


def merge_duplicate_rows(gradient: Any) -> Any:
    """A sparse gradient in which every row occurs once; other gradients as they are.

    An embedding that looked up a row four times gives that row four times; a norm or a clip must
    see their sum.
    """
    if gradient is None or not is_sparse(gradient):
        return gradient
    import tensorflow as tf

    rows, position = tf.unique(gradient.indices)
    merged = tf.math.unsorted_segment_sum(gradient.values, position, tf.shape(rows)[0])
    merged.set_shape([None, *gradient.values.shape[1:]])
    return tf.IndexedSlices(merged, rows, gradient.dense_shape)
