"""The files of a `ClipMonitor`, as it writes them; `report` reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_gradclip import files
from keras_gradclip._types import Config
from keras_gradclip.clippers.base import Clipper, serialize
from keras_gradclip.clippers.enforce import Enforcer
from keras_gradclip.diagnostics._recorder import FIELDS
from keras_gradclip.diagnostics.watch import labels_of
from keras_gradclip.names import layers_of, names_of
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

#: File names inside `run_dir`.
MONITOR_CSV, THRESHOLDS_CSV, MONITOR_JSON = "monitor.csv", "thresholds.csv", "monitor.json"
#: What a clipper limits that acts on most steps, since it sets how far each moves the weights.
UPDATES = "weight updates"


def step_of(text: str) -> int:
    """A number of steps that an array can hold."""
    return int(np.int64(int(text)))


#: The columns of each table, and what reads a field of each.
COLUMNS: dict[str, dict[str, Callable[[str], object]]] = {
    MONITOR_CSV: {"step": step_of, "epoch": int, "variable": str, **dict.fromkeys(FIELDS, float)},
    THRESHOLDS_CSV: {"step": step_of, "name": str, "value": float},
}


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of `monitor.csv` or `thresholds.csv`, and a line of text for each damaged one."""
    columns = COLUMNS[path.name]
    return files.read_damaged_csv(path, columns, [name for name in columns if name != "epoch"])


class WatchedVariable(NamedTuple):
    """A variable that a monitor watches.

    Attributes:
        name: its path, each once: of a second layer of one path with `#2` behind the layer.
        layer: its layer.
        shape: its shape.
        optimizer: the one that updates it.
        label: of the optimizer; "" if there is but one.
        start: the optimizer's number of updates when the run began.
        rule: the name of the rule that applies to it.
        clipper: the clipper of that rule, or None.
        limits: what that limits: `UPDATES`, "gradients" or "nothing".
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    optimizer: ClippedOptimizer
    label: str
    start: int
    rule: str
    clipper: Clipper | None
    limits: str


def watched_variables(
    optimizers: Sequence[ClippedOptimizer], starts: Sequence[int]
) -> list[WatchedVariable]:
    """The variables of some optimizers, one optimizer's after the other's.

    Args:
        optimizers: built.
        starts: for each its number of updates when the run began.
    """
    result: list[WatchedVariable] = []
    everything = [v for optimizer in optimizers for v in optimizer._trainable_variables]
    named = zip(layers_of(everything), names_of(everything), strict=True)
    labels = labels_of(optimizers)
    for optimizer, label, start in zip(optimizers, labels, starts, strict=True):
        variables, clipper = optimizer._trainable_variables, optimizer.clipper
        rules = clipper.rule_of(variables) if clipper else [("*", None)] * len(variables)
        assignments = clipper.assignments(variables) if clipper else []
        of_updates = Enforcer(assignments, variables, False).limited_updates()
        for i, (variable, (rule, part)) in enumerate(zip(variables, rules, strict=True)):
            layer, name = next(named)
            rule = f"{label}: {rule}" if label else rule
            shape = tuple(int(d) for d in variable.shape)
            limits = UPDATES if i in of_updates else "gradients" if part else "nothing"
            result.append(
                WatchedVariable(name, layer, shape, optimizer, label, start, rule, part, limits)
            )
    return result


class MonitorFiles:
    """Writes samples into a folder.

    Args:
        folder: made if need be.
        watched: the variables that are watched.
        every: of the monitor.
    """

    def __init__(self, folder: Path, watched: Sequence[WatchedVariable], every: int) -> None:
        self.folder, self.names = folder, [variable.name for variable in watched]
        folder.mkdir(parents=True, exist_ok=True)
        starts = {variable.name: variable.start for variable in watched}
        for name, columns in COLUMNS.items():
            files.write_csv(folder / name, list(columns), _rows_before(folder / name, starts))
        files.write_json(folder / MONITOR_JSON, _description(watched, every))

    def add(
        self,
        step: int,
        epoch: int,
        row: Mapping[str, np.ndarray],
        thresholds: Mapping[str, float],
    ) -> None:
        """Add a sample."""
        files.append_csv(
            self.folder / MONITOR_CSV,
            list(COLUMNS[MONITOR_CSV]),
            [
                [step, epoch, path, *(f"{row[field][i]:.6g}" for field in FIELDS)]
                for i, path in enumerate(self.names)
                if is_measured(row)[i]
            ],
        )
        files.append_csv(
            self.folder / THRESHOLDS_CSV,
            list(COLUMNS[THRESHOLDS_CSV]),
            [[step, name, f"{value:.9g}"] for name, value in thresholds.items()],
        )


def is_measured(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each variable whether a sample has it: of several optimizers some may skip a step."""
    return ~np.isnan(row["nonfinite"])


def _rows_before(path: Path, starts: Mapping[str, int]) -> list[dict[str, str]]:
    """The rows of the run that this one resumes, up to the step that it resumes from.

    Args:
        path: the file.
        starts: for each variable the number of updates that are done.
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


def _description(watched: Sequence[WatchedVariable], every: int) -> Config:
    clippers = {variable.label: variable.optimizer.clipper for variable in watched}
    if not any(clippers.values()):
        clipper = None
    elif len(clippers) == 1:
        (clipper,) = map(serialize, clippers.values())
    else:
        clipper = {label: serialize(one) for label, one in clippers.items()}
    texts = [f"{label}: {_text(one)}" if label else _text(one) for label, one in clippers.items()]
    return {
        "every": every,
        "clipper": clipper,
        "clipper_text": "; ".join(texts),
        "remembers": any(variable.optimizer._clip.state for variable in watched),
        "variables": [
            {
                "path": variable.name,
                "layer": variable.layer,
                "shape": list(variable.shape),
                "rule": variable.rule,
                "clipper": _text(variable.clipper),
                "limits": variable.limits,
                "measures": getattr(variable.clipper, "measures", None),
            }
            for variable in watched
        ],
    }


def _text(clipper: object) -> str:
    """A clipper for people."""
    return "off" if clipper is None else str(clipper)
