"""The verdict, the ranking, the files and the picture, from trials written by hand."""

import csv
import dataclasses
import itertools
import json
import math

import keras_tuner as kt
import numpy as np
import pytest
from matplotlib.figure import Figure

import keras_gradclip as kgc
from keras_gradclip.tuning.oracles import BASELINE, make_oracle
from tuning import plots, results
from tuning.results import TrialRow, best_row, describe, rank_test, ranked, verdict

ACCURACY = kt.Objective("val_accuracy", "max")
LOSS = kt.Objective("val_loss", "min")


def row(trial, score, threshold=None, confirms="", spread=0.0, status="completed", **more):
    """A trial; one that confirms has five runs within `spread` of its score."""
    kind = {"clipper": "none"}
    if threshold is not None:
        kind = {"clipper": "absolute", "absolute/threshold": threshold}
    steps = (-1.0, -0.5, 0.0, 0.5, 1.0) if confirms else (0.0,)
    more = {"scores": tuple(score + spread * step for step in steps), **more}
    return TrialRow(
        trial,
        status,
        {**kind, "learning_rate": 0.01},
        score,
        baseline=trial == "0",
        confirms=confirms,
        clip_fraction=0.0 if threshold is None else 0.03,
        grad_norm=1.0,
        epochs=2.0,
        seconds=5.0,
        **more,
    )


def confirmed(clipped, unclipped, spread=0.0, direction="max", **more):
    return ranked(
        [
            row("4", clipped, 0.02, confirms="1", spread=spread, **more),
            row("5", unclipped, confirms="0", spread=spread, **more),
            *(row("1", 0.9, 0.02), row("0", 0.8), row("2", 0.7, 0.05)),
        ],
        direction,
    )


def diverged(row, lost):
    """The row with so many of its runs diverged."""
    scores = (*[-math.inf] * lost, *row.scores[lost:])
    return dataclasses.replace(row, status="diverged", scores=scores, score=-math.inf)


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_the_test_is_exact(runs):
    """Two trials that do not overlap at all: 2 of the C(2n, n) orders."""
    a, b = range(runs), range(runs, 2 * runs)
    assert rank_test(a, b) == pytest.approx(2 / math.comb(2 * runs, runs))
    assert rank_test([1.0] * runs, [1.0] * runs) == 1.0


def test_the_test_agrees_with_counting_every_order():
    a, b = (0.1, 0.4, 0.4, -math.inf), (0.4, 0.5, 0.9, 0.7)

    def larger(ours, theirs):
        return sum((x > y) + 0.5 * (x == y) for x in ours for y in theirs)

    both = (*a, *b)
    counts = []
    for chosen in itertools.combinations(range(8), 4):
        rest = [both[i] for i in range(8) if i not in chosen]
        counts.append(larger([both[i] for i in chosen], rest))
    as_low = sum(count <= larger(a, b) for count in counts) / len(counts)
    assert rank_test(a, b) == pytest.approx(2 * as_low)


@pytest.mark.parametrize(
    "rows, objective, effect, start, part",
    [
        (confirmed(0.9, 0.8, 0.01), ACCURACY, "helps", "Use absolute threshold=0.02", "It matters"),
        (confirmed(0.7, 0.8, 0.01), ACCURACY, "harms", "Do not clip", "Clipping harms: 70.00 %"),
        (confirmed(0.7, 0.8, 0.01, "min"), LOSS, "helps", "Use absolute", "0.7 (0.69 to 0.71)"),
        (confirmed(0.9, 0.8, 0.2), ACCURACY, "not shown", "Clipping is not shown", "guess: Use"),
        (confirmed(0.8, 0.9, 0.2), ACCURACY, "not shown", "Clipping is not", "guess: Do not clip"),
        (confirmed(0.8, 0.8), ACCURACY, "not shown", "Clipping is not shown to matter", "p = 1"),
        # Two numbers never overlap, and three against three do so one time in ten.
        ([row("1", 0.9, 0.02), row("0", 0.8)], ACCURACY, "not tested", "Not tested", "--confirm"),
        (confirmed(0.9, 0.8, scores=(0.9,)), ACCURACY, "not tested", "Not tested", "--confirm"),
        (
            confirmed(0.9, 0.8, scores=(0.9,) * 3),
            ACCURACY,
            "not tested",
            "Not tested",
            "guess: Use",
        ),
        # Ten classes, all at chance.
        (
            confirmed(0.17, 0.13, 0.01, chance=0.1),
            ACCURACY,
            "not tested",
            "No model lea",
            "10.00 %",
        ),
        (confirmed(0.17, 0.11, 0.01), ACCURACY, "helps", "Use absolute", "It matters"),
        ([row("1", 0.9, 0.02)], ACCURACY, "not tested", "Not tested: no unclipped trial", "Use"),
        ([row("0", 0.9)], ACCURACY, "not tested", "Not tested: no clipped", "Do not clip"),
        ([row("0", -math.inf, status="diverged")], ACCURACY, "not tested", "No trial", "lower the"),
        ([row("0", math.nan, status="failed")], ACCURACY, "not tested", "No trial", "errors above"),
    ],
)
def test_the_verdict(rows, objective, effect, start, part):
    answer = verdict(rows, objective)
    assert answer.effect == effect
    assert answer.text.startswith(start) and part in answer.text
    tested = effect in ("helps", "harms", "not shown")
    assert math.isfinite(answer.p_value) == tested == ("rank test over seeds: p = " in answer.text)
    if tested:
        assert (answer.p_value < 0.05) == (effect != "not shown")


@pytest.mark.parametrize(
    "lost, effect, part", [(5, "helps", "5 of 5 runs diverged unclipped"), (1, "not shown", "1 of")]
)
def test_runs_that_diverge_rank_last(lost, effect, part):
    again, plain, *own = confirmed(0.9, 0.89, 0.01)
    answer = verdict(ranked([again, diverged(plain, lost), *own], "max"), ACCURACY)
    assert answer.effect == effect and part in answer.text


def test_terminal_picture_and_json_agree(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **kw: titles.append(text))
    for rows in (confirmed(0.9, 0.8, 0.01), confirmed(0.8, 0.9, 0.2)):
        results.write_best(rows, tmp_path / "best.json", ACCURACY, None, "net")
        content = json.loads((tmp_path / "best.json").read_text())
        plots.draw(rows, tmp_path / "a.png", ACCURACY, "net")
        text = verdict(rows, ACCURACY).text
        assert (
            content["verdict"]["text"] == text == titles[-1].partition("\n")[2].replace("\n", " ")
        )
        assert content["verdict"]["p_value"] == rank_test(rows[0].scores, rows[1].scores)
        assert ("Do not clip" in text) == (content["values"]["clipper"] == "none")


def test_best_json_holds_the_better_of_the_confirmed(tmp_path):
    rows = confirmed(0.7, 0.8, 0.01)
    assert best_row(rows).trial == "5"
    path = tmp_path / "best.json"
    results.write_best(rows, path, ACCURACY, None, "net")
    content = json.loads(path.read_text())
    assert content["score"] == 0.8
    clipper = kgc.get(content["clipper"])  # one that leaves everything alone
    assert clipper.rules == ((".*", None),) and clipper.default is None
    assert results.write_best([], tmp_path / "none.json", ACCURACY, None, "net") is None
    assert not (tmp_path / "none.json").exists()


def test_hparams_has_a_run_for_each_trial_that_ended(tmp_path):
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    folder = tmp_path / "tensorboard"
    rows = [row("0", 0.8), row("1", 0.9, 0.02), row("2", math.nan, 0.1, status="running")]
    results.write_hparams(rows, folder, ACCURACY)
    results.write_hparams(rows, folder, ACCURACY)  # once more: as at the end of the next trial
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]

    [events] = (folder / "1").iterdir()
    read = EventAccumulator(str(events)).Reload()
    [score] = read.Tensors("val_accuracy")
    assert tf.make_ndarray(score.tensor_proto) == np.float32(0.9)
    data = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info
    assert info.hparams["absolute/threshold"].number_value == 0.02
    assert info.hparams["clipper"].string_value == "absolute"


@pytest.mark.parametrize("old", [False, True])
def test_a_trial_has_the_score_of_each_run(old):
    """Version 0.2 first kept them as metrics of names of their own."""
    oracle = make_oracle("random", ACCURACY, 2, hyperparameters=kt.HyperParameters())
    trial = kt.engine.trial.Trial(kt.HyperParameters(), trial_id="0000", status="COMPLETED")
    trial.hyperparameters.values = {"clipper": "none", BASELINE: True}
    trial.score = 0.5
    for i, score in enumerate((0.4, 0.6)):
        trial.metrics.update(f"run-{i}" if old else "val_accuracy", score)
    trial.metrics.update("seconds", 3.0)
    oracle.trials["0000"] = trial
    (row,) = results.trial_rows(oracle)
    assert row.scores == (0.4, 0.6) and row.status == "completed" and row.seconds == 3
    assert row.baseline and row.values == {"clipper": "none"}


def test_trials_csv_has_a_column_a_hyperparameter(tmp_path):
    path = tmp_path / "trials.csv"
    results.write_trials([row("1", 0.9, 0.02), row("0", math.nan, status="failed")], path)
    with open(path, encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["rank"], first["trial"], first["absolute/threshold"]) == ("1", "1", "0.02")
    assert (second["status"], second["score"], second["absolute/threshold"]) == ("failed", "", "")


def test_descriptions():
    values = {"clipper": "exponential", "exponential/gamma": 0.0123, "exponential/rescale": "none"}
    assert describe(values) == "exponential gamma=0.0123"
    values = {"clipper": "none", "activation_gate": True, "gate/gamma": 0.2, "units": 16}
    assert describe(values) == "no clipping gate/gamma=0.2 units=16"


def pixels(path):
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("objective", [ACCURACY, LOSS])
@pytest.mark.filterwarnings("error:constrained_layout")
def test_the_picture_shows_what_clips_and_what_diverged(tmp_path, objective):
    rows = [
        *confirmed(0.9, 0.8, 0.02, objective.direction),
        row("6", math.nan, 0.09, status="diverged"),
        row("7", math.nan, status="failed"),
    ]
    plots.draw(rows, tmp_path / "a.png", objective, "net")
    first = pixels(tmp_path / "a.png")
    for changed in (
        [dataclasses.replace(r, clip_fraction=0.9) for r in rows],  # colour
        [r for r in rows if r.status != "diverged"],  # crosses
        confirmed(0.9, 0.85, 0.02),  # the line of the unclipped
    ):
        plots.draw(changed, tmp_path / "b.png", objective, "net")
        second = pixels(tmp_path / "b.png")
        assert first.shape == second.shape and (first != second).any(axis=2).sum() > 50


def test_a_clipped_and_an_unclipped_trial_in_one_place_are_both_visible():
    figure = Figure()
    rows = [row("1", 0.8, 0.02), row("0", 0.8), row("2", 0.2, 0.1)]
    rows.append(row("3", math.nan, 0.1, status="diverged"))
    plots._scores(figure, rows, ["learning_rate"], ACCURACY)
    below, above, _, cross = figure.axes[0].collections
    assert np.array_equal(below.get_offsets(), above.get_offsets())
    assert below.get_sizes()[0] > above.get_sizes()[0]
    assert cross.get_zorder() > above.get_zorder()  # not behind what is beyond the scale


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
@pytest.mark.filterwarnings("error:constrained_layout")
def test_a_picture_of_next_to_nothing(rows, tmp_path):
    plots.draw(rows, tmp_path / "a.png", ACCURACY, "net")
    assert (pixels(tmp_path / "a.png") < 128).sum() > 100  # at least the verdict
