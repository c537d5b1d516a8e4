"""The exponential clip, in one pass over the memory where TensorFlow's operations take several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from keras import ops

from keras_gradclip import _compat
from keras_gradclip import _kernels as kernels
from keras_gradclip._types import Tensor


def clip_exponential(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    beta: Tensor,
    gamma: Tensor,
    *,
    rescale: bool = False,
) -> list[Tensor]:
    """clip(x, -α, α) with α = γ·exp(β·W), for each x; with `rescale`, times exp(β·W).

    Args:
        xs: dense float tensors.
        weights: W for each of them: a tensor of its shape, or a scalar.
        beta: β, a float32 scalar tensor.
        gamma: γ, a float32 scalar tensor.
        rescale: multiply by exp(β·W) after the clip.

    Returns:
        The clipped tensors, in the dtypes of `xs`.
    """
    compiled = _worth_compiling(xs)
    chosen = [xs[i] for i in compiled], [weights[i] for i in compiled]
    result = dict(zip(compiled, _compiled_exponential(*chosen, beta, gamma, rescale), strict=True))
    for i in {*range(len(xs))} - {*compiled}:
        result[i] = _exponential(xs[i], weights[i], beta, gamma, rescale)
    return [result[i] for i in range(len(xs))]


def _exponential(x: Tensor, weight: Tensor, beta: Tensor, gamma: Tensor, rescale: bool) -> Tensor:
    factor = kernels.exp_of(beta, weight)
    y = kernels.clip_symmetric(x, gamma * factor)
    return kernels.scale(y, factor) if rescale else y


def _compiled_exponential(
    xs: Sequence[Tensor], weights: Sequence[Tensor], beta: Tensor, gamma: Tensor, rescale: bool
) -> list[Tensor]:
    """`_exponential` by XLA, in one pass: TensorFlow's operations would write every step out."""
    groups, pieces = _group_small(xs, weights)
    # A call for each large tensor: they run side by side, and those of one size share a program.
    results = []
    for group in groups:
        x, weight = _joined([xs[i] for i in group]), _joined([weights[i] for i in group])
        size, shape = x.shape.num_elements(), x.shape
        if weight.shape == shape:  # flat, so that more of them share a program
            x, weight = ops.reshape(x, (size,)), ops.reshape(weight, (size,))
        run = _xla_exponential(tuple(x.shape), x.dtype)
        results.append(ops.reshape(run(x, weight, beta, gamma, rescale), shape))
    return pieces(results)


@functools.cache
def _xla_exponential(shape: tuple[int, ...], dtype: Tensor) -> Callable[..., Tensor]:
    del shape, dtype  # one function for each: TensorFlow warns of one that is traced for many
    import tensorflow as tf

    return tf.function(_exponential, jit_compile=True, autograph=False)


def _worth_compiling(xs: Sequence[Tensor]) -> list[int]:
    """Which tensors XLA may have: on TensorFlow's CPU, in a graph, of static shape, and many."""
    if not kernels.runs_on_tensorflow_cpu() or _compat.is_traced_for_xla():
        return []
    import tensorflow as tf

    if tf.executing_eagerly():
        return []
    chosen = [i for i, x in enumerate(xs) if x.shape.is_fully_defined()]
    size = sum(xs[i].shape.num_elements() for i in chosen)
    return chosen if size >= kernels.WORTH_COMPILING else []


def _group_small(
    xs: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[list[int]], Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Which tensors to treat as one, and the function that takes the results apart again."""
    groups: list[list[int]] = []
    small: dict[Tensor, list[int]] = {}
    for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        if x.shape.num_elements() < kernels.SMALL and weight.shape == x.shape:
            small.setdefault((x.dtype, weight.dtype), []).append(i)
        else:
            groups.append([i])
    groups += small.values()

    def pieces(results: Sequence[Tensor]) -> list[Tensor]:
        out: list[Tensor] = [None] * len(xs)
        for group, result in zip(groups, results, strict=True):
            if len(group) == 1:
                out[group[0]] = result
                continue
            ends = np.cumsum([xs[i].shape.num_elements() for i in group])[:-1].tolist()
            for i, piece in zip(group, ops.split(result, ends), strict=True):
                out[i] = ops.reshape(piece, xs[i].shape)
        return out

    return groups, pieces


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor as it is; several, flat and one behind the other."""
    if len(tensors) == 1:
        return tensors[0]
    return ops.concatenate([ops.reshape(t, (-1,)) for t in tensors])
