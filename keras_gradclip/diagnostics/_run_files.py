"""Reads the files that `ClipMonitor` wrote: samples by layer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_gradclip._types import Config
from keras_gradclip.diagnostics._monitor_files import (
    MONITOR_CSV,
    MONITOR_JSON,
    THRESHOLDS_CSV,
    UPDATES,
    read_rows,
    step_of,
)
from keras_gradclip.diagnostics._recorder import FIELDS
from keras_gradclip.files import read_json

#: What a clipper of norms says that it measures: see `MEASURES`.
NORM = "layer_norm"
#: The keys of each entry of "variables" in `monitor.json` and their types.
_VARIABLE = {"path": str, "layer": str, "shape": list, "rule": str, "clipper": str}


@dataclasses.dataclass(frozen=True)
class Run:
    """The samples of a monitored run, by layer.

    Attributes:
        steps: int array `[samples]`.
        layers: the layers' names.
        figures: for each of `monitor.FIELDS` a float64 array `[samples, layers]`: norms are those
            of the whole layer, `clip_fraction` is weighted by elements, `angle` and `max_abs` are
            the largest among the layer's variables. NaN where the gradient was not finite, and
            where a sample has no row of the layer.
        clipped: bool array `[samples, layers]`, any variable of the layer was clipped.
        partial: bool array `[layers]`, the clip takes single elements or units of the layer.
        measured: bool array `[samples, layers]`, the sample has rows of the layer.
        thresholds: name to (steps, values).
        description: what `monitor.json` holds.
        problems: a line of text for each part of the files that could not be used.
    """

    steps: np.ndarray
    layers: list[str]
    figures: dict[str, np.ndarray]
    clipped: np.ndarray
    partial: np.ndarray
    measured: np.ndarray
    thresholds: dict[str, tuple[np.ndarray, np.ndarray]]
    description: Config
    problems: tuple[str, ...] = ()

    @property
    def global_before(self) -> np.ndarray:
        """The global L2 norm before the clip, `[samples]`."""
        return self._global("norm_before")

    @property
    def global_after(self) -> np.ndarray:
        """The global L2 norm after the clip, `[samples]`."""
        return self._global("norm_after")

    @property
    def limits_updates(self) -> np.ndarray:
        """A mask of the layers of which weight updates are limited, not gradients."""
        limited = [v["layer"] for v in self._variables if v.get("limits") == UPDATES]
        return np.isin(self.layers, limited)

    @property
    def limits_norms(self) -> np.ndarray:
        """A mask of the layers whose threshold is one of a layer's norm."""
        others = [v["layer"] for v in self._variables if v.get("measures", NORM) != NORM]
        return ~np.isin(self.layers, others)

    @property
    def _variables(self) -> list[Config]:
        return self.description["variables"]

    def _global(self, name: str) -> np.ndarray:
        return np.sqrt(np.sum(np.where(self.measured, self.figures[name], 0.0) ** 2, axis=1))


def read_run(run_dir: str | os.PathLike) -> Run:
    """The samples that a `ClipMonitor` wrote into `run_dir`; damaged lines are left out and named.

    Raises:
        ValueError: the files are not there, are damaged as a whole, or hold no sample.
    """
    folder = Path(run_dir)
    for name in (MONITOR_CSV, MONITOR_JSON):
        if not (folder / name).is_file():
            raise ValueError(
                f"report: `run_dir` ({str(folder)!r}) holds no {name}. Train with the callback "
                "ClipMonitor(run_dir) first."
            )
    description = _description(folder / MONITOR_JSON)
    names = [v["path"] for v in description["variables"]]
    problems: list[str] = []
    steps, values = _samples(folder / MONITOR_CSV, names, problems)
    thresholds = _thresholds(folder / THRESHOLDS_CSV, problems)
    return _by_layer(steps, values, description, thresholds, tuple(problems))


def _description(path: Path) -> Config:
    remedy = "Train on with ClipMonitor, which writes it anew."
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"report: {error}. {remedy}") from None
    variables = content.get("variables") if isinstance(content, dict) else None
    is_whole = (
        isinstance(variables, list)
        and variables
        and "clipper" in content
        and isinstance(content.get("clipper_text"), str)
        and all(
            isinstance(v, dict) and all(isinstance(v.get(k), t) for k, t in _VARIABLE.items())
            for v in variables
        )
        and all(isinstance(d, int) for v in variables for d in v["shape"])
    )
    if not is_whole:
        raise ValueError(
            f"report: {path} lacks `clipper`, `clipper_text` or `variables` with "
            f"{', '.join(_VARIABLE)}. {remedy}"
        )
    return content


def _samples(
    path: Path, names: Sequence[str], problems: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Steps `[samples]` and values `[samples, fields, variables]`, NaN where there is no row.

    A sample is a run of rows with one step and no variable twice: a step may be sampled twice.
    """
    index = {name: i for i, name in enumerate(names)}
    steps: list[int] = []
    samples: list[np.ndarray] = []
    unknown: dict[str, int] = {}
    sampled: set[str] = set()
    rows, damaged = read_rows(path)
    problems += damaged
    for row in rows:
        step, name = step_of(row["step"]), row["variable"]
        values = [float(row[field]) for field in FIELDS]
        if name not in index:
            unknown[name] = unknown.get(name, 0) + 1
            continue
        if not steps or step != steps[-1] or name in sampled:
            steps.append(step)
            samples.append(np.full((len(FIELDS) + 1, len(names)), np.nan))
            sampled = set()
        sampled.add(name)
        samples[-1][:, index[name]] = [*values, 1.0]
    if unknown:
        problems.append(
            f"{sum(unknown.values())} lines of {path.name} name variables that {MONITOR_JSON} does "
            f"not list, as after freezing a layer: {', '.join(list(unknown)[:3])}"
            + (" …" if len(unknown) > 3 else "")
        )
    if not samples:
        reason = f" Left out: {'; '.join(problems[:3])}." if problems else ""
        raise ValueError(
            f"report: {path} holds no samples: no update was measured.{reason} Train on, or lower "
            "`every`."
        )
    return np.array(steps), np.stack(samples)


def _thresholds(path: Path, problems: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    pairs: dict[str, list[tuple[int, float]]] = {}
    if not path.is_file():
        return {}
    rows, damaged = read_rows(path)
    problems += damaged
    for row in rows:
        pairs.setdefault(row["name"], []).append((step_of(row["step"]), float(row["value"])))
    return {
        name: (np.array([s for s, _ in found]), np.array([v for _, v in found]))
        for name, found in pairs.items()
    }


def _by_layer(
    steps: np.ndarray,
    values: np.ndarray,
    description: Config,
    thresholds: dict[str, tuple[np.ndarray, np.ndarray]],
    problems: tuple[str, ...],
) -> Run:
    variables = description["variables"]
    owners = [v["layer"] for v in variables]
    sizes = np.array([max(math.prod(v["shape"]), 1) for v in variables], "float64")
    layers = list(dict.fromkeys(owners))
    has_row = np.isfinite(values[:, -1])
    of_variable = {name: values[:, i] for i, name in enumerate(FIELDS)}
    figures = {name: np.full((len(steps), len(layers)), np.nan) for name in FIELDS}
    clipped = np.zeros((len(steps), len(layers)), bool)
    partial = np.zeros(len(layers), bool)
    measured = np.zeros((len(steps), len(layers)), bool)
    for k, layer in enumerate(layers):
        columns = [i for i, owner in enumerate(owners) if owner == layer]
        rows = has_row[:, columns]
        part = {name: np.where(rows, of_variable[name][:, columns], 0.0) for name in FIELDS}
        fraction, weights = part["clip_fraction"], rows * sizes[columns]
        of_layer = {
            name: np.sqrt(np.sum(part[name] ** 2, axis=1)) for name in ("norm_before", "norm_after")
        } | {name: part[name].max(axis=1) for name in ("max_abs", "angle", "nonfinite")}
        of_layer["clip_fraction"] = np.sum(fraction * weights, axis=1) / np.maximum(
            weights.sum(axis=1), 1.0
        )
        measured[:, k] = rows.any(axis=1)
        for name in FIELDS:
            figures[name][:, k] = np.where(measured[:, k], of_layer[name], np.nan)
        clipped[:, k] = np.any(fraction > 0, axis=1)
        partial[k] = bool(np.any((fraction > 0) & (fraction < 1)))
    return Run(
        steps, layers, figures, clipped, partial, measured, thresholds, description, problems
    )
