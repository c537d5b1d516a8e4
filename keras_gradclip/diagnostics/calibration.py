"""`calibrate`: thresholds suggested from a model's own gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import re
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _validation as validation
from keras_gradclip._types import Threshold
from keras_gradclip.clippers.base import Clipper, selectable, serialize, threshold_of
from keras_gradclip.clippers.composite import ClipMap
from keras_gradclip.clippers.relative import UpdateRatioClip
from keras_gradclip.clippers.units import units_of
from keras_gradclip.declarations import MEASURES, Measure, parameters
from keras_gradclip.diagnostics._put_back import everything_put_back
from keras_gradclip.diagnostics.sampler import (
    Figure,
    Sample,
    Sampler,
    labels_of,
    sync,
    watched_optimizers,
)
from keras_gradclip.diagnostics.samples import by_layer
from keras_gradclip.files import write_json
from keras_gradclip.names import layers_of, path_of, size_of
from keras_gradclip.optimizer._advice import step_bound
from keras_gradclip.optimizer._inner import is_plain_sgd

#: The smallest suggested share of `max_ratio`: κ of 1e-3 and of 2e-3 serve the same learning rates
#: (docs/evidence.md).
LEAST_SHARE = 0.5


def kinds() -> dict[str, str]:
    """The clippers for which a threshold is suggested, and the figure that each limits."""
    return {
        alias: MEASURES[cls.measures].text
        for alias, cls in selectable().items()
        if cls.measures is not None and threshold_of(cls) is not None
    }


def _measure(kind: str) -> Measure:
    return MEASURES[selectable()[kind].measures or ""]


def _counts_units(measure: str | None) -> bool:
    """True if a measure is taken per unit of a kernel; vectors have no units."""
    return measure in ("unit_ratio", "unit_step")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Suggested thresholds, and the samples behind them.

    Attributes:
        layers: the layers, in the model's order.
        kernels: for each layer the names of its variables with more than one unit.
        samples: what the thresholds are percentiles of: for each clipper a float64 array
            `[updates, layers]` (NaN where the clipper does not apply), and for "global" one
            `[updates]`; not in the JSON of `save`.
        percentile: the percentile, above 0 and at most 100.
        nonfinite: the number of updates excluded because a gradient was not finite.
        beta: β of the exponential clipper.
        eps: ε of the adaptive clipper.
        max_ratio: the largest suggested κ: that of `clipper="auto"` for this optimizer and
            number of kernels.
        anneal: as `clipper="auto"` sets it for this optimizer.
        thresholds: for each clipper ("norm", "absolute", "exponential", "adaptive", "update_ratio",
            "rms") and layer the percentile; None where the gradient is zero or missing, or the
            clipper does not apply. "adaptive" and "update_ratio" are measured on kernels only,
            because vectors start at zero; "update_ratio" at the learning rate of the update (with
            `anneal`, at the largest so far), for steps of η per element if the optimizer ignores
            the gradient's scale. `clip_map` keeps "update_ratio" between half of `max_ratio` and
            `max_ratio`, also without a gradient, and limits biases with their units.
        global_norm: the suggested `NormClip(..., scope="global")`; None if all is zero.
        updates: the number of updates measured.

    Raises:
        ValueError: a percentile that is not above 0 and at most 100.
    """

    layers: list[str]
    kernels: dict[str, list[str]]
    samples: Mapping[str, np.ndarray] = dataclasses.field(repr=False, compare=False)
    percentile: float = 90.0
    nonfinite: int = 0
    beta: float = 0.7
    eps: float = 1e-3
    max_ratio: float = UpdateRatioClip().max_ratio
    anneal: str | None = None
    thresholds: dict[str, dict[str, float | None]] = dataclasses.field(init=False)
    global_norm: float | None = dataclasses.field(init=False)
    updates: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        percentile = _percentile(self.percentile)

        def suggestion(values: np.ndarray) -> float | None:
            value = float(np.percentile(values, percentile))
            return value if value > 0 else None

        thresholds = {
            kind: dict(zip(self.layers, map(suggestion, self.samples[kind].T), strict=True))
            for kind in kinds()
            if kind in self.samples
        }
        object.__setattr__(self, "percentile", percentile)
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "global_norm", suggestion(self.samples["global"]))
        object.__setattr__(self, "updates", len(self.samples["global"]))

    def at(self, percentile: float) -> Calibration:
        """The same samples at a different percentile."""
        return dataclasses.replace(self, percentile=percentile)

    def clipper(self, kind: str, layer: str, segments: int = 1) -> Clipper | None:
        """The clipper of a layer in `clip_map`; None if it is not clipped."""
        validation.choice("Calibration", "layer", layer, tuple(self.layers))
        limits = self.limits(kind, segments)[:, self.layers.index(layer)]
        return self._clipper(kind, limits, segments)

    def _clipper(self, kind: str, limits: np.ndarray, segments: int) -> Clipper | None:
        """The clipper with a column of `limits`; None if that is NaN."""
        if np.isnan(limits).any():
            return None
        threshold: Threshold = float(limits[0])
        if segments > 1:
            starts = [int(part[0]) for part in np.array_split(np.arange(self.updates), segments)]
            threshold = keras.optimizers.schedules.PiecewiseConstantDecay(
                # The schedule keeps a value up to and including its boundary.
                [start - 1 for start in starts[1:]],
                [float(f"{limits[start]:.6g}") for start in starts],
            )
        cls = selectable()[kind]
        needs = {p.name for p in parameters(cls)} & {*_measure(kind).needs}
        same = {name: getattr(self, name) for name in needs}
        return cls(**{threshold_of(cls) or "": threshold, **same})

    def clip_map(self, kind: str = "update_ratio", segments: int = 1) -> ClipMap:
        """A `ClipMap` with a rule for each layer.

        Rules match paths, so layers with the same path (`tower/dense` and `tower/dense#2`) share a
        rule, with the largest of their thresholds.

        Args:
            kind: "update_ratio", whose thresholds worked at every learning rate of the study
                (docs/evidence.md); or "norm", "absolute", "exponential", "adaptive" or "rms",
                which are misleading if the measured run had too high a learning rate.
            segments: the number of equal parts of the measured run, each with its own percentile;
                above 1, the thresholds are `PiecewiseConstantDecay` schedules from step 0 on.
                Norms that drift during training are then clipped equally often early and late;
                a constant threshold would clip only one half.

        Raises:
            ValueError: an unknown kind, one without a threshold for any layer, or fewer than 10
                updates per segment.
        """
        limits = self.limits(kind, segments)
        if np.isnan(limits).all():
            others = [other for other, of in self.thresholds.items() if any(of.values())]
            raise ValueError(
                f"Calibration: `kind` {kind!r} has no threshold for any layer: their gradients are "
                "zero, or no layer has a kernel of two or more units. Others: "
                f"{', '.join(others) or 'none'}."
            )
        measure, paths = selectable()[kind].measures, self._paths()
        rules = {}
        for i, path in enumerate(paths):
            kernels = [
                n
                for p, name in zip(paths, self.layers, strict=True)
                if p == path
                for n in self.kernels.get(name, ())
            ]
            if _counts_units(measure) and not kernels:
                continue
            pattern = re.escape(path) + "(/[^/]+)?"
            if measure == "unit_ratio":  # "unit_step" is for a clipper of all variables
                names = "|".join(map(re.escape, dict.fromkeys(kernels)))
                pattern = f"{re.escape(path)}/({names})"
            rules[pattern] = self._clipper(kind, limits[:, i], segments)
        return ClipMap(rules)

    def limits(self, kind: str = "update_ratio", segments: int = 1) -> np.ndarray:
        """The thresholds of `clip_map` at each measured update.

        Args:
            kind: as in `clip_map`.
            segments: as in `clip_map`.

        Returns:
            float64 `[updates, layers]`; NaN where nothing is clipped. The map would have clipped
            the `samples[kind]` above it.

        Raises:
            ValueError: an unknown kind, or fewer than 10 updates per segment.
        """
        validation.choice("Calibration", "kind", kind, tuple(self.thresholds))
        number = validation.count("Calibration", "segments", segments)
        if number > 1 and self.updates < 10 * number:
            raise ValueError(
                f"Calibration: `segments` must leave 10 updates or more to each, but is {number} "
                f"for {self.updates} updates. Watch more updates, or pass fewer segments."
            )
        whole = np.array([*self.thresholds[kind].values()], "float64")  # NaN for None
        parts = np.array_split(self.samples[kind], number)
        levels = np.array([np.percentile(part, self.percentile, axis=0) for part in parts])
        # A segment without gradients takes the threshold of the whole run.
        levels = np.where((levels > 0) & (whole > 0), levels, whole)
        if at_most := _measure(kind).at_most:
            # After divergence gradients are near 0; the threshold must not follow.
            most = getattr(self, at_most)
            least = LEAST_SHARE * most
            has_kernel = np.array([layer in self.kernels for layer in self.layers])
            levels = np.where(has_kernel & np.isnan(levels), least, np.clip(levels, least, most))
        paths = np.array(self._paths())
        alike = np.where(paths[:, None] == paths, levels[:, None], np.nan)
        return np.repeat(np.fmax.reduce(alike, axis=2), [len(part) for part in parts], axis=0)

    def _paths(self) -> list[str]:
        """The path of each layer: its name without the `#2` of a second layer with that path."""
        short = [re.sub(r"#\d+$", "", layer) for layer in self.layers]
        return [s if s in self.layers else name for s, name in zip(short, self.layers, strict=True)]

    def table(self) -> str:
        """A text table: one line per layer with each clipper's threshold, as `save` writes it."""
        columns = [["layer", *self.layers]]
        for kind, of_layer in self.thresholds.items():
            columns.append([kind])
            for saved, measured in zip(self.limits(kind)[0], of_layer.values(), strict=True):
                star = "*" if _measure(kind).at_most and saved != measured else ""
                columns[-1].append("–" if np.isnan(saved) else f"{saved:.3g}{star}")
        widths = [max(map(len, column)) for column in columns]
        head, *lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in zip(*columns, strict=True)
        ]
        total = "–" if self.global_norm is None else f"{self.global_norm:.3g}"
        left_out = f", {self.nonfinite} left out as not finite" if self.nonfinite else ""
        counted = f"{self.updates} update{'' if self.updates == 1 else 's'}"
        lines.append(
            f"global norm: {total}; percentile {self.percentile:g} of {counted}{left_out}; "
            f"exponential: gamma at beta={self.beta:g}"
        )
        cells = [cell for column in columns[1:] for cell in column]
        if "–" in cells:
            lines.append(
                "–: no threshold, the layer is left alone: its gradient is zero or missing, or it "
                "has no kernel of two or more units, which adaptive and update_ratio need"
            )
        if any(cell.endswith("*") for cell in cells):
            lines.append(
                f"*: capped, to {LEAST_SHARE * self.max_ratio:g} to {self.max_ratio:g}. A larger "
                "ratio means too high a learning rate; a smaller one, or none, that the run had "
                "no gradients left"
            )
        return "\n".join([head, "-" * len(head), *lines])

    __str__ = table

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def save(self, path: str | os.PathLike, kind: str = "update_ratio", segments: int = 1) -> None:
        """Writes JSON: the `ClipMap` under "clipper", for `--clip-config`, and all figures.

        Args:
            path: the file.
            kind: which clipper, as in `clip_map`.
            segments: as in `clip_map`.
        """
        figures = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del figures["samples"]
        content = {
            "clipper": serialize(self.clip_map(kind, segments)),
            "calibration": {"kind": kind, "segments": segments, **figures},
        }
        write_json(path, content)


def calibrate(
    model: keras.Model,
    data: object,
    steps: int = 100,
    percentile: float = 90.0,
    *,
    follow: bool = True,
    batch_size: int | None = None,
    beta: float = 0.7,
    eps: float = 1e-3,
    callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | None = None,
    optimizer: keras.optimizers.Optimizer | Sequence[keras.optimizers.Optimizer] | None = None,
) -> Calibration | Calibrations:
    """Suggests a threshold for each layer and each clipper, from the model's own gradients.

    Measures `steps` updates of `fit` and takes, for each layer, a percentile of what each clipper
    limits: the 90th clips about one update in ten as long as the gradients do not drift. In most
    networks they do: measure as many updates as the run will have, or use
    `clip_map(segments=8)`. Compile without the clip that you want to replace: it changes the norms.

    Afterwards the model, optimizers, metrics and all that `keras.utils.set_random_seed` sets are
    restored bit for bit. Not restored are the position and generators of the data, your own lists
    and arrays that training writes into, the random sequence of stateful TensorFlow operations in
    a layer (`tf.random.normal`), because the step is traced again, and on JAX the shuffling of a
    model that was never fitted, because Keras draws once more when it builds the metrics.

    ```python
    found = kgc.calibrate(model, dataset, steps=200)
    model.compile("adamw", loss, clipper=found.clip_map())
    ```

    Args:
        model: compiled with a `ClippedOptimizer` (or a `ClippedModel`), `clipper=None` or not:
            the gradients are measured before the clip.
        data: what `fit` takes as x, repeated as needed unless it is a generator; or a tuple
            (x, y) or (x, y, sample_weight).
        steps: the number of updates to measure.
        percentile: above 0 and at most 100, as in `numpy.percentile`.
        follow: True trains meanwhile: the figures are those of the first `steps` updates of a
            run. False keeps the present weights.
        batch_size: for (x, y) arrays, as in `fit`.
        beta: β for the exponential clipper's γ.
        eps: ε of the adaptive clipper.
        callbacks: Keras callbacks for the measured `fit`.
        optimizer: the built optimizer or optimizers to measure, if training uses others than the
            model's own, as a GAN does.

    Returns:
        A `Calibration`; print it for a table. For several optimizers, or a
        `keras.optimizers.MultiOptimizer`, a dict of them by the name of the inner optimizer.

    Raises:
        ValueError: an argument out of its range, a model that is not built or has no
            `ClippedOptimizer`, or no update with finite gradients.
    """
    if np.ndim(steps):  # y, as in `fit`
        raise ValueError(
            f"calibrate: `steps` must be a number, but is of type {type(steps).__name__}. Pass x "
            "and y as one tuple: calibrate(model, (x, y))."
        )
    count = validation.count("calibrate", "steps", steps)
    percentile = _percentile(percentile)
    beta = validation.positive("calibrate", "beta", beta)
    eps = validation.positive("calibrate", "eps", eps)
    optimizers = watched_optimizers("calibrate", model, optimizer)
    for one in optimizers:
        if not one.built:
            raise ValueError(
                "calibrate: the model is not built. Call it on a batch, or give it an Input."
                if optimizer is None
                else "calibrate: `optimizer` is not built. Call its build(variables) first."
            )
    parts = data if isinstance(data, tuple) else (data,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(
            "calibrate: `data` must be a data set, or a tuple (x, y) or (x, y, sample_weight), "
            f"but has {len(parts)} parts."
        )
    x, y, weight = (*parts, None, None)[:3]
    batches = int(getattr(model, "steps_per_execution", 1))
    samplers = [Sampler("calibrate", one, _figures(beta, eps), batches) for one in optimizers]
    watch = _Watch(samplers, count)
    with everything_put_back(model, optimizers), contextlib.ExitStack() as stack:
        for one, sampler in zip(optimizers, samplers, strict=True):
            stack.callback(one.unwatch, sampler)
            if not follow:
                stack.enter_context(one.held())
        model.fit(
            x,
            y,
            sample_weight=weight,
            batch_size=batch_size,
            # An upper bound (one batch per epoch); the callback stops training.
            epochs=count * max(one.gradient_accumulation_steps or 1 for one in optimizers),
            shuffle=isinstance(data, tuple),  # a data set sets its own order
            verbose=0,
            callbacks=keras.tree.flatten([watch, callbacks or ()]),
        )
        watch.fetch()
        skipped = [sampler.updates - sampler.samples for sampler in samplers]
    settings = {"percentile": percentile, "beta": beta, "eps": eps}
    found = [
        _suggest(sampler, samples[:count], left_out, settings)
        for sampler, samples, left_out in zip(samplers, watch.samples, skipped, strict=True)
    ]
    if len(found) == 1:
        return found[0]
    return Calibrations(zip(labels_of(optimizers), found, strict=True))


class Calibrations(dict[str, Calibration]):
    """A `Calibration` for each of several optimizers; print it for their tables."""

    def __str__(self) -> str:
        return "\n\n".join(f"{label}\n{found}" for label, found in self.items())


class _Watch(keras.callbacks.Callback):
    """Attaches samplers, fetches after each batch, ends training after a number of updates."""

    def __init__(self, samplers: Sequence[Sampler], updates: int) -> None:
        super().__init__()
        self.samplers, self.updates = samplers, updates
        self.samples: list[list[Sample]] = [[] for _ in samplers]

    def on_train_begin(self, logs: object = None) -> None:
        """Rebuilds the train function, so that it is traced with the samplers."""
        for sampler in self.samplers:
            sampler.optimizer.watch(sampler)
        self.model.make_train_function(force=True)

    def fetch(self) -> None:
        """Fetches new samples to the host."""
        for sampler, samples in zip(self.samplers, self.samples, strict=True):
            samples += sampler.fetch()

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        """Fetches samples and stops training after enough updates."""
        sync(self.model)
        self.fetch()
        counts = [count for count in (sampler.updates for sampler in self.samplers) if count]
        if counts and min(counts) >= self.updates:
            self.model.stop_training = True


def _percentile(value: object) -> float:
    return validation.positive("calibrate", "percentile", value, at_most=100)


def _figures(beta: float, eps: float) -> dict[str, Figure]:
    """The figures computed on the device for each variable, from which `MEASURES` follow."""
    return {
        "layer_norm": lambda v: v.norm_before,
        "largest_element": lambda v: v.max_abs,
        "largest_scaled_element": lambda v: v.largest_scaled_element(beta),
        "unit_ratio": lambda v: v.unit_ratio(eps),
        "sign_step": lambda v: v.sign_step(eps),
    }


def _suggest(
    sampler: Sampler, samples: Sequence[Sample], skipped: int, settings: Mapping[str, float]
) -> Calibration:
    """The `Calibration` of one optimizer's samples."""
    variables, inner = sampler.variables, sampler.optimizer.inner_optimizer
    kept = [s for s in samples if np.isfinite([*s.figures.values()]).all()]
    if not samples and not skipped:
        raise ValueError(
            "calibrate: no update was made. `data` is empty or too short for an update, or "
            f"training does not use the optimizer {inner.name!r}."
        )
    if not kept:
        raise ValueError(
            f"calibrate: none of {len(samples) + skipped} updates had finite gradients. Lower the "
            "learning rate, or look at the data; ClipMonitor names the layer."
        )
    figures = {name: np.array([s.figures[name] for s in kept]) for name in sampler.figures}
    norms = figures["layer_norm"]
    figures["largest_rms"] = norms / np.sqrt([max(size_of(v), 1) for v in variables])
    sign_step = figures.pop("sign_step")
    # An optimizer that ignores the gradient's scale is assumed to change each element by η.
    step = figures["unit_ratio"] if is_plain_sgd(inner) else sign_step
    rates = np.array([[s.learning_rate] for s in kept])
    bound = step_bound(inner, variables)
    if bound.anneal is not None:  # the limit falls with the rate, so use the largest so far
        rates = np.maximum.accumulate(np.maximum(rates, arithmetic.TINY))
    figures["unit_step"] = step * rates

    owners, units = layers_of(variables), units_of(variables)
    is_kernel = [len(u.axes) < len(v.shape) for u, v in zip(units, variables, strict=True)]
    kernels: dict[str, list[str]] = {}
    for i in np.flatnonzero(is_kernel):
        kernels.setdefault(owners[i], []).append(path_of(variables[i]).rpartition("/")[2])
    largest = {name: by_layer(np.maximum, values, owners) for name, values in figures.items()}
    largest["layer_norm"] = np.sqrt(by_layer(np.add, norms**2, owners))
    for measure in filter(_counts_units, figures):
        of_kernels = np.where(is_kernel, figures[measure], np.nan)
        largest[measure] = by_layer(np.fmax, of_kernels, owners)
    return Calibration(
        list(dict.fromkeys(owners)),
        kernels,
        {
            **{kind: largest[selectable()[kind].measures or ""] for kind in kinds()},
            "global": np.linalg.norm(norms, axis=1),
        },
        nonfinite=len(samples) - len(kept) + skipped,
        max_ratio=bound.max_ratio,
        anneal=bound.anneal,
        **settings,
    )
