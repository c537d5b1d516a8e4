"""One call of `apply`, checked and put in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from keras_gradclip import _aggregation as aggregation
from keras_gradclip._types import Gradient, Gradients, Optimizer, Tensor, Variable
from keras_gradclip.optimizer._loss_scale import LossScale


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of `apply` is about.

    Attributes:
        indices: positions of the variables.
        scale: who scaled the loss.
        if_present: positions of those that are updated only if a boolean scalar is true.
    """

    indices: Sequence[int]
    scale: LossScale
    if_present: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)


def collect(
    optimizer: Optimizer,
    grads: Sequence[Gradient],
    trainable_variables: Sequence[Variable] | None,
) -> tuple[Gradients, list[int]]:
    """One entry for each variable that the optimizer was built with, and which were named."""
    aggregation.check_replica_context()
    if trainable_variables is None and not optimizer.built:
        raise ValueError(
            "ClippedOptimizer: `apply(grads)` without variables needs a built optimizer. "
            "Call `optimizer.build(trainable_variables)` first."
        )
    variables = list(
        optimizer._trainable_variables if trainable_variables is None else trainable_variables
    )
    optimizer.build(variables)
    if len(grads) != len(variables):
        raise ValueError(
            f"ClippedOptimizer: {len(grads)} gradients came for {len(variables)} variables."
        )
    if all(g is None for g in grads):
        raise ValueError("ClippedOptimizer: No gradients provided for any variable.")
    indices = [_index(optimizer, v) for v in variables]
    gradients: Gradients = [None] * len(optimizer._trainable_variables)
    for i, g in zip(indices, grads, strict=True):
        gradients[i] = g
    return gradients, indices


def _index(optimizer: Optimizer, variable: Variable) -> int:
    try:
        return optimizer._get_variable_index(variable)
    except KeyError:
        raise ValueError(
            f"ClippedOptimizer: unknown variable {getattr(variable, 'path', variable)!r}. The "
            "optimizer works on the variables that it was built with; after unfreezing a "
            "layer, compile with a new optimizer."
        ) from None
