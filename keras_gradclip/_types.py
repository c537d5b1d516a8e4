"""Types of what passes through an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import keras

LearningRateSchedule = keras.optimizers.schedules.LearningRateSchedule


class Tensor(Protocol):
    """A tensor of the backend in use: `tf.Tensor`, `jax.Array` or `torch.Tensor`."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> object: ...
    def __getitem__(self, key: object, /) -> Tensor: ...
    def __neg__(self) -> Tensor: ...
    def __add__(self, other: Scalar, /) -> Tensor: ...
    def __radd__(self, other: Scalar, /) -> Tensor: ...
    def __sub__(self, other: Scalar, /) -> Tensor: ...
    def __rsub__(self, other: Scalar, /) -> Tensor: ...
    def __mul__(self, other: Scalar, /) -> Tensor: ...
    def __rmul__(self, other: Scalar, /) -> Tensor: ...
    def __truediv__(self, other: Scalar, /) -> Tensor: ...
    def __rtruediv__(self, other: Scalar, /) -> Tensor: ...
    def __mod__(self, other: Scalar, /) -> Tensor: ...
    def __pow__(self, other: Scalar, /) -> Tensor: ...
    def __lt__(self, other: Scalar, /) -> Tensor: ...
    def __le__(self, other: Scalar, /) -> Tensor: ...
    def __gt__(self, other: Scalar, /) -> Tensor: ...
    def __ge__(self, other: Scalar, /) -> Tensor: ...


class IndexedSlices(Protocol):
    """A `tf.IndexedSlices`: some rows of a gradient."""

    @property
    def values(self) -> Tensor: ...
    @property
    def indices(self) -> Tensor: ...
    @property
    def dense_shape(self) -> Tensor: ...


#: A tensor (often a float32 scalar) or a Python number.
Scalar: TypeAlias = Tensor | float
#: Of the variable's shape and any float dtype; None where a variable has no gradient.
Gradient: TypeAlias = Tensor | IndexedSlices | None
#: A number, or a schedule over the optimizer's iterations.
Threshold: TypeAlias = float | LearningRateSchedule
#: Live hyper-parameters at one update, by name.
Hyper: TypeAlias = Mapping[str, Tensor]
#: A clipper's running state, by name.
State: TypeAlias = dict[str, Tensor]
#: A JSON-able dict, as `get_config` returns it.
Config: TypeAlias = dict[str, object]

# TEMPORARY
from typing import Any

Variable = Any
Optimizer = Any
Model = Any
Strategy = Any
Layer = Any
Gradients = Any
