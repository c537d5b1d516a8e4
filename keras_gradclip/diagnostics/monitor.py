"""`ClipMonitor`: what the clip does to each variable's gradient, over time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_gradclip import _aggregation as aggregation
from keras_gradclip import _validation as validation
from keras_gradclip._names import names_of, size_of
from keras_gradclip._types import Config
from keras_gradclip.diagnostics._monitor_files import MonitorFiles
from keras_gradclip.diagnostics._recorder import FIELDS, Recorder
from keras_gradclip.diagnostics.loggers import Log, to_tensorboard
from keras_gradclip.diagnostics.watch import UPDATES_IN_A_STEP, sync, wrapped_optimizer
from keras_gradclip.optimizer._hyperparameters import to_numpy


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
    gradient), and `grad_norm_p50`, `_p90`, `_p99` (percentiles over the samples of the global L2
    norm before the clip). A plain model with a ClippedOptimizer gets `grad_norm` (before the clip)
    and `clip_fraction` (of all elements) as well; a ClippedModel has its own. All samples are in
    `history`, and in `run_dir`:

    - `monitor.csv`, a row a sample and variable: `step` (updates before it), `epoch`, `variable`
      (its path; where a second layer has the same one, with `#2` behind the layer),
      `norm_before`, `norm_after` (L2), `clip_fraction` (0..1), `max_abs` (before the clip),
      `angle` (degrees), `nonfinite` (share of the updates looked at since the last sample);
    - `thresholds.csv`, the live thresholds at each sample, as schedules and callbacks set them;
    - `monitor.json`, the variables, the rule that hits each, and the clipper.

    Training on from a checkpoint appends to them: rows of steps that are done again go. After an
    interrupted `fit` call `detach()`, unless the model is a ClippedModel, which does it itself.

    Args:
        run_dir: a folder (made if need be), or None to write nothing.
        every: measure one update in this many. One measurement reads each gradient about five
            times.
        tensorboard: log to `run_dir/tensorboard` too.
        log: a function of `(step, figures)`, or several, called with each sample on the chief
            alone: `loggers.to_wandb()`, `to_mlflow()`, `to_trackio()`, or one of your own.
            `figures` is a dict of finite floats: `grad_norm`, `grad_norm_after`, `grad_max`,
            `clip_angle` and `clip_fraction` of the whole, `norm_before/VARIABLE` and so on for
            each figure and variable, `threshold/NAME`.

    Attributes:
        history: a dict of lists, a sample an entry: `step`, `epoch`, and for each of the figures
            above a float64 array, one number a variable; `thresholds`, a list of dicts.
        variables: the names of the variables, as in `monitor.csv`, in the order of those arrays.

    Raises:
        ValueError: `every` below 1, tensorboard without a run_dir, a log that is no function; when
            training begins: a model without a ClippedOptimizer.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike | None = None,
        every: int = 50,
        tensorboard: bool = False,
        log: Log | Sequence[Log] = (),
    ) -> None:
        super().__init__()
        if tensorboard and run_dir is None:
            raise ValueError("ClipMonitor: `tensorboard=True` needs a `run_dir` to write to.")
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.every = validation.count("ClipMonitor", "every", every)
        self.tensorboard = tensorboard
        self.logs: list[Log] = [*log] if isinstance(log, Sequence) else [log]
        for function in self.logs:
            if not callable(function):
                raise ValueError(
                    "ClipMonitor: `log` must be a function of (step, figures), or several, but "
                    f"is {function!r}. Call it without brackets, or pass loggers.to_wandb()."
                )
        self.variables: list[str] = []
        self.history: dict[str, list] = {}
        self._recorder: Recorder | None = None
        self._files: MonitorFiles | None = None
        self._active_logs: list[Log] = []
        self._epoch = 0
        self._wholes: list[dict[str, float]] = []  # of the epoch's samples
        self._sizes = np.zeros(0)  # of the variables
        self._fetched_batch = self._fetched_step = 0
        self._interval = 1  # batches between two fetches
        self._is_checked = False  # updates that are not finite are left out

    # Keras calls these -----------------------------------------------------------------------

    def on_train_begin(self, logs: Config | None = None) -> None:
        """Attach to the optimizer and open the files."""
        self.detach()
        optimizer = wrapped_optimizer("ClipMonitor", self.model)
        updates = UPDATES_IN_A_STEP * int(getattr(self.model, "steps_per_execution", 1))
        self._recorder = Recorder(optimizer, self.every, updates // self.every + 4)
        self._interval = self.every // UPDATES_IN_A_STEP + 1
        self._fetched_step = int(to_numpy(optimizer.iterations))
        self._is_checked = optimizer.skip_nonfinite or self.model.optimizer is not optimizer
        self.variables = names_of(optimizer._trainable_variables)
        self._sizes = np.array([size_of(v) for v in optimizer._trainable_variables], "float64")
        self.history = {k: [] for k in ("step", "epoch", *FIELDS, "thresholds")}
        # Every worker measures, for the logs; one writes.
        if aggregation.is_chief(optimizer._strategy):
            self._active_logs = list(self.logs)
            if self.run_dir is not None:
                self._files = MonitorFiles(self.run_dir, optimizer, self.variables, self.every)
                if self.tensorboard:
                    self._active_logs.append(to_tensorboard(self.run_dir / "tensorboard"))
        optimizer.watch(self._recorder)
        self.model.make_train_function(force=True)  # the step must be traced with the watcher

    def on_epoch_begin(self, epoch: int, logs: Config | None = None) -> None:
        """Ask for a measurement of the first update."""
        self._epoch, self._fetched_batch = epoch, 0
        self._wholes = []
        self._attached.force.assign(1.0)

    def on_train_batch_end(self, batch: int, logs: Config | None = None) -> None:
        """Fetch what was measured, before the buffer is full."""
        batches = batch + 1 - self._fetched_batch
        if batches < self._interval:
            return
        self._fetched_batch = batch + 1
        sync(self.model)
        self._fetch()
        step = int(to_numpy(self._attached.optimizer.iterations))
        updates, self._fetched_step = step - self._fetched_step, step
        if updates > 0:  # a batch may be several updates, or a part of one
            self._interval = max(1, self.every * batches // updates)

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        """Fetch the rest and add the epoch's means to the logs."""
        self._fetch()
        nonfinite = self._attached.fetch_skipped()
        if nonfinite is not None:  # a sample without norms
            row = {field: np.full(nonfinite.shape, np.nan) for field in FIELDS}
            row["nonfinite"] = nonfinite
            optimizer = self._attached.optimizer
            step = int(to_numpy(optimizer.iterations))
            self._keep(step, row, dict(optimizer.clip_hyperparameters))
        if logs is not None:
            for name, mean in self._means().items():  # a ClippedModel has two of them already
                logs.setdefault(name, mean)

    def on_train_end(self, logs: Config | None = None) -> None:
        """Detach: the next `fit` pays nothing."""
        self.detach()

    def detach(self) -> None:
        """Stop watching, also after a `fit` that was interrupted."""
        if self._recorder is not None:
            self._recorder.optimizer.unwatch(self._recorder)
            self._recorder = None
            self.model.train_function = None
        self._files, self._active_logs = None, []

    # Inside ----------------------------------------------------------------------------------

    @property
    def _attached(self) -> Recorder:
        if self._recorder is None:
            raise RuntimeError("ClipMonitor: training has not begun.")
        return self._recorder

    def _fetch(self) -> None:
        for sample in self._attached.fetch(self._is_checked):
            self._keep(*sample)

    def _keep(self, step: int, row: dict[str, np.ndarray], thresholds: dict[str, float]) -> None:
        self.history["step"].append(step)
        self.history["epoch"].append(self._epoch)
        self.history["thresholds"].append(thresholds)
        for field in FIELDS:
            self.history[field].append(row[field])
        self._wholes.append(whole_of(row, self._sizes))
        if self._files is not None:
            self._files.add(step, self._epoch, row, thresholds)
        if self._active_logs:
            figures = {
                **self._wholes[-1],
                **{
                    f"{f}/{n}": v
                    for f in FIELDS
                    for n, v in zip(self.variables, row[f], strict=True)
                },
                **{f"threshold/{name}": value for name, value in thresholds.items()},
            }
            finite = {name: float(v) for name, v in figures.items() if math.isfinite(v)}
            for log in self._active_logs:
                log(step, finite)

    def _means(self) -> dict[str, float]:
        """Over the epoch's samples; NaN where there is none with finite gradients."""
        finite = [whole for whole in self._wholes if math.isfinite(whole["grad_norm"])]
        samples = {name: [whole[name] for whole in finite] for name in WHOLE}
        samples["nonfinite_fraction"] = [whole["nonfinite_fraction"] for whole in self._wholes]
        means = {name: float(np.mean(v)) if v else math.nan for name, v in samples.items()}
        norms = samples["grad_norm"]
        for percentile in (50, 90, 99):
            value = float(np.percentile(norms, percentile)) if norms else math.nan
            means[f"grad_norm_p{percentile}"] = value
        return means


#: Figures of the whole gradient, of all variables together.
WHOLE = (
    "grad_norm",
    "grad_norm_after",
    "grad_max",
    "clip_angle",
    "clip_fraction",
    "nonfinite_fraction",
)


def whole_of(row: Mapping[str, np.ndarray], sizes: np.ndarray) -> dict[str, float]:
    """The figures `WHOLE` of a sample; NaN where a variable's gradient is not finite.

    Args:
        row: for each of `FIELDS` an array `[variables]`.
        sizes: the variables' numbers of elements.
    """
    before, after = row["norm_before"], row["norm_after"]
    values = (
        np.linalg.norm(before),
        np.linalg.norm(after),
        row["max_abs"].max(initial=0.0),
        _whole_angle(before, after, row["angle"]),
        row["clip_fraction"] @ sizes / max(sizes.sum(), 1),
        row["nonfinite"].max(initial=0.0),
    )
    return dict(zip(WHOLE, map(float, values), strict=True))


def _whole_angle(before: np.ndarray, after: np.ndarray, angles: np.ndarray) -> float:
    """The angle in degrees between two gradients, from the norms and angles of their parts."""
    # 1 − cos of the whole, without losing small ones.
    whole_before, whole_after = np.linalg.norm(before), np.linalg.norm(after)
    sizes = whole_before * whole_after
    if sizes == 0:
        return 0.0
    chord = np.sum(before * after * 4 * np.sin(np.radians(angles) / 2) ** 2)
    spread = whole_before * after - whole_after * before
    total = chord / sizes + np.sum(spread**2) / sizes**2
    return math.degrees(2 * math.asin(min(math.sqrt(total) / 2, 1.0)))
