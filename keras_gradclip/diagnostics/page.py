"""`report`: one self-contained HTML page about what the clip did in a run.

It reads what `ClipMonitor` wrote and needs NumPy alone; the page loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import json
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_gradclip.diagnostics.monitor import FIELDS, MONITOR_CSV, MONITOR_JSON, THRESHOLDS_CSV

#: A layer clipped on more than this share of the steps is reported: the clip then acts as a
#: smaller learning rate (Seetharaman et al., arXiv 2007.14469, do so on purpose).
TOO_OFTEN = 0.5
#: For clippers of elements: a larger mean share of clipped elements is reported.
TOO_MANY_ELEMENTS = 0.1
#: Degrees by which the clip may turn a layer's gradient on average, before it is reported.
TOO_FAR = 45.0
#: A global norm this many times the median of the samples around it is a spike.
SPIKE = 10.0
#: A clip that acts on more than the first share of the layers in one fifth of the run, and on less
#: than the second in another, is reported as uneven.
UNEVEN = (0.3, 0.02)
#: More layers than this with one finding are told in one sentence.
SINGLY = 3
#: Degrees below which the clip is said to keep the direction.
STRAIGHT = 0.1
#: Columns of a heat map, at most.
COLUMNS = 160


@dataclasses.dataclass(frozen=True)
class Run:
    """The samples of a monitored run, by layer.

    Attributes:
        steps: int array `[samples]`.
        layers: the layers' names.
        figures: for each of `monitor.FIELDS` a float64 array `[samples, layers]`: norms are those
            of the whole layer, `clip_fraction` is weighted by elements, `angle` and `max_abs` are
            the largest among the layer's variables.
        clipped: bool array `[samples, layers]`, any variable of the layer was clipped.
        partial: bool array `[layers]`, the clip takes single elements or units of the layer.
        thresholds: name to (steps, values).
        description: what `monitor.json` holds.
    """

    steps: np.ndarray
    layers: list[str]
    figures: dict[str, np.ndarray]
    clipped: np.ndarray
    partial: np.ndarray
    thresholds: dict[str, tuple[np.ndarray, np.ndarray]]
    description: dict[str, Any]

    @property
    def global_before(self) -> np.ndarray:
        """The global L2 norm before the clip, `[samples]`."""
        return np.sqrt(np.sum(self.figures["norm_before"] ** 2, axis=1))

    @property
    def global_after(self) -> np.ndarray:
        """The global L2 norm after the clip, `[samples]`."""
        return np.sqrt(np.sum(self.figures["norm_after"] ** 2, axis=1))


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is plainly said about a run.

    Attributes:
        level: "bad", "note" or "good".
        text: one or two sentences.
        details: a line for each layer concerned, where they are many.
    """

    level: str
    text: str
    details: tuple[str, ...] = ()


def read_run(run_dir: str | os.PathLike) -> Run:
    """The samples that a `ClipMonitor` wrote into `run_dir`.

    Raises:
        ValueError: they are not there, or damaged.
    """
    folder = Path(run_dir)
    for name in (MONITOR_CSV, MONITOR_JSON):
        if not (folder / name).exists():
            raise ValueError(
                f"report: `run_dir` ({str(folder)!r}) holds no {name}. Train with the callback "
                "ClipMonitor(run_dir) first."
            )
    description = json.loads((folder / MONITOR_JSON).read_text())
    variables = description["variables"]
    index = {v["path"]: i for i, v in enumerate(variables)}
    samples: dict[tuple[int, int], np.ndarray] = {}
    count: dict[int, int] = {}
    with (folder / MONITOR_CSV).open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                step, i = int(row["step"]), index[row["variable"]]
                values = [float(row[name]) for name in FIELDS]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"report: line {line} of {folder / MONITOR_CSV} cannot be read ({error!r}). "
                    "Remove the line, or monitor the run anew."
                ) from error
            if i == 0:  # each sample begins with the first variable; a step may come twice
                count[step] = count.get(step, -1) + 1
            key = (step, count.get(step, 0))
            if key not in samples:
                samples[key] = np.full((len(FIELDS), len(variables)), np.nan)
            samples[key][:, i] = values
    if not samples:
        raise ValueError(
            f"report: {folder / MONITOR_CSV} holds no samples: no update was measured. Train on, "
            "or lower `every`."
        )
    stacked = np.stack(list(samples.values()))
    return _by_layer(
        np.array([step for step, _ in samples]),
        {name: stacked[:, i] for i, name in enumerate(FIELDS)},
        description,
        _read_thresholds(folder / THRESHOLDS_CSV),
    )


def _read_thresholds(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found: dict[str, list[tuple[int, float]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return {
        name: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs]))
        for name, pairs in found.items()
    }


def _by_layer(steps: np.ndarray, of_variable: dict, description: dict, thresholds: dict) -> Run:
    variables = description["variables"]
    owners = [v["layer"] for v in variables]
    sizes = np.array([math.prod(v["shape"]) for v in variables], "float64")
    layers = list(dict.fromkeys(owners))
    figures = {name: np.zeros((len(steps), len(layers))) for name in FIELDS}
    clipped = np.zeros((len(steps), len(layers)), bool)
    partial = np.zeros(len(layers), bool)
    for k, layer in enumerate(layers):
        mine = [i for i, owner in enumerate(owners) if owner == layer]
        part = {name: of_variable[name][:, mine] for name in FIELDS}
        for name in ("norm_before", "norm_after"):
            figures[name][:, k] = np.sqrt(np.sum(part[name] ** 2, axis=1))
        for name in ("max_abs", "angle", "nonfinite"):
            figures[name][:, k] = part[name].max(axis=1)
        fraction = part["clip_fraction"]
        figures["clip_fraction"][:, k] = fraction @ sizes[mine] / sizes[mine].sum()
        clipped[:, k] = np.any(fraction > 0, axis=1)
        partial[k] = bool(np.any((fraction > 0) & (fraction < 1)))
    return Run(steps, layers, figures, clipped, partial, thresholds, description)


# Findings ------------------------------------------------------------------------------------


def findings(run: Run) -> list[Finding]:
    """Plain sentences about a run, the worst first."""
    good = np.isfinite(run.global_before)
    result = _nonfinite(run)
    if not good.any():
        return result
    off = run.description["clipper"] is None
    if off:
        result.append(Finding("note", "Clipping is off: the gradients were only watched."))
    else:
        result += _how_often(run, good)
    result += _spikes(run, good, off)
    quiet = np.nanmax(run.figures["norm_before"][good], axis=0) < 1e-12
    if quiet.any():
        names = _some([n for n, q in zip(run.layers, quiet, strict=True) if q])
        result.append(
            Finding(
                "bad", f"{names}: the gradient is zero in every sample; nothing is learnt there."
            )
        )
    return sorted(result, key=lambda f: ("bad", "note", "good").index(f.level))


def _nonfinite(run: Run) -> list[Finding]:
    bad = run.figures["nonfinite"]
    worst = np.nanmax(bad, axis=0)
    hit = [i for i in np.argsort(-bad.sum(axis=0), kind="stable") if worst[i] > 0]
    if not hit:
        return []
    samples = int(np.sum(np.any(bad > 0, axis=1)))
    first = int(run.steps[np.argmax(np.any(bad > 0, axis=1))])
    names = _some([run.layers[i] for i in hit])
    return [
        Finding(
            "bad",
            f"Gradients that are not finite, first seen at step {first}, in {samples} of "
            f"{len(run.steps)} samples: {names}. Lower the learning rate, or look at the loss; "
            "skip_nonfinite=True leaves such updates out.",
        )
    ]


def _how_often(run: Run, good: np.ndarray) -> list[Finding]:
    share = run.clipped[good].mean(axis=0)
    fraction = np.nanmean(run.figures["clip_fraction"][good], axis=0)
    before, after = (run.figures[n][good] for n in ("norm_before", "norm_after"))
    left = _left(before, after)
    angle = np.nanmean(run.figures["angle"][good], axis=0)
    too_often = (share > TOO_OFTEN) & (~run.partial | (fraction > TOO_MANY_ELEMENTS))
    worst = _worst(share * (1 - left), too_often)
    result = []

    def told(i: int) -> str:
        what = f" ({_percent(fraction[i])} of its elements)" if run.partial[i] else ""
        return (
            f"{run.layers[i]}: clipped on {_percent(share[i])} of steps{what}, and "
            f"{_percent(left[i])} of its norm is left"
        )

    def percentile(i: int) -> str:
        return "" if run.partial[i] else f"{np.percentile(before[:, i], 90):.3g}"

    if len(worst) <= SINGLY:
        for i in worst:
            hint = f" The 90th percentile of its norm is {percentile(i)}." if percentile(i) else ""
            result.append(Finding("bad", f"{told(i)}: the threshold is too low.{hint}"))
    else:
        names = _some([f"{run.layers[i]} ({_percent(share[i])})" for i in worst], 3)
        result.append(
            Finding(
                "bad",
                f"{len(worst)} of {len(run.layers)} layers are clipped on more than "
                f"{_percent(TOO_OFTEN)} of steps, and {_percent(left[worst].mean())} of their "
                f"norm is left on average: their thresholds are too low. Worst: {names}.",
                tuple(
                    told(i)
                    + (f"; 90th percentile of the norm: {percentile(i)}" * (not run.partial[i]))
                    for i in worst
                ),
            )
        )
    result += _turned(run, angle)
    result += _uneven(run, good)
    if not run.clipped[good].any():
        suggestion = np.percentile(run.global_before[good], 90)
        result.append(
            Finding(
                "bad",
                "No layer was ever clipped: the clip does nothing. Lower the threshold (the 90th "
                f"percentile of the global norm is {suggestion:.3g}), or leave it out.",
            )
        )
    elif not too_often.any():
        result.append(
            Finding(
                "good",
                f"On average a layer was clipped on {_percent(share.mean())} of steps, at most on "
                f"{_percent(share.max())} ({run.layers[int(share.argmax())]}).",
            )
        )
    return result


def _turned(run: Run, angle: np.ndarray) -> list[Finding]:
    turned = _worst(angle, angle > TOO_FAR)
    advice = "A norm clip keeps the direction."
    if len(turned) <= SINGLY:
        return [
            Finding(
                "note",
                f"{run.layers[i]}: the clip turns the gradient by {angle[i]:.0f}° on average. "
                f"{advice}",
            )
            for i in turned
        ]
    return [
        Finding(
            "note",
            f"In {len(turned)} of {len(run.layers)} layers the clip turns the gradient by more "
            f"than {TOO_FAR:.0f}° on average, most in {run.layers[turned[0]]} "
            f"({angle[turned[0]]:.0f}°). {advice}",
            tuple(f"{run.layers[i]}: {angle[i]:.0f}°" for i in turned),
        )
    ]


def _uneven(run: Run, good: np.ndarray) -> list[Finding]:
    """A clip that acts in one part of the run alone, because the norms drift."""
    if good.sum() < 20:
        return []
    fifths = np.array_split(run.clipped[good].mean(axis=1), 5)
    first, last = (float(part.mean()) for part in (fifths[0], fifths[-1]))
    if not (max(first, last) > UNEVEN[0] and min(first, last) < UNEVEN[1]):
        return []
    sizes = np.array_split(run.global_before[good], 5)
    ratio = np.median(sizes[0]) / max(float(np.median(sizes[-1])), 1e-30)
    drift = f"falls {ratio:.0f}-fold" if ratio > 1 else f"grows {1 / max(ratio, 1e-30):.0f}-fold"
    reason = f" The global norm {drift} in between." if max(ratio, 1 / ratio) >= 2 else ""
    return [
        Finding(
            "note",
            f"The clip acts at one end of the run: on {_percent(first)} of the layers in its first "
            f"fifth, on {_percent(last)} in its last.{reason} A schedule or PercentileClip follows "
            "such a drift.",
        )
    ]


def _spikes(run: Run, good: np.ndarray, off: bool) -> list[Finding]:
    before, after = run.global_before[good], run.global_after[good]
    reach = max(3, len(before) // 20)
    around = np.array(
        [np.median(before[max(0, i - reach) : i + reach + 1]) for i in range(len(before))]
    )
    times = before / np.maximum(around, 1e-30)
    spikes = (times > SPIKE) & (around > 0)
    if not spikes.any():
        return []
    worst = int(np.where(spikes, times, 0).argmax())
    where = f"step {run.steps[good][worst]}: {times[worst]:.0f} times the norm around it"
    text = f"{int(spikes.sum())} of {len(before)} samples are spikes, the largest at {where}"
    if off:
        return [Finding("note", f"{text}. A clip would bound them.")]
    return [Finding("note", f"{text}; after the clip {after[worst] / around[worst]:.1f} times.")]


def _worst(badness: np.ndarray, chosen: np.ndarray) -> list[int]:
    """The chosen indices, the worst first."""
    return [int(i) for i in np.argsort(-badness, kind="stable") if chosen[i]]


def _some(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _percent(share: float) -> str:
    value = 100 * float(share)
    return f"{value:.0f} %" if value >= 1 or value == 0 else f"{value:.2g} %"


# The page ------------------------------------------------------------------------------------


def report(run_dir: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Write one HTML page about a run: findings, curves, heat maps of layer × time, rules.

    Args:
        run_dir: the folder that a `ClipMonitor(run_dir)` wrote into.
        output: the page; by default `report.html` in `run_dir`.

    Returns:
        The path of the page.

    Raises:
        ValueError: `run_dir` holds no samples, or damaged ones.
    """
    folder = Path(run_dir)
    run = read_run(folder)
    path = folder / "report.html" if output is None else Path(output)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(_page(run, _name(folder.resolve())), encoding="utf-8")
    scratch.replace(path)
    return path


def _name(folder: Path) -> str:
    """What a run is called: its folder, or the one above where that is named after the monitor."""
    return folder.parent.name if folder.name.startswith("monitor") else folder.name


def _page(run: Run, name: str) -> str:
    said = "".join(
        f'<li class="{f.level}"><b>{_LEVELS[f.level]}</b> {html.escape(f.text)}{_details(f)}</li>'
        for f in findings(run)
    )
    any_clipped = bool(run.clipped.any())
    turned = float(np.nanmax(run.figures["angle"], initial=0.0)) >= STRAIGHT
    curves = [
        _chart(
            "Global gradient norm",
            {
                "before": (run.steps, run.global_before),
                "after the clip": (run.steps, run.global_after),
            },
            log=True,
        ),
        _chart(
            "Layers clipped, % of all",
            {"": (run.steps, 100 * run.clipped.mean(axis=1))},
            floor=0.0,
        ),
        _chart(
            "Largest element before the clip",
            {"": (run.steps, _row_max(run.figures["max_abs"]))},
            log=True,
        ),
    ]
    if turned:
        curves.append(
            _chart(
                "Largest angle of a layer's gradient, before to after, degrees",
                {"": (run.steps, _row_max(run.figures["angle"]))},
                floor=0.0,
            )
        )
    curves += _threshold_chart(run.thresholds)
    maps = []
    if any_clipped:
        maps.append(_heat_map("Share clipped", run, run.figures["clip_fraction"], top=1.0))
    norms = run.figures["norm_before"]
    maps.append(
        _heat_map(
            "Norm before the clip, as a multiple of the layer's median",
            run,
            norms / np.maximum(_median(norms), 1e-30),
            log=True,
            told=norms,
        )
    )
    if turned:
        maps.append(_heat_map("Angle, degrees", run, run.figures["angle"]))
    if np.nanmax(run.figures["nonfinite"]) > 0:
        maps.append(_heat_map("Share not finite", run, run.figures["nonfinite"], top=1.0))
    rules = "".join(
        f"<tr><td>{html.escape(v['path'])}</td><td>{'×'.join(map(str, v['shape'])) or 'scalar'}"
        f"</td><td><code>{html.escape(v['rule'])}</code></td>"
        f"<td>{html.escape(v['clipper'])}</td></tr>"
        for v in run.description["variables"]
    )
    straight = any_clipped and not turned
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: '
        'gradients</title><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{html.escape(name)}</h1>"
        f'<p class="sub">Clipper: {html.escape(_clipper(run.description))}</p>{_tiles(run)}'
        f'<h2>Findings</h2><ul class="findings">{said}</ul>'
        f'<h2>Over time</h2><div class="curves">{"".join(curves)}</div>'
        f"<h2>Layer by layer</h2>{''.join(maps)}"
        + "<p class=sub>The clip keeps the direction of every layer's gradient.</p>" * straight
        + _layer_table(run)
        + f"<h2>Which rule hits what</h2>"
        f"<details{' open' if len(run.description['variables']) <= 20 else ''}><summary>"
        f"{len(run.description['variables'])} variables</summary>"
        f'<div class="wide"><table class="rules"><tr><th>variable</th><th>shape</th><th>rule</th>'
        f"<th>clipper</th></tr>{rules}</table></div></details>"
        f'<div id="tip" hidden></div></main><script>{_SCRIPT}</script></body></html>'
    )


def _details(finding: Finding) -> str:
    if not finding.details:
        return ""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in finding.details)
    return f"<details><summary>all {len(finding.details)}</summary><ul>{lines}</ul></details>"


def _clipper(description: dict[str, Any]) -> str:
    """The clipper in a line: a map of many rules by their number and kinds."""
    text = description["clipper_text"]
    if len(text) <= 160:
        return text
    variables = description["variables"]
    rules = len({v["rule"] for v in variables})
    kinds = ", ".join(dict.fromkeys(v["clipper"].partition("(")[0] for v in variables))
    return f"{text.partition('(')[0]} of {rules} rules ({kinds}); the table at the end has them"


def _tiles(run: Run) -> str:
    """The run in five figures."""
    good = np.isfinite(run.global_before)
    bad = int(np.sum(np.any(run.figures["nonfinite"] > 0, axis=1)))
    off = run.description["clipper"] is None
    norm, change = "–", ""
    if good.any():
        first, last = run.global_before[good], run.global_after[good]
        norm = _number(_two_digits(np.median(first)))
        change = f"{_percent(_left(first, last))} left after the clip"
    tiles = [
        ("measured", f"{len(run.steps)}", f"updates {run.steps.min()} to {run.steps.max()}"),
        ("layers", f"{len(run.layers)}", f"{len(run.description['variables'])} variables"),
        (
            "clipped",
            "off" if off else _percent(run.clipped[good].mean() if good.any() else 0.0),
            "of all layers and measured steps",
        ),
        ("global norm", norm, f"median; {change}" if change else ""),
        ("not finite", f"{bad}" if bad else "never", "of the measured steps" if bad else ""),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b>"
            f"<span>{html.escape(note)}</span></div>"
            for name, value, note in tiles
        )
        + "</div>"
    )


def _left(before: np.ndarray, after: np.ndarray) -> Any:
    """What is left of the norm, averaged over the samples: each counts the same."""
    return np.mean(np.where(before > 0, after / np.maximum(before, 1e-30), 1.0), axis=0)


def _layer_table(run: Run) -> str:
    """Every layer in numbers."""
    good = np.isfinite(run.global_before)
    if not good.any():
        return ""
    before, after = (run.figures[n][good] for n in ("norm_before", "norm_after"))
    share = run.clipped[good].mean(axis=0)
    left = _left(before, after)
    quantiles = np.percentile(before, (50, 90, 100), axis=0)
    angle = np.nanmean(run.figures["angle"][good], axis=0)
    turned = bool(angle.max() >= STRAIGHT)
    head = ("clipped on", "norm left", "median norm", "90 % below", "largest") + ("angle",) * turned
    rows = "".join(
        f"<tr><td>{html.escape(layer)}</td>"
        + "".join(
            f"<td>{cell}</td>"
            for cell in (
                _percent(share[i]),
                _percent(left[i]),
                *(_number(q) for q in quantiles[:, i]),
                *([f"{angle[i]:.1f}°"] if turned else []),
            )
        )
        + "</tr>"
        for i, layer in enumerate(run.layers)
    )
    names = "".join(f"<th>{name}</th>" for name in head)
    return (
        f"<details{' open' if len(run.layers) <= 12 else ''}><summary>every layer in numbers"
        f'</summary><div class="wide"><table class="numbers"><tr><th>layer</th>{names}</tr>'
        f"{rows}</table></div></details>"
    )


def _threshold_chart(thresholds: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """The live thresholds, if any of them changes; of many the lowest, median and highest."""
    moving = {n: (s, v) for n, (s, v) in thresholds.items() if np.ptp(v) > 0}
    if not moving:
        return []
    if len(moving) <= 6:
        return [_chart("Thresholds", moving, log=True)]
    steps = next(iter(moving.values()))[0]
    stacked = np.stack([np.interp(steps, s, v) for s, v in moving.values()])
    lines = {
        name: (steps, np.percentile(stacked, q, axis=0))
        for name, q in (("lowest", 0), ("median", 50), ("highest", 100))
    }
    return [_chart(f"Thresholds: {len(moving)} of them", lines, log=True)]


def _median(values: np.ndarray) -> np.ndarray:
    """The median of each column; NaN for a column without any number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "All-NaN slice": that is what we want
        return np.nanmedian(values, axis=0)


def _row_max(values: np.ndarray) -> np.ndarray:
    """The largest number of each row; NaN for a row without any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "All-NaN slice": that is what we want
        return np.nanmax(values, axis=1)


def _chart(
    title: str,
    series: dict[str, tuple[np.ndarray, np.ndarray]],
    log: bool = False,
    floor: float | None = None,
) -> str:
    """An SVG line chart; NaN breaks a line."""
    width, height, left, right, top, bottom = 520, 220, 58, 12, 10, 30
    points = [(x, np.where(y > 0, y, np.nan) if log else y) for x, y in series.values()]
    every = np.concatenate([y[np.isfinite(y)] for _, y in points])
    head = f"<figure><figcaption>{html.escape(title)}</figcaption>"
    if not every.size:
        return f"{head}<p>nothing to show</p></figure>"
    low, high = float(every.min()), float(every.max())
    if floor is not None:
        low = min(low, floor)
    scale: Callable[[Any], Any] = np.log10 if log else (lambda v: v)
    bottom_value, top_value = float(scale(low)), float(scale(high))
    if top_value - bottom_value < 1e-9 * max(1.0, abs(top_value)):
        pad = 0.5 if log else max(abs(top_value), 1.0) / 2
        top_value += pad
        bottom_value = bottom_value if floor is not None else bottom_value - pad
    starts = [int(x.min()) for x, _ in points]
    ends = [int(x.max()) for x, _ in points]
    x0, x1 = min(starts), max(max(ends), min(starts) + 1)

    def at_x(x: Any) -> Any:
        return left + (width - left - right) * (x - x0) / (x1 - x0)

    def at_y(y: Any) -> Any:
        return top + (height - top - bottom) * (top_value - y) / (top_value - bottom_value)

    parts = []
    for value in _ticks(bottom_value, top_value, log):
        y = at_y(value)
        shown = _number(10**value if log else value)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>'
        )
    marks = (("step ", x0, "start"), ("", (x0 + x1) // 2, "middle"), ("", x1, "end"))
    for name, value, anchor in marks:
        place = f'x="{at_x(value):.1f}" y="{height - 10}" text-anchor="{anchor}"'
        parts.append(f"<text {place}>{name}{value}</text>")
    for k, (x, y) in enumerate(points):
        runs: list[list[str]] = [[]]
        for px, py in zip(at_x(x), at_y(scale(y)), strict=True):
            if math.isfinite(py):
                runs[-1].append(f"{px:.1f},{py:.1f}")
            elif runs[-1]:
                runs.append([])
        for run in runs:
            if len(run) == 1:
                px, py = run[0].split(",")
                parts.append(f'<circle class="s{k}" cx="{px}" cy="{py}" r="2.5"/>')
            elif run:
                parts.append(f'<polyline class="s{k}" points="{" ".join(run)}"/>')
    names = [n for n in series if n]
    legend = "".join(
        f'<span><i class="s{k}"></i>{html.escape(n)}</span>' for k, n in enumerate(names)
    )
    return (
        f'{head}<div class="legend">{legend}</div><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Three to seven round numbers between low and high; on a log axis, their logarithms."""
    if log and high - low < 2:
        exponents = range(math.floor(low), math.ceil(high) + 1)
        ticks = [math.log10(m) + e for e in exponents for m in (1, 2, 5)]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) < 3:  # too narrow for 1, 2, 5: round numbers of the plain axis
            ticks = [math.log10(t) for t in _ticks(10**low, 10**high, False) if t > 0]
        return ticks
    step = 10 ** math.floor(math.log10((high - low) / 4)) if high > low else 1.0
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= 6:
            step *= factor
            break
    if log:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """A tick's label."""
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.0e}"


def _two_digits(value: float) -> float:
    return float(f"{float(value):.2g}")


def _heat_map(
    title: str,
    run: Run,
    values: np.ndarray,
    log: bool = False,
    top: float | None = None,
    told: np.ndarray | None = None,
) -> str:
    """Layers down, time across, as a picture of one pixel a cell; hover for the numbers.

    The numbers are those of `told` `[samples, layers]`, or of `values`.
    """
    chunks = np.array_split(np.arange(len(run.steps)), min(COLUMNS, len(run.steps)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a chunk of NaN stays NaN
        cells = np.stack([np.nanmean(values[c], axis=0) for c in chunks], axis=1)
        numbers = cells
        if told is not None:
            numbers = np.stack([np.nanmean(told[c], axis=0) for c in chunks], axis=1)
    shown = np.where(cells > 0, np.log10(np.maximum(cells, 1e-30)), np.nan) if log else cells
    finite = shown[np.isfinite(shown)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if not log:
        low = 0.0
    if top is not None:
        high = top
    if high <= low:
        high = low + 1.0
    picture = _png(_colours((shown - low) / (high - low)))
    pixels = max(5, min(18, 720 // max(len(run.layers), 1)))
    every = -(-13 // pixels)  # rows a label needs to be read
    labels = "".join(f"<div>{html.escape(n)}</div>" for n in run.layers[::every])
    starts = [int(run.steps[c[0]]) for c in chunks]
    data = {
        "layers": run.layers,
        "steps": starts,
        "cells": [[f"{v:.3g}" if math.isfinite(v) else "–" for v in row] for row in numbers],
    }
    ends = [_number(_two_digits(10**v if log else v)) for v in (low, high)]
    script = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    return (
        f'<figure class="map"><figcaption>{html.escape(title)}<span class="scale">{ends[0]}'
        f'<i></i>{ends[1]}</span></figcaption><div class="heat" style="--row:{pixels * every}px">'
        f'<div class="labels">{labels}</div><img alt="{html.escape(title)}, layers down, steps '
        f'across" src="data:image/png;base64,{picture}" style="height:'
        f'{pixels * len(run.layers)}px">'
        f'<div class="axis"><span>step {starts[0]}</span><span>'
        f"{int(run.steps[-1])}</span></div></div>"
        f'<script type="application/json">{script}</script></figure>'
    )


#: Five anchors of the viridis colour map, dark to bright.
_VIRIDIS = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], "float64"
)


def _colours(values: np.ndarray) -> np.ndarray:
    """RGBA bytes `[rows, columns, 4]` of numbers in 0..1; NaN is transparent."""
    known = np.isfinite(values)
    position = np.clip(np.where(known, values, 0.0), 0, 1) * (len(_VIRIDIS) - 1)
    low = np.minimum(position.astype(int), len(_VIRIDIS) - 2)
    part = (position - low)[..., None]
    rgb = _VIRIDIS[low] * (1 - part) + _VIRIDIS[low + 1] * part
    return np.concatenate([rgb, 255.0 * known[..., None]], axis=-1).round().astype("uint8")


def _png(pixels: np.ndarray) -> str:
    """A PNG file of RGBA bytes, in base64."""
    height, width = pixels.shape[:2]

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(file).decode()


_LEVELS = {"bad": "Look at this:", "note": "Note:", "good": "Good:"}

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2433;--soft:#667085;--back:#fff;--card:#f6f7f9;
--line:#dfe3ea;
--s0:#2563eb;--s1:#d9480f;--s2:#0f8a5f;--s3:#9333ea;--s4:#b7791f;--s5:#db2777;
--bad:#c2410c;--note:#2563eb;--good:#15803d}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--back:#14171c;--card:#1d2129;
--line:#323845;--s0:#7aa7ff;--s1:#ff9d66;--s2:#4fd1a1;--s3:#c99bff;--s4:#f0c060;--s5:#ff8fc0;
--bad:#ff9d66;--note:#7aa7ff;--good:#5ddb8f}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 60px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:32px 0 10px}
.sub{color:var(--soft);margin:4px 0 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:8px;margin-top:14px}
.tiles div{background:var(--card);border-radius:6px;padding:8px 12px;display:flex;
flex-direction:column}
.tiles b{font-size:20px}.tiles span{font-size:12px;color:var(--soft)}
.findings{list-style:none;margin:0;padding:0;display:grid;gap:8px}
.findings>li{background:var(--card);border-left:4px solid var(--soft);border-radius:4px;
padding:8px 12px;overflow-wrap:anywhere}
.findings details ul{margin:6px 0 0;padding-left:18px;font-size:13px;columns:2 380px}
.findings .bad{border-color:var(--bad)}.findings .bad b{color:var(--bad)}
.findings .note{border-color:var(--note)}.findings .note b{color:var(--note)}
.findings .good{border-color:var(--good)}.findings .good b{color:var(--good)}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px}
figure{margin:0;background:var(--card);border-radius:6px;padding:10px 12px;min-width:0}
figure.map{margin-bottom:14px}
figcaption{font-weight:600;display:flex;flex-wrap:wrap;gap:4px 16px;justify-content:space-between}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--soft)}
svg .grid{stroke:var(--line);stroke-width:1}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
.legend{min-height:20px;font-size:12px;color:var(--soft);display:flex;flex-wrap:wrap;gap:2px 14px}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}
.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}.s5{stroke:var(--s5)}
i.s0,circle.s0{background:var(--s0);fill:var(--s0)}i.s1,circle.s1{background:var(--s1);fill:var(--s1)}
i.s2,circle.s2{background:var(--s2);fill:var(--s2)}i.s3,circle.s3{background:var(--s3);fill:var(--s3)}
i.s4,circle.s4{background:var(--s4);fill:var(--s4)}i.s5,circle.s5{background:var(--s5);fill:var(--s5)}
.scale{font-weight:400;font-size:12px;color:var(--soft);display:flex;align-items:center;gap:6px}
.scale i{width:90px;height:10px;border-radius:2px;
background:linear-gradient(90deg,#440154,#3b528b,#21918c,#5ec962,#fde725)}
.heat{display:grid;grid-template-columns:minmax(60px,max-content) minmax(0,1fr);gap:8px;
margin-top:6px}
.labels{max-width:min(32vw,300px);color:var(--soft)}
.labels div{height:var(--row);line-height:var(--row);font-size:min(12px,var(--row));
overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.heat img{width:100%;image-rendering:pixelated;display:block;background:repeating-linear-gradient(
45deg,var(--line) 0 3px,transparent 3px 6px)}
.axis{display:flex;justify-content:space-between;font-size:11px;color:var(--soft);
grid-column:2;margin-top:-6px}
@media(max-width:600px){svg text{font-size:15px}}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;margin-top:8px}
th,td{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid var(--line);white-space:nowrap}
.rules td:last-child{white-space:normal;min-width:22em}
.numbers td:not(:first-child),.numbers th:not(:first-child){text-align:right}
summary{cursor:pointer;color:var(--soft)}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--back);font-size:12px;
padding:3px 8px;border-radius:4px;z-index:2}
"""

_SCRIPT = """
const tip=document.getElementById('tip');
for(const figure of document.querySelectorAll('figure.map')){
 const data=JSON.parse(figure.querySelector('script').textContent);
 const img=figure.querySelector('img');
 img.addEventListener('mousemove',e=>{
  const box=img.getBoundingClientRect();
  const n=data.steps.length,m=data.layers.length;
  const i=Math.min(n-1,Math.max(0,Math.floor((e.clientX-box.left)/box.width*n)));
  const j=Math.min(m-1,Math.max(0,Math.floor((e.clientY-box.top)/box.height*m)));
  tip.textContent=data.layers[j]+', step '+data.steps[i]+': '+data.cells[j][i];
  tip.hidden=false;
  const w=tip.offsetWidth;
  tip.style.left=Math.min(e.clientX+14,innerWidth-w-6)+'px';
  tip.style.top=(e.clientY+16)+'px';
 });
 img.addEventListener('mouseleave',()=>{tip.hidden=true});
}
"""
