"""The comparison: cells, resumption, divergence, table and picture, on a network of a second."""

import csv
import dataclasses
from pathlib import Path

import pytest
from PIL import Image
from tiny_recipe import RECIPE as TINY

from recipes import training
from recipes.errors import RecipeError, TrainingDiverged
from recipes.plugin import files
from recipes.registry import find_recipe
from recipes.tools import compare, study

pytestmark = pytest.mark.usefixtures("blank_pictures")

FLAGS = ["--epochs", "1", "--limit-steps", "2"]


@pytest.fixture
def fast(monkeypatch):
    """`training.run` without training: accuracy falls with the rate, large rates diverge.

    The calls are kept in the list that this returns.
    """
    calls = []
    monkeypatch.setenv("COLUMNS", "200")  # a terminal wide enough to search the table for words

    def run(recipe, options, folder, callbacks):
        calls.append(options)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "backup.npz").write_bytes(b"large")
        if options.learning_rate > 0.5 and options.clipper == "none":
            (folder / "history.csv").write_text("epoch,val_accuracy,clip_fraction\n0,0.25,0.0\n")
            raise TrainingDiverged("training diverged to NaN", step=7, layer="conv1")
        return training.Result(
            recipe=recipe.name,
            output=folder,
            monitor="val_accuracy",
            best=0.9 if options.learning_rate < 0.5 else 0.11,
            best_epoch=0,
            kept=True,
            history=[{"epoch": 0}],
            test={"accuracy": 0.8},
            parameters=10,
            clip_fraction=0.0 if options.clipper == "none" else 0.5,
            seconds=1.0,
            data=dataclasses.make_dataclass("Data", ["num_outputs"])(10),
        )

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(compare, "find_recipe", lambda name: TINY)
    return calls


def read(folder):
    table = study.StudyFile(folder / "compare.csv", compare.KEY, compare.RESULTS, compare._NUMBERS)
    return table.read().to_dict("records")


def arguments(folder, *more):
    return ["alexnet", "--output", str(folder), *more]


@pytest.mark.pictures
def test_every_cell_has_a_row_and_the_verdicts_are_right(fast, tmp_path, capsys):
    rates = ["--learning-rates", "0.01", "1.0", "--seeds", "0", "3"]
    assert compare.main(arguments(tmp_path, *rates, *FLAGS)) == 0
    rows = {(r["clipper"], r["learning_rate"], r["seed"]): r for r in read(tmp_path)}
    assert set(rows) == {
        (clipper, rate, seed)
        for clipper in ("recipe", "none")
        for rate in (0.01, 1.0)
        for seed in (0, 3)
    }
    assert rows["recipe", 0.01, 0]["status"] == "learned"
    assert rows["recipe", 1.0, 3]["status"] == "at chance"
    diverged = rows["none", 1.0, 3]
    assert (diverged["status"], diverged["diverged_step"]) == ("diverged", "7")
    assert diverged["val_accuracy"] == 0.25 and diverged["test_accuracy"] == ""
    assert {(o.clipper, o.learning_rate, o.seed) for o in fast} == {
        ("absolute" if c == "recipe" else c, rate, seed) for c, rate, seed in rows
    }
    assert {(o.epochs, o.limit_steps, o.tensorboard) for o in fast} == {(1, 2, False)}
    out = capsys.readouterr().out
    assert "8 of 8 runs to do: the first one tells how long" in out
    assert "recipe at 0.01, seed 3\n  learned, 90.0 %, " in out and "; about 1 s left" in out
    assert "2 of 2 diverged" in out and "11.0 (11.0–11.0), 2 of 2 at chance; 50 % clipped" in out
    with Image.open(tmp_path / "compare.png") as picture:
        assert min(picture.size) > 400
    assert not list(tmp_path.rglob("backup.npz"))


def test_finished_cells_are_not_run_again(fast, tmp_path):
    assert (
        compare.main(arguments(tmp_path, "--learning-rates", "0.01", "--seeds", "0", *FLAGS)) == 0
    )
    assert len(fast) == 2
    before = (tmp_path / "compare.csv").read_text().splitlines()
    more = ["--learning-rates", "0.01", "0.02", "--seeds", "0"]
    assert compare.main(arguments(tmp_path, *more, *FLAGS)) == 0
    assert [o.learning_rate for o in fast] == [0.01, 0.01, 0.02, 0.02]
    after = (tmp_path / "compare.csv").read_text().splitlines()
    assert after[: len(before)] == before and len(after) == 5
    assert compare.main(arguments(tmp_path, *more, *FLAGS)) == 0
    assert len(fast) == 4


def test_a_model_stays_until_its_run_has_a_row(fast, tmp_path, monkeypatch):
    """Else a kill in between leaves a finished run that cannot be tested again."""

    def full_disk(*unused):
        raise OSError("no space left")

    monkeypatch.setattr(files, "append_csv", full_disk)
    flags = ["--learning-rates", "0.01", "--seeds", "0", *FLAGS]
    assert compare.main(arguments(tmp_path, *flags)) == 1
    assert [path.parent.name for path in tmp_path.rglob("backup.npz")] == ["recipe-lr0.01-seed0"]


def test_an_interrupted_cell_goes_on(fast, tmp_path, monkeypatch, capsys):
    finish = training.run

    def interrupted(recipe, options, folder, callbacks):
        if options.clipper == "none":
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt
        return finish(recipe, options, folder, callbacks)

    flags = ["--learning-rates", "0.01", "--seeds", "0", *FLAGS]
    monkeypatch.setattr(training, "run", interrupted)
    assert compare.main(arguments(tmp_path, *flags)) == 130
    assert "goes on" in capsys.readouterr().err
    assert [r["clipper"] for r in read(tmp_path)] == ["recipe"]
    monkeypatch.setattr(training, "run", finish)
    assert compare.main(arguments(tmp_path, *flags)) == 0
    assert [(o.clipper, o.resume) for o in fast] == [("absolute", False), ("none", True)]


@pytest.mark.parametrize(
    ("before", "now"),
    [("--epochs 1", "--epochs 2"), ("--clipper norm --max-norm 5", "--clipper norm")],
)
def test_rows_of_other_options_do_not_mix(fast, tmp_path, capsys, before, now):
    flags = ["--learning-rates", "0.01", "--seeds", "0"]
    assert compare.main(arguments(tmp_path, *flags, *before.split())) == 0
    assert compare.main(arguments(tmp_path, *flags, *now.split())) == 2
    assert "other options" in capsys.readouterr().err
    assert len(fast) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--clippers", "soft"], ["--clippers soft: ", "absolute"]),
        (["--clippers", "norm:threshold=1"], ["--threshold belongs to", "not to 'norm'"]),
        (["--clippers", "norm:max_norm=big"], ["--max-norm", "'big'"]),
        (["--clippers", "none", "--threshhold", "1"], ["--threshhold"]),
        (["--learning-rates", "-1"], ["learning-rate"]),
        (["--strategy", "multiworker"], ["--strategy multiworker", "one machine"]),
        (["--learning-rate", "1"], ["--learning-rate: ", "use --learning-rates"]),
        (["--seed", "1"], ["--seed: ", "use --seeds"]),
    ],
)
def test_mistakes_cost_no_training(fast, tmp_path, capsys, flags, words):
    assert compare.main(arguments(tmp_path / "out", *flags)) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert not fast and not (tmp_path / "out").exists()


def test_only_classifiers_are_compared(tmp_path):
    driving = find_recipe("driving_resnet50")
    with pytest.raises(RecipeError, match="not a classifier"):
        compare.compare(driving, [], ["none"], [0.1], [0], tmp_path)


def test_clipper_words():
    assert compare.clipper_values(TINY, "recipe") == {}
    assert compare.clipper_values(TINY, "none") == {"clipper": "none"}
    assert compare.clipper_values(TINY, "norm:max_norm=5,scope=global") == {
        "clipper": "norm",
        "max_norm": 5.0,
        "scope": "global",
    }


@pytest.mark.slow
def test_real_runs_with_and_without_clipping(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "find_recipe", lambda name: TINY)
    flags = ["--learning-rates", "0.01", "--seeds", "0", "--clippers", "absolute:threshold=1e-6"]
    assert compare.main(arguments(tmp_path, *flags, "none", *FLAGS)) == 0
    clipped, plain = read(tmp_path)
    assert clipped["clip_fraction"] > 0.5 and plain["clip_fraction"] == 0
    with (tmp_path / "compare.csv").open(newline="") as file:
        assert next(csv.reader(file)) == [*compare.KEY, *compare.RESULTS]
