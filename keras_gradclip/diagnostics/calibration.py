"""`calibrate`: thresholds from the gradients that a model really has."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    UPDATES_IN_A_STEP,
    Figure,
    Sample,
    Sampler,
    labels_of,
    sync,
    watched_optimizers,
)
from keras_gradclip.files import write_json
from keras_gradclip.names import layers_of, path_of, size_of
from keras_gradclip.optimizer._advice import step_bound
from keras_gradclip.optimizer._inner import ignores_scale

#: What a `Calibration` keeps of how it was watched, beside its samples.
SETTINGS = ("nonfinite", "beta", "eps", "max_ratio", "anneal")

#: Of `max_ratio`: κ of 1e-3 and of 2e-3 serve the same learning rates (docs/evidence.md).
LEAST_SHARE = 0.5


def kinds() -> dict[str, str]:
    """The clippers that a threshold is suggested for, and what each bounds."""
    return {
        alias: MEASURES[cls.measures].text
        for alias, cls in selectable().items()
        if cls.measures is not None and threshold_of(cls) is not None
    }


def _measure(kind: str) -> Measure:
    return MEASURES[selectable()[kind].measures or ""]


def _counts_units(measure: str | None) -> bool:
    """Whether a measure is of a kernel's units, which vectors do not have."""
    return measure in ("unit_ratio", "unit_step")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        layers: the layers, in the model's order.
        thresholds: for each clipper ("norm", "absolute", "exponential", "adaptive", "update_ratio",
            "rms") and layer the percentile; None for a layer whose gradient is zero or missing,
            which the maps leave alone (that of "update_ratio" bounds it by the least share). The
            adaptive clipper's is that of the layer's kernels: vectors begin at zero, so that
            their ratio says nothing, and its map leaves them alone. "update_ratio", too, is of
            kernels, at the learning rate that was watched, with `anneal` at the largest so far
            (around an optimizer that ignores a gradient's scale, for steps of η an element); its
            map takes from half of `max_ratio` to the whole, and bounds biases with their units.
        kernels: for each layer the names of its variables with more than one unit.
        global_norm: the suggested `NormClip(..., scope="global")`; None if all is zero.
        updates: the number of updates that the figures rest on.
        nonfinite: the number of updates left out because a gradient was not finite.
        percentile: the percentile, 0..100.
        beta: β of the exponential clipper.
        eps: ε of the adaptive clipper.
        max_ratio: the largest κ that is suggested: that of `clipper="auto"` for this optimizer
            and so many kernels.
        anneal: as `clipper="auto"` has it for this optimizer.
        samples: what the thresholds are percentiles of: for each clipper a float64 array
            `[updates, layers]` (NaN where the clipper does not apply), and for "global" one
            `[updates]`; not in the JSON of `save`.
    """

    layers: list[str]
    thresholds: dict[str, dict[str, float | None]]
    kernels: dict[str, list[str]]
    global_norm: float | None
    updates: int
    nonfinite: int
    percentile: float
    beta: float
    eps: float
    max_ratio: float = UpdateRatioClip().max_ratio
    anneal: str | None = None
    samples: Mapping[str, np.ndarray] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of_samples(
        cls,
        layers: Sequence[str],
        kernels: Mapping[str, Sequence[str]],
        samples: Mapping[str, np.ndarray],
        *,
        percentile: float,
        **settings: Any,
    ) -> Calibration:
        """The thresholds that samples give.

        Args:
            layers: as the attribute.
            kernels: as the attribute.
            samples: as the attribute.
            percentile: as the attribute.
            **settings: attributes of the names in `SETTINGS`; by default as of `calibrate`.

        Raises:
            ValueError: a percentile outside 0..100.
        """
        percentile = _percentile(percentile)

        def suggestion(values: np.ndarray) -> float | None:
            value = float(np.percentile(values, percentile))
            return value if value > 0 else None

        return cls(
            list(layers),
            {
                kind: {layer: suggestion(samples[kind][:, i]) for i, layer in enumerate(layers)}
                for kind in kinds()
                if kind in samples
            },
            {layer: list(names) for layer, names in kernels.items()},
            suggestion(samples["global"]),
            len(samples["global"]),
            percentile=percentile,
            samples=dict(samples),
            **{"nonfinite": 0, "beta": 0.7, "eps": 1e-3, **settings},
        )

    def at(self, percentile: float) -> Calibration:
        """The same updates at another percentile, without watching them again."""
        same = {name: getattr(self, name) for name in SETTINGS}
        return Calibration.of_samples(
            self.layers, self.kernels, self.samples, percentile=percentile, **same
        )

    def clipper(self, kind: str, layer: str) -> Clipper | None:
        """The clipper suggested for a layer, or None where there is nothing to clip."""
        validation.choice("Calibration", "kind", kind, tuple(self.thresholds))
        return self._clipper(kind, [layer], 1)

    def saved_threshold(self, kind: str, layer: str) -> float | None:
        """The layer's threshold in `clip_map` and `save`; None where the layer is left alone.

        It is `thresholds[kind][layer]`, except for "update_ratio", whose figures are capped.
        """
        path = _path(layer, self.layers)
        levels = self._levels(kind, [n for n in self.layers if _path(n, self.layers) == path], 1)
        return levels[0] if levels else None

    def _clipper(self, kind: str, layers: Sequence[str], segments: int) -> Clipper | None:
        """The clipper at the largest threshold of some layers: a number or a schedule."""
        levels = self._levels(kind, layers, segments)
        if levels is None:
            return None
        threshold: Threshold = levels[0]
        if segments > 1:
            parts = np.array_split(np.arange(self.updates), segments)
            threshold = keras.optimizers.schedules.PiecewiseConstantDecay(
                # The schedule keeps a value up to and including its boundary.
                [int(part[-1]) for part in parts[:-1]],
                [float(f"{level:.6g}") for level in levels],
            )
        cls = selectable()[kind]
        needs = {p.name for p in parameters(cls)} & {*_measure(kind).needs}
        same = {name: getattr(self, name) for name in needs}
        return cls(**{threshold_of(cls) or "": threshold, **same})

    def clip_map(self, kind: str = "update_ratio", segments: int = 1) -> ClipMap:
        """A `ClipMap` with a rule for each layer.

        Rules go by path: layers of one path (`tower/dense` and `tower/dense#2`) share theirs, at
        the largest of their thresholds.

        Args:
            kind: "update_ratio", whose thresholds held at every learning rate of the study
                (docs/evidence.md); "norm", "absolute", "exponential", "adaptive" or "rms", whose
                figures are of gradients that a learning rate too high has already spoiled.
            segments: cut the updates watched into so many parts of equal length, each with a
                percentile of its own; the thresholds then are `PiecewiseConstantDecay` schedules
                over the updates from step 0 on. Norms that fall or rise during training are so
                clipped as often late as early, where a constant clips the one half alone.

        Raises:
            ValueError: an unknown kind, one without a figure for any layer, or fewer than 10
                updates a segment.
        """
        number = self._checked(kind, segments)
        measure = selectable()[kind].measures
        together: dict[str, list[str]] = {}
        for layer in self.kernels if _counts_units(measure) else self.layers:
            together.setdefault(_path(layer, self.layers), []).append(layer)
        rules = []
        for path, layers in together.items():
            pattern = re.escape(path) + "(/[^/]+)?"
            if measure == "unit_ratio":  # the other leaves vectors alone itself
                names = dict.fromkeys(name for layer in layers for name in self.kernels[layer])
                pattern = f"{re.escape(path)}/({'|'.join(re.escape(n) for n in names)})"
            rules.append((pattern, self._clipper(kind, layers, number)))
        return ClipMap(rules)

    def limits(self, kind: str = "update_ratio", segments: int = 1) -> np.ndarray:
        """What the thresholds of `clip_map` are at each of the updates watched.

        Args:
            kind: as in `clip_map`.
            segments: as in `clip_map`.

        Returns:
            float64 `[updates, layers]`; NaN where nothing is clipped. `samples[kind]` above it are
            what the map would have clipped.

        Raises:
            ValueError: as `clip_map`.
        """
        number = self._checked(kind, segments)
        lengths = [len(part) for part in np.array_split(np.arange(self.updates), number)]
        columns = []
        for layer in self.layers:
            levels = self._levels(kind, [layer], number) or [math.nan] * number
            columns.append(np.repeat(levels, lengths))
        return np.array(columns, "float64").T

    def _checked(self, kind: str, segments: int) -> int:
        """The number of segments, of a kind and a number that can be."""
        validation.choice("Calibration", "kind", kind, tuple(self.thresholds))
        if all(self._levels(kind, [layer], 1) is None for layer in self.layers):
            others = [other for other, of in self.thresholds.items() if any(of.values())]
            raise ValueError(
                f"Calibration: `kind` {kind!r} has no threshold for any layer: their gradients are "
                f"zero, or no layer has a kernel. Others: {', '.join(others) or 'none'}."
            )
        number = validation.steps("Calibration", "segments", segments) or 1
        if number > 1 and self.updates < 10 * number:
            raise ValueError(
                f"Calibration: `segments` must leave 10 updates or more to each, but is {number} "
                f"for {self.updates} updates. Watch more updates, or pass fewer segments."
            )
        return number

    def _levels(self, kind: str, layers: Sequence[str], segments: int) -> list[float] | None:
        """The largest threshold of some layers in each segment; None if they have none."""
        known = [t for t in (self.thresholds[kind][layer] for layer in layers) if t is not None]
        at_most = _measure(kind).at_most
        most = getattr(self, at_most) if at_most else math.inf
        # In a run that diverged the gradients are near 0, and so would the threshold be.
        least = LEAST_SHARE * most if at_most else 0.0
        if not known:
            has_kernels = any(layer in self.kernels for layer in layers)
            return [least] * segments if least and has_kernels else None
        if segments == 1:
            return [min(max([*known, least]), most)]
        values = self.samples[kind][:, [self.layers.index(layer) for layer in layers]]
        parts = np.array_split(values, segments)
        levels = [float(np.nanpercentile(part, self.percentile, axis=0).max()) for part in parts]
        # A part without any gradient has no figure of its own.
        return [min(max(level if level > 0 else max(known), least), most) for level in levels]

    def table(self) -> str:
        """Text: a line a layer with the threshold of each clipper, as `save` writes it."""
        rows, capped = [["layer", *self.thresholds]], []
        for layer in self.layers:
            rows.append([layer])
            for kind, of_layer in self.thresholds.items():
                saved, watched = self.saved_threshold(kind, layer), of_layer[layer]
                is_capped = _measure(kind).at_most and saved is not None and saved != watched
                capped += [watched or 0.0] if is_capped else []
                rows[-1].append("–" if saved is None else f"{saved:.3g}" + "*" * bool(is_capped))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        has_gaps = any("–" in row for row in rows)
        return "\n".join(
            [lines[0], "-" * len(lines[0]), *lines[1:], *self._notes(has_gaps, capped)]
        )

    def _notes(self, has_gaps: bool, capped: Sequence[float]) -> Iterator[str]:
        """What the table rests on; `capped` are the figures watched where it has a `*`."""
        total = "–" if self.global_norm is None else f"{self.global_norm:.3g}"
        left_out = f", {self.nonfinite} left out as not finite" if self.nonfinite else ""
        yield (
            f"global norm: {total}; percentile {self.percentile:g} of {self.updates} updates"
            f"{left_out}; exponential: gamma at beta={self.beta:g}"
        )
        if has_gaps:
            yield (
                "–: no threshold, the layer is left alone: its gradient is zero or missing, or it "
                "has no kernel, which adaptive and update_ratio are about"
            )
        if capped:
            watched = " to ".join(dict.fromkeys(f"{f(capped):.3g}" for f in (min, max)))
            yield (
                f"*: capped, of {watched} watched: update_ratio is from "
                f"{LEAST_SHARE * self.max_ratio:g} to {self.max_ratio:g}. A larger one says that "
                "the learning rate is too high, not that steps should be so large; a smaller one, "
                "or none, that the run had no gradients left"
            )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"

    def __str__(self) -> str:
        return self.table()

    def save(self, path: str | os.PathLike, kind: str = "update_ratio", segments: int = 1) -> None:
        """Write JSON: the `ClipMap` under "clipper", for `--clip-config`, and all the figures.

        Args:
            path: the file.
            kind: which clipper, as in `clip_map`.
            segments: as in `clip_map`.
        """
        names = [field.name for field in dataclasses.fields(self) if field.name != "samples"]
        figures = {name: getattr(self, name) for name in names}
        content = {
            "clipper": serialize(self.clip_map(kind, segments)),
            "calibration": {"kind": kind, "segments": segments, **figures},
        }
        write_json(path, content)


def _path(layer: str, layers: Sequence[str]) -> str:
    """The path of a layer: its name, less the `#2` of a second layer of the same path."""
    path = re.sub(r"#\d+$", "", layer)
    return path if path in layers else layer


def calibrate(
    model: keras.Model,
    data: Any,
    steps: int = 100,
    percentile: float = 90.0,
    *,
    follow: bool = True,
    batch_size: int | None = None,
    beta: float = 0.7,
    eps: float = 1e-3,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    optimizer: keras.optimizers.Optimizer | Sequence[keras.optimizers.Optimizer] | None = None,
) -> Any:
    """Suggest a threshold for each layer and each clipper, from the model's own gradients.

    Watches `steps` updates of `fit` and takes, for each layer, the percentile of what each
    clipper bounds: the 90th clips about one update in ten while the gradients stay as they were.
    Compile without the clip to be replaced: it changes the norms. Most networks' norms drift:
    watch as many updates as the run will have, or use `clip_map(segments=8)`.

    Afterwards model, optimizers, metrics and all that `keras.utils.set_random_seed` sets are what
    they were before, bit for bit. Not put back are the data's own position and generators, lists
    and arrays of your own that training writes into, and two things that are made anew: stateful
    operations of TensorFlow in a traced step (`tf.random.normal` in a layer) count their draws
    from the start, since the step is traced again; and on JAX a model whose first `fit` comes
    afterwards shuffles otherwise, since Keras draws one permutation more where it builds metrics.

    ```python
    found = kgc.calibrate(model, dataset, steps=200)
    model.compile("adamw", loss, clipper=found.clip_map())
    ```

    Args:
        model: compiled with a `ClippedOptimizer` (or a `ClippedModel`), `clipper=None` or not:
            the gradients are watched before the clip.
        data: what `fit` takes as x, repeated as needed unless it is a generator; or a tuple
            (x, y) or (x, y, sample_weight).
        steps: the number of updates to watch.
        percentile: in 0..100, as `numpy.percentile`.
        follow: True trains while it watches: the figures are those of the first `steps` updates
            of a run. False stays at the present weights.
        batch_size: for (x, y) arrays, as in `fit`.
        beta: β for the exponential clipper's γ.
        eps: ε of the adaptive clipper.
        callbacks: more Keras callbacks for the watched `fit`.
        optimizer: the optimizer to watch, or several, where training uses others than the model's
            own, as of a GAN; built.

    Returns:
        A `Calibration`; print it for a table. Of several optimizers, also of a
        `keras.optimizers.MultiOptimizer`, a dict that has one for each, by the name of the inner
        optimizer.

    Raises:
        ValueError: an argument out of its range, a model that is not built or has no
            `ClippedOptimizer`, or no update with finite gradients.
    """
    if np.ndim(steps) or hasattr(steps, "shape"):  # y, as in `fit`
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
    x, y, weight = _unpack(data)
    # Room for the updates between two fetches.
    capacity = UPDATES_IN_A_STEP * int(getattr(model, "steps_per_execution", 1))
    samplers = [Sampler("calibrate", one, _figures(beta, eps), capacity) for one in optimizers]
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
            # The callback stops it: so many epochs at most, of a batch each.
            epochs=count * max(one.gradient_accumulation_steps or 1 for one in optimizers),
            shuffle=isinstance(data, tuple),  # a data set has its own order
            verbose=0,
            callbacks=[watch, *callbacks],
        )
        watch.fetch()
        skipped = [sampler.updates - sampler.samples for sampler in samplers]
    labels = labels_of(optimizers)
    found = Calibrations()
    for label, sampler, samples, left_out in zip(
        labels, samplers, watch.samples, skipped, strict=True
    ):
        found[label] = _suggest(sampler, samples[:count], left_out, percentile, beta, eps)
    return found if len(found) > 1 else found[""]


class Calibrations(dict):
    """What `calibrate` found for each of several optimizers; print it for their tables."""

    def __str__(self) -> str:
        return "\n\n".join(f"{label}\n{found}" for label, found in self.items())


class _Watch(keras.callbacks.Callback):
    """Attaches samplers, fetches after each batch, ends training after a number of updates."""

    def __init__(self, samplers: Sequence[Sampler], updates: int) -> None:
        super().__init__()
        self.samplers, self.updates = samplers, updates
        self.samples: list[list[Sample]] = [[] for _ in samplers]

    def on_train_begin(self, logs: object = None) -> None:
        """The step must be traced with the samplers."""
        for sampler in self.samplers:
            sampler.optimizer.watch(sampler)
        self.model.make_train_function(force=True)

    def fetch(self) -> None:
        """Bring what is new to the host."""
        for sampler, samples in zip(self.samplers, self.samples, strict=True):
            samples += sampler.fetch()

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        """Look at the counters of the optimizers that are in use."""
        sync(self.model)
        self.fetch()
        counts = [count for count in (sampler.updates for sampler in self.samplers) if count]
        if counts and min(counts) >= self.updates:
            self.model.stop_training = True


def _percentile(value: object) -> float:
    percentile = validation.positive("calibrate", "percentile", value)
    if percentile > 100:
        raise ValueError(f"calibrate: `percentile` must be at most 100, but is {percentile!r}.")
    return percentile


def _unpack(data: Any) -> tuple[Any, Any, Any]:
    """x, y and sample_weight for `fit`."""
    if not isinstance(data, tuple):
        return data, None, None
    if not 1 <= len(data) <= 3:
        raise ValueError(
            "calibrate: `data` must be a data set, or a tuple (x, y) or (x, y, sample_weight), "
            f"but has {len(data)} parts."
        )
    x, y, weight = (*data, None, None)[:3]
    return x, y, weight


def _figures(beta: float, eps: float) -> dict[str, Figure]:
    """What is computed on the device for each variable; most are `MEASURES` of a layer then."""
    return {
        "square": lambda v: v.square_before,
        "largest_element": lambda v: v.largest_element,
        "largest_scaled_element": lambda v: v.largest_scaled_element(beta),
        "unit_ratio": lambda v: v.unit_ratio(eps),
        "sign_step": lambda v: v.sign_step(eps),
    }


def _suggest(
    sampler: Sampler,
    samples: Sequence[Sample],
    skipped: int,
    percentile: float,
    beta: float,
    eps: float,
) -> Calibration:
    """Percentiles over the updates of the sampler's figures, layer by layer."""
    variables, inner = sampler.variables, sampler.optimizer.inner_optimizer
    kept = [s for s in samples if np.isfinite([*s.figures.values()]).all()]
    if not kept:
        raise ValueError(
            f"calibrate: none of {len(samples) + skipped} updates had finite gradients. Lower the "
            "learning rate, or look at the data; ClipMonitor names the layer."
        )
    figures = {name: np.array([s.figures[name] for s in kept]) for name in sampler.figures}
    norms = figures["layer_norm"] = np.sqrt(figures.pop("square"))
    figures["largest_rms"] = norms / np.sqrt([max(size_of(v), 1) for v in variables])
    sign_step = figures.pop("sign_step")
    # An optimizer that ignores a gradient's scale is taken to change each element by its rate.
    step = sign_step if ignores_scale(inner) else figures["unit_ratio"]
    rates = np.array([[s.learning_rate] for s in kept])
    bound = step_bound(inner, variables)
    if bound.anneal is not None:  # the bound falls with the rate: what counts is the largest so far
        rates = np.maximum.accumulate(np.maximum(rates, arithmetic.TINY))
    figures["unit_step"] = step * rates

    owners = np.array(layers_of(variables))
    layers = list(dict.fromkeys(owners.tolist()))
    units = units_of(variables)
    is_kernel = np.array(
        [len(u.axes) < len(v.shape) for u, v in zip(units, variables, strict=True)]
    )
    of_layers = {}
    for measure, values in figures.items():
        counted = is_kernel if _counts_units(measure) else np.ones_like(is_kernel)
        combine = np.linalg.norm if measure == "layer_norm" else np.max
        columns = np.full((len(layers), len(kept)), np.nan)
        for k, layer in enumerate(layers):
            if (own := (owners == layer) & counted).any():
                columns[k] = combine(values[:, own], axis=1)
        of_layers[measure] = columns.T
    kernels: dict[str, list[str]] = {}
    for i in np.flatnonzero(is_kernel):
        kernels.setdefault(owners[i].item(), []).append(path_of(variables[i]).rpartition("/")[2])
    return Calibration.of_samples(
        layers,
        kernels,
        {
            **{kind: of_layers[selectable()[kind].measures or ""] for kind in kinds()},
            "global": np.linalg.norm(norms, axis=1),
        },
        percentile=percentile,
        nonfinite=len(samples) - len(kept) + skipped,
        beta=beta,
        eps=eps,
        max_ratio=bound.max_ratio,
        anneal=bound.anneal,
    )
