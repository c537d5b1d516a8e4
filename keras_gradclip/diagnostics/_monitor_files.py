"""The files of a `ClipMonitor`, as it writes them; `report` reads them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
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
HEADS = {
    MONITOR_CSV: ("step", "epoch", "variable", *FIELDS),
    THRESHOLDS_CSV: ("step", "name", "value"),
}


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
        for name, head in HEADS.items():
            files.write_csv(folder / name, head, _rows_before(folder / name, start, len(head)))
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
            HEADS[MONITOR_CSV],
            [
                [step, epoch, path, *(f"{row[field][i]:.6g}" for field in FIELDS)]
                for i, path in enumerate(self.names)
            ],
        )
        files.append_csv(
            self.folder / THRESHOLDS_CSV,
            HEADS[THRESHOLDS_CSV],
            [[step, name, f"{value:.9g}"] for name, value in thresholds.items()],
        )


def _rows_before(path: Path, start: int, width: int) -> list[list[str]]:
    """The rows of an earlier run that this one goes on from: of the steps before `start`."""
    if not path.exists() or not start:
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [row for row in rows if len(row) == width and row[0].isdigit() and int(row[0]) < start]


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
