"""`ClippedOptimizer`: clips, around any Keras optimizer, what that optimizer applies.

One update, in this order: add up micro-batches; sum over the replicas (one all-reduce); merge
duplicate sparse rows; unscale; skip if anything is not finite; clip; rescale; inner optimizer;
telemetry.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import backend, ops

from keras_gradclip import _aggregation as aggregation
from keras_gradclip import _compat
from keras_gradclip import _kernels as kernels
from keras_gradclip import _validation as validation
from keras_gradclip.clippers.base import (
    Clipper,
    as_clipper,
    current_value,
    deserialize_value,
    layers_of,
    serialize,
)


def _delegated() -> float:
    """Stands for the wrapper's own learning rate, which nobody reads: see `learning_rate`."""
    return 0.0


class ClipHyperparameters(MutableMapping):
    """The live thresholds of an optimizer: names as in `clipper.hyperparameters()`.

    Reading gives the current value as a float. Setting takes effect from the next step on,
    without a retrace, as `optimizer.learning_rate = ...` does. Inside an epoch on JAX, call
    `model.jax_state_sync()` first, as for the learning rate.
    """

    def __init__(self, optimizer: ClippedOptimizer) -> None:
        self._optimizer = optimizer

    def __getitem__(self, name: str) -> float:
        value = self._optimizer._hyper[self._known(name)]
        iterations = self._optimizer.iterations
        if isinstance(value, validation.LearningRateSchedule):
            value = value(ops.convert_to_tensor(to_numpy(iterations)))
        return float(to_numpy(value))

    def __setitem__(self, name: str, value: Any) -> None:
        current = self._optimizer._hyper[self._known(name)]
        if isinstance(current, validation.LearningRateSchedule):
            raise TypeError(
                f"clip_hyperparameters[{name!r}] follows the schedule {current!r} and cannot be "
                "set. Build the clipper with a number to be able to."
            )
        symbolic = ops.is_tensor(value) and not hasattr(value, "__float__")
        if not symbolic:
            value = validation.positive("clip_hyperparameters", name, value)
        current.assign(value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(
            f"clip_hyperparameters[{name!r}] cannot be deleted. To stop clipping, set it to a "
            "large value, or compile with clipper=None."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._optimizer._hyper)

    def __len__(self) -> int:
        return len(self._optimizer._hyper)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _known(self, name: str) -> str:
        if name not in self._optimizer._hyper:
            raise KeyError(f"no clip hyper-parameter is called {name!r}; there are {list(self)}")
        return name


def to_numpy(value: Any) -> Any:
    """A host copy; `.numpy()` works under MirroredStrategy, where `int(...)` raises.

    On PyTorch `.numpy()` takes no tensor of a GPU.
    """
    if aggregation.is_tensorflow() and hasattr(value, "numpy"):
        return value.numpy()
    return ops.convert_to_numpy(value)


@keras.saving.register_keras_serializable(package="keras_gradclip")
class ClippedOptimizer(keras.optimizers.Optimizer):
    """Wraps an optimizer so that it applies clipped gradients.

    The clip sees the gradient that will be applied: accumulated, summed over all replicas,
    unscaled. It works in any `keras.Model` and in custom loops, and behaves as the inner
    optimizer does to everything around it.

    ```python
    optimizer = ClippedOptimizer(keras.optimizers.AdamW(1e-3), AbsoluteClip(0.1))
    model.compile(optimizer=optimizer, loss="mse")
    ```

    Args:
        inner_optimizer: a Keras optimizer, or its name. It must not clip or accumulate by
            itself, and belongs to the wrapper from now on.
        clipper: a clipper, anything that `keras_gradclip.get` takes, or None (clip nothing).
        gradient_accumulation_steps: None, or the number of calls whose gradients are averaged
            into one update. The clip sees the average. Learning-rate schedules count updates.
        skip_nonfinite: leave out an update if its gradient has an infinity or a NaN on any
            replica, and count it in `skipped_steps`. Under mixed_float16 this always happens,
            and the loss scale falls.
        telemetry: keep the figures that `read_telemetry` returns; True takes them at every
            update, which costs two or three more passes over the gradients, an int n at every
            n-th, from the first after a reset on. `ClippedModel` turns it on, with n = 8.
        name: the optimizer's name.

    Raises:
        ValueError: an inner optimizer with its own clipping or accumulation, a
            LossScaleOptimizer or another ClippedOptimizer inside, or a wrong argument.
    """

    def __init__(
        self,
        inner_optimizer: Any,
        clipper: Any = None,
        gradient_accumulation_steps: int | None = None,
        skip_nonfinite: bool = False,
        telemetry: bool | int = False,
        name: str | None = None,
    ) -> None:
        inner_optimizer = _check_inner(inner_optimizer)
        clipper = as_clipper("ClippedOptimizer", "clipper", clipper, optional=True)
        steps = validation.steps(
            "ClippedOptimizer", "gradient_accumulation_steps", gradient_accumulation_steps
        )
        if not isinstance(skip_nonfinite, bool):
            raise ValueError(
                "ClippedOptimizer: `skip_nonfinite` must be True or False, but is "
                f"{skip_nonfinite!r}."
            )
        if not isinstance(telemetry, bool):
            validation.steps("ClippedOptimizer", "telemetry", telemetry)
        super().__init__(learning_rate=_delegated, name=name)
        self._clipper = clipper
        self.skip_nonfinite = skip_nonfinite
        self.telemetry = telemetry
        self._wrapped_blindly = False
        self._strategy = aggregation.current_strategy()
        self._ema_overwrite_frequency = None
        if self._strategy is not None and self._strategy.num_replicas_in_sync > 1:
            # Keras overwrites inside a cond in replica context, which fails; we do it.
            # The mark serves an optimizer that is compiled, and so wrapped, a second time.
            inner_optimizer.taken_ema_overwrite_frequency = (
                inner_optimizer.ema_overwrite_frequency
                or getattr(inner_optimizer, "taken_ema_overwrite_frequency", None)
            )
            self._ema_overwrite_frequency = inner_optimizer.taken_ema_overwrite_frequency
            inner_optimizer.ema_overwrite_frequency = None
        _compat.make_reduce_identity(inner_optimizer)
        self.inner_optimizer = inner_optimizer
        self.gradient_accumulation_steps = steps
        self._hyper = {}
        for key, value in (clipper.hyperparameters() if clipper else {}).items():
            self._hyper[key] = value if _is_schedule(value) else self._scalar(key, value)
        self._fraction_weights: list[float] = []
        self.set_frozen_variables(())
        self._observer: Any = None

    def _scalar(self, key: str, value: float) -> Any:
        """A float32 variable for a live threshold."""
        name = "clip_" + "".join(c if c.isalnum() else "_" for c in key)
        return self.add_variable(
            (), keras.initializers.Constant(value), "float32", aggregation="none", name=name
        )

    # What the outside sees ------------------------------------------------------------------

    @property
    def clipper(self) -> Clipper | None:
        """The clipper, with the thresholds that are in force now."""
        if self._clipper is None:
            return None
        values = dict(self._clipper.hyperparameters())
        for key, given in values.items():
            now = given if _is_schedule(given) else self.clip_hyperparameters[key]
            if now is not given and np.float32(given) != np.float32(now):
                values[key] = now  # set since; otherwise keep the number as it was written
        return self._clipper.with_hyperparameters(values)

    @property
    def clip_hyperparameters(self) -> ClipHyperparameters:
        """The live thresholds, to read and to set: `["threshold"] = 0.05`."""
        return ClipHyperparameters(self)

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def iterations(self) -> Any:
        """The number of updates so far; micro-batches and skipped steps do not count."""
        return self.inner_optimizer.iterations

    @property
    def variables(self) -> list[Any]:
        """The wrapper's variables, then the inner optimizer's; on JAX also the observer's.

        What a step on JAX may write goes in and comes out with the optimizer's variables.
        """
        watching = backend.backend() == "jax" and self._observer is not None
        return [
            *self._variables,
            *self.inner_optimizer.variables,
            *(self._observer.state if watching else []),
        ]

    @property
    def skipped_steps(self) -> int:
        """The number of updates left out because a gradient was not finite, since the start.

        What a LossScaleOptimizer leaves out is counted on TensorFlow alone: on JAX and PyTorch
        Keras drops it, a micro-batch at a time, before it comes here.
        """
        return int(to_numpy(self._skipped)) if self.built else 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Learns that somebody wraps this optimizer, by what `LossScaleOptimizer` assigns."""
        if name == "loss_scale_factor" and "inner_optimizer" in self.__dict__:
            self._on_loss_scale_factor(value)
        else:
            super().__setattr__(name, value)

    def _on_loss_scale_factor(self, value: float | None) -> None:
        if value is not None:
            raise ValueError(
                f"ClippedOptimizer: set loss_scale_factor={value!r} on the inner optimizer."
            )
        # `LossScaleOptimizer.__init__` assigns None to the optimizer that it wraps.
        self.inner_optimizer.loss_scale_factor = None
        if not aggregation.is_tensorflow():
            return
        outer = _compat.find_wrapping_loss_scale(self)
        if outer is None:
            # Somebody scales the loss and we cannot tell who: at least never apply an infinity.
            self._wrapped_blindly = True
        else:
            # Its own `apply` asks the first replica alone whether the gradients are finite.
            outer.apply = functools.partial(_apply_scaled, outer, self)

    @property
    def _model_variables_moving_average(self) -> Any:
        """What `SwapEMAWeights` looks for in the optimizer that it finds under a loss scale."""
        return self.inner_optimizer._model_variables_moving_average

    def scale_loss(self, loss: Any) -> Any:
        """`loss` times the inner optimizer's fixed loss scale, if it has one."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """What the inner optimizer does at the end of training (moving averages)."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """As the inner optimizer's."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_frozen_variables(self, variables: Sequence[Any]) -> None:
        """Name the model's variables that are not trained now: a ClipMap's rules may match them.

        `ClippedModel` does this at compile.
        """
        # Past Keras, which would take them for variables of the optimizer.
        object.__setattr__(self, "_frozen_variables", tuple(variables))

    # State ----------------------------------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
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
        state = {}
        if self._clipper is not None:
            self._clipper.check_variables([*variables, *self._frozen_variables])
            state = self._clipper.init(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        steps = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = None  # the base class would accumulate as well
        super().build(variables)
        self.gradient_accumulation_steps = steps

        self._paths = layers_of(variables)
        self._clip_state = {
            key: self.add_variable(
                value.shape,
                functools.partial(_constant, value),
                str(value.dtype),
                aggregation="none",
                name=f"clip_state_{i}",
            )
            for i, (key, value) in enumerate((k, np.asarray(v)) for k, v in state.items())
        }
        # Aggregation "none": every replica writes the same figures into its own copy.
        self._skipped = self.add_variable((), "zeros", "int32", "none", name="skipped_steps")
        # Sums since the last reset. Rows: squared norm before the clip, clip fraction.
        self._sums = self.add_variable(
            (2, len(variables)), "zeros", "float32", "none", name="telemetry"
        )
        # updates measured, skipped updates, sum of the measured global norms, updates
        self._totals = self.add_variable((4,), "zeros", "float32", "none", name="telemetry_totals")
        self._accumulators: list[Any] = []
        if self._micro_steps > 1:
            for v in variables:
                accumulator = aggregation.local_variable(
                    v.shape, v.dtype, f"accumulator_{len(self._accumulators)}"
                )
                self._track_variable(accumulator)
                self._accumulators.append(accumulator)

    @property
    def _micro_steps(self) -> int:
        return self.gradient_accumulation_steps or 1

    # One update -----------------------------------------------------------------------------

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """Clip and apply gradients; to be called in replica context.

        Args:
            grads: one gradient a variable; None, and `tf.IndexedSlices`, are allowed.
            trainable_variables: the variables; None for those that the optimizer was built with.

        Raises:
            ValueError: unknown variables, no gradient at all, or cross-replica context.
        """
        self._apply(grads, trainable_variables, None)

    def _apply(self, grads: Sequence[Any], trainable_variables: Any, loss_scale: Any) -> None:
        grads = list(grads)
        if not grads:
            return
        aggregation.check_replica_context()
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "ClippedOptimizer: `apply(grads)` without variables needs a built optimizer. "
                    "Call `optimizer.build(trainable_variables)` first."
                )
            variables = list(self._trainable_variables)
        else:
            variables = list(trainable_variables)
            if not self.built:
                self.build(variables)
        if len(grads) != len(variables):
            raise ValueError(
                f"ClippedOptimizer: {len(grads)} gradients came for {len(variables)} variables."
            )
        if all(g is None for g in grads):
            raise ValueError("ClippedOptimizer: no gradients provided for any variable.")
        # From here on, lists run over all variables that the optimizer was built with.
        called = [self._index(v) for v in variables]
        full: list[Any] = [None] * len(self._trainable_variables)
        for i, g in zip(called, grads, strict=True):
            full[i] = g

        if self._micro_steps > 1:
            present = [g is not None for g in full]
            self._accumulate(full)
            aggregation.cond(
                ops.equal((self._iterations + 1) % self._micro_steps, 0),
                functools.partial(self._update_from_accumulators, present, called, loss_scale),
                _nothing,
                state=self._written(),
            )
        else:
            self._update(full, called, loss_scale)
        self._iterations.assign_add(1)

    def _index(self, variable: Any) -> int:
        try:
            return self._get_variable_index(variable)
        except KeyError:
            raise ValueError(
                f"ClippedOptimizer: unknown variable {getattr(variable, 'path', variable)!r}. The "
                "optimizer works on the variables that it was built with; after unfreezing a "
                "layer, compile with a new optimizer."
            ) from None

    def _written(self) -> list[Any]:
        """Every variable that an update may write."""
        return [*self._trainable_variables, *self.variables]

    def _accumulate(self, grads: Sequence[Any]) -> None:
        for variable, accumulator, g in zip(
            self._trainable_variables, self._accumulators, grads, strict=True
        ):
            if g is None:
                continue
            if kernels.is_sparse(g):
                g = ops.convert_to_tensor(g)
            if _overwritten(variable):
                accumulator.assign(ops.maximum(accumulator, g))
            else:
                accumulator.assign_add(ops.cast(g, accumulator.dtype))

    def _update_from_accumulators(
        self, present: Sequence[bool], called: Sequence[int], loss_scale: Any
    ) -> None:
        grads = [
            kernels.read(a) if there else None
            for a, there in zip(self._accumulators, present, strict=True)
        ]
        self._update(grads, called, loss_scale)
        for accumulator, there in zip(self._accumulators, present, strict=True):
            if there:
                accumulator.assign(ops.zeros(accumulator.shape, accumulator.dtype))

    def _update(self, grads: Sequence[Any], called: Sequence[int], loss_scale: Any) -> None:
        """Reduce, merge, unscale; then step or skip."""
        ordinary, overwriting = list(grads), [None] * len(grads)
        for i, variable in enumerate(self._trainable_variables):
            if _overwritten(variable):  # a new value and no gradient: float8 scales
                overwriting[i], ordinary[i] = ordinary[i], None
        ordinary = aggregation.all_reduce_sum(ordinary)
        ordinary = [kernels.merge_duplicate_rows(g) for g in ordinary]
        divisors = [d for d in (self._micro_steps, self.inner_optimizer.loss_scale_factor) if d]
        if divisors[0] == 1:
            divisors.pop(0)
        if loss_scale is not None:
            divisors.append(loss_scale.dynamic_scale)
        for divisor in divisors:
            ordinary = [_divide(g, divisor) for g in ordinary]

        step = functools.partial(self._step, called, loss_scale)
        if self.skip_nonfinite or loss_scale is not None or self._wrapped_blindly:
            aggregation.cond(
                kernels.all_finite(ordinary),
                step,
                functools.partial(self._skip, loss_scale),
                (ordinary, overwriting),
                state=self._written(),
            )
        else:
            step(ordinary, overwriting)

    def _step(
        self, called: Sequence[int], loss_scale: Any, grads: list[Any], overwriting: list[Any]
    ) -> None:
        """Clip, let the inner optimizer apply, take the figures."""
        variables = self._trainable_variables
        clipped, stats, hyper = grads, None, {}
        if self._clipper is not None:
            iterations = self.inner_optimizer.iterations
            hyper = {k: current_value(v, iterations) for k, v in self._hyper.items()}
            state = {k: kernels.read(v) for k, v in self._clip_state.items()}
            clipped, state, stats = self._clipper.apply(grads, variables, state, hyper)
            for key, value in state.items():
                self._clip_state[key].assign(value)
        if self._observer is not None:
            self._observer.on_update(grads, clipped, stats, hyper)
            if self._observer.holds:
                return
        if self.telemetry:
            self._measure(grads, stats)
        inner_scale = self.inner_optimizer.loss_scale_factor
        if inner_scale:  # the inner optimizer will divide once more
            clipped = [_divide(g, 1.0 / inner_scale) for g in clipped]
        applied = [clipped[i] if overwriting[i] is None else overwriting[i] for i in called]
        self.inner_optimizer.apply(applied, [variables[i] for i in called])
        if self._ema_overwrite_frequency:
            aggregation.cond(
                ops.equal(self.inner_optimizer.iterations % self._ema_overwrite_frequency, 0),
                functools.partial(
                    _compat.overwrite_with_average, self.inner_optimizer, list(variables)
                ),
                _nothing,
                cross_replica=True,
            )
        if loss_scale is not None:
            _grow(loss_scale)

    def _skip(self, loss_scale: Any, grads: list[Any], overwriting: list[Any]) -> None:
        """Leave the update out on every replica; the loss scale falls."""
        if self._observer is not None:
            self._observer.on_skip(grads)
        del grads, overwriting
        self._skipped.assign(self._skipped + 1)
        self._totals.assign(self._totals + ops.convert_to_tensor([0.0, 1.0, 0.0, 0.0]))
        if loss_scale is not None:
            loss_scale.step_counter.assign(ops.zeros_like(loss_scale.step_counter))
            loss_scale.dynamic_scale.assign(loss_scale.dynamic_scale * 0.5)

    # Telemetry ------------------------------------------------------------------------------

    def _measure(self, grads: Sequence[Any], stats: Any) -> None:
        """Take the figures, if it is this update's turn; before any weight changes."""
        self._fraction_weights = list(stats.weights) if stats else [0.0] * len(grads)
        if self.telemetry == 1:
            self._record(grads, stats)
        else:
            aggregation.local_cond(
                ops.equal(kernels.read(self._totals)[3] % float(self.telemetry), 0.0),
                functools.partial(self._record, grads, stats),
                [self._sums, self._totals],
                self._trainable_variables,
            )
        self._totals.assign(self._totals + ops.convert_to_tensor([0.0, 0.0, 0.0, 1.0]))

    def _record(self, grads: Sequence[Any], stats: Any) -> None:
        zero = ops.zeros((), "float32")
        squares = list(stats.square_norms) if stats and stats.square_norms else [None] * len(grads)
        missing = [i for i, g in enumerate(grads) if g is not None and squares[i] is None]
        taken = kernels.sums_of_squares([kernels.values(grads[i]) for i in missing])
        for i, square in zip(missing, taken, strict=True):
            squares[i] = square
        squares = [zero if square is None else square for square in squares]
        fractions = stats.fractions() if stats else [None] * len(grads)
        squares = ops.stack(squares)
        self._sums.assign(
            self._sums
            + ops.stack([squares, ops.stack([zero if f is None else f for f in fractions])])
        )
        norm = ops.sqrt(ops.sum(squares))
        self._totals.assign(self._totals + ops.stack([ops.ones_like(norm), zero, norm, zero]))

    def observe(self, observer: Any) -> None:
        """Show every update, from the next trace on, to `observer`; None ends it.

        Args:
            observer: an object with `on_update(grads, clipped, stats, hyper)`, called after the
                clip in replica context with the reduced gradients (`stats`: `ClipStats` or None);
                `on_skip(grads)`, called for an update that is left out; `holds`, a bool: True
                leaves the weights as they are; and `state`, the list of the variables that the
                two write (for JAX).
        """
        self._observer = observer

    def mean_grad_norm(self) -> Any:
        """The global L2 norm before the clip, averaged since the last reset; a float32 scalar."""
        if not self.built:
            return ops.zeros((), "float32")
        return self._mean(kernels.read(self._totals)[2])

    def mean_clip_fraction(self) -> Any:
        """Elements (or norms) clipped / all, averaged since the last reset; a float32 scalar."""
        total = sum(self._fraction_weights)
        if not self.built or not total:
            return ops.zeros((), "float32")
        shares = ops.convert_to_tensor(np.asarray(self._fraction_weights, "float32") / total)
        return self._mean(ops.sum(kernels.read(self._sums)[1] * shares))

    def _mean(self, total: Any) -> Any:
        """`total` over the updates measured: 0 before the first, NaN if all were skipped."""
        totals = kernels.read(self._totals)
        none = ops.where(totals[1] > 0, float("nan"), 0.0)
        return ops.where(totals[0] > 0, total / ops.maximum(totals[0], 1.0), none)

    def read_telemetry(self) -> dict[str, Any]:
        """What happened since the last `reset_telemetry`, fetched to the host.

        The means are over the updates that were measured: see `telemetry`.

        Returns:
            A dict: `layers` (list of layer paths), `layer_grad_norm` (array, one a layer: the
            root mean square over the updates of the layer's L2 norm before the clip),
            `layer_clip_fraction` (array, 0..1), `grad_norm` (float, the mean global norm before
            the clip), `clip_fraction` (float), `updates` and `skipped` (ints).

        Raises:
            ValueError: telemetry is off.
        """
        if not self.telemetry:
            raise ValueError(
                "read_telemetry: nothing was recorded. Pass telemetry=True to ClippedOptimizer."
            )
        layers = list(dict.fromkeys(self._paths)) if self.built else []
        result: dict[str, Any] = {
            "layers": layers,
            "layer_grad_norm": np.zeros(len(layers), "float32"),
            "layer_clip_fraction": np.zeros(len(layers), "float32"),
            "grad_norm": 0.0,
            "clip_fraction": 0.0,
            "updates": 0,
            "skipped": 0,
        }
        if not self.built:
            return result
        measured, skipped, norms, updates = (float(x) for x in to_numpy(self._totals))
        squares, fractions = np.asarray(to_numpy(self._sums), "float64") / max(measured, 1.0)
        position = {layer: i for i, layer in enumerate(layers)}
        number = np.array([position[path] for path in self._paths], int)
        weights = np.asarray(self._fraction_weights or np.zeros(len(number)), "float64")

        def per_layer(x: np.ndarray) -> np.ndarray:
            return np.bincount(number, x, minlength=len(layers))

        counted = per_layer(weights)
        result["layer_grad_norm"] = np.sqrt(per_layer(squares)).astype("float32")
        result["layer_clip_fraction"] = np.divide(
            per_layer(weights * fractions), counted, out=np.zeros_like(counted), where=counted > 0
        ).astype("float32")
        result["grad_norm"] = norms / max(measured, 1.0)
        total = weights.sum()
        result["clip_fraction"] = float(weights @ fractions / total) if total else 0.0
        result["updates"], result["skipped"] = int(updates), int(skipped)
        return result

    def reset_telemetry(self) -> None:
        """Start the averages of `read_telemetry` anew."""
        if self.built:
            self._sums.assign(np.zeros(self._sums.shape, "float32"))
            self._totals.assign(np.zeros(self._totals.shape, "float32"))

    # Saving ---------------------------------------------------------------------------------

    def _saved(self) -> dict[str, Any]:
        """The wrapper's variables by stable names; telemetry is not worth saving."""
        named = {"calls": self._iterations}
        named.update({f"hyper:{k}": v for k, v in self._hyper.items() if not _is_schedule(v)})
        if self.built:
            named["skipped"] = self._skipped
            named.update({f"state:{k}": v for k, v in self._clip_state.items()})
            named.update({f"accumulator:{i}": v for i, v in enumerate(self._accumulators)})
        return {name.replace("/", "|"): v for name, v in named.items()}

    def save_own_variables(self, store: Any) -> None:
        """Save the wrapper's variables; Keras saves the inner optimizer by itself."""
        for name, variable in self._saved().items():
            store[name] = to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` saved; what does not fit stays, with a warning."""
        own, saved = self._saved(), {name: store[name] for name in store.keys()}  # noqa: SIM118
        fitting = [
            name
            for name, variable in own.items()
            if name in saved and tuple(saved[name].shape) == tuple(variable.shape)
        ]
        for name in fitting:
            own[name].assign(saved[name])
        missing = sorted({*own, *saved} - {*fitting})
        if missing:
            warnings.warn(
                f"ClippedOptimizer: not loaded, because this optimizer and the saved one differ "
                f"in them: {missing[:6]}. "
                + (
                    "Use the clipper and the gradient_accumulation_steps that it was saved with."
                    if self.built
                    else "Build it first: optimizer.build(model.trainable_variables)."
                ),
                stacklevel=2,
            )

    def set_weights(self, weights: Sequence[Any]) -> None:
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

    def get_config(self) -> dict[str, Any]:
        """The arguments, JSON-able, with the thresholds that are in force now."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        if self._ema_overwrite_frequency:
            inner["config"]["ema_overwrite_frequency"] = self._ema_overwrite_frequency
        return {
            "inner_optimizer": inner,
            "clipper": serialize(self.clipper),
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "skip_nonfinite": self.skip_nonfinite,
            "telemetry": self.telemetry,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> ClippedOptimizer:
        """The optimizer that `get_config` described, without its state."""
        config = copy.deepcopy(dict(config))  # Keras writes into the config that it reads
        config["inner_optimizer"] = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        config["clipper"] = deserialize_value(config.get("clipper"))
        return cls(**config)


def find(optimizer: Any) -> ClippedOptimizer | None:
    """The ClippedOptimizer that `optimizer` is, or wraps; None if there is none."""
    while optimizer is not None and not isinstance(optimizer, ClippedOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def _check_inner(inner: Any) -> Any:
    """The inner optimizer, if it can be wrapped."""
    if isinstance(inner, (str, dict)):
        inner = keras.optimizers.get(inner)
    remedy = None
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        remedy = (
            "wrap it the other way round: LossScaleOptimizer(ClippedOptimizer(inner, clipper)); "
            "under mixed_float16, compile does so by itself"
        )
    elif isinstance(inner, _compat.MultiOptimizer):
        remedy = (
            "each of its optimizers reduces, clips and accumulates for itself; write the "
            "MultiOptimizer around ClippedOptimizers instead, and compile a plain model with it"
        )
    elif isinstance(inner, ClippedOptimizer):
        remedy = "use Chain([first, second]) to clip twice"
    elif not isinstance(inner, keras.optimizers.Optimizer):
        remedy = "pass a keras.optimizers.Optimizer such as keras.optimizers.AdamW(1e-3)"
    if remedy:
        kind = type(inner).__name__
        raise ValueError(
            f"ClippedOptimizer: `inner_optimizer` must not be {inner!r} ({kind}): {remedy}."
        )
    for argument in ("clipvalue", "clipnorm", "global_clipnorm"):
        value = getattr(inner, argument, None)
        if value is not None:
            ours = {
                "clipvalue": f"AbsoluteClip({value})",
                "clipnorm": f"NormClip({value}, scope='variable')",
                "global_clipnorm": f"NormClip({value}, scope='global')",
            }[argument]
            raise ValueError(
                f"ClippedOptimizer: `inner_optimizer` ({type(inner).__name__}) clips by itself, "
                f"{argument}={value!r}. Leave that out and use the clipper {ours}."
            )
    if inner.gradient_accumulation_steps:
        n = inner.gradient_accumulation_steps
        raise ValueError(
            f"ClippedOptimizer: `inner_optimizer` ({type(inner).__name__}) has "
            f"gradient_accumulation_steps={n}, which would clip every micro-batch. Leave that "
            f"out and write ClippedOptimizer(..., gradient_accumulation_steps={n})."
        )
    return inner


def _is_schedule(value: Any) -> bool:
    return isinstance(value, validation.LearningRateSchedule)


def _overwritten(variable: Any) -> bool:
    return getattr(variable, "overwrite_with_gradient", False)


def _constant(value: np.ndarray, shape: Any, dtype: Any = None) -> Any:
    del shape
    return ops.convert_to_tensor(value, dtype=dtype)


def _nothing(*args: Any) -> None:
    del args


def _divide(gradient: Any, divisor: Any) -> Any:
    if gradient is None:
        return None
    x = kernels.values(gradient)
    return kernels.with_values(gradient, x / ops.cast(divisor, x.dtype))


def _apply_scaled(outer: Any, wrapper: ClippedOptimizer, grads: Any, trainable_variables=None):
    """`LossScaleOptimizer.apply` that reduces first and asks for finiteness afterwards."""
    if not outer.built:
        outer.build(list(trainable_variables))
        outer.built = True
    wrapper._apply(grads, trainable_variables, outer)


def _grow(loss_scale: Any) -> None:
    """After a finite step: double the scale every `dynamic_growth_steps` of them."""
    full = ops.equal(loss_scale.step_counter, loss_scale.dynamic_growth_steps - 1)
    counter = kernels.read(loss_scale.step_counter)
    scale = kernels.read(loss_scale.dynamic_scale)
    loss_scale.step_counter.assign(ops.where(full, ops.zeros_like(counter), counter + 1))
    loss_scale.dynamic_scale.assign(ops.where(full, scale * 2.0, scale))
