"""Units, what makes one output each: their axes, their norms, and the clip that bounds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat
from keras_gradclip._names import layers_of, path_of
from keras_gradclip._types import Tensor


def number_of_units(variable: keras.Variable, axes: Sequence[int]) -> float:
    """How many units a variable has that span `axes`."""
    return float(math.prod(int(d) for axis, d in enumerate(variable.shape) if axis not in axes))


def default_unit_axes(variable: keras.Variable) -> tuple[int, ...]:
    """The axes that a unit of `variable` spans, as `AdaptiveClip`'s table says."""
    shape = tuple(int(d) for d in variable.shape)
    rank = len(shape)
    layer, _, name = path_of(variable).rpartition("/")
    layer = layer.rpartition("/")[2]
    if sum(d != 1 for d in shape) <= 1 or "bias" in name:
        return tuple(range(rank))
    if name == "embeddings":
        return (rank - 1,)
    if rank >= 3 and ("depthwise" in name or ("depthwise" in layer and name == "kernel")):
        return tuple(range(rank - 2))
    if rank >= 3 and "transpose" in layer:
        return (*range(rank - 2), rank - 1)
    if rank == 3 and layer in ("query", "key", "value"):
        return (0,)
    return tuple(range(rank - 1))


def unit_axes(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """For each kernel of a model, the axes that one unit spans, asked of the layers.

    Args:
        model: a built `keras.Model` or layer.

    Returns:
        A dict from `variable.path` to a tuple of axes, for `AdaptiveClip(axes=...)`: every
        trainable variable with more than one dimension.

    Raises:
        ValueError: the model has no trainable variables yet.
    """
    if not model.trainable_variables:
        raise ValueError(
            "unit_axes: `model` has no trainable variables. Build it first, e.g. by calling it on "
            "a batch."
        )
    result = {
        path_of(v): default_unit_axes(v) for v in model.trainable_variables if len(v.shape) > 1
    }
    layers = keras.layers
    transposes = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
    convolutions = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
    for layer in _compat.all_layers(model):
        kernel = getattr(layer, "kernel", None) if layer.trainable_variables else None
        if kernel is None or path_of(kernel) not in result:
            continue
        rank = len(kernel.shape)
        if sum(int(d) != 1 for d in kernel.shape) <= 1:
            axes = tuple(range(rank))
        elif isinstance(layer, layers.EinsumDense):
            axes = _contracted(layer.equation)
        elif isinstance(layer, transposes):
            axes = (*range(rank - 2), rank - 1)
        elif isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
            axes = tuple(range(rank - 2))
        elif isinstance(layer, (*convolutions, layers.Dense)):
            axes = tuple(range(rank - 1))
        else:
            continue
        result[path_of(kernel)] = axes
    return result


def _contracted(equation: str) -> tuple[int, ...]:
    """The axes of an EinsumDense kernel over which its equation sums."""
    inputs, output = equation.replace(" ", "").replace("...", "").split("->")
    kernel = inputs.split(",")[1]
    return tuple(i for i, letter in enumerate(kernel) if letter not in output)


class Unit(NamedTuple):
    """What the units of a variable are.

    Attributes:
        axes: the axes that one unit spans.
        is_bias: a bias or a scale: of one dimension at most, or called so.
        kernels: of a bias, the position of the kernel whose units its elements belong to; None
            without one.
    """

    axes: tuple[int, ...]
    is_bias: bool
    kernel: int | None = None
    kernel_axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def norm_for_bias(self, read: Callable[[int], Tensor]) -> Tensor:
        """The squared norms of the kernel's units, of the bias's shape."""
        import keras

        square = arithmetic.unit_squares(read(self.kernel), self.kernel_axes)
        return keras.ops.sqrt(keras.ops.reshape(square, self.shape))


def units_of(variables: Sequence[keras.Variable], given=None) -> list[Unit]:
    """For each variable what its units are."""
    biases = dict(_kernels_of_biases(variables))
    result = []
    for i, v in enumerate(variables):
        kernel = biases.get(i)
        axes = () if kernel is None else default_unit_axes(variables[kernel])
        result.append(
            Unit(
                dict(given or ()).get(path_of(v), default_unit_axes(v)),
                is_vector(v),
                kernel,
                axes,
                tuple(v.shape),
            )
        )
    return result


def is_vector(variable: keras.Variable) -> bool:
    """Whether a variable is a bias or a scale: of one dimension at most, or called so."""
    return len(variable.shape) <= 1 or "bias" in path_of(variable).rpartition("/")[2]


def _kernels_of_biases(variables: Sequence[keras.Variable]) -> list[tuple[int, int]]:
    """Positions of biases, each with that of the last kernel in its layer with as many units."""
    layers: dict[str, list[int]] = {}
    for i, layer in enumerate(layers_of(variables)):
        layers.setdefault(layer, []).append(i)
    found = []
    for members in layers.values():
        units = {
            i: number_of_units(variables[i], default_unit_axes(variables[i]))
            for i in members
            if not is_vector(variables[i])
        }
        for i in members:
            size = math.prod(int(d) for d in variables[i].shape)
            kernel = next((k for k, n in reversed(units.items()) if n == size), None)
            if i not in units and kernel is not None:
                found.append((i, kernel))
    return found


def check_axes(owner, axes, variables):
    given = dict(axes or ())
    for variable in variables:
        rank = len(variable.shape)
        own = given.get(path_of(variable), ())
        if any(not 0 <= a < rank for a in own) or len(set(own)) < len(own):
            raise ValueError(
                f"{owner}: `axes` gives {list(own)} for {path_of(variable)!r}, which has "
                f"{rank} dimensions. Name each axis once, from 0 to {rank - 1}."
            )
