"""The files of a monitored run: written by the monitor, read by layer for the report."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from keras_gradclip import files
from keras_gradclip._types import Config

#: File names inside `run_dir`.
MONITOR_CSV, THRESHOLDS_CSV, MONITOR_JSON = "monitor.csv", "thresholds.csv", "monitor.json"
#: The figures of each variable in a sample; see `ClipMonitor`.
FIELDS = ("norm_before", "norm_after", "clip_fraction", "max_abs", "angle", "nonfinite")
#: The value of "limits" for clippers of weight updates, which act on most steps.
UPDATES = "weight updates"
#: The measure of clippers of a layer's norm; see `MEASURES`.
NORM = "layer_norm"
#: The keys of `monitor.json` and of each of its variables, and their types.
_DESCRIPTION = {"clipper": object, "clipper_text": str, "variables": list}
_VARIABLE = {"path": str, "layer": str, "shape": list, "rule": str, "clipper": str}

Thresholds = dict[str, tuple[np.ndarray, np.ndarray]]


def step_of(text: str) -> int:
    """The number of steps in a field; an OverflowError above int64."""
    return int(np.int64(int(text)))


#: The columns of each table, and the function that parses each.
COLUMNS: dict[str, dict[str, Callable[[str], object]]] = {
    MONITOR_CSV: {"step": step_of, "epoch": int, "variable": str, **dict.fromkeys(FIELDS, float)},
    THRESHOLDS_CSV: {"step": step_of, "name": str, "value": float},
}


# Writing -----------------------------------------------------------------------------------------


class RunFiles:
    """Writes samples into a folder.

    Args:
        folder: created if missing.
        starts: for each variable its optimizer's number of updates when the run began.
        description: the content of `monitor.json`.
    """

    def __init__(self, folder: Path, starts: Mapping[str, int], description: Config) -> None:
        self.folder, self.names = folder, list(starts)
        folder.mkdir(parents=True, exist_ok=True)
        for name, columns in COLUMNS.items():
            files.write_csv(folder / name, list(columns), _rows_before(folder / name, starts))
        files.write_json(folder / MONITOR_JSON, description)

    def add(
        self,
        step: int,
        epoch: int,
        row: Mapping[str, np.ndarray],
        thresholds: Mapping[str, float],
    ) -> None:
        """Adds a sample."""
        rows = {
            MONITOR_CSV: [
                [step, epoch, self.names[i], *(f"{row[field][i]:.6g}" for field in FIELDS)]
                for i in np.flatnonzero(is_measured(row))
            ],
            THRESHOLDS_CSV: [
                [step, name.replace("\n", " "), f"{value:.9g}"]  # one row per line
                for name, value in thresholds.items()
            ],
        }
        for name, columns in COLUMNS.items():
            files.append_csv(self.folder / name, list(columns), rows[name])


def is_measured(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """A mask of the variables in a sample; with several optimizers some may be missing."""
    return ~np.isnan(row["nonfinite"])


def _rows_before(path: Path, starts: Mapping[str, int]) -> list[dict[str, str]]:
    """The rows of a resumed run up to the step where it resumes.

    Args:
        path: the file.
        starts: the number of updates done, for each variable.
    """
    start = max(starts.values())
    if not path.exists() or not start:
        return []
    rows, problems = read_rows(path)
    if problems:
        warnings.warn(
            f"ClipMonitor: skipped damaged lines of {path}: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more." if len(problems) > 3 else "."),
            stacklevel=2,
        )
    return [
        row for row in rows if step_of(row["step"]) < starts.get(row.get("variable", ""), start)
    ]


# Reading -----------------------------------------------------------------------------------------


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The readable rows of `monitor.csv` or `thresholds.csv`.

    Lines are parsed one by one, so that a damaged one does not spoil the next.

    Returns:
        The rows, dicts of strings, and a line of text for each line that cannot be read.
    """
    columns = COLUMNS[path.name]
    needs = [name for name in columns if name != "epoch"]
    head, has_head = list(columns), False
    rows: list[dict[str, str]] = []
    problems: list[str] = []
    lines = path.read_bytes().decode("utf-8-sig", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        whole = line.rstrip("\r").replace("\0", "")
        problem = "NUL bytes" if "\0" in line else ""  # left by a power cut; a row may follow
        try:
            fields = next(csv.reader([whole], strict=True), [])
            if "\ufffd" in whole:
                raise ValueError("not UTF-8")
            if set(needs) <= set(fields):
                head, has_head = fields, True
            elif fields:
                if len(fields) != len(head):
                    raise ValueError(f"{len(fields)} columns, not {len(head)}")
                row = dict(zip(head, fields, strict=True))
                for name in columns.keys() & row.keys():
                    columns[name](row[name])
                rows.append(row)
        except (ValueError, OverflowError, csv.Error) as error:
            problem = problem or str(error)
        if problem:
            problems.append(f"line {number} of {path.name}: {problem}")
    if not has_head:
        missing = ", ".join(name for name in needs if name not in lines[0].split(","))
        problems.insert(0, f"line 1 of {path.name} is no header: it lacks {missing}")
    return rows, problems


@dataclasses.dataclass(frozen=True)
class Run:
    """The samples of a monitored run, by layer.

    Attributes:
        steps: int array `[samples]`.
        layers: the layers' names.
        figures: for each of `FIELDS` a float64 array `[samples, layers]`: norms are those of the
            whole layer, `clip_fraction` is weighted by elements, `angle` and `max_abs` are the
            largest among the layer's variables. NaN where the gradient was not finite, and where
            a sample has no row of the layer.
        clipped: bool array `[samples, layers]`, any variable of the layer was clipped.
        partial: bool array `[layers]`, the clip acts on single elements or units of the layer.
        measured: bool array `[samples, layers]`, the sample has rows of the layer.
        thresholds: name to (steps, values).
        description: the content of `monitor.json`.
        problems: a line of text for each part of the files that could not be used.
    """

    steps: np.ndarray
    layers: list[str]
    figures: dict[str, np.ndarray]
    clipped: np.ndarray
    partial: np.ndarray
    measured: np.ndarray
    thresholds: Thresholds
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

    def only(self, samples: np.ndarray | slice) -> Run:
        """The run with the samples that a mask or a slice selects."""
        return dataclasses.replace(
            self,
            steps=self.steps[samples],
            figures={name: values[samples] for name, values in self.figures.items()},
            clipped=self.clipped[samples],
            measured=self.measured[samples],
        )

    @property
    def finite(self) -> Run:
        """The run with the samples in which the whole gradient is finite."""
        return self.only(np.isfinite(self.global_before))

    def _global(self, name: str) -> np.ndarray:
        return np.sqrt(np.sum(np.where(self.measured, self.figures[name], 0.0) ** 2, axis=1))

    @property
    def limits_updates(self) -> np.ndarray:
        """A mask of the layers whose weight updates are limited instead of gradients."""
        variables = self.description["variables"]
        return np.isin(self.layers, [v["layer"] for v in variables if v.get("limits") == UPDATES])

    @property
    def limits_norms(self) -> np.ndarray:
        """A mask of the layers whose threshold limits the layer's norm."""
        variables = self.description["variables"]
        others = [v["layer"] for v in variables if v.get("measures", NORM) != NORM]
        return ~np.isin(self.layers, others)


def read_run(run_dir: str | os.PathLike) -> Run:
    """The samples of a `ClipMonitor` in `run_dir`; damaged lines are skipped and listed.

    Raises:
        ValueError: the files are missing, unreadable, or hold no sample.
    """
    folder = Path(run_dir)
    for name in (MONITOR_CSV, MONITOR_JSON):
        if not (folder / name).is_file():
            raise ValueError(
                f"report: `run_dir` ({str(folder)!r}) holds no {name}. Train with the callback "
                "ClipMonitor(run_dir) first."
            )
    description = _description(folder / MONITOR_JSON)
    rows, problems = read_rows(folder / MONITOR_CSV)
    known = {v["path"] for v in description["variables"]}
    unknown = [row["variable"] for row in rows if row["variable"] not in known]
    if unknown:
        several = list(dict.fromkeys(unknown))
        problems.append(
            f"{len(unknown)} lines of {MONITOR_CSV} name variables that {MONITOR_JSON} does not "
            f"list, as after freezing a layer: {', '.join(several[:3])}"
            + (" …" if len(several) > 3 else "")
        )
    rows = [row for row in rows if row["variable"] in known]
    if not rows:
        reason = f" Left out: {'; '.join(problems[:3])}." if problems else ""
        raise ValueError(
            f"report: {folder / MONITOR_CSV} holds no samples: no update was measured.{reason} "
            "Train on, or lower `every`."
        )
    pairs: dict[str, list[tuple[int, float]]] = {}
    if (folder / THRESHOLDS_CSV).is_file():
        of_thresholds, damaged = read_rows(folder / THRESHOLDS_CSV)
        problems += damaged
        for row in of_thresholds:
            pairs.setdefault(row["name"], []).append((step_of(row["step"]), float(row["value"])))
    thresholds = {
        name: (np.array([step for step, _ in of]), np.array([value for _, value in of]))
        for name, of in pairs.items()
    }
    return _run_of(rows, description, thresholds, tuple(problems))


def _description(path: Path) -> Config:
    remedy = "Train on with ClipMonitor, which writes it anew."
    try:
        content = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"report: {error}. {remedy}") from None

    def has(entry: object, kinds: Mapping[str, type]) -> bool:
        return isinstance(entry, dict) and all(
            key in entry and isinstance(entry[key], kind) for key, kind in kinds.items()
        )

    is_whole = has(content, _DESCRIPTION) and bool(content["variables"])
    if not is_whole or not all(has(entry, _VARIABLE) for entry in content["variables"]):
        raise ValueError(
            f"report: {path} lacks `clipper`, `clipper_text` or `variables` with "
            f"{', '.join(_VARIABLE)}. {remedy}"
        )
    return content


def by_layer(combine: np.ufunc, values: np.ndarray, owners: Sequence[str]) -> np.ndarray:
    """Values `[samples, variables]` combined over the variables of each layer: `[samples, layers]`.

    Args:
        combine: the function, such as `np.add`.
        values: the array.
        owners: the layer of each variable.
    """
    masks = [np.array(owners) == layer for layer in dict.fromkeys(owners)]
    return np.stack([combine.reduce(values[:, mask], axis=1) for mask in masks], axis=1)


def _run_of(
    rows: Sequence[Mapping[str, str]],
    description: Config,
    thresholds: Thresholds,
    problems: tuple[str, ...],
) -> Run:
    """The run of the rows of `monitor.csv`, combined over the variables of each layer.

    A sample is a sequence of rows with one step and no repeated variable: a step may occur twice.
    """
    variables = description["variables"]
    index = {v["path"]: i for i, v in enumerate(variables)}
    steps: list[int] = []
    samples: list[np.ndarray] = []
    for row in rows:
        step, i = step_of(row["step"]), index[row["variable"]]
        if not steps or step != steps[-1] or not np.isnan(samples[-1][-1, i]):
            steps.append(step)
            samples.append(np.full((len(FIELDS), len(index)), np.nan))
        samples[-1][:, i] = [float(row[field]) for field in FIELDS]
    values = dict(zip(FIELDS, np.stack(samples, axis=1), strict=True))

    owners = [v["layer"] for v in variables]
    sizes = np.array([max(math.prod(v["shape"]), 1) for v in variables], "float64")
    has_row = is_measured(values)
    of_variable = {name: np.where(has_row, array, 0.0) for name, array in values.items()}
    fraction = of_variable["clip_fraction"]

    measured = by_layer(np.logical_or, has_row, owners)
    figures = {name: by_layer(np.maximum, of_variable[name], owners) for name in FIELDS}
    for name in ("norm_before", "norm_after"):
        figures[name] = np.sqrt(by_layer(np.add, of_variable[name] ** 2, owners))
    elements = np.maximum(by_layer(np.add, has_row * sizes, owners), 1.0)
    figures["clip_fraction"] = by_layer(np.add, fraction * sizes, owners) / elements
    return Run(
        np.array(steps),
        list(dict.fromkeys(owners)),
        {name: np.where(measured, figure, np.nan) for name, figure in figures.items()},
        by_layer(np.logical_or, fraction > 0, owners),
        np.any(by_layer(np.logical_or, (fraction > 0) & (fraction < 1), owners), axis=0),
        measured,
        thresholds,
        description,
        problems,
    )
