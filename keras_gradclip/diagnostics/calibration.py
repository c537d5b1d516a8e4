"""`calibrate`: thresholds from the gradients that a model really has."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _validation as validation
from keras_gradclip._types import Tensor, Threshold
from keras_gradclip.clippers.base import Clipper, selectable, serialize, threshold_of
from keras_gradclip.clippers.composite import ClipMap
from keras_gradclip.clippers.relative import UpdateRatioClip
from keras_gradclip.clippers.units import units_of
from keras_gradclip.declarations import MEASURES, Measure, parameters
from keras_gradclip.diagnostics._put_back import everything_put_back
from keras_gradclip.diagnostics._sampler import Sampler, Watch
from keras_gradclip.diagnostics.watch import (
    UPDATES_IN_A_STEP,
    labels_of,
    watched_optimizers,
)
from keras_gradclip.files import write_json
from keras_gradclip.names import layers_of, path_of
from keras_gradclip.optimizer._advice import step_bound

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


def _counts_units(kind: str) -> bool:
    """Whether the figure is of a kernel's units, which vectors do not have."""
    return selectable()[kind].measures in ("unit_ratio", "unit_step")


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
        nonfinite: int = 0,
        beta: float = 0.7,
        eps: float = 1e-3,
        max_ratio: float = UpdateRatioClip().max_ratio,
        anneal: str | None = None,
    ) -> Calibration:
        """The thresholds that samples give; the arguments are the attributes of that name.

        Raises:
            ValueError: a percentile outside 0..100.
        """
        percentile = _percentile(percentile)

        def suggestion(values: np.ndarray) -> float | None:
            value = float(np.percentile(values, percentile))
            return value if value > 0 else None

        return cls(
            layers=list(layers),
            thresholds={
                kind: {layer: suggestion(samples[kind][:, i]) for i, layer in enumerate(layers)}
                for kind in kinds()
                if kind in samples
            },
            kernels={layer: list(names) for layer, names in kernels.items()},
            global_norm=suggestion(samples["global"]),
            updates=len(samples["global"]),
            nonfinite=nonfinite,
            percentile=percentile,
            beta=beta,
            eps=eps,
            max_ratio=max_ratio,
            anneal=anneal,
            samples=dict(samples),
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
        return self._made(kind, self._threshold(kind, [layer], 1))

    def saved_threshold(self, kind: str, layer: str) -> float | None:
        """The layer's threshold in `clip_map` and `save`; None where the layer is left alone.

        It is `thresholds[kind][layer]`, except for "update_ratio", whose figures are capped.
        """
        path = _path(layer, self.layers)
        levels = self._levels(kind, [n for n in self.layers if _path(n, self.layers) == path], 1)
        return levels[0] if levels else None

    def _made(self, kind: str, threshold: Threshold | None) -> Clipper | None:
        if threshold is None:
            return None
        cls = selectable()[kind]
        measure = _measure(kind)
        same = {name: getattr(self, name) for name in measure.needs}
        names = {p.name for p in parameters(cls)}
        same = {name: value for name, value in same.items() if name in names}
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
        together: dict[str, list[str]] = {}
        for layer in self.kernels if _counts_units(kind) else self.layers:
            together.setdefault(_path(layer, self.layers), []).append(layer)
        rules = []
        for path, layers in together.items():
            pattern = _pattern(path)
            if selectable()[kind].measures == "unit_ratio":  # the other leaves vectors alone itself
                names = dict.fromkeys(name for layer in layers for name in self.kernels[layer])
                pattern = f"{re.escape(path)}/({'|'.join(re.escape(n) for n in names)})"
            rules.append((pattern, self._made(kind, self._threshold(kind, layers, number))))
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

    def _threshold(self, kind: str, layers: Sequence[str], segments: int) -> Tensor:
        """The largest threshold of some layers: a number, a schedule, or None."""
        levels = self._levels(kind, layers, segments)
        if levels is None or segments == 1:
            return levels and levels[0]
        parts = np.array_split(np.arange(self.updates), segments)
        return keras.optimizers.schedules.PiecewiseConstantDecay(
            # The schedule keeps a value up to and including its boundary.
            [int(part[-1]) for part in parts[:-1]],
            [float(f"{level:.6g}") for level in levels],
        )

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
        rows = _cells(self)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], _note(self)])

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
        figures = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "samples"
        }
        content = {
            "clipper": serialize(self.clip_map(kind, segments)),
            "calibration": {"kind": kind, "segments": segments, **figures},
        }
        write_json(path, content)


def _cells(found: Calibration) -> list[tuple[str, ...]]:
    """The head and a row a layer: what `save` writes, `*` where that is not what was watched."""
    rows = [("layer", *found.thresholds)]
    for layer in found.layers:
        rows.append((layer, *(_cell(found, kind, layer) for kind in found.thresholds)))
    return rows


def _cell(found: Calibration, kind: str, layer: str) -> str:
    saved = found.saved_threshold(kind, layer)
    if saved is None:
        return "–"
    is_capped = _measure(kind).at_most and saved != found.thresholds[kind][layer]
    return f"{saved:.3g}" + ("*" if is_capped else "")


def _note(found: Calibration) -> str:
    """What the table rests on."""
    total = "–" if found.global_norm is None else f"{found.global_norm:.3g}"
    left_out = f", {found.nonfinite} left out as not finite" if found.nonfinite else ""
    lines = [
        f"global norm: {total}; percentile {found.percentile:g} of {found.updates} updates"
        f"{left_out}; exponential: gamma at beta={found.beta:g}"
    ]
    cells = {cell for row in _cells(found)[1:] for cell in row[1:]}
    if "–" in cells:
        lines.append(
            "–: no threshold, the layer is left alone: its gradient is zero or missing, or it has "
            "no kernel, which adaptive and update_ratio are about"
        )
    if any(cell.endswith("*") for cell in cells):
        most, least = found.max_ratio, LEAST_SHARE * found.max_ratio
        lines.append(
            f"*: capped, of {_watched_range(found)} watched: update_ratio is from {least:g} to "
            f"{most:g}. A larger one says that the learning rate is too high, not that steps "
            "should be so large; a smaller one, or none, that the run had no gradients left"
        )
    return "\n".join(lines)


def _watched_range(found: Calibration) -> str:
    """From the smallest to the largest of the capped figures."""
    watched = [
        value or 0.0
        for kind, of_layer in found.thresholds.items()
        for layer, value in of_layer.items()
        if _cell(found, kind, layer).endswith("*")
    ]
    low, high = f"{min(watched):.3g}", f"{max(watched):.3g}"
    return low if low == high else f"{low} to {high}"


def _pattern(layer: str) -> str:
    """A regular expression for the paths of a layer's variables."""
    return re.escape(layer) + "(/[^/]+)?"


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
    # Room for the updates between two fetches.
    capacity = UPDATES_IN_A_STEP * int(getattr(model, "steps_per_execution", 1))
    samplers = [Sampler(one, capacity, beta, eps) for one in optimizers]
    batches = count * max(one.gradient_accumulation_steps or 1 for one in optimizers)
    with everything_put_back(model, optimizers), contextlib.ExitStack() as stack:
        if not follow:
            for one in optimizers:
                stack.enter_context(one._inner_update.held())
        _fit(model, data, batch_size, [Watch(samplers, count), *callbacks], batches)
        for sampler in samplers:
            sampler.fetch()
        skipped = [sampler.skipped for sampler in samplers]
    found = Calibrations(
        (label, _suggest(sampler, count, left_out, percentile))
        for label, sampler, left_out in zip(labels_of(optimizers), samplers, skipped, strict=True)
    )
    return found if len(found) > 1 else found[""]


class Calibrations(dict):
    """What `calibrate` found for each of several optimizers; print it for their tables."""

    def __str__(self) -> str:
        return "\n\n".join(f"{label}\n{found}" for label, found in self.items())


def _fit(
    model: keras.Model,
    data: Any,
    batch_size: int | None,
    callbacks: list[keras.callbacks.Callback],
    batches: int,
) -> None:
    """Train until a callback stops it, at most as many epochs as so many batches can need."""
    x, y, weight = _unpack(data)
    model.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=batch_size,
        epochs=batches,
        shuffle=isinstance(data, tuple),  # a data set has its own order
        verbose=0,
        callbacks=callbacks,
    )


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


def _suggest(sampler: Sampler, count: int, skipped: int, percentile: float) -> Calibration:
    """Percentiles over the updates of the sampler's figures, layer by layer."""
    variables = sampler.variables
    fetched = sampler.samples[:count]
    finite = [i for i, figures in enumerate(fetched) if np.isfinite(figures).all()]
    kept = np.array([fetched[i] for i in finite])
    if not len(kept):
        raise ValueError(
            f"calibrate: none of {len(fetched) + skipped} updates had finite gradients. Lower the "
            "learning rate, or look at the data; ClipMonitor names the layer."
        )
    square, largest, scaled, ratio, step = (kept[:, i] for i in range(5))
    sizes = np.array([max(math.prod(v.shape), 1) for v in variables], "float64")
    owners, units = layers_of(variables), units_of(variables)
    layers = list(dict.fromkeys(owners))
    samples = {kind: np.full((len(kept), len(layers)), np.nan) for kind in kinds()}
    bound = step_bound(sampler.optimizer.inner_optimizer, variables)
    if bound.anneal is not None:  # the bound falls with the rate: what counts is the largest so far
        rates = np.maximum([sampler.rates[i] for i in finite], arithmetic.TINY)
        step = step * (np.maximum.accumulate(rates) / rates)[:, None]
    kernels_of: dict[str, list[str]] = {}
    for k, layer in enumerate(layers):
        mine = [i for i, owner in enumerate(owners) if owner == layer]
        samples["norm"][:, k] = np.sqrt(square[:, mine].sum(axis=1))
        samples["absolute"][:, k] = largest[:, mine].max(axis=1)
        samples["exponential"][:, k] = scaled[:, mine].max(axis=1)
        samples["rms"][:, k] = np.sqrt(square[:, mine] / sizes[mine]).max(axis=1)
        whole = [i for i in mine if len(units[i].axes) < len(variables[i].shape)]
        if whole:
            samples["adaptive"][:, k] = ratio[:, whole].max(axis=1)
            samples["update_ratio"][:, k] = step[:, whole].max(axis=1)
            kernels_of[layer] = [path_of(variables[i]).rpartition("/")[2] for i in whole]
    first: dict[str | None, str] = {}  # clippers that bound the same figure share it
    for kind in kinds():
        samples[kind] = samples[first.setdefault(selectable()[kind].measures, kind)]
    return Calibration.of_samples(
        layers,
        kernels_of,
        {**samples, "global": np.sqrt(square.sum(axis=1))},
        percentile=percentile,
        nonfinite=len(fetched) - len(kept) + skipped,
        beta=sampler.beta,
        eps=sampler.eps,
        max_ratio=bound.max_ratio,
        anneal=bound.anneal,
    )
