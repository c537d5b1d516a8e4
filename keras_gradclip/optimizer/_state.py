"""The state of an optimizer: how it is made, and under which names it is saved."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import backend, ops

from keras_gradclip import _aggregation as aggregation
from keras_gradclip import _compat
from keras_gradclip import _validation as validation
from keras_gradclip._layers import networks_of
from keras_gradclip._names import path_of
from keras_gradclip._types import Config, Optimizer, State, Strategy, Tensor, Variable
from keras_gradclip.clippers.base import deserialize_value, serialize
from keras_gradclip.optimizer._accumulation import Accumulation
from keras_gradclip.optimizer._advice import AUTO, choose, say, warn_of_muon, warn_of_remarks
from keras_gradclip.optimizer._hyperparameters import HasThresholds, is_schedule, to_numpy
from keras_gradclip.optimizer._inner import InnerUpdate
from keras_gradclip.optimizer._skips import FirstNonfinite, SpikeWindow
from keras_gradclip.optimizer._telemetry import Telemetry
from keras_gradclip.optimizer._watcher import Watcher


class HasState(HasThresholds):
    """Mixin of an optimizer: its variables, `.keras` files, weights and config.

    Telemetry, and which gradient was first not finite, are not worth saving.
    """

    built: bool
    inner_optimizer: Optimizer
    gradient_accumulation_steps: int | None
    skip_nonfinite: bool
    skip_spikes: float | None
    telemetry: bool | int
    name: str
    _track_variable: Callable[[Variable], None]
    _trainable_variables: list[Variable]
    _variables: list[Variable]
    _frozen_variables: Sequence[Variable]
    _strategy: Strategy
    _telemetry: Telemetry | None
    _watchers: Sequence[Watcher]
    _undo: Any
    _start_telemetry: Callable[[], None]
    _iterations: Variable
    _skipped: Variable
    _clip_state: State
    _accumulation: Accumulation | None
    _spikes: SpikeWindow | None
    _is_auto: bool
    _first_nonfinite: FirstNonfinite
    add_variable: Callable[..., Variable]
    _inner_update: InnerUpdate

    @property
    def variables(self) -> list[Variable]:
        """The wrapper's, then the inner optimizer's, then the watchers'.

        What a step on JAX may write goes in and comes out with the optimizer's variables.
        """
        own = [*self._variables, *self.inner_optimizer.variables]
        if self.built:
            own.append(self._first_nonfinite.number)
        if self._telemetry is not None:
            own += self._telemetry.state
        if backend.backend() == "jax":
            own += [v for watcher in self._watchers for v in watcher.state]
            own += [] if self._undo is None else self._undo.state
        return own

    def keep_for(self, undo: Any) -> None:
        """Let what undoes a model's skipped steps have state: on JAX it travels with ours."""
        object.__setattr__(self, "_undo", undo)  # past Keras, which would track it

    def build(self, variables: Sequence[Variable]) -> None:
        """Create the state for `variables`, here and in the inner optimizer.

        Raises:
            ValueError: a ClipMap's rule matches none of the variables, or two rules collide.
        """
        if self.built:
            return
        variables = list(variables)
        if self._strategy is None and aggregation.replica_count() > 1:
            raise ValueError(
                "ClippedOptimizer: it was created outside the strategy that its model trains "
                "under, and every replica would count its steps. Create it inside "
                "`strategy.scope()`."
            )
        with aggregation.outside_of_traces(variables):
            self._build(variables)

    def _build(self, variables: list[Variable]) -> None:
        if self.inner_optimizer.built:
            self._check_inner_knows(variables)
        else:
            _compat.build_with_all_tracked(self.inner_optimizer, variables)
        if self._is_auto:
            chosen, reason = choose(self.inner_optimizer, variables)
            self._set_clipper(chosen)
            self._is_auto = False
            if aggregation.is_chief(self._strategy):
                say(chosen, reason)
        state = {}
        if self._clipper is not None:
            self._clipper.check_variables([*variables, *self._frozen_beside(variables)])
            state = self._clipper.init(variables)
            warn_of_muon(self.inner_optimizer, self._clipper, variables)
            warn_of_remarks(self._clipper, variables)
        steps = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = None  # the base class would accumulate as well
        super().build(variables)  # type: ignore[misc]
        self.gradient_accumulation_steps = steps

        # Aggregation "none": every replica writes the same into its own copy.
        self._clip_state = {
            key: self.add_variable(
                np.shape(value),
                functools.partial(_constant, value),
                str(np.asarray(value).dtype),
                aggregation="none",
                name=f"clip_state_{i}",
            )
            for i, (key, value) in enumerate(state.items())
        }
        self._skipped = self.add_variable((), "zeros", "int32", "none", name="skipped_steps")
        if self._accumulation is not None:
            # A checkpoint names variables by their place: 0.1 had its telemetry before the sums.
            flags = self.add_variable((2, len(variables)), "zeros", "float32", "none", name="flags")
            self.add_variable((4,), "zeros", "float32", "none", name="reserved")
            self._accumulation.build(variables, flags, self._track_variable)
        if self._spikes is not None:
            self._spikes.build(self.add_variable)
        self._first_nonfinite = FirstNonfinite()
        self._start_telemetry()

    def _frozen_beside(self, variables: Sequence[Variable]) -> list[Variable]:
        """What else the network has, for the rules of a ClipMap: known once it is built."""
        parts = [v for network in networks_of(variables) for v in network.variables]
        others = {id(v): v for v in [*self._frozen_variables, *parts]}
        for v in variables:
            others.pop(id(v), None)
        return list(others.values())

    def _check_inner_knows(self, variables: Sequence[Variable]) -> None:
        """Raise a ValueError if the inner optimizer was built without some of the variables."""
        unknown = [v for v in variables if not _compat.knows(self.inner_optimizer, v)]
        if unknown:
            kind = type(self.inner_optimizer).__name__
            raise ValueError(
                f"ClippedOptimizer: `inner_optimizer` ({kind}) was built without "
                f"{path_of(unknown[0])!r} and {len(unknown) - 1} other variables of "
                f"{len(variables)}, and has no state for them. After unfreezing a layer, pass a "
                f"new one: ClippedOptimizer({kind}(...), ...)."
            )

    def reset_clip_state(self) -> None:
        """Let the clipper forget what it remembers: norms seen, the largest learning rate."""
        if self.built and self._clipper is not None:
            for key, value in self._clipper.init(self._trainable_variables).items():
                self._clip_state[key].assign(value)

    def _note_schedule(self, is_new: bool) -> None:
        """Tell the clipper that a schedule, or a new one, has set the learning rate."""
        if self.built and self._clipper is not None and self._clipper.needs_learning_rate:
            state = {key: to_numpy(v) for key, v in self._clip_state.items()}
            rate = np.float32(to_numpy(self.inner_optimizer.learning_rate))
            for key, value in self._clipper.scheduled(state, rate, is_new).items():
                self._clip_state[key].assign(value)

    def _saved(self) -> dict[str, Variable]:
        """The wrapper's own variables by stable names."""
        named = {"calls": self._iterations}
        named.update({f"hyper:{k}": v for k, v in self._hyper.items() if not is_schedule(v)})
        if self.built:
            named["skipped"] = self._skipped
            named.update({f"state:{k}": v for k, v in self._clip_state.items()})
            if self._spikes is not None:
                named |= {"spikes:norms": self._spikes.norms, "spikes:seen": self._spikes.seen}
            if self._accumulation is not None:
                sums = self._accumulation.sums
                named.update({f"accumulator:{i}": v for i, v in enumerate(sums)})
                named["touched"] = self._accumulation.flags
        return {name.replace("/", "|"): v for name, v in named.items()}

    def save_own_variables(self, store: dict[str, Tensor]) -> None:
        """Save the wrapper's variables; Keras saves the inner optimizer by itself."""
        for name, variable in self._saved().items():
            store[name] = to_numpy(variable)

    def load_own_variables(self, store: Mapping[str, Tensor]) -> None:
        """Load what `save_own_variables` saved; what does not fit stays, with a warning."""
        own, saved = self._saved(), {name: store[name] for name in store.keys()}  # noqa: SIM118
        fitting = [
            name
            for name, variable in own.items()
            if name in saved and tuple(saved[name].shape) == tuple(variable.shape)
        ]
        for name in fitting:
            own[name].assign(saved[name])
        if self.built and self._accumulation is not None:
            self._accumulation.mark_from_sums()  # files of 0.1 and 0.2 have no such flags
            own.pop("touched")
        missing = {*own, *saved} - {*fitting}
        if not self.built:  # a counter, and what "auto" chooses anew, are no loss
            missing -= {"skipped"}
            if self._is_auto:
                missing = {name for name in missing if not name.startswith("hyper:")}
        elif "skipped" not in saved:  # saved before it was built: there was no state yet
            missing -= {*own}
        if missing:
            warnings.warn(
                f"ClippedOptimizer: not loaded, because this optimizer and the saved one differ "
                f"in them: {sorted(missing)[:6]}. "
                + (
                    "Use the clipper and the gradient_accumulation_steps that it was saved with."
                    if self.built
                    else "Build it first: optimizer.build(model.trainable_variables)."
                ),
                stacklevel=2,
            )

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Set all variables, the inner optimizer's as well, in the order of `variables`."""
        if not self.built:
            raise ValueError(
                "ClippedOptimizer: `set_weights` needs a built optimizer. Call "
                "`optimizer.build(trainable_variables)` first."
            )
        variables, weights = self.variables, list(weights)
        shapes = [tuple(np.shape(w)) for w in weights]
        if shapes != [tuple(v.shape) for v in variables]:
            raise ValueError(
                f"ClippedOptimizer: `weights` must have the shapes of the {len(variables)} "
                f"variables, but there are {len(weights)}, of the shapes {shapes[:6]} ..."
            )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)

    def __repr__(self) -> str:
        clipper = repr(AUTO) if self._is_auto else self.clipper
        return f"<{type(self).__name__} of {type(self.inner_optimizer).__name__}, {clipper}>"

    def get_config(self) -> Config:
        """The arguments, JSON-able, with the thresholds that are in force now."""
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "clipper": AUTO if self._is_auto else serialize(self.clipper),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "skip_nonfinite": self.skip_nonfinite,
            "skip_spikes": self.skip_spikes,
            "telemetry": self.telemetry,
            "name": self.name,
            "compiled": self._inner_update.compiled.mode,
        }

    @classmethod
    def from_config(cls, config: Config, custom_objects: Config | None = None) -> Optimizer:
        """The optimizer that `get_config` described, without its state."""
        owner = cls.__name__
        arguments = inspect.signature(cls).parameters
        takes_all = any(a.kind is a.VAR_KEYWORD for a in arguments.values())  # a subclass may
        known = (*arguments, *(config if takes_all else ()))
        validation.config(owner, config, known, needed=("inner_optimizer",))
        config = copy.deepcopy(dict(config))  # Keras writes into the config that it reads
        config["inner_optimizer"] = validation.made_of(
            owner,
            "inner_optimizer",
            config["inner_optimizer"],
            functools.partial(keras.saving.deserialize_keras_object, custom_objects=custom_objects),
        )
        config["clipper"] = deserialize_value(config.get("clipper"), owner, "clipper")
        return cls(**config)


def _constant(value: Tensor, shape: Sequence[int], dtype: str | None = None) -> Tensor:
    del shape
    return ops.convert_to_tensor(np.asarray(value), dtype=dtype)
