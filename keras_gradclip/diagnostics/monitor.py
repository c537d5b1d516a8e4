"""`ClipMonitor`: what the clip does to each variable's gradient, over time."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import backend, ops

from keras_gradclip import _aggregation as aggregation
from keras_gradclip import _kernels as kernels
from keras_gradclip import _validation as validation
from keras_gradclip.clippers.base import layers_of, path_of, serialize
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer, find, to_numpy

#: What is measured on the device for each variable in a sampled update.
_ROWS = ("square_before", "square_after", "chord", "clip_fraction", "max_abs", "bad", "bad_since")
#: What is written for each variable.
FIELDS = ("norm_before", "norm_after", "clip_fraction", "max_abs", "angle", "nonfinite")
#: File names inside `run_dir`.
MONITOR_CSV, THRESHOLDS_CSV, MONITOR_JSON = "monitor.csv", "thresholds.csv", "monitor.json"


def wrapped_optimizer(owner: str, model: Any) -> ClippedOptimizer:
    """The built `ClippedOptimizer` of a compiled model.

    Raises:
        ValueError: the model is not compiled with one or is not built.
    """
    outer: Any = getattr(model, "optimizer", None)
    wrapper = find(outer)
    if wrapper is None:
        raise ValueError(
            f"{owner}: the model's optimizer is {outer!r}, which does not clip. Compile with "
            "ClippedOptimizer(inner_optimizer, clipper), or build a ClippedModel; clipper=None "
            "will do."
        )
    if not wrapper.built:
        if not model.built:
            raise ValueError(
                f"{owner}: the model is not built. Call it on a batch, or give it an Input."
            )
        with strategy_scope(wrapper):
            outer.build(model.trainable_variables)
    return wrapper


def strategy_scope(optimizer: ClippedOptimizer) -> Any:
    """The scope of the strategy under which the optimizer was made."""
    strategy = optimizer._strategy
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def device_variable(shape: Sequence[int], dtype: str = "float32") -> Any:
    """A variable of zeros into which every replica writes the same."""
    if backend.backend() == "jax" and dtype == "int64":
        dtype = "int32"  # JAX has no other, unless asked
    return keras.Variable(
        initializer="zeros", shape=tuple(shape), dtype=dtype, trainable=False, aggregation="none"
    )


def _text(clipper: Any) -> str:
    """A clipper for people."""
    return "off" if clipper is None else str(clipper)


def names_of(variables: Sequence[Any]) -> list[str]:
    """`variable.path`, each once: the second of one path belongs to layer `#2`."""
    layers = layers_of(variables)
    names = []
    for variable, layer in zip(variables, layers, strict=True):
        _, slash, tail = path_of(variable).rpartition("/")
        names.append(f"{layer}/{tail}" if slash else layer)
    return names


def sync(model: Any) -> None:
    """Bring the variables up to date: inside an epoch on JAX they are not."""
    if backend.backend() == "jax":
        model.jax_state_sync()


class _Recorder:
    """Takes the figures of one update in `every`, on the device.

    Samples go round in a buffer of `capacity`, so that the host need not look at every step.
    """

    holds = False

    def __init__(self, optimizer: ClippedOptimizer, every: int, capacity: int) -> None:
        self.optimizer = optimizer
        self.every, self.capacity = every, capacity
        count = len(optimizer._trainable_variables)
        self.names = list(optimizer.clip_hyperparameters)
        with strategy_scope(optimizer):
            self.samples = device_variable((capacity, len(_ROWS), count))
            self.steps = device_variable((capacity,), "int64")
            # The length of the window that ends with the sample, then the live thresholds.
            self.extra = device_variable((capacity, 1 + len(self.names)))
            self.written = device_variable((), "int64")
            self.force = device_variable(())
            self.updates = device_variable(())  # since the last sample, skipped ones included
            self.nonfinite = device_variable((count,))  # of them, with a bad gradient
        self.state = [
            *(self.samples, self.steps, self.extra, self.written),
            *(self.force, self.updates, self.nonfinite),
        ]
        self.read = 0

    # On the device ---------------------------------------------------------------------------

    def on_skip(self, grads: Sequence[Any]) -> None:
        bad = [0.0 if g is None else 1.0 - kernels.float32(kernels.all_finite([g])) for g in grads]
        self.updates.assign(self.updates + 1.0)
        self.nonfinite.assign(self.nonfinite + ops.stack([kernels.float32(b) for b in bad]))

    def on_update(self, grads: Any, clipped: Any, stats: Any, hyper: Any) -> None:
        self.updates.assign(self.updates + 1.0)
        iterations = ops.cast(self.optimizer.inner_optimizer.iterations, self.steps.dtype)
        due = ops.logical_or(ops.equal(iterations % self.every, 0), self.force > 0)

        def sample() -> None:
            self._sample(iterations, grads, clipped, stats, hyper)

        aggregation.local_cond(due, sample, self.state, self.optimizer._trainable_variables)

    def _sample(self, iterations: Any, grads: Any, clipped: Any, stats: Any, hyper: Any) -> None:
        zero = ops.zeros((), "float32")
        fractions = stats.fractions() if stats else [None] * len(grads)
        columns = []
        for before, after, fraction in zip(grads, clipped, fractions, strict=True):
            if before is None:
                columns.append([zero] * (len(_ROWS) - 1))
                continue
            x, y = (kernels.float32(kernels.values(g)) for g in (before, after))
            square_x, square_y = kernels.sum_of_squares(x), kernels.sum_of_squares(y)
            # |x/‖x‖ − y/‖y‖|² gives small angles that the cosine loses in float32.
            directions = (
                v * ops.rsqrt(ops.maximum(s, 1e-30)) for v, s in ((x, square_x), (y, square_y))
            )
            first, second = directions
            chord = kernels.sum_of_squares(first - second)
            column = [
                square_x,
                square_y,
                chord,
                zero if fraction is None else fraction,
                kernels.max_abs(x),
            ]
            finite = ops.isfinite(square_x)
            columns.append(
                [*(ops.where(finite, c, zero) for c in column), 1.0 - kernels.float32(finite)]
            )
        figures = ops.transpose(ops.stack([ops.stack(c) for c in columns]))
        figures = ops.concatenate([figures, (self.nonfinite + 0.0)[None]])
        extra = ops.stack([self.updates + 0.0, *(hyper[n] for n in self.names)])

        here = ops.equal(
            ops.arange(self.capacity, dtype=self.steps.dtype), self.written % self.capacity
        )
        self.samples.assign(
            ops.where(here[:, None, None], figures[None], kernels.read(self.samples))
        )
        self.extra.assign(ops.where(here[:, None], extra[None], kernels.read(self.extra)))
        self.steps.assign(ops.where(here, iterations, kernels.read(self.steps)))
        self.written.assign(self.written + 1)
        self.force.assign(ops.zeros(()))
        self.updates.assign(ops.zeros(()))
        self.nonfinite.assign(ops.zeros(self.nonfinite.shape))

    # On the host -----------------------------------------------------------------------------

    def fetch(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """The samples since the last fetch: (step, figures `[rows, variables]`, extra)."""
        written = int(to_numpy(self.written))
        if written == self.read:
            return []
        samples, steps, extra = (to_numpy(v) for v in (self.samples, self.steps, self.extra))
        first = max(self.read, written - self.capacity)
        self.read = written
        return [
            (int(steps[i % self.capacity]), samples[i % self.capacity], extra[i % self.capacity])
            for i in range(first, written)
        ]

    def fetch_skipped(self) -> tuple[float, np.ndarray]:
        """Updates and bad gradients since the last sample; both start anew."""
        updates, bad = float(to_numpy(self.updates)), to_numpy(self.nonfinite).astype("float64")
        if bad.any():
            self.updates.assign(0.0)
            self.nonfinite.assign(np.zeros(bad.shape, "float32"))
        return updates, bad


class ClipMonitor(keras.callbacks.Callback):
    """Watches, variable by variable, what the clip does to the gradients.

    ```python
    model.fit(x, y, callbacks=[kgc.ClipMonitor("runs/mine")])
    kgc.report("runs/mine")            # runs/mine/report.html
    ```

    One update in `every` is measured, after the sum over replicas and micro-batches, on the
    device; the host fetches the samples about every `every` batches. The first update of each
    epoch is always measured. Updates that are left out because a gradient was not finite are all
    counted. It works under MirroredStrategy, with gradient accumulation, steps_per_execution,
    mixed_float16 and jit_compile, on TensorFlow, JAX and PyTorch.

    `fit`'s history gets, averaged over the epoch's samples: `grad_norm_after` (global L2 norm
    after the clip), `grad_max` (largest element before it), `clip_angle` (degrees between the
    whole gradient before and after), `nonfinite_fraction` (share of updates with a non-finite
    gradient). All samples are in `history`, and in `run_dir`:

    - `monitor.csv`, a row a sample and variable: `step` (updates before it), `epoch`, `variable`
      (its path; where a second layer has the same one, with `#2` behind the layer),
      `norm_before`, `norm_after` (L2), `clip_fraction` (0..1), `max_abs` (before the clip),
      `angle` (degrees), `nonfinite` (share of the updates looked at since the last sample);
    - `thresholds.csv`, the live thresholds at each sample, as schedules and callbacks set them;
    - `monitor.json`, the variables, the rule that hits each, and the clipper.

    Training on from a checkpoint appends to them: rows of steps that are done again go.

    Args:
        run_dir: a folder (made if need be), or None to write nothing.
        every: measure one update in this many. One measurement reads each gradient about five
            times.
        tensorboard: write the same to `run_dir/tensorboard`, a tag a figure and variable; a lot
            of tags for a large model.

    Attributes:
        history: a dict of lists, a sample an entry: `step`, `epoch`, and for each of the figures
            above a float64 array, one number a variable; `thresholds`, a list of dicts.
        variables: the names of the variables, as in `monitor.csv`, in the order of those arrays.

    Raises:
        ValueError: `every` below 1, tensorboard without a run_dir; when training begins: a model
            without a ClippedOptimizer.
    """

    def __init__(
        self, run_dir: str | os.PathLike | None = None, every: int = 50, tensorboard: bool = False
    ) -> None:
        super().__init__()
        steps = validation.steps("ClipMonitor", "every", every)
        if steps is None:
            raise ValueError("ClipMonitor: `every` must be a whole number of at least 1, not None.")
        if tensorboard and run_dir is None:
            raise ValueError("ClipMonitor: `tensorboard=True` needs a `run_dir` to write to.")
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.every = steps
        self.tensorboard = tensorboard
        self.variables: list[str] = []
        self.history: dict[str, list] = {}
        self._recorder: _Recorder | None = None
        self._folder: Path | None = None
        self._writer: Any = None
        self._epoch = 0
        self._batches = 0

    # Keras calls these -----------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Attach to the optimizer and open the files."""
        optimizer = wrapped_optimizer("ClipMonitor", self.model)
        # Every worker measures, for the logs; one writes.
        self._folder = self.run_dir if aggregation.is_chief(optimizer._strategy) else None
        per_call = int(getattr(self.model, "steps_per_execution", 1))
        self._recorder = _Recorder(optimizer, self.every, per_call // self.every + 4)
        self._checked = optimizer.skip_nonfinite or self.model.optimizer is not optimizer
        watched = optimizer._trainable_variables
        self.variables = names_of(watched)
        self.history = {k: [] for k in ("step", "epoch", *FIELDS, "thresholds")}
        self._open(optimizer)
        optimizer.observe(self._recorder)
        self.model.make_train_function(force=True)  # the step must be traced with the hook

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Ask for a measurement of the first update."""
        self._epoch, self._batches = epoch, 0
        self._first = len(self.history["step"])
        self._recorder_().force.assign(1.0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Fetch what was measured, every `every` batches."""
        if batch + 1 - self._batches >= self.every:
            self._batches = batch + 1
            sync(self.model)
            self._fetch()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Fetch the rest and add the epoch's means to the logs."""
        self._fetch()
        self._fetch_skipped()
        if logs is not None:
            logs.update(self._means())

    def on_train_end(self, logs: Any = None) -> None:
        """Detach: the next `fit` pays nothing."""
        recorder = self._recorder_()
        recorder.optimizer.observe(None)
        self.model.train_function = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # Inside ----------------------------------------------------------------------------------

    def _recorder_(self) -> _Recorder:
        if self._recorder is None:
            raise RuntimeError("ClipMonitor: training has not begun.")
        return self._recorder

    def _fetch(self) -> None:
        recorder = self._recorder_()
        for step, figures, extra in recorder.fetch():
            figures = figures.astype("float64")
            before, after = np.sqrt(figures[0]), np.sqrt(figures[1])
            angle = np.degrees(2 * np.arcsin(np.clip(np.sqrt(figures[2]) / 2, 0, 1)))
            angle[(before == 0) | (after == 0)] = 0.0  # no direction to compare
            looked_at = float(extra[0]) if self._checked else 1.0
            row = {
                "norm_before": before,
                "norm_after": after,
                "clip_fraction": figures[3],
                "max_abs": figures[4],
                "angle": angle,
                "nonfinite": (figures[5] + figures[6]) / max(looked_at, 1.0),
            }
            for name in FIELDS[:-1]:
                row[name][figures[5] > 0] = np.nan
            thresholds = dict(zip(recorder.names, (float(x) for x in extra[1:]), strict=True))
            self._keep(step, row, thresholds)

    def _fetch_skipped(self) -> None:
        """A sample without norms, if updates were left out since the last one."""
        recorder = self._recorder_()
        updates, bad = recorder.fetch_skipped()
        if bad.any():
            row = {name: np.full(bad.shape, np.nan) for name in FIELDS}
            row["nonfinite"] = bad / max(updates, 1.0)
            step = int(to_numpy(recorder.optimizer.iterations))
            self._keep(step, row, dict(recorder.optimizer.clip_hyperparameters))

    def _keep(self, step: int, row: dict[str, np.ndarray], thresholds: dict[str, float]) -> None:
        self.history["step"].append(step)
        self.history["epoch"].append(self._epoch)
        self.history["thresholds"].append(thresholds)
        for name in FIELDS:
            self.history[name].append(row[name])
        if self._folder is not None:
            with (self._folder / MONITOR_CSV).open("a", newline="") as file:
                csv.writer(file).writerows(
                    [step, self._epoch, path, *(f"{row[name][i]:.6g}" for name in FIELDS)]
                    for i, path in enumerate(self.variables)
                )
            with (self._folder / THRESHOLDS_CSV).open("a", newline="") as file:
                csv.writer(file).writerows([step, k, f"{v:.9g}"] for k, v in thresholds.items())
        if self._writer is not None:
            import tensorflow as tf

            with self._writer.as_default(step=step):
                for name in FIELDS:
                    for path, value in zip(self.variables, row[name], strict=True):
                        if math.isfinite(value):
                            tf.summary.scalar(f"{name}/{path}", value)
                for key, value in thresholds.items():
                    tf.summary.scalar(f"threshold/{key}", value)

    def _means(self) -> dict[str, float]:
        """Means over the epoch's samples; NaN where there is none with finite gradients."""
        samples = range(self._first, len(self.history["step"]))
        rows = {name: [self.history[name][i] for i in samples] for name in FIELDS}
        sums: dict[str, list[float]] = {"after": [], "max": [], "angle": [], "bad": []}
        for before, after, _, largest, angle, bad in zip(*rows.values(), strict=True):
            sums["bad"].append(float(bad.max(initial=0.0)))
            if not np.isfinite(before).all():
                continue
            sums["after"].append(float(np.linalg.norm(after)))
            sums["max"].append(float(largest.max(initial=0.0)))
            # 1 − cos of the whole from the parts' angles, without losing small ones.
            sizes = np.linalg.norm(before) * np.linalg.norm(after)
            chord = np.sum(before * after * 4 * np.sin(np.radians(angle) / 2) ** 2)
            spread = np.linalg.norm(before) * after - np.linalg.norm(after) * before
            total = 0.0 if sizes == 0 else chord / sizes + np.sum(spread**2) / sizes**2
            sums["angle"].append(math.degrees(2 * math.asin(min(math.sqrt(total) / 2, 1.0))))
        means = {k: float(np.mean(v)) if v else math.nan for k, v in sums.items()}
        return {
            "grad_norm_after": means["after"],
            "grad_max": means["max"],
            "clip_angle": means["angle"],
            "nonfinite_fraction": 0.0 if math.isnan(means["bad"]) else means["bad"],
        }

    def _open(self, optimizer: ClippedOptimizer) -> None:
        """Start or continue the files in `run_dir`."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        start = int(to_numpy(optimizer.iterations))
        heads = {
            MONITOR_CSV: ["step", "epoch", "variable", *FIELDS],
            THRESHOLDS_CSV: ["step", "name", "value"],
        }
        for name, head in heads.items():
            path = self._folder / name
            kept: list[list[str]] = []
            if path.exists() and start:
                with path.open(newline="") as file:
                    kept = [
                        r
                        for r in list(csv.reader(file))[1:]
                        if len(r) == len(head) and int(r[0]) < start
                    ]
            scratch = path.with_suffix(".tmp")
            with scratch.open("w", newline="") as file:
                csv.writer(file).writerows([head, *kept])
            scratch.replace(path)
        watched = optimizer._trainable_variables
        clipper = optimizer.clipper
        rules = clipper.rule_of(watched) if clipper else [("*", None)] * len(watched)
        description = {
            "every": self.every,
            "clipper": serialize(clipper),
            "clipper_text": _text(clipper),
            "variables": [
                {
                    "path": name,
                    "layer": layer,
                    "shape": [int(d) for d in v.shape],
                    "rule": rule,
                    "clipper": _text(c),
                }
                for v, name, layer, (rule, c) in zip(
                    watched, self.variables, layers_of(watched), rules, strict=True
                )
            ],
        }
        (self._folder / MONITOR_JSON).write_text(json.dumps(description, indent=1))
        if self.tensorboard:
            try:
                import tensorflow as tf

                self._writer = tf.summary.create_file_writer(str(self._folder / "tensorboard"))
            except ImportError as error:
                raise ValueError(
                    "ClipMonitor: `tensorboard=True` needs the packages tensorflow and "
                    f"tensorboard ({error}). Install them or pass tensorboard=False."
                ) from error
