"""Arithmetic on gradients, with `keras.ops` or a faster operation of the backend.

A gradient is a dense tensor, or a `tf.IndexedSlices` with some rows of an embedding table, each
row once (see `merge_duplicate_rows`).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence

import keras
import numpy as np
from keras import backend, ops

from keras_gradclip import _compat
from keras_gradclip._types import Gradient, Tensor
from keras_gradclip.names import size_of

#: Largest exponent: exp(80) = 5.5e34 fits float32, and 0 * inf would be NaN.
MAX_EXPONENT = 80.0
#: Far below any useful threshold, far above float32's subnormal numbers.
TINY = 1e-30
#: Largest limit; with an infinite one, inf / inf would be NaN.
LARGEST = float(np.finfo("float32").max)
#: Elements below which the number of operations matters, and above it the memory traffic. In
#: ResNet-50, 172 of 214 gradients are smaller and hold 8 % of the elements.
SMALL = 1 << 16
#: Elements that make an XLA compilation (about a second) worthwhile.
WORTH_COMPILING = 1 << 20
#: Elements that make the start of a convolution (0.1 ms) worthwhile.
WORTH_CONVOLVING = 1 << 20
#: Rows that TensorFlow sums with a relative error below 1e-5.
LONG = 1 << 12
#: Elements of a row made of several rows, for a convolution and for XLA.
SIDE_BY_SIDE, SIDE_BY_SIDE_XLA = 1 << 15, 1 << 13
#: Blocks of `_folded_squares`.
XLA_BLOCKS = 8


def is_sparse(gradient: Gradient) -> bool:
    """Whether `gradient` is a `tf.IndexedSlices`."""
    return hasattr(gradient, "dense_shape") and hasattr(gradient, "indices")


def read(value: Tensor) -> Tensor:
    """The present value of a variable; tensors and numbers as they are.

    `keras.ops.convert_to_tensor` returns a TensorFlow variable itself, whose value may change
    before it is used.
    """
    if isinstance(value, keras.Variable):
        value = value.value
    if backend.backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(value, tf.Variable):
            return tf.convert_to_tensor(value)
    return value


def values(gradient: Gradient) -> Tensor:
    """The values of a gradient, for a sparse one those of its rows."""
    return gradient.values if is_sparse(gradient) else ops.convert_to_tensor(gradient)


def dense(gradient: Gradient) -> Gradient:
    """A gradient as a dense tensor; Keras's conversion does not convert an IndexedSlices."""
    if not is_sparse(gradient):
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


def with_values(gradient: Gradient, new: Tensor) -> Tensor:
    """`gradient` with other values."""
    if is_sparse(gradient):
        return type(gradient)(new, gradient.indices, gradient.dense_shape)
    return new


def matching_rows(weight: Tensor, gradient: Gradient) -> Tensor:
    """The rows of `weight` that correspond to `values(gradient)`."""
    return ops.take(weight, gradient.indices, axis=0) if is_sparse(gradient) else weight


def clip_between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip(x, low, high) by scalars or tensors of x's shape; NaN stays NaN."""
    if runs_on_tensorflow_cpu() and not _compat.is_traced_for_xla():
        import tensorflow as tf

        # One pass, where ops.clip takes two. In XLA and on CUDA, ClipByValue drops a NaN.
        return tf.raw_ops.ClipByValue(t=x, clip_value_min=low, clip_value_max=high)
    clipped = ops.clip(x, low, high)
    if backend.backend() == "tensorflow" and _compat.is_traced_for_xla():
        # Before TensorFlow 2.21, XLA's minimum and maximum drop a NaN.
        return ops.where(ops.isnan(x), x, clipped)
    return clipped


@functools.cache
def runs_on_tensorflow_cpu() -> bool:
    """Whether the backend is TensorFlow without a GPU."""
    if backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def float32(x: Tensor) -> Tensor:
    """`x` in float32."""
    return ops.cast(x, "float32")


def sum_of_squares(*xs: Tensor) -> Tensor:
    """The sum of x² over all elements as a float32 scalar: float16 overflows at 256²."""
    is_tensorflow = backend.backend() == "tensorflow"
    parts = [_half_of_squares(x) if is_tensorflow else ops.sum(ops.square(float32(x))) for x in xs]
    total = parts[0] if len(parts) == 1 else ops.sum(ops.stack(parts))
    return 2.0 * total if is_tensorflow else total


def _half_of_squares(x: Tensor) -> Tensor:
    import tensorflow as tf

    x = float32(x)
    if not _is_for_xla_on_cpu(x):
        return tf.nn.l2_loss(x)  # one pass, no temporary
    squares = column_squares(x if len(x.shape) > 1 else x[:, None])
    if squares.shape[-1] > LONG:
        squares = column_squares(ops.reshape(ops.sqrt(squares), (-1, 1)))
    return 0.5 * ops.sum(_apart(squares))


def column_squares(x: Tensor) -> Tensor:
    """The sum of x² over all axes but the last, kept as dimensions of 1; float32."""
    x, shape = float32(x), tuple(x.shape)
    is_xla = _is_for_xla_on_cpu(x)
    is_known = all(shape)  # and not empty
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if is_known else (0, 0)
    is_large = rows * columns >= WORTH_CONVOLVING
    if not (is_xla or is_large or rows > LONG) or not runs_on_tensorflow_cpu():
        return ops.sum(ops.square(x), axis=tuple(range(len(shape) - 1)), keepdims=True)
    # TensorFlow sums a column element by element, which loses digits in long columns. With several
    # rows side by side, each sum is one of fewer numbers: about the square root of all.
    limit = max((SIDE_BY_SIDE_XLA if is_xla else SIDE_BY_SIDE) // columns, 1)
    width = 1 << (min(math.isqrt(rows), limit).bit_length() - 1)
    block = width * (XLA_BLOCKS if is_xla else 1)
    whole = rows - rows % block
    x = ops.reshape(x, (rows, columns))
    wide = ops.reshape(x[:whole], (whole // width, width * columns))
    if is_xla:
        sums = ops.sum(_folded_squares(wide), axis=0)
    elif is_large and not _compat.is_traced_for_xla():
        sums = _convolved_squares(wide)
    else:
        sums = ops.sum(ops.square(wide), axis=0)
    total = ops.sum(_apart(ops.reshape(sums, (width, columns))), axis=0)
    if whole < rows:
        total = total + ops.sum(ops.square(x[whole:]), axis=0)
    return ops.reshape(total, (*[1] * (len(shape) - 1), columns))


def _apart(sums: Tensor) -> Tensor:
    """Sums of squares that XLA does not merge with the next sum."""
    return ops.abs(sums)


def unit_squares(x: Tensor, axes: Sequence[int] | None) -> Tensor:
    """The sum of x² over `axes`, kept as dimensions of 1; a scalar for all axes; float32."""
    if axes is None or len(axes) == len(x.shape):
        return sum_of_squares(x)
    if tuple(axes) == tuple(range(len(x.shape) - 1)):
        return column_squares(x)
    square = ops.square(float32(x))
    return ops.sum(square, axis=tuple(axes), keepdims=True) if axes else square


def _is_for_xla_on_cpu(x: Tensor) -> bool:
    shape = tuple(x.shape)
    return (
        runs_on_tensorflow_cpu()
        and None not in shape
        and math.prod(shape) >= SMALL
        and _compat.is_traced_for_xla()
    )


def _folded_squares(x: Tensor) -> Tensor:
    """The squares of a matrix, summed over `XLA_BLOCKS` blocks of rows.

    On a CPU, XLA sums a column element by element. A sum of blocks is vectorised and leaves an
    eighth of the rows.
    """
    rows = x.shape[0] // XLA_BLOCKS
    blocks = [x[k * rows : (k + 1) * rows] for k in range(XLA_BLOCKS)]
    return functools.reduce(operator.add, [ops.square(block) for block in blocks])


def _convolved_squares(x: Tensor) -> Tensor:
    """The sum of squares of each column of a matrix, as the gradient of a 1 × 1 depthwise filter.

    One pass without a temporary; a square and a sum take up to three times as long.
    """
    import tensorflow as tf

    image = tf.reshape(x, (1, -1, 1, x.shape[1]))
    sums = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=image,
        filter_sizes=[1, 1, x.shape[1], 1],
        out_backprop=image,
        strides=[1, 1, 1, 1],
        padding="VALID",
    )
    return tf.reshape(sums, (-1,))


def max_abs(x: Tensor) -> Tensor:
    """The largest |x|, a float32 scalar; 0 for an empty tensor."""
    return ops.max(float32(ops.abs(x)), initial=0.0)


def exp_of(beta: Tensor, weight: Tensor) -> Tensor:
    """exp(β·W) in float32, kept finite."""
    return ops.exp(ops.minimum(beta * float32(weight), MAX_EXPONENT))


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x·factor in x's dtype, computed in float32 (float64 for a float64 x)."""
    if backend.standardize_dtype(x.dtype) == "float64":
        return x * ops.cast(factor, "float64")
    return ops.cast(float32(x) * factor, x.dtype)


def fractions_over(
    xs: Sequence[Tensor], limits: Sequence[Tensor], sizes: Sequence[float]
) -> list[Tensor]:
    """The fraction of elements with |x| > limit, for each x; float32 scalars.

    A limit is a scalar or has the shape of x. A size is that of the variable, including rows that
    a sparse gradient lacks.
    """
    cast = {
        (id(limit), x.dtype): ops.cast(limit, x.dtype) for x, limit in zip(xs, limits, strict=True)
    }
    limits = [cast[id(limit), x.dtype] for x, limit in zip(xs, limits, strict=True)]

    def over(x: Tensor, limit: Tensor) -> Tensor:
        return float32(ops.abs(x) > limit)

    counts = _sums(over, xs, limits)
    return [n / max(size, 1) for n, size in zip(counts, sizes, strict=True)]


def sums_of_squares(xs: Sequence[Tensor]) -> list[Tensor]:
    """`sum_of_squares` of each x, with fewer operations and slightly less precision."""
    return _sums(lambda x: ops.square(float32(x)), xs, whole=sum_of_squares)


def _sums(
    fn: Callable[..., Tensor], *lists: Sequence[Tensor], whole: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """The sum of the elementwise fn(x, ...) for each x, computed for all small x at once.

    `whole` computes the sum for a large x.
    """
    whole = whole or (lambda *tensors: ops.sum(fn(*tensors)))
    small: dict[Tensor, list[int]] = {}
    result: list[Tensor] = [None] * len(lists[0])
    for i, tensors in enumerate(zip(*lists, strict=True)):
        shape = tuple(tensors[0].shape)
        # `segment_sum` adds element by element, too imprecise for larger ones.
        if None not in shape and 0 < math.prod(shape) <= 4096:
            small.setdefault(tensors[0].dtype, []).append(i)
        else:
            result[i] = whole(*tensors)
    for group in small.values():
        counts = [int(np.prod(lists[0][i].shape)) for i in group]
        flat = [_flat([tensors[i] for i in group], counts) for tensors in lists]
        ids = np.repeat(np.arange(len(group), dtype="int32"), counts)
        figures = ops.broadcast_to(fn(*flat), (len(ids),))  # all may be scalars
        totals = ops.segment_sum(figures, ops.convert_to_tensor(ids), num_segments=len(group))
        for i, total in zip(group, ops.unstack(totals, num=len(group)), strict=True):
            result[i] = total
    return result


def _flat(tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The concatenated tensors, with scalars repeated; a single scalar if all are the same."""
    if all(t is tensors[0] for t in tensors) and len(tensors[0].shape) == 0:
        return tensors[0]
    rows = [
        ops.reshape(t, (-1,)) if len(t.shape) else ops.broadcast_to(t, (n,))
        for t, n in zip(tensors, counts, strict=True)
    ]
    return rows[0] if len(rows) == 1 else ops.concatenate(rows)


def clip_factors(
    squares: Sequence[Tensor], limits: Sequence[Tensor], sizes: Sequence[int]
) -> list[Tensor]:
    """The `clip_factor` of each scope, from its squared norm, its limit and its size."""
    # On a CPU, a large gradient with a separate factor is scaled while it is in the cache. Small
    # ones share operations.
    result: list[Tensor] = [None] * len(squares)
    together = [i for i, size in enumerate(sizes) if size < SMALL or not runs_on_tensorflow_cpu()]
    for i in {*range(len(sizes))} - {*together}:
        result[i] = clip_factor(ops.sqrt(squares[i]), limits[i])
    if together:
        shared = all(limits[i] is limits[together[0]] for i in together)
        limit = limits[together[0]] if shared else ops.stack([limits[i] for i in together])
        factors = clip_factor(ops.sqrt(ops.stack([squares[i] for i in together])), limit)
        for i, factor in zip(together, ops.unstack(factors, num=len(together)), strict=True):
            result[i] = factor
    return result


def clip_factor(norm: Tensor, max_norm: Tensor) -> Tensor:
    """min(1, max_norm/norm); 0 if the norm is not finite.

    Then finite gradients in the scope become 0, and only an infinite element becomes NaN. Keras's
    `global_clipnorm` makes every gradient NaN.
    """
    max_norm = clip_between(ops.convert_to_tensor(max_norm), TINY, LARGEST)
    return ops.where(ops.isfinite(norm), max_norm / ops.maximum(norm, max_norm), 0.0)


def divided(gradients: Sequence[Gradient], divisor: Tensor) -> list[Tensor]:
    """Each gradient over a scalar, in its dtype; a loss scale may be infinite in float16."""
    if isinstance(divisor, (int, float)) and divisor == 1:
        return list(gradients)

    def one(gradient: Gradient) -> Gradient:
        x = values(gradient)
        wide = "float64" if backend.standardize_dtype(x.dtype) == "float64" else "float32"
        quotient = ops.cast(x, wide) / ops.cast(divisor, wide)
        return with_values(gradient, ops.cast(quotient, x.dtype))

    return [None if g is None else one(g) for g in gradients]


def rescaled(mode: str, before: Tensor, after: Tensor) -> Tensor:
    """`after`, scaled to the L2 norm ("norm") or largest element ("max") of `before`.

    A zero gradient stays zero, and a ratio that is not finite counts as 1.
    """
    size = max_abs if mode == "max" else lambda x: ops.sqrt(sum_of_squares(x))
    old, new = size(before), size(after)
    ratio = ops.where(new > 0, old / ops.where(new > 0, new, 1.0), 0.0)
    return scale(after, ops.where(ops.isfinite(ratio), ratio, 1.0))


def all_finite(gradients: Sequence[Gradient]) -> Tensor:
    """Whether all elements of all gradients are finite, a boolean scalar."""
    flags = [ops.all(ops.isfinite(values(g))) for g in gradients if g is not None]
    return ops.all(ops.stack(flags))


def merge_duplicate_rows(gradient: Gradient) -> Tensor:
    """A sparse gradient with the sum of rows that occur several times; others as they are."""
    if gradient is None or not is_sparse(gradient):
        return gradient
    import tensorflow as tf

    rows, position = tf.unique(gradient.indices)
    merged = tf.math.unsorted_segment_sum(gradient.values, position, tf.shape(rows)[0])
    merged.set_shape([None, *gradient.values.shape[1:]])
    return tf.IndexedSlices(merged, rows, gradient.dense_shape)


class Programs:
    """Functions of one large gradient, compiled by XLA, which goes through memory only once.

    Gradients of one shape share a program. The variables' shapes decide where it pays.
    """

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        sizes: dict[tuple[int, ...], int] = {}
        for v in variables:
            sizes[tuple(v.shape)] = sizes.get(tuple(v.shape), 0) + size_of(v)
        self._shapes = {
            shape
            for shape, size in sizes.items()
            if size >= WORTH_COMPILING and math.prod(shape) >= SMALL
        }
        self._programs: dict[object, Callable[..., Tensor]] = {}

    def pays(self, x: Tensor) -> bool:
        """Whether a program for `x` is worth its compilation."""
        if backend.backend() != "tensorflow" or tuple(x.shape) not in self._shapes:
            return False
        import tensorflow as tf

        return not tf.executing_eagerly() and not _compat.is_traced_for_xla()

    def run(
        self, key: Hashable, function: Callable[..., Tensor], x: Tensor, *args: object
    ) -> Tensor:
        """`function(x, *args)`, compiled; `key` distinguishes it from other functions."""
        import tensorflow as tf

        key = (key, tuple(x.shape), x.dtype)
        if key not in self._programs:  # TensorFlow warns of a function with many traces
            self._programs[key] = tf.function(function, jit_compile=True, autograph=False)
        return self._programs[key](x, *args)
