"""Flags, configs and the checks that they share."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tiny_recipe import RECIPE

from keras_gradclip.files import replace_file, write_json
from recipes.command_line import exit_status
from recipes.errors import RecipeError
from recipes.registry import RECIPES, find_recipe, script_of
from recipes.training import Recipe, Result
from recipes.training import options as opts
from recipes.training.run import print_result

ROOT = Path(__file__).resolve().parents[2]


def parse(*argv):
    return opts.parse(RECIPE, list(argv)).options


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_rising_order_of_sources(tmp_path):
    config = write(tmp_path / "c.json", {"recipe": "tiny", "epochs": 7, "batch_size": 16})
    options = parse("--config", config, "--batch-size", "8")
    assert options.seed == 0  # the table
    assert options.image_size == 16  # the recipe
    assert options.epochs == 7  # the config
    assert options.batch_size == 8  # the command line


def test_saved_config_gives_the_same_options(tmp_path):
    options = parse("--epochs", "5", "--clipper", "exponential", "--beta", "0.5", "--no-flip")
    path = tmp_path / "config.json"
    write_json(path, options.saved)
    assert parse("--config", str(path)) == options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "--epochs 0: must be 1 or more"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--learning-rate", "0"], "more than 0"),
        (["--learning-rate", "nan"], "finite"),
        (["--label-smoothing", "1.5"], "0.99 or less"),
        (["--momentum", "-1"], "0 or more"),
        (["--clipper", "agc"], "invalid choice: 'agc'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--clipper"], "--clipper: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["--import"], "--import: expected one argument"),
        (["--clipper", "norm", "--beta", "0.5"], "--beta belongs to --clipper exponential"),
        (["--clipper", "none", "--threshold", "0.1"], "--threshold belongs to"),
        (["--gate-gamma", "0.1"], "--gate-gamma needs --activation-gate"),
        (["--resume", "--max-norm", "1"], "--max-norm: give --clipper, too, or neither to"),
        (["--optimizer", "adam", "--momentum", "0.5"], "--momentum needs --optimizer sgd"),
        (["--worker-timeout", "9"], "--worker-timeout needs --strategy multiworker"),
        (["--config", "absent.json"], "absent.json: No such file"),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(RecipeError) as error:
        parse(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "c.json, line 1: not JSON"),
        ([1], "must hold an object"),
        ({"epohcs": 3}, "unknown option 'epohcs', did you mean 'epochs'?"),
        ({"epochs": "3"}, '--epochs "3": must be a value of type int'),
        ({"epochs": True}, "must be a value of type int"),
        ({"epochs": None}, "must be a value of type int"),
        ({"jit": 1}, "must be a value of type bool"),
        ({"clipper": "agc"}, "one of absolute, exponential, norm, rms"),
        ({"recipe": "vgg16"}, "belongs to the recipe 'vgg16'"),
    ],
)
def test_broken_configs_name_file_key_and_value(tmp_path, content, message):
    with pytest.raises(RecipeError) as error:
        parse("--config", write(tmp_path / "c.json", content))
    assert message in str(error.value)
    assert "c.json" in str(error.value)


def test_what_the_recipe_or_a_file_sets_may_go_unused(tmp_path):
    sgd = Recipe(name="sgd", settings={"optimizer": "sgd", "momentum": 0.9})
    config = write(tmp_path / "c.json", {"momentum": 0.8, "worker_timeout": 9})
    assert opts.parse(sgd, ["--optimizer", "adam", "--config", config]).options.momentum == 0.8
    assert opts.parse(RECIPE, ["--resume", "--worker-timeout", "9"]).options.resume


def test_the_flags_of_saved_options_are_accepted():
    """A search prints them in the command that trains with its best trial."""
    saved = parse("--epochs", "5").saved
    words = opts.as_words(RECIPE, {n: value for n, value in saved.items() if n != "recipe"})
    assert {"--momentum", "--worker-timeout"} < {*words} and parse(*words).saved == saved


def test_an_int_will_do_for_a_float(tmp_path):
    options = parse("--config", write(tmp_path / "c.json", {"learning_rate": 1}))
    assert options.learning_rate == 1.0
    assert isinstance(options.learning_rate, float)


def test_threshold_of_the_recipe_goes_with_its_clipper():
    assert parse().clipping == {"threshold": 0.01}
    assert parse("--clipper", "absolute").threshold == 0.01
    assert parse("--clipper", "rms").clipping == {}  # another threshold, of the same name


def test_clip_config_from_a_file_is_kept_in_the_config(tmp_path):
    spec = {"class_name": "AbsoluteClip", "config": {"threshold": 0.02}}
    for content in (spec, {"clipper": spec, "score": 0.9}):
        options = parse("--clip-config", write(tmp_path / "best.json", content))
        assert options.clip_config == spec
        assert options.clipper == "none" and options.clipping == {}
    saved = write(tmp_path / "c.json", options.saved)
    assert parse("--config", saved).clip_config == spec
    assert parse("--config", saved, "--clipper", "norm").clip_config is None
    with pytest.raises(RecipeError, match="give one of them"):
        parse("--clip-config", str(tmp_path / "best.json"), "--threshold", "0.1")


def test_clip_config_must_be_a_clipper(tmp_path):
    with pytest.raises(RecipeError, match="holds no serialised clipper"):
        parse("--clip-config", write(tmp_path / "best.json", {"clipper": "absolute"}))


def test_settings_of_a_recipe_are_checked():
    with pytest.raises(RecipeError, match=r"recipe bad: unknown option 'epoch', did you mean"):
        Recipe(name="bad", settings={"epoch": 1}).options()
    with pytest.raises(RecipeError, match="epochs"):
        Recipe(name="bad", settings={"epochs": 0}).options()


def test_an_option_of_a_recipe_may_take_the_place_of_a_fixed_one():
    width = opts.Option("image_size", int, 20, "of a picture", low=2)
    recipe = Recipe(name="small", extra_options=(width,))
    assert recipe.options().image_size == 20
    assert recipe.options(image_size=4).image_size == 4


def test_a_terminal_that_lacks_a_letter_gets_its_number(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    assert exit_status(lambda: print("b\udcffad ü κ", flush=True)) == 0
    assert out.buffer.getvalue() == b"b\\udcffad \xfc \\u03ba\n"


def test_the_closing_table_shows_all_of_a_folder_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "30")
    folder = tmp_path / "run[a]" / "[" / "]"
    result = Result(
        *("tiny", folder, "val_accuracy", 0.5, 0, True, [{"epoch": 1}], {}, 9, 0.1, 1.0),
        data=types.SimpleNamespace(name="digits"),
    )
    print_result(RECIPE, result)
    shown = "".join(c for c in capsys.readouterr().out if not c.isspace() and c != "│")
    assert "".join(str(folder).split()) in shown and "gradient" not in shown


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"good": 1})

    def half(scratch):
        with open(scratch, "w", encoding="utf-8") as file:
            file.write('{"ba')
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, half)
    assert json.loads(path.read_text()) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_help_mentions_every_option(capsys):
    with pytest.raises(SystemExit) as leave:
        parse("--help")
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert all(option.flag in text for option in opts.OPTIONS)
    assert "looking at the test set" in " ".join(text.split())


def test_help_begins_with_what_the_command_does_and_has_the_flags_of_the_chosen_clipper(capsys):
    def shown(*argv):
        with pytest.raises(SystemExit):
            opts.parse(find_recipe("resnet50"), list(argv))
        return capsys.readouterr().out

    lines = shown("--help").splitlines()
    assert lines[0] == "ResNet-50 with per-layer gradient clipping."
    assert lines[2].startswith("usage: ") and "--max-norm 1" in lines[5]
    assert lines[8] == "--clipper absolute:"
    text = shown("--clipper", "norm", "--help")
    assert "--max-norm" in text and "--threshold" not in text
    assert "--max-norm" in shown("--help-clippers")


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--treshold"], "--threshold"),
        (["--momen"], "--momentum"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_one_that_was_meant(words, near):
    with pytest.raises(RecipeError, match=f"did you mean '{near}'"):
        parse(*words)


def test_two_dashes_alone_make_no_flag_similar():
    with pytest.raises(RecipeError, match=r"unrecognized arguments: --lr 1 \(see"):
        parse("--lr", "1")


COMMANDS = [
    *(script_of(name) for name in RECIPES),
    *(f"recipes/tools/{n}.py" for n in ("calibrate", "cluster", "compare", "zoo")),
    "recipes/predict.py",
    "tuning/search.py",
]
MISTAKES = {
    "recipes/tools/compare.py": [["vgg16", "--learning-rate", "x"], ["vgg16", "--epoch", "1"]],
    "recipes/tools/calibrate.py": [["vgg16", "--percentile", "0"], ["vgg16", "--epoch", "1"]],
    "recipes/tools/zoo.py": [["--only", "lenet"], ["--epoch", "1"]],
    "tuning/search.py": [
        ["--learning-rate-range", "1", "2"],
        ["--clippers", "agc"],
        ["--rescales", "l2"],
        ["--max-trial", "3"],
    ],
    "recipes/resnet50.py": [
        ["--epochs", "0"],
        ["--epoch", "3"],
        ["--optimizer", "adan"],
        ["--clipper", "agc"],
        ["--clipper", "norm", "--beta", "0.5"],
        ["--threshold", "-1"],
        ["--gate-gamma", "0.1"],
        ["--activation-gate", "--gate-gamma", "-1"],
        ["--devices", "3"],
        ["--config", "absent.json"],
    ],
}
CASES = [(command, words, 0) for command in COMMANDS for words in (["--help"],)]
CASES += [(command, words, 2) for command, lists in MISTAKES.items() for words in lists]


# One process answers all: exit status, lines on stderr and what is imported by then, of each.
RUNNER = """
import contextlib, io, json, runpy, sys
answers = []
for script, words in json.load(sys.stdin):
    sys.argv = [script, *words]
    error, status = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    slow = {"keras", "tensorflow", "pandas", "matplotlib"} & {*sys.modules}
    answers.append([status, error.getvalue().splitlines(), sorted(slow)])
assert "recipes.plugin" in sys.modules
print(json.dumps(answers))
"""


def test_flags_are_answered_before_keras_is_imported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([(str(ROOT / command), words) for command, words, _ in CASES]),
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    for (command, words, want), answer in zip(CASES, json.loads(done.stdout), strict=True):
        status, lines, slow = answer
        assert (status, slow) == (want, []), (command, words, lines)
        assert len(lines) == (want == 2), (command, words, lines)
        assert all(line.startswith("error: ") for line in lines), (command, words, lines)
