"""Which clipper suits an inner optimizer and a network: the rule behind `clipper="auto"`."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

import keras

from keras_gradclip import _compat
from keras_gradclip._names import SCOPES, names_of, path_of
from keras_gradclip._types import Optimizer, Variable
from keras_gradclip.clippers.base import Clipper
from keras_gradclip.clippers.composite import ClipMap
from keras_gradclip.clippers.enforce import Enforcer
from keras_gradclip.clippers.relative import UpdateRatioClip
from keras_gradclip.clippers.stateful import PercentileClip

AUTO = "auto"
#: κ of a network of `SHALLOW` kernels and of one of `DEEP`, under SGD's momentum and where nothing
#: adds up steps (docs/evidence.md, docs/choosing.md). How far a network's function moves adds up
#: over its layers (arXiv 2002.03432): the share is smaller the deeper it is.
WITH_MOMENTUM = (2e-3, 1e-3)
WITHOUT_MOMENTUM = (5e-3, 2e-3)
SHALLOW, DEEP = 8, 16


def _ratio(shares: tuple[float, float], kernels: int) -> float:
    """κ of so many kernels: between the two by a power of their number, beyond them constant."""
    depth = math.log(max(kernels, 1) / SHALLOW) / math.log(DEEP / SHALLOW)
    return round(shares[0] * (shares[1] / shares[0]) ** min(max(depth, 0.0), 1.0), 5)


def choose(inner: Optimizer, variables: Sequence[Variable]) -> tuple[Clipper | None, str]:
    """The clipper of `clipper="auto"`, and why; docs/choosing.md has the rule as a table.

    Args:
        inner: the inner optimizer, built.
        variables: the network's trainable variables.
    """
    guard = PercentileClip(90.0, window=20, scope="layer")
    matrices = muon_matrices(inner, variables)
    if matrices:
        rules: list[tuple[str, Clipper | None]] = [(re.escape(path), None) for path in matrices]
        return ClipMap(rules, guard), (
            "Muon's steps have one size whatever the gradient's, so its matrices are left alone; "
            "for the others a guard that clips a tenth of the updates"
        )
    if any(_is_of_normalisation(v) for v in variables):
        return guard, "a network with normalisation survives high learning rates: a guard"
    bound, kernels = step_bound(inner, variables), count_kernels(variables)
    why = "no normalisation: no step moves a unit, or its bias, by more than κ of its norm"
    if bound.anneal is not None:
        return bound, (
            f"{why}, which falls with the learning rate, and is smaller the deeper the network "
            f"({kernels} kernels); momentum adds up what is left"
        )
    return bound, (
        f"{why}, a larger one where no momentum adds up steps, and smaller the deeper the network "
        f"({kernels} kernels)"
    )


def step_bound(inner: Optimizer, variables: Sequence[Variable]) -> UpdateRatioClip:
    """What bounds this optimizer's steps in a network of so many kernels.

    Args:
        inner: the inner optimizer.
        variables: the network's trainable variables.
    """
    kernels = count_kernels(variables)
    if isinstance(inner, keras.optimizers.SGD) and inner.momentum:
        ratio = _ratio(WITH_MOMENTUM, kernels)
        return UpdateRatioClip(ratio, biases="unit", anneal="learning_rate")
    return UpdateRatioClip(_ratio(WITHOUT_MOMENTUM, kernels), biases="unit")


def count_kernels(variables: Sequence[Variable]) -> int:
    """How many of them are neither vectors nor biases."""
    return sum(len(v.shape) > 1 and not _is_bias(v) for v in variables)


def _is_bias(variable: Variable) -> bool:
    """By its name: a recurrent layer's or an attention's has two axes."""
    return "bias" in path_of(variable).lower().rpartition("/")[2]


def _is_of_normalisation(variable: Variable) -> bool:
    layer, _, name = path_of(variable).lower().rpartition("/")
    return name == "gamma" or "norm" in layer


def muon_matrices(inner: Optimizer, variables: Sequence[Variable]) -> list[str]:
    """The paths of the variables that `keras.optimizers.Muon` updates by its own rule.

    Args:
        inner: an optimizer, built with `variables`.
        variables: the trainable variables.
    """
    muon = getattr(keras.optimizers, "Muon", None)
    if muon is None or not isinstance(inner, muon):
        return []
    return [path_of(v) for v in variables if not _compat.muon_uses_adamw(inner, v)]


def warn_of_muon(inner: Optimizer, clipper: Clipper, variables: Sequence[Variable]) -> None:
    """Warn of a clip in front of Muon's matrices, with the ClipMap that leaves them alone.

    Of one that multiplies a matrix by a number: any other changes the direction of Muon's step.
    """
    clipped = {
        path_of(v)
        for v, (_, rule) in zip(variables, clipper.rule_of(variables), strict=True)
        if rule is not None and rule.scope in SCOPES and rule.stage != "update"
    }
    matrices = [path for path in muon_matrices(inner, variables) if path in clipped]
    if matrices:
        rules = ", ".join(f"{re.escape(path)!r}: None" for path in matrices)
        warnings.warn(
            f"ClippedOptimizer: Muon's step has the same size whatever its gradient's, so that "
            f"`clipper` ({clipper}) bounds nothing on its {len(matrices)} matrices, and only "
            "shifts the weight of this step in its momentum. Leave them alone: "
            f"ClipMap({{{rules}}}, default={clipper!r}).",
            stacklevel=3,
        )


def warn_of_remarks(enforcer: Enforcer) -> None:
    """Warn of what is unexpected about the clip of some variables, as `describe` shows it."""
    paths: dict[str, list[str]] = {}
    for name, remark in zip(names_of(enforcer.variables), enforcer.remarks(), strict=True):
        if remark:
            paths.setdefault(remark, []).append(name)
    for remark, names in paths.items():
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        warnings.warn(f"ClippedOptimizer: {remark}: {names[:6]}{more}.", stacklevel=3)
