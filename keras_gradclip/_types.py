"""Names for what passes through an update, and what Keras leaves without types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

#: A tensor of the backend in use, of the variable's shape and any float dtype; or a
#: `tf.IndexedSlices` with some of its rows.
Gradient: TypeAlias = Any
#: One entry a variable; None where a variable has no gradient.
Gradients: TypeAlias = list[Gradient]
#: A float32 tensor of shape () or a Python number.
Scalar: TypeAlias = Any
#: Any tensor of the backend in use.
Tensor: TypeAlias = Any
#: A `tf.distribute.Strategy`, or None without one.
Strategy: TypeAlias = Any
#: The live hyper-parameters at one step, by name.
Hyper: TypeAlias = Mapping[str, Scalar]
#: A clipper's running state, by name.
State: TypeAlias = dict[str, Tensor]
#: A number or a `keras.optimizers.schedules.LearningRateSchedule`.
Threshold: TypeAlias = Any
#: What `get_config` returns: JSON-able.
Config: TypeAlias = dict[str, Any]
