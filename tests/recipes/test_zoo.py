"""The zoo: every recipe is in it, failures do not stop it, and its table."""

import csv
import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import shapes_only

from recipes.errors import RecipeError
from recipes.tools import zoo

pytestmark = pytest.mark.usefixtures("blank_pictures")

ROOT = Path(__file__).resolve().parents[2]


def test_every_recipe_file_is_in_the_zoo():
    files = {
        path.stem
        for path in (ROOT / "recipes").glob("*.py")
        if "\nRECIPE = " in path.read_text(encoding="utf-8")
    }
    assert files == {module.removeprefix("recipes.") for module, _ in zoo.RECIPES.values()}


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_recipes_have_valid_settings_and_build(name):
    import keras

    from recipes import models

    recipe = zoo.find_recipe(name)
    options = recipe.options()  # raises at a setting that cannot be
    assert recipe.name == name
    assert options.clipper != "none"
    assert "python recipes/" in recipe.description
    with shapes_only():
        if recipe.build:
            model = recipe.build(1, options.image_size, keras.Model, options)
        else:
            model = models.build(recipe.network, 10, options.image_size, **recipe.network_options)
    norms = [la for la in model.layers if isinstance(la, keras.layers.BatchNormalization)]
    assert bool(norms) == ("resnet50" in name or name == "inception_v2")


def test_unknown_recipe():
    with pytest.raises(RecipeError, match=r"lenet.*alexnet"):
        zoo.find_recipe("lenet")


def row(name, **values):
    return {
        "recipe": name,
        "error": "",
        "parameters": 1234567,
        "monitor": "val_accuracy",
        "best": 0.9876,
        "best_epoch": 3,
        "test": 0.97,
        "clip_fraction": 0.125,
        "seconds": 61.2,
        **values,
    }


def test_a_failed_recipe_is_reported_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    ran = []

    def train(name, folder, argv, others):
        ran.append((name, folder.name, argv))
        if name == "vgg16" and len(ran) < 4:
            return {"error": "OSError: disk full"}
        return row(name)

    monkeypatch.setattr(zoo, "train", train)
    flags = ["--only", "alexnet,vgg16,resnet50", "--output", str(tmp_path / "zoo")]
    assert zoo.main([*flags, "--epochs", "2"]) == 1
    assert ran == [(n, n, ["--epochs", "2"]) for n in ("alexnet", "vgg16", "resnet50")]
    out = capsys.readouterr().out
    assert "2 of 3: vgg16\n  failed: OSError: disk full, " in out
    for text in ("1,234,567", "98.76 %", "97.00 %", "12.5 %", "61", "results in"):
        assert text in out
    # Nothing is overwritten; with --resume only the failed recipe runs again.
    assert zoo.main(flags) == 2
    assert "--resume" in capsys.readouterr().err
    assert zoo.main([*flags, "--resume"]) == 0
    assert [name for name, *_ in ran] == ["alexnet", "vgg16", "resnet50", "vgg16"]
    with (tmp_path / "zoo" / "zoo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(r["recipe"] for r in rows) == ["alexnet", "resnet50", "vgg16"]
    assert not any(r["error"] for r in rows)


def test_a_mistake_in_the_flags_costs_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "train", lambda *_: pytest.fail("trained"))
    assert zoo.main(["--output", str(tmp_path), "--epoch", "2"]) == 2
    assert "--epoch" in capsys.readouterr().err
    assert zoo.main(["--output", str(tmp_path), "--only", "lenet"]) == 2
    assert zoo.main(["--output", str(tmp_path), "--strategy", "multiworker"]) == 2
    assert "one machine" in capsys.readouterr().err


def test_rows_of_other_options_do_not_mix(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "alexnet").mkdir()
    saved = zoo.find_recipe("alexnet").options(epochs=2).saved
    (tmp_path / "alexnet" / "config.json").write_text(json.dumps(saved))
    flags = ["--only", "alexnet", "--output", str(tmp_path), "--resume", "--epochs", "3"]
    assert zoo.main(flags) == 2
    assert "alexnet was trained with other values: epochs (2, now 3)" in capsys.readouterr().err


def test_a_run_at_chance_is_called_so(tmp_path):
    for name in ("alexnet", "vgg16"):
        (tmp_path / name).mkdir()
        names = json.dumps({"classes": list("0123456789"), "decoding": {}})
        (tmp_path / name / "best.classes.json").write_text(names)
    # Of vgg19 the number of classes is not known.
    rows = [row("alexnet", best=0.11), row("vgg16", best=0.3), row("vgg19", best=0.11)]
    columns = zoo.table(pd.DataFrame(rows), tmp_path)["validation"]
    assert list(columns) == ["11.00 %, at chance", "30.00 %", "11.00 %"]


def test_an_error_in_brackets_is_printed_as_it_is(tmp_path, capsys):
    failed = row("vgg16", error="DataError: [/data/a] and [b]")
    zoo.show_table(zoo.table(pd.DataFrame([failed]), tmp_path), "title")
    assert "[/data/a] and [b]" in capsys.readouterr().out


def test_the_steering_row_is_in_its_own_metric(tmp_path):
    steering = row("driving_resnet50", monitor="val_mae", best=0.0351, test=0.0402)
    [line] = zoo.table(pd.DataFrame([steering]), tmp_path).to_dict("records")
    assert line["validation"] == "mae 0.0351" and line["test"] == "mae 0.0402"


@pytest.fixture
def tiny(monkeypatch):
    """The tiny recipe is in the list, and its process finds it."""
    monkeypatch.setitem(zoo.RECIPES, "tiny", ("tiny_recipe", "RECIPE"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def test_a_recipe_trains_into_a_row(tiny, tmp_path, capsys):
    flags = ["--epochs", "1", "--limit-steps", "2"]
    result = zoo.train("tiny", tmp_path / "tiny", flags)
    assert "error" not in result and result["monitor"] == "val_accuracy"
    assert 0 <= result["best"] <= 1 and result["parameters"] > 0 and result["best_epoch"] == 1
    assert set(result) == {*zoo.RESULTS} - {"error"}
    assert "  Best accuracy: " in capsys.readouterr().out


def test_a_failed_process_is_a_failed_row(tiny, tmp_path, monkeypatch):
    result = zoo.train("tiny", tmp_path, ["--epochs", "no"])
    assert result == {"error": "argument --epochs: invalid int value: 'no' (see --help)"}


def test_a_killed_process_is_a_failed_row(monkeypatch, tmp_path):
    """As the kernel kills one that is out of memory."""
    (tmp_path / "killed.py").write_text(
        "import os\n"
        "from tiny_recipe import RECIPE\n"
        "if __name__ == '__main__':\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setitem(zoo.RECIPES, "killed", ("killed", "RECIPE"))
    assert zoo.train("killed", tmp_path, []) == {"error": "was killed by signal 9 (SIGKILL)"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", zoo.RECIPES)
def test_every_recipe_learns_with_clipping_on(tmp_path, name):
    result = zoo.train(name, tmp_path / name, ["--verbose", "line", "--no-tensorboard"])
    assert "error" not in result
    if result["monitor"] == "val_accuracy":
        assert result["best"] > 0.9 - 1e-6  # Keras computes it in float32
    else:
        from recipes.data import driving_log, rendered

        drive = driving_log.load(rendered.rendered_drive(), correction=0.2)
        errors = [abs(f.steering - drive.mean_angle) for f in drive.parts[1]]
        assert result["best"] < 0.6 * sum(errors) / len(errors)
