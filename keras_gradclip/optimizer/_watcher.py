"""What looks at an update while it happens: telemetry, `ClipMonitor`, `calibrate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from keras_gradclip._types import Gradients, Hyper, Variable
from keras_gradclip.clippers.base import ClipStats


@dataclasses.dataclass(frozen=True)
class ClippedUpdate:
    """An update between the clip and the inner optimizer, one entry a variable in each list.

    Attributes:
        gradients: before the clip; reduced over replicas and micro-batches, unscaled.
        clipped: after it.
        stats: what the clipper counted; None without a clipper.
        hyper: the thresholds in force.
    """

    gradients: Gradients
    clipped: Gradients
    stats: ClipStats | None
    hyper: Hyper


class Watcher(Protocol):
    """Sees every update, in replica context; must change nothing but its own state."""

    @property
    def state(self) -> Sequence[Variable]:
        """The variables that the two methods write: on JAX they travel with the optimizer's."""

    def on_update(self, update: ClippedUpdate) -> None:
        """An update that is about to be applied."""

    def on_skip(self, gradients: Gradients) -> None:
        """An update that is left out, because something in it is not finite."""


class Watched:
    """Mixin of an optimizer: who sees its updates."""

    _watchers: tuple[Watcher, ...]

    def watch(self, watcher: Watcher) -> None:
        """Show every update, from the next trace on, to `watcher`, beside those that watch."""
        self._watchers = (*self._watchers, watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """End what `watch` began."""
        self._watchers = tuple(w for w in self._watchers if w is not watcher)

    def end_watches(self) -> bool:
        """End all watches; whether there were any."""
        were_any, self._watchers = bool(self._watchers), ()
        return were_any
