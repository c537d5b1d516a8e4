"""The layers that own given variables, found in memory.

`Optimizer.build(variables)` and `clipper(grads, variables)` get only variables, which do not know
their layers. The layer's class defines units, biases and normalisations more reliably than a path.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import keras

from keras_gradclip import _compat

T = TypeVar("T")


class ByVariable(Generic[T]):
    """A weak mapping from variables to values, by identity: variables are not hashable."""

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def __contains__(self, variable: keras.Variable) -> bool:
        return id(variable) in self._values

    def __getitem__(self, variable: keras.Variable) -> T:
        return self._values[id(variable)]

    def __setitem__(self, variable: keras.Variable, value: T) -> None:
        if variable not in self:
            weakref.finalize(variable, self._values.pop, id(variable))
        self._values[id(variable)] = value


#: The layer of each variable looked up so far, or None.
_OWNERS: ByVariable[weakref.ref | None] = ByVariable()
#: The layers found by the scan of the current `one_scan`.
_scanned: list[keras.layers.Layer] | None = None


@contextlib.contextmanager
def one_scan() -> Iterator[None]:
    """A context that scans memory for layers only once; each scan takes about 0.1 s."""
    global _scanned
    _scanned = []
    try:
        yield
    finally:
        _scanned = None


def living_layers() -> list[keras.layers.Layer]:
    """`_compat.living_layers`, once in a `one_scan`."""
    if _scanned is None:
        return _compat.living_layers()
    if not _scanned:
        _scanned.extend(_compat.living_layers())
    return _scanned


def owners_of(variables: Sequence[keras.Variable]) -> list[weakref.ref | None]:
    """A weak reference to each variable's layer, the same object for the same layer.

    None if no living layer has the variable: it was created outside of layers, or `gc.freeze` hid
    its layer from the garbage collector.
    """
    unknown = [v for v in variables if v not in _OWNERS]
    if unknown:
        wanted = {id(v) for v in unknown}
        found: dict[int, keras.layers.Layer] = {}
        for layer in living_layers():
            for v in _compat.own_variables(layer):
                # Several layers may share it (tied weights); its path begins with its creator's.
                is_creator = _path(v).rpartition("/")[0] == _path(layer)
                if id(v) in wanted and (is_creator or id(v) not in found):
                    found[id(v)] = layer
        for v in unknown:
            layer = found.get(id(v))
            _OWNERS[v] = None if layer is None else weakref.ref(layer)
    return [_OWNERS[v] for v in variables]


def _path(thing: keras.Variable | keras.layers.Layer) -> str:
    return str(getattr(thing, "path", None) or getattr(thing, "name", ""))


def networks_of(variables: Sequence[keras.Variable]) -> list[keras.layers.Layer]:
    """The outermost layers that contain some of `variables` and train no other variables.

    For all trainable variables of a model this is the model, including its frozen layers; for
    those of two networks, it is both.
    """
    parents: dict[int, list[keras.layers.Layer]] = {}
    for layer in living_layers():
        for part in _compat.own_layers(layer):
            parents.setdefault(id(part), []).append(layer)
    wanted = {id(v) for v in variables}

    def trains_nothing_else(layer: keras.layers.Layer) -> bool:
        own = (v for part in _compat.all_layers(layer) for v in _compat.own_variables(part))
        return all(id(v) in wanted for v in own if v.trainable)

    owners = [owner() for owner in owners_of(variables) if owner is not None]
    queue = {id(layer): layer for layer in owners if layer is not None}
    reached, outermost = dict(queue), {}
    while queue:
        key, layer = queue.popitem()
        around = [p for p in parents.get(key, ()) if id(p) in reached or trains_nothing_else(p)]
        if not around:
            outermost[key] = layer
        queue.update((id(p), p) for p in around if id(p) not in reached)
        reached.update((id(p), p) for p in around)
    result: list[keras.layers.Layer] = []
    inside: set[int] = set()

    def order(layer: keras.layers.Layer) -> tuple[int, bool]:
        # A Sequential comes before its own functional view of the same layers.
        return -len(_compat.all_layers(layer)), not getattr(layer, "compiled", False)

    for layer in sorted(outermost.values(), key=order):
        own = _compat.own_layers(layer)
        if not own or any(id(part) not in inside for part in own):  # else a view of the others
            result.append(layer)
            inside.update(id(part) for part in _compat.all_layers(layer))
    return result


_NORMALISATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)
#: Normalise inputs or weights, not activations.
_OTHERS = (keras.layers.Normalization, keras.layers.SpectralNormalization)


def is_normalisation(layer: keras.layers.Layer) -> bool:
    """Whether a layer normalises activations.

    A custom layer does if its class name ends in "Norm" or "Normalization" and it has no sublayers.
    """
    if isinstance(layer, _NORMALISATIONS):
        return True
    if isinstance(layer, _OTHERS) or _compat.own_layers(layer):
        return False
    return bool(re.search(r"Norm(alization)?(\dD|\dd)?$", type(layer).__name__))
