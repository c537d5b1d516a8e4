"""The verdict, the ranking, the files and the picture, from trials written by hand."""

import csv
import json
import math

import keras_tuner as kt
import numpy as np
import pytest

import keras_gradclip as kgc
from tuning import plots, results

ACCURACY = kt.Objective("val_accuracy", "max")
LOSS = kt.Objective("val_loss", "min")


def row(trial, score, threshold=None, confirms="", spread=0.0, status="completed", **values):
    kind = {"clipper": "none"}
    if threshold is not None:
        kind = {"clipper": "absolute", "absolute/threshold": threshold}
    return {
        "trial": trial,
        "status": status,
        "baseline": trial == "0",
        "confirms": confirms,
        "score": score,
        "lowest": score - spread,
        "highest": score + spread,
        "runs": 3.0 if confirms else 1.0,
        "clip_fraction": 0.0 if threshold is None else 0.03,
        "grad_norm": 1.0,
        "epochs": 2.0,
        "seconds": 5.0,
        "values": {**kind, "learning_rate": 0.01, **values},
    }


def confirmed(clipped, unclipped, spread, worse_first=False, status=("completed", "completed")):
    again = [
        row("4", clipped, 0.02, confirms="1", spread=spread, status=status[0]),
        row("5", unclipped, confirms="0", spread=spread, status=status[1]),
    ]
    own = [row("1", 0.9, 0.02), row("0", 0.8), row("2", 0.7, 0.05)]
    return [*(again[::-1] if worse_first else again), *own]


@pytest.mark.parametrize(
    "rows, objective, start, part",
    [
        (confirmed(0.9, 0.8, 0.01), ACCURACY, "Use absolute threshold=0.02", "It matters: 90.00 %"),
        (confirmed(0.9, 0.8, 0.06), ACCURACY, "It may not matter", "The best guess: Use absolute"),
        (confirmed(0.8, 0.8, 0.01), ACCURACY, "It does not matter", "overlap"),
        (confirmed(0.7, 0.8, 0.01), ACCURACY, "Do not clip", "do not overlap"),
        (confirmed(0.7, 0.8, 0.01), LOSS, "Use absolute", "It matters: 0.7 (0.69 to 0.71)"),
        (
            confirmed(0.9, -math.inf, 0.01, status=("completed", "diverged")),
            ACCURACY,
            "Use absolute",
            "without clipping, training diverged",
        ),
        (
            confirmed(-math.inf, 0.8, 0.01, status=("diverged", "completed")),
            ACCURACY,
            "Do not clip: unclipped, 80.00 %",
            "no clipped trial held up",
        ),
        ([row("1", 0.9, 0.02), row("0", 0.8)], ACCURACY, "Use absolute", "not confirmed"),
        ([row("0", 0.9), row("1", 0.8, 0.02)], ACCURACY, "Do not clip", "not confirmed"),
        ([row("1", 0.9, 0.02)], ACCURACY, "Use absolute", "without clipping, training diverged"),
        ([row("0", -math.inf, status="diverged")], ACCURACY, "No trial ended well", "lower the"),
        ([row("0", math.nan, status="failed")], ACCURACY, "No trial ended", "errors above"),
    ],
)
def test_the_verdict(rows, objective, start, part):
    text = results.verdict(rows, objective)
    assert text.startswith(start) and part in text


def test_best_json_holds_the_better_of_the_confirmed(tmp_path):
    rows = confirmed(0.7, 0.8, 0.01, worse_first=True)
    assert results.best_row(rows)["trial"] == "5"
    path = tmp_path / "best.json"
    results.write_best(rows, path, ACCURACY, None, "net")
    content = json.loads(path.read_text())
    assert content["score"] == 0.8
    clipper = kgc.get(content["clipper"])  # one that leaves everything alone
    assert clipper.rules == ((".*", None),) and clipper.default is None
    assert results.write_best([], tmp_path / "none.json", ACCURACY, None, "net") is None
    assert not (tmp_path / "none.json").exists()


def test_trials_csv_has_a_column_a_hyperparameter(tmp_path):
    path = tmp_path / "trials.csv"
    results.write_csv([row("1", 0.9, 0.02), row("0", math.nan, status="failed")], path)
    with open(path, newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["rank"], first["trial"], first["absolute/threshold"]) == ("1", "1", "0.02")
    assert (second["status"], second["score"], second["absolute/threshold"]) == ("failed", "", "")


def test_descriptions():
    values = {"clipper": "exponential", "exponential/gamma": 0.0123, "exponential/rescale": "none"}
    assert results.describe(values) == "exponential gamma=0.0123"
    values = {"clipper": "none", "activation_gate": True, "gate/clip_value": 0.1, "gate/gamma": 0.2}
    assert results.describe({**values, "units": 16}) == "no clipping gate c=0.1 γ=0.2 units=16"


def pixels(path):
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("objective", [ACCURACY, LOSS])
def test_the_picture_shows_what_clips_and_what_diverged(tmp_path, objective):
    rows = [
        *confirmed(0.9, 0.8, 0.02),
        row("6", math.nan, 0.09, status="diverged"),
        row("7", math.nan, status="failed"),
    ]
    plots.draw(rows, tmp_path / "a.png", objective, "net", ranges={"absolute/threshold": (0.01, 1)})
    first = pixels(tmp_path / "a.png")
    for changed in (
        [{**r, "clip_fraction": 0.9} for r in rows],  # colour
        [r for r in rows if r["status"] != "diverged"],  # crosses
        confirmed(0.9, 0.85, 0.02),  # the line of the unclipped
    ):
        plots.draw(changed, tmp_path / "b.png", objective, "net")
        second = pixels(tmp_path / "b.png")
        assert first.shape == second.shape and (first != second).any(axis=2).sum() > 50


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row("0", math.nan, status="failed")],
        [row("0", 0.8)],
        [row("0", 0.8), row("1", 0.8, 0.02)],  # no range at all
        [row("1", 0.8, 0.02), row("0", math.nan, status="diverged")],
    ],
)
def test_a_picture_of_next_to_nothing(rows, tmp_path):
    plots.draw(rows, tmp_path / "a.png", ACCURACY, "net")
    assert (pixels(tmp_path / "a.png") < 128).sum() > 100  # at least the verdict
