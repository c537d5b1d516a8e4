"""Units: the weights of one output of a layer, as the layers define them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import keras
from keras import ops

from keras_gradclip._layers import ByVariable, is_normalisation, owners_of
from keras_gradclip._types import Tensor
from keras_gradclip.names import layers_of, path_of


def number_of_units(variable: keras.Variable, axes: Sequence[int]) -> float:
    """The number of a variable's units that span `axes`."""
    return float(math.prod(int(d) for axis, d in enumerate(variable.shape) if axis not in axes))


KERNEL, TABLE, BIAS, OTHER = "kernel", "table", "bias", "other"


@dataclasses.dataclass(frozen=True)
class Unit:
    """The role of a variable in its layer, and its units.

    Attributes:
        kind: `KERNEL`; `TABLE`, an embedding table; `BIAS`; or `OTHER`, such as a scale.
        axes: the axes that one unit spans.
        kernels: for a bias, the names of the kernels in its layer whose units it is added to: one,
            or one for each row of the bias.
        letters: for a bias of EinsumDense, one letter per axis of its kernel and of itself; a dot
            for an axis that is summed over or is 1.
        is_known: whether the layer defines it; else it is a guess from name and shape.
    """

    kind: str
    axes: tuple[int, ...]
    kernels: tuple[str, ...] = ()
    letters: tuple[str, str] | None = None
    is_known: bool = True

    @property
    def is_kernel(self) -> bool:
        """Whether it is limited by its own norm: a kernel or a table."""
        return self.kind in (KERNEL, TABLE)


_UNITS: ByVariable[Unit] = ByVariable()


def unit_of(variable: keras.Variable) -> Unit:
    """The `Unit` of a variable by its layer; a guess if the layer is unknown."""
    return units_of([variable])[0]


def units_of(variables: Sequence[keras.Variable]) -> list[Unit]:
    """`unit_of` for each variable, with one lookup of all layers."""
    for v, owner in zip(variables, owners_of(variables), strict=True):
        if v not in _UNITS:
            layer = None if owner is None else owner()
            _UNITS[v] = (None if layer is None else _of_layer(layer, v)) or _guess(v)
    return [_UNITS[v] for v in variables]


def unit_axes(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """The axes that one unit spans, for each kernel of a model, as its layer defines them.

    Args:
        model: a built `keras.Model` or layer.

    Returns:
        A dict from `variable.path` to a tuple of axes, for `AdaptiveClip(axes=...)`: every
        trainable variable with more than one dimension.

    Raises:
        ValueError: the model has no trainable variables yet.
    """
    if not getattr(model, "trainable_variables", None):
        raise ValueError(
            f"unit_axes: `model` ({model!r}) has no trainable variables. Pass a model, and build "
            "it first, e.g. by calling it on a batch."
        )
    variables = [v for v in model.trainable_variables if len(v.shape) > 1]
    return {path_of(v): u.axes for v, u in zip(variables, units_of(variables), strict=True)}


def _columns(rank: int) -> tuple[int, ...]:
    return tuple(range(rank - 1))  # (..., in, out)


def _spatial(rank: int) -> tuple[int, ...]:
    return tuple(range(rank - 2))  # (..., in, multiplier)


def _transposed(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1)  # (..., out, in)


def _rows(rank: int) -> tuple[int, ...]:
    return (rank - 1,)  # (words, dimension)


L = keras.layers
#: For each layer class its kernels (a function from rank to a unit's axes), and the kernel to whose
#: outputs its bias is added. The first match counts; subclasses match.
_LAYERS: tuple[tuple[tuple[type, ...], dict[str, Callable[[int], tuple[int, ...]]], str], ...] = (
    (
        (L.Dense, L.EinsumDense, L.Conv1D, L.Conv2D, L.Conv3D),
        {"kernel": _columns, "lora_kernel_a": _columns, "lora_kernel_b": _columns},
        "kernel",
    ),
    ((L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose), {"kernel": _transposed}, "kernel"),
    ((L.DepthwiseConv1D, L.DepthwiseConv2D), {"kernel": _spatial}, "kernel"),
    (
        (L.SeparableConv1D, L.SeparableConv2D),
        {"depthwise_kernel": _spatial, "pointwise_kernel": _columns},
        "pointwise_kernel",
    ),
    (
        (L.Embedding,),
        {
            "embeddings": _rows,
            "lora_embeddings_a": _rows,
            "lora_embeddings_b": _columns,
            "reverse_embeddings": _columns,
        },
        "",
    ),
)


def _of_layer(layer: keras.layers.Layer, variable: keras.Variable) -> Unit | None:
    """The `Unit` of a variable of `layer`; None for an unknown class."""
    name, shape = str(variable.name), tuple(int(d) for d in variable.shape)
    rank = len(shape)
    whole = tuple(range(rank))
    is_float8_scale = getattr(variable, "overwrite_with_gradient", False)
    if isinstance(layer, L.PReLU) or is_normalisation(layer) or is_float8_scale:
        return Unit(OTHER, whole)
    if isinstance(layer, L.EinsumDense) and name in ("kernel", "bias"):
        return _of_einsum(layer, name, shape)
    if hasattr(layer, "recurrent_kernel"):  # any cell: the gates' units are columns
        if name == "bias":  # GRU: one row is added to the inputs' part, one to the states'
            both = ("kernel", "recurrent_kernel")
            return Unit(BIAS, whole, both if rank == 2 and shape[0] == 2 else both[1:])
        return Unit(KERNEL, _spread(shape, _columns(rank))) if "kernel" in name else None
    if isinstance(layer, L.TorchModuleWrapper) and rank > 1:  # (out, in, ...), and tables by rows
        return Unit(KERNEL, tuple(range(1, rank)), is_known=False)
    for classes, kernels_of, biased in _LAYERS:
        if isinstance(layer, classes):
            if name == "bias":
                return Unit(BIAS, whole, (biased,))
            if name in kernels_of:
                kind = TABLE if kernels_of[name] is _rows else KERNEL
                return Unit(kind, _spread(shape, kernels_of[name](rank)))
    return None


def _spread(shape: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    """`axes`, or all axes if all dimensions but one are 1, which makes one unit, as in AGC."""
    return axes if sum(d != 1 for d in shape) > 1 else tuple(range(len(shape)))


def _of_einsum(layer: keras.layers.Layer, name: str, shape: Sequence[int]) -> Unit:
    inputs, output = layer.equation.replace(" ", "").replace("...", "").split("->")
    kernel = inputs.split(",")[1]
    if name == "kernel":
        summed = tuple(i for i, letter in enumerate(kernel) if letter not in output)
        return Unit(KERNEL, _spread(shape, summed))
    units = "".join(letter if letter in output else "." for letter in kernel)
    # A Keras bias has the output's axes from its first one on; missing ones are 1.
    own = output[min(output.find(letter) for letter in layer.bias_axes) :]
    own = "".join(letter if letter in layer.bias_axes else "." for letter in own)
    return Unit(BIAS, tuple(range(len(shape))), ("kernel",), (units, own.ljust(len(shape), ".")))


def _guess(variable: keras.Variable) -> Unit:
    name = path_of(variable).rpartition("/")[2]
    kind = OTHER if len(variable.shape) <= 1 else TABLE if "embedding" in name else KERNEL
    kind = BIAS if "bias" in name else kind
    return Unit(kind, default_unit_axes(variable), is_known=False)


def default_unit_axes(variable: keras.Variable) -> tuple[int, ...]:
    """A guess of the axes that a unit of `variable` spans, by `AdaptiveClip`'s table."""
    shape = tuple(int(d) for d in variable.shape)
    rank = len(shape)
    layer, _, name = path_of(variable).rpartition("/")
    layer = layer.rpartition("/")[2]
    if sum(d != 1 for d in shape) <= 1 or "bias" in name:
        return tuple(range(rank))
    if name == "embeddings":
        return (rank - 1,)
    if rank >= 3 and ("depthwise" in name or ("depthwise" in layer and name == "kernel")):
        return _spatial(rank)
    if rank >= 3 and "transpose" in layer:
        return _transposed(rank)
    if rank == 3 and layer in ("query", "key", "value"):
        return (0,)
    return _columns(rank)


def with_axes(
    units: Sequence[Unit],
    variables: Sequence[keras.Variable],
    axes: Sequence[tuple[str, tuple[int, ...]]] | None,
) -> list[Unit]:
    """`units`, with the axes of the variables in `axes` replaced."""
    given, result = dict(axes or ()), list(units)
    for i, variable in enumerate(variables if given else ()):
        own = given.get(path_of(variable))
        if own is not None and own != units[i].axes:
            kind = units[i].kind if len(own) == len(variable.shape) else KERNEL
            result[i] = Unit(kind, own, units[i].kernels, None, is_known=True)
    return result


def kernels_of_biases(
    variables: Sequence[keras.Variable], units: Sequence[Unit]
) -> dict[int, list[int]]:
    """The position of each bias, and those of the kernels whose units it belongs to.

    A bias of an unknown layer, or another vector, belongs to the last kernel in its layer with as
    many units; one of n rows to n kernels with as many units as a row.
    """
    counts = {
        i: number_of_units(variables[i], unit.axes)
        for i, unit in enumerate(units)
        if unit.kind == KERNEL
    }
    owners, layers = owners_of(variables), layers_of(variables)
    named = {(id(owners[k]), str(variables[k].name)): k for k in counts if owners[k] is not None}
    found: dict[int, list[int]] = {}
    for i, unit in enumerate(units):
        shape = tuple(int(d) for d in variables[i].shape)
        size, rows = math.prod(shape), shape[0] if len(shape) == 2 else 0
        if unit.is_kernel or (unit.kind == OTHER and unit.is_known):
            continue
        if unit.is_known:
            of = [named.get((id(owners[i]), name), -1) for name in unit.kernels]
            share = size / len(of)
            fits = all(k in counts and counts[k] in (1, share) for k in of)
            if fits or (unit.letters and of[0] in counts):
                found[i] = of
            continue
        mine = [k for k in counts if layers[k] == layers[i]]
        last = [k for k in mine if counts[k] == size][-1:]
        each = [k for k in mine if counts[k] * rows == size]
        if last or (rows and len(each) == rows):
            found[i] = last or each
    return found


def norms_for_bias(unit: Unit, shape: Sequence[int], of_kernels: Sequence[Tensor]) -> Tensor:
    """The norm of the unit of each element of a bias; the smallest, if it is added to several.

    `of_kernels` are the norms of its kernels' units; axes that a unit spans have size 1.
    """
    shape = tuple(int(d) for d in shape)
    if len(of_kernels) > 1:
        rows = [ops.broadcast_to(ops.reshape(x, (-1,)), shape[1:]) for x in of_kernels]
        return ops.stack(rows)
    (norm,) = of_kernels
    if math.prod(int(d) for d in norm.shape) == 1:
        return ops.broadcast_to(ops.reshape(norm, ()), shape)
    if unit.letters is None:
        return ops.reshape(norm, shape)
    units, own = unit.letters
    norm = ops.reshape(norm, [d for d, x in zip(norm.shape, units, strict=True) if x != "."])
    units = units.replace(".", "")
    shared = tuple(i for i, letter in enumerate(units) if letter not in own)
    norm = ops.min(norm, axis=shared) if shared else norm
    kept = [letter for letter in units if letter in own]
    norm = ops.transpose(norm, [kept.index(x) for x in own if x in kept])
    at = [i for i, letter in enumerate(own) if letter in kept]
    spread = [shape[i] if i in at else 1 for i in range(len(shape))]
    return ops.broadcast_to(ops.reshape(norm, spread), shape)
