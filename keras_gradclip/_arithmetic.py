"""Arithmetic on one gradient, or on a list of them.

Everything here is written on `keras.ops`; where a backend has one fused operation for what
`keras.ops` does in two passes, the dispatch is in this module and nowhere else.

A *gradient* is a dense tensor, or a `tf.IndexedSlices` (the gradient of an embedding: some rows
of the variable). The functions here take both; sparse gradients are expected without duplicate
rows (`merge_duplicate_rows`).
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

# exp(80) = 5.5e34 still fits float32: a larger exponent would turn a zero gradient into
# 0 * inf = NaN, and thresholds beyond it clip nothing anyway.
MAX_EXPONENT = 80.0

# Far below any useful threshold, far above float32's subnormal numbers.
TINY = 1e-30

# Of float32. A limit beyond it is as good as none, but infinity over infinity is NaN.
LARGEST = float(np.finfo("float32").max)

# Elements. Below, what a gradient costs is the number of operations on it; above, the memory that
# they go through. In ResNet-50, 172 of 214 gradients are below and hold 8 % of the elements.
SMALL = 1 << 16

# Elements. Below, an XLA compilation (about a second) is not worth its while.
WORTH_COMPILING = 1 << 20

# Elements. Below, a square and a sum take less than the 0.1 ms that a convolution starts with.
WORTH_CONVOLVING = 1 << 20

# Rows. A column of so many is added up to 1e-5; longer ones are not.
LONG = 1 << 12

# Elements of a row, where several are put side by side: for a convolution, and for XLA.
SIDE_BY_SIDE, SIDE_BY_SIDE_XLA = 1 << 15, 1 << 13

# Of which XLA adds up the squares of a matrix, see `_folded_squares`.
XLA_BLOCKS = 8


def is_sparse(gradient: Gradient) -> bool:
    """Whether `gradient` is a `tf.IndexedSlices` (told by its fields: TensorFlow may be absent)."""
    return hasattr(gradient, "dense_shape") and hasattr(gradient, "indices")


def read(value: Tensor) -> Tensor:
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


def values(gradient: Gradient) -> Tensor:
    """The dense values of a gradient: itself, or the rows that a sparse gradient holds."""
    return gradient.values if is_sparse(gradient) else ops.convert_to_tensor(gradient)


def dense(gradient: Gradient) -> Gradient:
    """A gradient as a dense tensor: Keras's own conversion lets an IndexedSlices through."""
    if not is_sparse(gradient):
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


def with_values(gradient: Gradient, new: Tensor) -> Tensor:
    """`gradient` with `new` in place of its values."""
    if is_sparse(gradient):
        return type(gradient)(new, gradient.indices, gradient.dense_shape)
    return new


def matching_rows(weight: Tensor, gradient: Gradient) -> Tensor:
    """The part of `weight` that lines up with `values(gradient)`."""
    return ops.take(weight, gradient.indices, axis=0) if is_sparse(gradient) else weight


def clip_between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip(x, low, high), of scalars or tensors of x's shape; NaN stays NaN."""
    if runs_on_tensorflow_cpu() and not _compat.is_traced_for_xla():
        import tensorflow as tf

        # One pass over x where ops.clip runs a minimum and a maximum. XLA fuses the two anyway,
        # and its ClipByValue drops a NaN, as CUDA's does.
        return tf.raw_ops.ClipByValue(t=x, clip_value_min=low, clip_value_max=high)
    clipped = ops.clip(x, low, high)
    if backend.backend() == "tensorflow" and _compat.is_traced_for_xla():
        # XLA fuses this as well. Before TensorFlow 2.21 its minimum and maximum drop a NaN, too.
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
    """`x` in float32 (no operation where it already is)."""
    return ops.cast(x, "float32")


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of x², a float32 scalar whatever x's dtype: float16 overflows at 256² ."""
    x = float32(x)
    if backend.backend() == "tensorflow":
        import tensorflow as tf

        if _is_for_xla_on_cpu(x):
            squares = column_squares(x if len(x.shape) > 1 else x[:, None])
            if squares.shape[-1] > LONG:
                squares = column_squares(ops.reshape(ops.sqrt(squares), (-1, 1)))
            return ops.sum(_apart(squares))
        return 2.0 * tf.nn.l2_loss(x)  # one pass, no temporary
    return ops.sum(ops.square(x))


def column_squares(x: Tensor) -> Tensor:
    """The sum of x² over all axes but the last, which stay as dimensions of 1; float32."""
    x, shape = float32(x), tuple(x.shape)
    is_xla = _is_for_xla_on_cpu(x)
    is_known = all(shape)  # and not empty
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if is_known else (0, 0)
    is_large = rows * columns >= WORTH_CONVOLVING
    if not (is_xla or is_large or rows > LONG) or not runs_on_tensorflow_cpu():
        return ops.sum(ops.square(x), axis=tuple(range(len(shape) - 1)), keepdims=True)
    # TensorFlow adds up a column one element after the other, and so loses digits with every
    # thousand of them. Rows side by side make each sum one of few numbers: about the root of all.
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
    """Sums of squares that XLA does not take for a part of the next sum, to add up all at once."""
    return ops.abs(sums)


def unit_squares(x: Tensor, axes: Sequence[int] | None) -> Tensor:
    """The sum of x² over `axes`, which stay as dimensions of 1; a scalar over all; float32."""
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
    """The squares of a matrix, its rows added up in `XLA_BLOCKS` blocks: fewer rows are left.

    On a CPU, XLA adds up a column as the order of a float sum demands, one element after the other
    from the memory. A sum of blocks goes through it in vectors: an eighth is left for the order.
    """
    rows = x.shape[0] // XLA_BLOCKS
    blocks = [x[k * rows : (k + 1) * rows] for k in range(XLA_BLOCKS)]
    return functools.reduce(operator.add, [ops.square(block) for block in blocks])


def _convolved_squares(x: Tensor) -> Tensor:
    """The sum of the squares of each column of a matrix.

    The gradient of a 1 × 1 depthwise filter is a sum of products, column by column: one pass
    without a temporary, where a square and a sum take up to three times as long.
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
    """x·factor, taken in float32 (float64 for a float64 x) and returned in x's dtype."""
    if backend.standardize_dtype(x.dtype) == "float64":
        return x * ops.cast(factor, "float64")
    return ops.cast(float32(x) * factor, x.dtype)


def fractions_over(
    xs: Sequence[Tensor], limits: Sequence[Tensor], sizes: Sequence[float]
) -> list[Tensor]:
    """For each x the number of its elements with |x| > limit, over its size; float32 scalars.

    Args:
        xs: float tensors.
        limits: for each a scalar, or a tensor of its shape.
        sizes: the numbers of elements of the variables: the rows that a sparse gradient does not
            hold are not clipped.
    """
    cast = {
        (id(limit), x.dtype): ops.cast(limit, x.dtype) for x, limit in zip(xs, limits, strict=True)
    }
    limits = [cast[id(limit), x.dtype] for x, limit in zip(xs, limits, strict=True)]

    def over(x: Tensor, limit: Tensor) -> Tensor:
        return float32(ops.abs(x) > limit)

    counts = _figures(over, xs, limits)
    return [n / max(size, 1) for n, size in zip(counts, sizes, strict=True)]


def sums_of_squares(xs: Sequence[Tensor]) -> list[Tensor]:
    """`sum_of_squares` of each x, for figures: a little less exact, and fewer operations."""
    return _figures(lambda x: ops.square(float32(x)), xs, whole=sum_of_squares)


def _figures(
    fn: Callable[..., Tensor], *lists: Sequence[Tensor], whole: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """The sum of fn(x, ...), elementwise, for each x; vectors are treated as one.

    `whole` does the same at once for a tensor that is left alone.
    """
    whole = whole or (lambda *tensors: ops.sum(fn(*tensors)))
    small: dict[Tensor, list[int]] = {}
    result: list[Tensor] = [None] * len(lists[0])
    for i, tensors in enumerate(zip(*lists, strict=True)):
        shape = tuple(tensors[0].shape)
        # Larger ones lose too much in float32 if their elements are added one by one.
        if None not in shape and 0 < math.prod(shape) <= 4096:
            small.setdefault(tensors[0].dtype, []).append(i)
        else:
            result[i] = whole(*tensors)
    for group in small.values():
        counts = [int(np.prod(lists[0][i].shape)) for i in group]
        flat = [_flat([tensors[i] for i in group], counts) for tensors in lists]
        ids = np.repeat(np.arange(len(group), dtype="int32"), counts)
        figures = ops.broadcast_to(fn(*flat), (len(ids),))  # what comes of scalars is one
        totals = ops.segment_sum(figures, ops.convert_to_tensor(ids), num_segments=len(group))
        for i, total in zip(group, ops.unstack(totals, num=len(group)), strict=True):
            result[i] = total
    return result


def _flat(tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The tensors one behind the other; scalars repeated, or as one if they are the same."""
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
    """`clip_factor` of each scope, a list of float32 scalars.

    Args:
        squares: the squared norm of each scope, float32 scalars.
        limits: what each norm may be at most, float32 scalars.
        sizes: the number of elements of each scope.
    """
    # TensorFlow's CPU runs an operation when its inputs are there: with a factor of its own, a
    # large gradient is scaled while it is still in the cache. Small ones share their operations.
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
    """min(1, max_norm/norm); 0 where the norm is not finite.

    A factor of 0 keeps one infinite element from spoiling its whole scope: the finite gradients
    beside it become 0 and only the element itself becomes NaN, where `global_clipnorm` of Keras
    makes every gradient NaN.
    """
    max_norm = clip_between(ops.convert_to_tensor(max_norm), TINY, LARGEST)
    return ops.where(ops.isfinite(norm), max_norm / ops.maximum(norm, max_norm), 0.0)


def divided(gradients: Sequence[Gradient], divisor: Tensor) -> list[Tensor]:
    """Each gradient over a scalar, in its dtype; float16 in float32, as a scale may exceed it."""
    if isinstance(divisor, (int, float)) and divisor == 1:
        return list(gradients)

    def one(gradient: Gradient) -> Gradient:
        x = values(gradient)
        wide = "float64" if backend.standardize_dtype(x.dtype) == "float64" else "float32"
        quotient = ops.cast(x, wide) / ops.cast(divisor, wide)
        return with_values(gradient, ops.cast(quotient, x.dtype))

    return [None if g is None else one(g) for g in gradients]


def rescaled(mode: str, before: Tensor, after: Tensor) -> Tensor:
    """A clipped gradient with the L2 norm ("norm") or largest element ("max") of before.

    A gradient of 0 stays 0; where the ratio of the two is not finite, it counts as 1.
    """
    size = max_abs if mode == "max" else lambda x: ops.sqrt(sum_of_squares(x))
    old, new = size(before), size(after)
    ratio = ops.where(
        new > 0, old / ops.where(new > 0, new, ops.ones_like(new)), ops.zeros_like(new)
    )
    return scale(after, ops.where(ops.isfinite(ratio), ratio, ops.ones_like(ratio)))


def all_finite(gradients: Sequence[Gradient]) -> Tensor:
    """A boolean scalar: every element of every gradient is finite (None entries are ignored)."""
    flags = [ops.all(ops.isfinite(values(g))) for g in gradients if g is not None]
    return ops.all(ops.stack(flags))


def merge_duplicate_rows(gradient: Gradient) -> Tensor:
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


class Programs:
    """XLA programs of functions that are applied to one large gradient at a time.

    TensorFlow writes the result of each operation to memory; XLA goes through it once. Variables
    of one shape share a program.

    Args:
        variables: those whose gradients will come, dense: their shapes decide what pays.
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
        """Whether a program for `x` is worth its compilation, here and now."""
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
