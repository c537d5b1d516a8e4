"""Type aliases for tensors, gradients and configurations, whatever the backend in use.

Only type checkers import the three backends here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import jax
    import keras
    import tensorflow as tf
    import torch

Tensor: TypeAlias = "tf.Tensor | jax.Array | torch.Tensor"
#: A tensor of shape (), or a Python number.
Scalar: TypeAlias = "tf.Tensor | jax.Array | torch.Tensor"
#: A float tensor of the variable's shape, or a sparse one with some of its rows.
Gradient: TypeAlias = "tf.Tensor | tf.IndexedSlices | jax.Array | torch.Tensor"
#: One entry per variable; None for a variable without a gradient.
Gradients: TypeAlias = list[Gradient]
Strategy: TypeAlias = "tf.distribute.Strategy"
#: A number, which may change during training, or a schedule.
Threshold: TypeAlias = "float | keras.optimizers.schedules.LearningRateSchedule"
#: The values of the live hyper-parameters in one step, by name.
Hyper: TypeAlias = Mapping[str, Scalar]
#: A clipper's running state, by name.
State: TypeAlias = dict[str, Tensor]
#: The limit of each scope, and a clipper's new state.
Limits: TypeAlias = tuple[Tensor, State]
#: The JSON-able dictionary of `get_config`.
Config: TypeAlias = dict[str, Any]
