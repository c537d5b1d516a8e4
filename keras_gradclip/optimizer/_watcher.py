"""The interface of watchers of an update: telemetry, `ClipMonitor`, `calibrate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import keras

from keras_gradclip._types import Gradients, Hyper, State
from keras_gradclip.clippers.base import ClipStats


@dataclasses.dataclass(frozen=True)
class ClippedUpdate:
    """An update after the clip and before the inner optimizer; lists have an entry per variable.

    Attributes:
        gradients: before the clip; reduced over replicas and micro-batches, unscaled.
        clipped: after the clip.
        stats: the clipper's statistics; None without a clipper.
        hyper: the thresholds in force.
        state: the clippers' state after the clip.
    """

    gradients: Gradients
    clipped: Gradients
    stats: ClipStats | None
    hyper: Hyper
    state: State


class Watcher(Protocol):
    """Base class: called at every update in replica context; may change only its own state."""

    @property
    def state(self) -> Sequence[keras.Variable]:
        """The variables that the two methods write; on JAX, part of the optimizer's state."""

    def on_update(self, update: ClippedUpdate) -> None:
        """Called before an update is applied."""

    def on_skip(self, gradients: Gradients) -> None:
        """Called for a skipped update."""
