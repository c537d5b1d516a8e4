"""The names that everything goes by: a variable's path, its layer, and groups of variables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import keras

from keras_gradclip._layers import owners_of
from keras_gradclip._validation import did_you_mean as did_you_mean


def path_of(variable: keras.Variable) -> str:
    """`variable.path`; the name of what has no path (a `tf.Variable`)."""
    path = getattr(variable, "path", None) or getattr(variable, "name", None) or "variable"
    return str(path).removesuffix(":0")


def layer_of(variable: keras.Variable) -> str:
    """The layer of a variable: everything in its path before the last `/`."""
    return path_of(variable).rpartition("/")[0] or path_of(variable)


def layers_of(variables: Sequence[keras.Variable]) -> list[str]:
    """The layer of each variable, by the name that reports have for it.

    Two layers may have one path (two towers with a Dense of the same name in each): the second's
    name gets `#2`. Which variable belongs to which is known from the layers; of variables that
    were made outside of layers, a path that comes again begins the next layer.
    """
    groups: dict[str, list[tuple[object, set[str]]]] = {}
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
    """`variable.path`, each once: the second of one path belongs to layer `#2`."""
    names = []
    for variable, layer in zip(variables, layers_of(variables), strict=True):
        _, slash, tail = path_of(variable).rpartition("/")
        names.append(f"{layer}/{tail}" if slash else layer)
    return names


def size_of(variable: keras.Variable) -> int:
    """The number of elements of a variable."""
    return math.prod(int(dim) for dim in variable.shape)


#: What one norm may be taken over.
SCOPES = ("layer", "variable", "global")


def scope_numbers(scope: str, variables: Sequence[keras.Variable]) -> list[int]:
    """For each variable the number of the scope that it belongs to, from 0 on.

    Args:
        scope: one of `SCOPES`.
        variables: the variables, in the optimizer's order.
    """
    if scope == "global":
        return [0] * len(variables)
    if scope == "variable":
        return list(range(len(variables)))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(layer, len(numbers)) for layer in layers_of(variables)]
