"""The names that everything goes by: a variable's path, its layer, and groups of variables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from keras_gradclip._types import Variable


def path_of(variable: Variable) -> str:
    """`variable.path`; the name of what has no path (a `tf.Variable`)."""
    path = getattr(variable, "path", None) or getattr(variable, "name", None) or "variable"
    return str(path).removesuffix(":0")


def layer_of(variable: Variable) -> str:
    """The layer of a variable: everything in its path before the last `/`."""
    return path_of(variable).rpartition("/")[0] or path_of(variable)


def layers_of(variables: Sequence[Variable]) -> list[str]:
    """The layer of each variable.

    Two layers may have one path (two towers with a Dense of the same name in each): where a path
    comes a second time, it belongs to a second layer, whose name gets `#2`.
    """
    counts: dict[str, int] = {}
    layers = []
    for variable in variables:
        path = path_of(variable)
        counts[path] = counts.get(path, 0) + 1
        layers.append(layer_of(variable) + (f"#{counts[path]}" if counts[path] > 1 else ""))
    return layers


def size_of(variable: Variable) -> int:
    """The number of elements of a variable."""
    return math.prod(int(dim) for dim in variable.shape)


#: What one norm may be taken over.
SCOPES = ("layer", "variable", "global")


def scope_numbers(scope: str, variables: Sequence[Variable]) -> list[int]:
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
