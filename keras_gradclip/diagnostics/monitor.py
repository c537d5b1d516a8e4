"""`ClipMonitor`: records what the clip does to each variable's gradient."""

from __future__ import annotations

import math
import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_gradclip import _validation as validation
from keras_gradclip import aggregation
from keras_gradclip._types import Config
from keras_gradclip.clippers.base import serialize
from keras_gradclip.clippers.enforce import Enforcer
from keras_gradclip.diagnostics.loggers import Log, to_tensorboard
from keras_gradclip.diagnostics.sampler import (
    Figure,
    Sample,
    Sampler,
    labels_of,
    sync,
    watched_optimizers,
)
from keras_gradclip.diagnostics.samples import FIELDS, UPDATES, RunFiles, is_measured
from keras_gradclip.names import layers_of, names_of, size_of

#: Figures computed on the device for each variable; `nonfinite` comes with each sample.
FIGURES: dict[str, Figure] = {
    name: operator.attrgetter(name) for name in FIELDS if name != "nonfinite"
}


class ClipMonitor(keras.callbacks.Callback):
    """Records, for each variable, what the clip does to its gradient.

    ```python
    model.fit(x, y, callbacks=[kgc.ClipMonitor("runs/mine")])
    kgc.report("runs/mine")            # runs/mine/report.html
    ```

    One update in `every` is measured on the device, after the sum over replicas and micro-batches,
    and the first of each epoch; the host fetches the samples about every `every` batches. Updates
    skipped because a gradient was not finite are all counted. It works under MirroredStrategy, with
    gradient accumulation, steps_per_execution, mixed_float16 and jit_compile, on TensorFlow, JAX
    and PyTorch.

    `fit`'s history gets, averaged over the epoch's samples: `grad_norm_after` (global L2 norm
    after the clip), `grad_max` (largest element before it), `clip_angle` (degrees between the
    whole gradient before and after), `nonfinite_fraction` (share of the epoch's updates with a
    non-finite gradient), and `grad_norm_p50`, `_p90`, `_p99` (percentiles over the samples of the
    global L2 norm before the clip). A plain model with a ClippedOptimizer gets `grad_norm` (before
    the clip) and `clip_fraction` (of all elements) as well; a ClippedModel has its own. All samples
    are in `history`, and in `run_dir`:

    - `monitor.csv`, a row per sample and variable: `step` (updates before it), `epoch`, `variable`
      (its path; where a second layer has the same one, with `#2` behind the layer),
      `norm_before`, `norm_after` (L2), `clip_fraction` (0..1), `max_abs` (before the clip),
      `angle` (degrees), `nonfinite` (share of the updates since the last sample);
    - `thresholds.csv`, the live thresholds at each sample, as schedules and callbacks set them;
    - `monitor.json`, the variables, the rule that applies to each, and the clipper.

    Training that resumes from a checkpoint appends to these files; rows of repeated steps are
    removed. After an interrupted `fit` call `detach()`; a ClippedModel does so by itself.

    With a `keras.optimizers.MultiOptimizer` of ClippedOptimizers all of them are measured; names
    of rules and thresholds then begin with the optimizer (`adam: head/.*`, `adam/max_norm`). A
    sample has the variables whose optimizers made an update at that step.

    Args:
        run_dir: a folder (created if missing), or None to write nothing.
        every: measure one update in this many; each reads every gradient about five times.
        tensorboard: log to `run_dir/tensorboard` too.
        log: a function of `(step, figures)`, or several, called with each sample, only on the
            chief: `loggers.to_wandb()`, `to_mlflow()`, `to_trackio()`, or your own. `figures` is
            a dict of finite floats: `grad_norm`, `grad_norm_after`, `grad_max`, `clip_angle` and
            `clip_fraction` of the whole gradient, `norm_before/VARIABLE` and so on for each figure
            and variable, `threshold/NAME`.
        optimizer: the optimizer or optimizers to measure, if training uses others than the
            model's own, as a GAN does; one that is not built is measured from its first update.

    Attributes:
        history: a dict of lists with one entry per sample: `step`, `epoch`; for each figure above
            a float64 array `[variables]`, NaN where there is none; `thresholds`, dicts.
        variables: the names of the variables, as in `monitor.csv`, in the order of those arrays.

    Raises:
        ValueError: a `run_dir` that is not a path, `every` below 1, tensorboard without a run_dir,
            a log that is not a function; when training begins, no optimizer that clips.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike | None = None,
        every: int = 50,
        tensorboard: bool = False,
        log: Log | Sequence[Log] = (),
        *,
        optimizer: keras.optimizers.Optimizer | Sequence[keras.optimizers.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(run_dir, (str, os.PathLike, type(None))):
            raise ValueError(
                f"ClipMonitor: `run_dir` must be a folder or None, but is {run_dir!r}. Write "
                f"ClipMonitor(every={run_dir!r}) for one update in that many."
            )
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
        self.optimizer = optimizer
        self._samplers: list[Sampler] = []
        self._labels: list[str] = []  # of the samplers' optimizers
        self._sizes = np.zeros(0)  # elements of each variable
        self._files: RunFiles | None = None
        self._active_logs: list[Log] = []
        self._epoch = 0
        self._wholes: list[dict[str, float]] = []  # one dict per sample of the epoch
        self._nonfinite = np.zeros(2)  # the epoch's updates: not finite, all
        self._fetched_batch = 0

    # Keras calls these -----------------------------------------------------------------------

    def set_model(self, model: keras.Model = None) -> None:
        """Sets the model, as Keras does."""
        if not isinstance(self, ClipMonitor):
            raise ValueError(
                "ClipMonitor: `callbacks` has the class in it. Write callbacks=[ClipMonitor()]."
            )
        super().set_model(model)

    def on_train_begin(self, logs: Config | None = None) -> None:
        """Attaches to the optimizer and opens the files."""
        self.detach()
        optimizers = watched_optimizers("ClipMonitor", self.model, self.optimizer)
        batches = self.every + int(getattr(self.model, "steps_per_execution", 1))
        self._samplers = [
            Sampler("ClipMonitor", one, FIGURES, batches, self.every) for one in optimizers
        ]
        self.variables = []
        self.history = {k: [] for k in ("step", "epoch", *FIELDS, "thresholds")}
        # Every worker measures, for the logs; only one writes.
        if aggregation.is_chief(optimizers[0].strategy):
            self._active_logs = list(self.logs)
            if self.tensorboard and self.run_dir is not None:
                self._active_logs.append(to_tensorboard(self.run_dir / "tensorboard"))
        self._open()  # which may fail: no watcher is to stay then
        for sampler in self._samplers:
            sampler.optimizer.watch(sampler)
        self.model.make_train_function(force=True)  # trace the step with the watcher

    def _open(self, at_last: bool = False) -> None:
        """Opens the files once all optimizers are built; `at_last` drops the others."""
        unbuilt = [sampler for sampler in self._samplers if not sampler.state]
        if self.variables or (unbuilt and not at_last):
            return
        for sampler in unbuilt:
            sampler.optimizer.unwatch(sampler)
            self._samplers.remove(sampler)
        if not self._samplers:
            return
        self._labels = labels_of([sampler.optimizer for sampler in self._samplers])
        everything = [v for sampler in self._samplers for v in sampler.variables]
        self.variables = names_of(everything)
        self._sizes = np.array([size_of(v) for v in everything], "float64")
        if self.run_dir is not None and aggregation.is_chief(self._samplers[0].optimizer.strategy):
            starts = [s.start for s in self._samplers for _ in s.variables]
            before = dict(zip(self.variables, starts, strict=True))
            by_label = dict(zip(self._labels, self._samplers, strict=True))
            self._files = RunFiles(self.run_dir, before, _description(self.every, by_label))

    def on_epoch_begin(self, epoch: int, logs: Config | None = None) -> None:
        """Requests a measurement of the first update."""
        self._epoch, self._fetched_batch = epoch, 0
        self._wholes, self._nonfinite = [], np.zeros(2)
        for sampler in self._samplers:
            sampler.force()

    def on_train_batch_end(self, batch: int, logs: Config | None = None) -> None:
        """Fetches samples before the buffer is full."""
        if batch + 1 - self._fetched_batch >= self.every:
            self._fetched_batch = batch + 1
            sync(self.model)
            self._open()
            self._fetch()

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        """Fetches the remaining samples and adds the epoch's means to the logs."""
        self._open(at_last=True)
        self._fetch()
        if not self._samplers:
            return  # no optimizer made an update
        rest = [sampler.fetch_skipped() for sampler in self._samplers]
        if any(sample.skipped.any() for sample in rest):
            self._keep(max(sample.step for sample in rest), rest)
        else:
            self._nonfinite[1] += max(sample.updates for sample in rest)
        if logs is not None:
            for name, mean in self._means().items():  # a ClippedModel logs two of them itself
                logs.setdefault(name, mean)

    def on_train_end(self, logs: Config | None = None) -> None:
        """Detaches from the optimizer."""
        self.detach()

    def detach(self) -> None:
        """Detaches from the optimizer; to be called after an interrupted `fit`."""
        for sampler in self._samplers:
            sampler.optimizer.unwatch(sampler)
            self.model.train_function = None
        self._samplers = []
        self._files, self._active_logs = None, []

    # Internals -------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """Fetches new samples; those of several optimizers at one step become one."""
        if not self.variables:
            return
        samples: dict[tuple[int, int], list[Sample | None]] = {}
        for i, sampler in enumerate(self._samplers):
            times: Counter[int] = Counter()
            for sample in sampler.fetch():
                times[sample.step] += 1
                key = (sample.step, times[sample.step])
                samples.setdefault(key, [None] * len(self._samplers))[i] = sample
        for step, time in sorted(samples):
            self._keep(step, samples[step, time])

    def _keep(self, step: int, samples: Sequence[Sample | None]) -> None:
        """Records the samples of all optimizers at one step; None for one without an update."""
        of_optimizers = [
            _fields_of(sample, len(sampler.variables))
            for sample, sampler in zip(samples, self._samplers, strict=True)
        ]
        row = {f: np.concatenate([fields[f] for fields in of_optimizers]) for f in FIELDS}
        thresholds = {
            f"{label}/{name}" if label else name: value
            for label, sample in zip(self._labels, samples, strict=True)
            for name, value in (sample.thresholds.items() if sample else ())
        }
        whole = whole_of(row, self._sizes)
        self._wholes.append(whole)
        updates = max(sample.updates for sample in samples if sample)
        self._nonfinite += updates * whole["nonfinite_fraction"], updates
        entry = {"step": step, "epoch": self._epoch, **row, "thresholds": thresholds}
        for name, value in entry.items():
            self.history[name].append(value)
        if self._files is not None:
            self._files.add(step, self._epoch, row, thresholds)
        if self._active_logs:
            figures = whole | {f"threshold/{name}": value for name, value in thresholds.items()}
            for field, values in row.items():
                named = zip(self.variables, values.tolist(), strict=True)
                figures |= {f"{field}/{name}": value for name, value in named}
            finite = {name: value for name, value in figures.items() if math.isfinite(value)}
            for log in self._active_logs:
                log(step, finite)

    def _means(self) -> dict[str, float]:
        """Means over the epoch's samples; NaN if none has finite gradients."""
        finite = [whole for whole in self._wholes if math.isfinite(whole["grad_norm"])]
        samples = {name: [whole[name] for whole in finite] for name in WHOLE}
        means = {name: float(np.mean(v)) if v else math.nan for name, v in samples.items()}
        if self._wholes:
            means["nonfinite_fraction"] = float(self._nonfinite[0] / self._nonfinite[1])
        norms = samples["grad_norm"] or [math.nan]
        for percentile in (50, 90, 99):
            means[f"grad_norm_p{percentile}"] = float(np.percentile(norms, percentile))
        return means


def _fields_of(sample: Sample | None, count: int) -> dict[str, np.ndarray]:
    """An array `[variables]` for each of `FIELDS`; NaN where a gradient is not finite."""
    fields = {name: np.full(count, np.nan) for name in FIELDS}
    if sample is None:
        return fields
    if not sample.figures:
        return {**fields, "nonfinite": sample.skipped}
    is_finite = np.isfinite(sample.figures["norm_before"])
    return {
        **{name: np.where(is_finite, v, np.nan) for name, v in sample.figures.items()},
        # A skipped update is not sampled; an applied one with a non-finite gradient counts as 1.
        "nonfinite": np.where(is_finite, sample.skipped, 1.0),
    }


#: Figures of the whole gradient.
WHOLE = (
    "grad_norm",
    "grad_norm_after",
    "grad_max",
    "clip_angle",
    "clip_fraction",
    "nonfinite_fraction",
)


def whole_of(row: Mapping[str, np.ndarray], sizes: np.ndarray) -> dict[str, float]:
    """The figures `WHOLE` of a sample; NaN where a measured variable's gradient is not finite.

    Args:
        row: for each of `FIELDS` an array `[variables]`.
        sizes: the variables' numbers of elements.
    """
    is_there = is_measured(row)
    row, sizes = {name: values[is_there] for name, values in row.items()}, sizes[is_there]
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
    size = np.linalg.norm(before) * np.linalg.norm(after)
    if size == 0:
        return 0.0
    cosine = np.sum(before * after * np.cos(np.radians(angles))) / size
    return math.degrees(math.acos(np.clip(cosine, -1.0, 1.0)))


def _description(every: int, samplers: Mapping[str, Sampler]) -> Config:
    """The content of `monitor.json`.

    Args:
        every: as in `ClipMonitor`.
        samplers: by the label of their optimizer.
    """
    everything = [v for sampler in samplers.values() for v in sampler.variables]
    named = zip(names_of(everything), layers_of(everything), strict=True)
    clippers = {label: sampler.optimizer.clipper for label, sampler in samplers.items()}
    remembers = False
    variables = []
    for label, clipper in clippers.items():
        own = samplers[label].variables
        rules = clipper.rule_of(own) if clipper else [("*", None)] * len(own)
        assignments = clipper.assignments(own) if clipper else []
        enforcer = Enforcer(assignments, own, False)
        remembers |= bool(enforcer.state)
        of_updates = enforcer.limited_updates()
        for i, (rule, chosen) in enumerate(rules):
            path, layer = next(named)
            variables.append(
                {
                    "path": path,
                    "layer": layer,
                    "shape": [int(d) for d in own[i].shape],
                    "rule": _labelled(label, rule),
                    "clipper": str(chosen or "off"),
                    "limits": UPDATES if i in of_updates else "gradients" if chosen else "nothing",
                    "measures": getattr(chosen, "measures", None),
                }
            )
    serialized = {label: serialize(clipper) for label, clipper in clippers.items()}
    return {
        "every": every,
        "clipper": serialized.get("", serialized) if any(clippers.values()) else None,
        "clipper_text": "; ".join(_labelled(n, str(one or "off")) for n, one in clippers.items()),
        "remembers": remembers,
        "variables": variables,
    }


def _labelled(label: str, text: str) -> str:
    return f"{label}: {text}" if label else text
