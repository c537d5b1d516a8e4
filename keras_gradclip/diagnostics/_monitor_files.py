"""The files of a `ClipMonitor`, as it writes them; `report` reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from keras_gradclip import _files as files
from keras_gradclip._names import layers_of
from keras_gradclip._types import Config
from keras_gradclip.clippers.base import serialize
from keras_gradclip.diagnostics._recorder import FIELDS
from keras_gradclip.optimizer._hyperparameters import to_numpy
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

#: File names inside `run_dir`.
MONITOR_CSV, THRESHOLDS_CSV, MONITOR_JSON = "monitor.csv", "thresholds.csv", "monitor.json"


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


class MonitorFiles:
    """Writes samples into a folder.

    Args:
        folder: made if need be.
        optimizer: the optimizer that is watched.
        names: of its variables.
        every: of the monitor.
    """

    def __init__(
        self, folder: Path, optimizer: ClippedOptimizer, names: list[str], every: int
    ) -> None:
        self.folder, self.names = folder, names
        folder.mkdir(parents=True, exist_ok=True)
        start = int(to_numpy(optimizer.iterations))
        for name, columns in COLUMNS.items():
            files.write_csv(folder / name, list(columns), _rows_before(folder / name, start))
        files.write_json(folder / MONITOR_JSON, _description(optimizer, names, every))

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
            ],
        )
        files.append_csv(
            self.folder / THRESHOLDS_CSV,
            list(COLUMNS[THRESHOLDS_CSV]),
            [[step, name, f"{value:.9g}"] for name, value in thresholds.items()],
        )


def _rows_before(path: Path, start: int) -> list[dict[str, str]]:
    """The rows of an earlier run that this one goes on from: of the steps before `start`."""
    if not path.exists() or not start:
        return []
    rows, problems = read_rows(path)
    if problems:
        warnings.warn(
            f"ClipMonitor: damaged lines were left out of {path}: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more." if len(problems) > 3 else "."),
            stacklevel=2,
        )
    return [row for row in rows if step_of(row["step"]) < start]


def _description(optimizer: ClippedOptimizer, names: list[str], every: int) -> Config:
    variables, clipper = optimizer._trainable_variables, optimizer.clipper
    rules = clipper.rule_of(variables) if clipper else [("*", None)] * len(variables)
    return {
        "every": every,
        "clipper": serialize(clipper),
        "clipper_text": _text(clipper),
        "variables": [
            {
                "path": name,
                "layer": layer,
                "shape": [int(d) for d in v.shape],
                "rule": rule,
                "clipper": _text(part),
            }
            for v, name, layer, (rule, part) in zip(
                variables, names, layers_of(variables), rules, strict=True
            )
        ],
    }


def _text(clipper: object) -> str:
    """A clipper for people."""
    return "off" if clipper is None else str(clipper)
