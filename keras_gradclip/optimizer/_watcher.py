"""What looks at an update while it happens: telemetry, `ClipMonitor`, `calibrate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import keras

from keras_gradclip._types import Gradients, Hyper, State
from keras_gradclip.clippers.base import ClipStats


@dataclasses.dataclass(frozen=True)
class ClippedUpdate:
    """An update between the clip and the inner optimizer, one entry a variable in each list.

    Attributes:
        gradients: before the clip; reduced over replicas and micro-batches, unscaled.
        clipped: after it.
        stats: what the clipper counted; None without a clipper.
        hyper: the thresholds in force.
        state: the clippers' state after the clip.
    """

    gradients: Gradients
    clipped: Gradients
    stats: ClipStats | None
    hyper: Hyper
    state: State


class Watcher(Protocol):
    """Sees every update, in replica context; must change nothing but its own state."""

    @property
    def state(self) -> Sequence[keras.Variable]:
        """The variables that the two methods write: on JAX they travel with the optimizer's."""

    def on_update(self, update: ClippedUpdate) -> None:
        """An update that is about to be applied."""

    def on_skip(self, gradients: Gradients) -> None:
        """An update that is left out, because something in it is not finite."""
