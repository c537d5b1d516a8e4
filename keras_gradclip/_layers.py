"""From variables to the layers that own them, by identity.

`Optimizer.build(variables)` and `clipper(grads, variables)` get variables alone, and a variable
does not know its layer. What a layer's class says of it (what is a unit, a bias, a normalisation)
is worth more than what a path reads like, so that the layers are looked up, once a variable.
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
    """A weak mapping from variables to values: variables are not hashable by identity."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref, T]] = {}

    def __contains__(self, variable: keras.Variable) -> bool:
        entry = self._entries.get(id(variable))
        return entry is not None and entry[0]() is variable

    def __getitem__(self, variable: keras.Variable) -> T:
        if variable not in self:
            raise KeyError(variable)
        return self._entries[id(variable)][1]

    def __setitem__(self, variable: keras.Variable, value: T) -> None:
        key = id(variable)
        entry = weakref.ref(variable, lambda ref: self._forget(key, ref))
        self._entries[key] = (entry, value)

    def _forget(self, key: int, ref: weakref.ref) -> None:
        if key in self._entries and self._entries[key][0] is ref:
            del self._entries[key]


#: The layer of each variable looked up so far; None: no layer has it.
_OWNERS: ByVariable[weakref.ref | None] = ByVariable()


#: What the scan of the present `one_scan` found.
_LIVING: list[keras.layers.Layer] | None = None


@contextlib.contextmanager
def one_scan() -> Iterator[None]:
    """Inside, all memory is looked through for layers once at most, which takes about 0.1 s."""
    global _LIVING
    before, _LIVING = _LIVING, _LIVING or []
    try:
        yield
    finally:
        _LIVING = before


def _living_layers() -> list[keras.layers.Layer]:
    if _LIVING is None:
        return _compat.living_layers()
    if not _LIVING:
        _LIVING.extend(_compat.living_layers())
    return _LIVING


def owners_of(variables: Sequence[keras.Variable]) -> list[weakref.ref | None]:
    """For each variable, a weak reference to the layer that made it, the same for one layer.

    Returns:
        A list; None where no living layer has the variable (it was made outside of layers, or
        `gc.freeze` hid its layer from the garbage collector).
    """
    unknown = [v for v in variables if v not in _OWNERS]
    if unknown:
        wanted = {id(v): v for v in unknown}
        found: dict[int, keras.layers.Layer] = {}
        for layer in _living_layers():
            for v in _compat.own_variables(layer):
                # A second layer may share it (tied weights): the first one's path is in its own.
                is_maker = _path(v).rpartition("/")[0] == _path(layer)
                if id(v) in wanted and (is_maker or id(v) not in found):
                    found[id(v)] = layer
        for v in unknown:
            layer = found.get(id(v))
            _OWNERS[v] = None if layer is None else weakref.ref(layer)  # one object a layer
    return [_OWNERS[v] for v in variables]


def _path(thing: keras.Variable | keras.layers.Layer) -> str:
    return str(getattr(thing, "path", None) or getattr(thing, "name", ""))


def networks_of(variables: Sequence[keras.Variable]) -> list[keras.layers.Layer]:
    """The outermost layers around `variables` that train nothing else.

    Of all the variables that train in a model, this is the model, with its frozen layers; of those
    of two networks, it is both.
    """
    parents: dict[int, list[keras.layers.Layer]] = {}
    for layer in _living_layers():
        for part in _compat.own_layers(layer):
            parents.setdefault(id(part), []).append(layer)
    wanted = {id(v) for v in variables}

    def trains_nothing_else(layer: keras.layers.Layer) -> bool:
        own = (v for part in _compat.all_layers(layer) for v in _compat.own_variables(part))
        return all(id(v) in wanted for v in own if v.trainable)

    owners = [owner() for owner in owners_of(variables) if owner is not None]
    waiting = {id(layer): layer for layer in owners if layer is not None}
    reached, outermost = dict(waiting), {}
    while waiting:
        key, layer = waiting.popitem()
        around = [p for p in parents.get(key, ()) if id(p) in reached or trains_nothing_else(p)]
        if not around:
            outermost[key] = layer
        waiting.update((id(p), p) for p in around if id(p) not in reached)
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


_NORMALISATIONS = tuple(
    getattr(keras.layers, name)
    for name in (
        "BatchNormalization",
        "GroupNormalization",
        "LayerNormalization",
        "RMSNormalization",
        "UnitNormalization",
    )
    if hasattr(keras.layers, name)
)
#: Keras's of the inputs and of weights, which leave activations as they are.
_OTHERS = (keras.layers.Normalization, keras.layers.SpectralNormalization)


def is_normalisation(layer: keras.layers.Layer) -> bool:
    """Whether a layer normalises activations: one of Keras's, or called so by its class.

    The class of somebody's own must end in "Norm" or "Normalization" and have no layers inside.
    """
    if isinstance(layer, _NORMALISATIONS):
        return True
    if isinstance(layer, _OTHERS) or _compat.own_layers(layer):
        return False
    return bool(re.search(r"Norm(alization)?(\dD|\dd)?$", type(layer).__name__))
