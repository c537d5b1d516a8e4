"""Names and scopes of variables: their paths, layers, and groups with one norm."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import keras

from keras_gradclip._layers import ByVariable, owners_of
from keras_gradclip._validation import did_you_mean as did_you_mean

_SAVED: ByVariable[str] = ByVariable()


def as_saved(variables: Sequence[keras.Variable], paths: Sequence[str] | None) -> list[str]:
    """Gives variables the paths under which their optimizer was saved; returns their paths.

    Keras loads a subclassed model under other paths: `net/dense/kernel` as `dense_1/kernel`.
    Paths that differ in more than a prefix and numbers are of another model, and not given.
    """
    own = [path_of(v) for v in variables]
    if paths is not None and len(paths) == len(own) and all(map(_are_alike, own, paths)):
        for variable, before, path in zip(variables, own, paths, strict=True):
            if path != before:
                _SAVED[variable] = path
    return [path_of(v) for v in variables]


def _are_alike(*paths: str) -> bool:
    first, second = ("/" + re.sub(r"_\d+(?=/)", "", path) for path in paths)
    return first.endswith(second) or second.endswith(first)


def path_of(variable: keras.Variable, as_saved: bool = True) -> str:
    """`variable.path`, or that in its file; the name of a `tf.Variable`, which has no path."""
    if as_saved and variable in _SAVED:
        return _SAVED[variable]
    path = getattr(variable, "path", None) or getattr(variable, "name", None) or "variable"
    return str(path).removesuffix(":0")


def layer_of(variable: keras.Variable) -> str:
    """The path of a variable's layer: everything before the last `/` of its own path."""
    return path_of(variable).rpartition("/")[0] or path_of(variable)


def layers_of(variables: Sequence[keras.Variable]) -> list[str]:
    """A unique name of each variable's layer.

    Of two layers with one path (two towers, each with a Dense of the same name), the second gets
    `#2`. Variables that no living layer owns begin another layer when a path repeats.
    """
    groups: dict[str, list[tuple[object, set[str]]]] = {}  # path: (layer, its variables' paths)
    names = []
    for variable, owner in zip(variables, owners_of(variables), strict=True):
        path, layer = path_of(variable), layer_of(variable)
        of_path = groups.setdefault(layer, [])
        own = [n for n, (known, _) in enumerate(of_path) if known is owner]
        if not own or path in of_path[own[-1]][1]:
            own.append(len(of_path))
            of_path.append((owner, set()))
        of_path[own[-1]][1].add(path)
        names.append(layer if own[-1] == 0 else f"{layer}#{own[-1] + 1}")
    return names


def names_of(variables: Sequence[keras.Variable]) -> list[str]:
    """A unique `variable.path` for each variable, with the layer's name from `layers_of`."""
    names = []
    for variable, layer in zip(variables, layers_of(variables), strict=True):
        _, slash, tail = path_of(variable).rpartition("/")
        names.append(f"{layer}/{tail}" if slash else layer)
    return names


def size_of(variable: keras.Variable) -> int:
    """The number of elements of a variable."""
    return math.prod(int(dim) for dim in variable.shape)


#: The scopes of a norm.
SCOPES = ("layer", "variable", "global")


def scope_numbers(scope: str, variables: Sequence[keras.Variable]) -> list[int]:
    """The number of each variable's scope, from 0 on; `scope` is one of `SCOPES`."""
    if scope == "global":
        return [0] * len(variables)
    if scope == "variable":
        return list(range(len(variables)))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(layer, len(numbers)) for layer in layers_of(variables)]
