"""What passes through an update, by the names that the backends have for it.

TensorFlow, JAX and PyTorch are imported by the backend in use alone: what they call a tensor is
named here for the reader, and for a type checker that has all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import jax
    import keras
    import tensorflow as tf
    import torch

#: A tensor of the backend in use.
Tensor: TypeAlias = "tf.Tensor | jax.Array | torch.Tensor"
#: A tensor of shape (), or a Python number where one will do.
Scalar: TypeAlias = "tf.Tensor | jax.Array | torch.Tensor"
#: Of the variable's shape and any float dtype; or some of its rows; None where there is none.
Gradient: TypeAlias = "tf.Tensor | tf.IndexedSlices | jax.Array | torch.Tensor"
#: One entry a variable; None where a variable has no gradient.
Gradients: TypeAlias = list[Gradient]
Strategy: TypeAlias = "tf.distribute.Strategy"
#: A number, which may change during training, or a schedule of it.
Threshold: TypeAlias = "float | keras.optimizers.schedules.LearningRateSchedule"
#: The live hyper-parameters at one step, by name.
Hyper: TypeAlias = Mapping[str, Scalar]
#: A clipper's running state, by name.
State: TypeAlias = dict[str, Tensor]
#: The limit of each scope, and a clipper's new state.
Limits: TypeAlias = tuple[Tensor, State]
#: What `get_config` returns: JSON-able.
Config: TypeAlias = dict[str, Any]
