"""The evidence study: finished rows are not trained again, and the tables show them."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

import keras_gradclip as kgc
from benchmarks import evidence, yardstick
from keras_gradclip.files import read_csv, read_json
from recipes.tools import study as runner
from recipes.training.recipe import at_chance


def study(**changes):
    return evidence.Study(
        **{
            "name": "tiny",
            "network": "lenet5",
            "data": "mnist_embedded@14",
            "clippers": (evidence.NONE, kgc.UpdateRatioClip()),
            "rates": (0.3,),
            "seeds": (1,),
            "epochs": 1,
        }
        | changes
    )


def train(path, *studies):
    """The rows of the studies, as the command trains them."""
    file = runner.StudyFile(path, evidence.KEY, evidence.RESULTS, evidence.NUMBERS)
    return evidence.train(file, studies, "")


def test_a_study_goes_on_and_draws(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(128, 14, 14, 1)).astype("float32"), rng.integers(0, 10, 128)
    monkeypatch.setattr(evidence, "load_images", lambda *_: (x, y, x[:50], y[:50]))
    path = tmp_path / "evidence.csv"
    train(path, study(clippers=(evidence.NONE,)))
    train(path, study())
    rows = train(path, study())
    assert list(rows["clipper"]) == ["none", str(kgc.UpdateRatioClip())]
    assert float(rows["clip_fraction"].iloc[1]) > 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 of 1 runs to do: about 3 s"
    assert printed[1] == "1 of 1: tiny: none at 0.3, seed 1" and " %, " in printed[2]
    assert printed[3].startswith("1 of 2 runs to do: about ")
    assert len(printed) == 6  # the third time nothing is left
    evidence.report((study(),), rows, tmp_path)
    assert (tmp_path / "evidence-tiny.png").stat().st_size > 5_000


def test_a_run_that_diverged_counts_as_guessing():
    rows = pd.DataFrame(
        {
            "clipper": "none",
            "learning_rate": 0.1,
            "seed": ["1", "2"],
            "status": ["learned", "diverged"],
            "test_accuracy": [0.5, float("nan")],
        }
    )
    [line] = evidence.table(evidence.scored(rows)).to_dict("records")
    assert line == {"clipper": "none", "0.1": "30.0 (10.0–50.0), 1 of 2 diverged"}


def test_missing_data_is_said(tmp_path, capsys):
    status = evidence.main(
        ["--preset", "full", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    )
    assert status == 2
    assert f"--data-dir {tmp_path} holds no prepared cifar10" in capsys.readouterr().err


def test_a_run_that_learned_nothing_is_at_chance(tmp_path, monkeypatch, capsys):
    """The labels say nothing of the images."""
    x = np.random.default_rng(0).normal(size=(100, 14, 14, 1)).astype("float32")
    y = np.arange(100) % 10
    monkeypatch.setattr(evidence, "load_images", lambda *_: (x, y, np.zeros_like(x), y))
    rows = train(tmp_path / "evidence.csv", study(clippers=(evidence.NONE,)))
    [row] = rows.to_dict("records")
    assert row["status"] == "at chance" and row["test_accuracy"] == pytest.approx(0.1)
    assert "at chance, 10.0 %" in capsys.readouterr().out
    assert "| none | 10.0, 1 of 1 at chance |" in evidence.markdown(
        evidence.table(evidence.scored(rows))
    )


@pytest.mark.parametrize(
    ("accuracy", "classes", "expected"),
    [
        (0.1, 10, True),
        (0.18, 10, True),
        (0.25, 10, False),
        (0.52, 2, True),
        (0.6, 2, False),
        (1.0, 2, False),
        (0.0015, 1000, True),
        (0.01, 1000, False),
        (float("nan"), 10, True),
    ],
)
def test_what_is_at_chance(accuracy, classes, expected):
    assert at_chance(accuracy, 1 / classes) == expected


@pytest.mark.slow
def test_the_yardstick_is_searched_once(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 14, 14, 1)).astype("float32"), rng.integers(0, 10, 80)
    monkeypatch.setattr(evidence, "load_images", lambda *_: (x, y, x[:50], y[:50]))
    monkeypatch.setattr(yardstick, "TRIALS", 2)
    path = tmp_path / "evidence.csv"
    of_search = study(clippers=(evidence.SEARCHED,))
    train(path, of_search)
    [found] = read_json(tmp_path / "evidence-search.json").values()
    assert 0 <= found["val_accuracy"] <= 1
    assert found["clipper"] is None or kgc.get(found["clipper"]) is not None
    # The second seed takes what was found.
    monkeypatch.setattr(yardstick, "_search", None)
    train(path, dataclasses.replace(of_search, seeds=(1, 2)))
    rows = read_csv(path, numbers=False)
    assert [row["clipper"] for row in rows] == [evidence.SEARCHED] * 2
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert capsys.readouterr().out.count(evidence.SEARCHED) == 2
