"""The choice of `clipper="auto"` for an inner optimizer and a network."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Sequence

import keras
import numpy as np

from keras_gradclip import _compat, aggregation
from keras_gradclip._layers import is_normalisation, living_layers, networks_of
from keras_gradclip._types import Strategy
from keras_gradclip.clippers.base import Clipper
from keras_gradclip.clippers.composite import ClipMap
from keras_gradclip.clippers.enforce import Enforcer
from keras_gradclip.clippers.relative import UpdateRatioClip
from keras_gradclip.clippers.stateful import PercentileClip
from keras_gradclip.clippers.units import BIAS, KERNEL, TABLE, Unit, units_of
from keras_gradclip.names import SCOPES, layers_of, names_of, path_of
from keras_gradclip.optimizer._inner import is_plain_sgd

AUTO = "auto"
LOG = logging.getLogger("keras_gradclip")
#: κ for `SHALLOW` and for `DEEP` kernels, with SGD's momentum and without (docs/evidence.md,
#: docs/choosing.md). The change of a network's function adds up over its layers (arXiv 2002.03432),
#: so κ falls with depth.
WITH_MOMENTUM = (2e-3, 1e-3)
WITHOUT_MOMENTUM = (5e-3, 2e-3)
SHALLOW, DEEP = 8, 16


def _ratio(shares: tuple[float, float], kernels: int) -> float:
    """κ for a number of kernels: a power law between the two values, constant outside."""
    depth = math.log(max(kernels, 1) / SHALLOW) / math.log(DEEP / SHALLOW)
    return round(shares[0] * (shares[1] / shares[0]) ** min(max(depth, 0.0), 1.0), 5)


def choose(
    inner: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    strategy: Strategy | None = None,
) -> Clipper | None:
    """The clipper of `clipper="auto"`; the chief logs the choice and its reason.

    It logs a warning, so that Python shows it by default;
    `logging.getLogger("keras_gradclip").setLevel("ERROR")` turns it off.
    """
    chosen, reason = advice(inner, variables)
    if aggregation.is_chief(strategy):
        LOG.warning("clipper='auto': %s, because %s", chosen, reason)
    return chosen


def advice(
    inner: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> tuple[Clipper | None, str]:
    """The clipper for a built optimizer, and the reason; docs/choosing.md has a table."""
    guard = PercentileClip(90.0, window=20, scope="layer")
    matrices = muon_matrices(inner, variables)
    if matrices:
        rules: list[tuple[str, Clipper | None]] = [(re.escape(path), None) for path in matrices]
        return ClipMap(rules, guard), (
            "Muon's steps have one size whatever the gradient's, so its matrices are left alone; "
            "for the others a guard that clips a tenth of the updates"
        )
    networks = networks_of(variables)
    layers = [layer for network in networks for layer in _compat.all_layers(network)]
    normalisation = next(filter(is_normalisation, layers), None)
    if normalisation is not None:
        return guard, (
            f"the model has normalisation ({type(normalisation).__name__}), with which high "
            "learning rates are survived: a guard that clips a tenth of the updates"
        )
    unscaled = [x for x in _losses_of(inner, networks) if not _has_one_scale(x)]
    if unscaled:
        return guard, (
            f"the outputs have the scale of the targets (the loss is {_name_of(unscaled[0])}), "
            "which the initial weights are no measure of: a guard that clips a tenth of the updates"
        )
    if not all(map(aggregation.has_value, variables)):
        return guard, (
            "the first step creates the weights, so that their norms are not known (call the model "
            "on a batch before `fit` to go by them): a guard that clips a tenth of the updates"
        )
    free = _layers_to_leave_free(variables)
    names = dict.fromkeys(layers_of(variables))
    if len(free) == len(names):
        return guard, f"the model has only {_FREE}: a guard that clips a tenth of the updates"
    bound, kernels = step_bound(inner, variables), count_kernels(variables)
    why = (
        "the model has no normalisation: no step moves a unit, or its bias, by more than κ of its "
        "norm, which is smaller the deeper the network "
        f"({kernels} kernel{'s' if kernels > 1 else ''})"
    )
    if bound.anneal is not None:
        why += ", and falls with the learning rate, as momentum adds up what is left"
    if not free:
        return bound, why
    shown = ", ".join(free[:3]) + (", ..." if len(free) > 3 else "")
    pattern = "|".join(f"{re.escape(layer)}(/[^/]+)?" for layer in free)
    return ClipMap([(pattern, guard)], bound, allow_unmatched=True), (
        f"{why}; but a guard that clips a tenth of the updates for {_FREE} (here {shown})"
    )


def _losses_of(
    inner: keras.optimizers.Optimizer, networks: Sequence[keras.layers.Layer]
) -> list[object]:
    """The losses of the models compiled with `inner`; of `networks` if it is in no model.

    Several models may have the same layers. Empty in a custom training loop.
    """
    trained = [x for x in living_layers() if _is_in(vars(x).get("optimizer"), inner)]
    models = [x for x in trained or networks if getattr(x, "compiled", False)]
    losses = [m.add_loss if m.loss is None and m.losses else m.loss for m in models]
    return [loss for loss in keras.tree.flatten(losses) if loss is not None]


def _is_in(optimizer: object, inner: keras.optimizers.Optimizer) -> bool:
    """Whether `optimizer` is `inner`, or a wrapper of it or of several optimizers."""
    parts = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
    return optimizer is inner or any(_is_in(part, inner) for part in parts if part is not None)


#: Losses of logits, probabilities or directions, which have the one scale of initial weights.
_OF_ONE_SCALE = (
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    "categorical_generalized_cross_entropy",
    "categorical_hinge",
    "circle",
    "cosine_similarity",
    "ctc",
    "dice",
    "hinge",
    "kl_divergence",
    "sparse_categorical_crossentropy",
    "squared_hinge",
    "tversky",
)


def _has_one_scale(loss: object) -> bool:
    """Whether a loss is one of `_OF_ONE_SCALE`: a name, a function, or an object that wraps one."""
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    function = getattr(loss, "fn", loss)
    return any(function is getattr(keras.losses, name, ...) for name in _OF_ONE_SCALE)


def _name_of(loss: object) -> str:
    return str(loss) if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


_FREE = (
    "tables, LoRA, kernels that begin near zero and biases of frozen ones, which must move by more "
    "than a share of a norm"
)
#: A unit with a smaller initial norm begins near zero. Glorot and He units begin at about 1; at a
#: growth of κ per step a unit would need a thousand steps to get there.
NEAR_ZERO = 0.1


def _layers_to_leave_free(variables: Sequence[keras.Variable]) -> list[str]:
    """Layers whose kernel norm is no measure for a step, or that have a bias but no kernel."""
    units, layers = units_of(variables), layers_of(variables)
    free = dict.fromkeys(layer for layer, u in zip(layers, units, strict=True) if u.kind == BIAS)
    for layer, unit in zip(layers, units, strict=True):
        if unit.kind == KERNEL:
            free.pop(layer, None)
    for v, unit, layer in zip(variables, units, layers, strict=True):
        if unit.kind == TABLE or (unit.kind == KERNEL and _begins_near_zero(v, unit)):
            free[layer] = None
    return [layer for layer in dict.fromkeys(layers) if layer in free]


def _begins_near_zero(variable: keras.Variable, unit: Unit) -> bool:
    """True if most units begin near zero, or in LoRA, where one of two factors does."""
    if "lora" in path_of(variable).rpartition("/")[2]:
        return True
    values = np.asarray(aggregation.to_numpy(variable), "float64")
    return bool(np.sqrt(np.median(np.sum(values**2, axis=unit.axes))) < NEAR_ZERO)


def step_bound(
    inner: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> UpdateRatioClip:
    """The `UpdateRatioClip` for this optimizer and the network's number of kernels."""
    kernels = count_kernels(variables)
    if is_plain_sgd(inner) and inner.momentum:
        ratio = _ratio(WITH_MOMENTUM, kernels)
        return UpdateRatioClip(ratio, anneal="learning_rate")
    return UpdateRatioClip(_ratio(WITHOUT_MOMENTUM, kernels))


def count_kernels(variables: Sequence[keras.Variable]) -> int:
    """The number of kernels, which excludes vectors, biases and tables."""
    return sum(unit.kind == KERNEL for unit in units_of(variables))


def muon_matrices(
    inner: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[str]:
    """The paths of the variables that `keras.optimizers.Muon`, if built, updates by Muon's rule."""
    muon = getattr(keras.optimizers, "Muon", None)
    if muon is None or not isinstance(inner, muon):
        return []
    return [path_of(v) for v in variables if not _compat.muon_uses_adamw(inner, v)]


def warn_of_muon(
    inner: keras.optimizers.Optimizer, clipper: Clipper, variables: Sequence[keras.Variable]
) -> None:
    """Warns of a clip of Muon's matrices, and shows the ClipMap that excludes them.

    Only for a clip that scales the whole matrix, which has no effect on Muon's step.
    """
    by_position: dict[int, list[bool]] = {}
    for assignment in clipper.assignments(variables):
        one_factor = assignment.clipper.scope in SCOPES and not assignment.calls_apply
        for i in assignment.members if assignment.clipper.stage == "gradient" else ():
            by_position.setdefault(i, []).append(one_factor)
    clipped = {path_of(variables[i]) for i, factors in by_position.items() if all(factors)}
    matrices = [path for path in muon_matrices(inner, variables) if path in clipped]
    if matrices:
        rules = ", ".join(f"{re.escape(path)!r}: None" for path in matrices)
        warnings.warn(
            f"ClippedOptimizer: Muon's step has the same size whatever its gradient's, so that "
            f"`clipper` ({clipper}) bounds nothing on its {len(matrices)} matrices, and only "
            "shifts the weight of this step in its momentum. Leave them alone: "
            f"ClipMap({{{rules}}}, default={clipper!r}).",
            stacklevel=5,
        )


def warn_of_remarks(enforcer: Enforcer) -> None:
    """Warns of the remarks on variables that `describe` shows."""
    remarks = enforcer.remarks()
    if not any(remarks):
        return
    paths: dict[str, list[str]] = {}
    for name, remark in zip(names_of(enforcer.variables), remarks, strict=True):
        if remark:
            paths.setdefault(remark, []).append(name)
    for remark, names in paths.items():
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        warnings.warn(f"ClippedOptimizer: {remark}: {names[:6]}{more}.", stacklevel=5)
