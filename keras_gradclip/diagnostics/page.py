"""`report`: one self-contained HTML page about what the clip did in a run.

It reads what `ClipMonitor` wrote; the page loads nothing from elsewhere.
"""

from __future__ import annotations

import functools
import html
import os
from pathlib import Path

import numpy as np

from keras_gradclip._types import Config
from keras_gradclip.diagnostics._charts import Chart, HeatMap, number
from keras_gradclip.diagnostics._monitor_files import MONITOR_CSV
from keras_gradclip.diagnostics._run_files import Run, read_run
from keras_gradclip.diagnostics._templates import render
from keras_gradclip.diagnostics.findings import (
    Clipping,
    findings,
    left_of,
    over_samples,
    percent,
)
from keras_gradclip.files import write_text

#: Degrees below which the clip is said to keep the direction.
STRAIGHT = 0.1
#: Keeps divisors above zero.
_TINY = 1e-30


class Report(type(Path())):  # type: ignore[misc]  # Path itself cannot be subclassed before 3.12
    """The path of a report; a notebook shows the page itself."""

    def _repr_html_(self) -> str | None:
        if not self.is_file():
            return None
        page = html.escape(self.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width:100%;height:720px;border:0"></iframe>'


def report(run_dir: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Write one HTML page about a run: findings, curves, heat maps of layer × time, rules.

    Lines of the files that are damaged, as after a run that was killed, are left out and named on
    the page.

    Args:
        run_dir: the folder that a `ClipMonitor(run_dir)` wrote into, or the one above it where
            that is called `monitor`.
        output: the page; by default `report.html` beside the monitor's files.

    Returns:
        The path of the page; the last value of a notebook's cell, it shows the page.

    Raises:
        ValueError: `run_dir` holds no samples, or its files cannot be read as a whole.
    """
    folder = Path(run_dir)
    if not (folder / MONITOR_CSV).exists() and (folder / "monitor" / MONITOR_CSV).exists():
        folder /= "monitor"
    page = render("report.html.j2", **_context(read_run(folder), _name(folder.resolve())))
    path = Report(folder / "report.html" if output is None else output)
    if not path.name or "\0" in path.name or path.is_dir():
        raise ValueError(
            f"report: `output` ({str(output)!r}) is not the name of a file. Give one, such as "
            "'report.html'."
        )
    write_text(path, page)
    return path


def _name(folder: Path) -> str:
    """What a run is called: its folder, or the one above where that is named after the monitor."""
    return folder.parent.name if folder.name.startswith("monitor") else folder.name


def _context(run: Run, name: str) -> Config:
    """What the template shows."""
    is_turned = float(np.nanmax(run.figures["angle"], initial=0.0)) >= STRAIGHT
    is_clipped = bool(run.clipped.any())
    return {
        "name": name,
        "clipper": _clipper(run.description),
        "tiles": _tiles(run),
        "findings": findings(run),
        "charts": _charts(run, is_turned),
        "maps": _maps(run, is_clipped, is_turned),
        "keeps_direction": is_clipped and not is_turned,
        "columns": ("clipped on", "norm left", "median norm", "90 % below", "largest", "angle"),
        "rows": _layer_rows(run),
        "variables": run.description["variables"],
    }


def _clipper(description: Config) -> str:
    """The clipper in a line: a map of many rules by their number and kinds."""
    text = description["clipper_text"]
    if len(text) <= 160:
        return text
    variables = description["variables"]
    rules = len({v["rule"] for v in variables})
    kinds = ", ".join(dict.fromkeys(v["clipper"].partition("(")[0] for v in variables))
    return f"{text.partition('(')[0]} of {rules} rules ({kinds}); the table at the end has them"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The run in five figures: (name, value, note)."""
    is_finite = np.isfinite(run.global_before)
    bad = int(np.sum(np.any(run.figures["nonfinite"] > 0, axis=1)))
    is_off = run.description["clipper"] is None
    norm, change, clipped = "–", "", 0.0
    if is_finite.any():
        before, after = run.global_before[is_finite], run.global_after[is_finite]
        norm = number(float(f"{np.median(before):.2g}"))
        change = f"median; {percent(float(left_of(before, after)))} left after the clip"
        clipped = run.clipped[is_finite].sum() / max(run.measured[is_finite].sum(), 1)
    return [
        ("measured", f"{len(run.steps)}", f"updates {run.steps.min()} to {run.steps.max()}"),
        ("layers", f"{len(run.layers)}", f"{len(run.description['variables'])} variables"),
        ("clipped", "off" if is_off else percent(clipped), "of all layers and measured steps"),
        ("global norm", norm, change),
        ("not finite", f"{bad}" if bad else "never", "of the measured steps" if bad else ""),
    ]


def _charts(run: Run, is_turned: bool) -> list[Chart]:
    def largest(name: str) -> tuple[np.ndarray, np.ndarray]:
        return run.steps, over_samples(np.nanmax, run.figures[name], axis=1)

    norms = {
        "before": (run.steps, run.global_before),
        "after the clip": (run.steps, run.global_after),
    }
    clipped = run.clipped.sum(axis=1) / np.maximum(run.measured.sum(axis=1), 1)
    charts = [
        Chart.of("Global gradient norm", norms, log=True),
        Chart.of("Layers clipped, % of all", {"": (run.steps, 100 * clipped)}, floor=0.0),
        Chart.of("Largest element before the clip", {"": largest("max_abs")}, log=True),
    ]
    if is_turned:
        title = "Largest angle of a layer's gradient, before to after, degrees"
        charts.append(Chart.of(title, {"": largest("angle")}, floor=0.0))
    return charts + _threshold_charts(run.thresholds)


def _threshold_charts(thresholds: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[Chart]:
    """The live thresholds, if any of them changes; of many the lowest, median and highest."""
    moving = {n: (s, v) for n, (s, v) in thresholds.items() if np.ptp(v) > 0}
    if not moving:
        return []
    if len(moving) <= 6:
        return [Chart.of("Thresholds", moving, log=True)]
    steps = next(iter(moving.values()))[0]
    stacked = np.stack([np.interp(steps, s, v) for s, v in moving.values()])
    lines = {
        name: (steps, np.percentile(stacked, q, axis=0))
        for name, q in (("lowest", 0), ("median", 50), ("highest", 100))
    }
    return [Chart.of(f"Thresholds: {len(moving)} of them", lines, log=True)]


def _maps(run: Run, is_clipped: bool, is_turned: bool) -> list[HeatMap]:
    norms = run.figures["norm_before"]
    median = np.maximum(over_samples(np.nanmedian, norms), _TINY)
    title = "Norm before the clip, as a multiple of the layer's median"
    maps = [HeatMap.of(title, run, norms / median, log=True, numbers=norms)]
    if is_clipped:
        fractions = run.figures["clip_fraction"]
        maps.insert(0, HeatMap.of("Share clipped", run, fractions, top=1.0))
    if is_turned:
        maps.append(HeatMap.of("Angle, degrees", run, run.figures["angle"]))
    if np.nanmax(run.figures["nonfinite"]) > 0:
        maps.append(HeatMap.of("Share not finite", run, run.figures["nonfinite"], top=1.0))
    return maps


def _layer_rows(run: Run) -> list[tuple[str, ...]]:
    """Every layer in numbers."""
    is_finite = np.isfinite(run.global_before)
    if not is_finite.any():
        return []
    clipping = Clipping.of(run, is_finite)
    norms = run.figures["norm_before"][is_finite]
    quantiles = [
        over_samples(functools.partial(np.nanpercentile, q=q), norms) for q in (50, 90, 100)
    ]
    return [
        (
            layer,
            percent(clipping.share[i]),
            percent(clipping.left[i]),
            *(number(q[i]) for q in quantiles),
            f"{clipping.angle[i]:.1f}°",
        )
        for i, layer in enumerate(run.layers)
    ]
