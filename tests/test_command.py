"""`python -m keras_gradclip`: its three commands, and one line for every mistake."""

import os
import subprocess
import sys

import keras
import pytest
from run_files import CLIPPED, write_run

import keras_gradclip as kgc
from keras_gradclip.__main__ import main
from keras_gradclip.clippers import cards
from keras_gradclip.clippers.base import ALIASES
from keras_gradclip.declarations import declared


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model compiled with a clipper, one without, and one that is not compiled."""
    folder = tmp_path_factory.mktemp("models")
    for name, model_class in (("clipped", kgc.ClippedModel), ("plain", keras.Model)):
        inputs = keras.Input((4,))
        model = model_class(inputs, keras.layers.Dense(3, name="head")(inputs))
        clipper = {"clipper": kgc.NormClip(2.0)} if name == "clipped" else {}
        model.compile("sgd", "mse", **clipper)
        model.save(folder / f"{name}.keras")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save(folder / "bare.keras")
    (folder / "broken.keras").write_text("no model\n")
    return folder


def test_report_prints_the_path_of_the_page(tmp_path, capsys):
    run = write_run(tmp_path / "monitor", [{"conv1": CLIPPED}] * 3)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "model, flags, expected",
    [
        ("clipped", [], "NormClip(max_norm=2, scope=layer)"),
        ("plain", ["--clipper", "norm", "--max-norm", "3", "--scope", "global"], "scope=global)"),
        ("plain", ["--clipper", "adaptive", "--clip-factor=0.2"], "clip_factor=0.2"),
    ],
)
def test_describe_names_the_rule_of_each_variable(model, flags, expected, files, capsys):
    assert main(["describe", str(files / f"{model}.keras"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("head/kernel") and expected in lines[2]


def shown(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        main(["describe", *flags])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_has_the_flags_of_the_chosen_clipper_and_help_clippers_those_of_all(capsys):
    text = shown(capsys, "--help", "--clipper", "norm")
    assert text.startswith("Says which rule of a clipper hits which variable")
    assert "--max-norm" in text and "--threshold" not in text
    text = shown(capsys, "--help-clippers")
    for alias, cls in kgc.clippers.selectable().items():
        section = text.partition(f"--clipper {alias}:")[2].partition("--clipper ")[0]
        for parameter in kgc.clippers.parameters(cls):
            flag = f"--{parameter.flag.replace('_', '-')} "
            assert (flag in section) == (parameter.kind != "object")


def test_the_declarations_that_command_lines_read_are_those_of_the_clippers():
    ours = [a for a, cls in ALIASES.items() if cls.__module__.startswith("keras_gradclip.")]
    found = {alias: d for alias, d in cards.declarations().items() if alias in ours}
    assert declared() == found, "run python -m keras_gradclip.clippers.cards"


@pytest.mark.parametrize(
    "words, status",
    [
        (["--help"], 0),
        (["describe", "--clipper", "norm", "--help"], 0),
        (["describe", "--help-clippers"], 0),
        (["describe", "m.keras", "--clipper", "norm", "--max-norm=-1"], 2),
        (["describe", "m.keras", "--cliper", "norm"], 2),
        (["describe", "nowhere.keras"], 2),
        (["reports"], 2),
    ],
)
def test_flags_are_answered_before_keras_is_imported(words, status, tmp_path):
    """`-X importtime` lists what is imported."""
    command = [sys.executable, "-X", "importtime", "-m", "keras_gradclip", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "keras_gradclip.command_line" in imported
    assert not {"keras", "tensorflow", "numpy"} & imported


def test_a_terminal_that_lacks_a_letter_gets_its_number():
    program = [sys.executable, "-m", "keras_gradclip", "describe", "m.keras", "--help-clippers"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and r"\u03ba, the largest" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report", "nowhere"], "holds no monitor.csv"),
        (["describe", "nowhere.keras"], "there is no file 'nowhere.keras'"),
        (["describe", "{broken}"], "cannot be loaded as a Keras model"),
        (["describe", "{plain}"], "was compiled without a clipper"),
        (["describe", "{bare}", "--clipper", "auto"], "without the optimizer that --clipper auto"),
        (["describe", "{plain}", "--clipper", "norn"], "did you mean 'norm'?"),
        (["describe", "{plain}", "--clipper", "norm", "--max-norm=-1"], "`max_norm` must be"),
        (["describe", "{plain}", "--clipper", "norm", "--max-norm=x"], "invalid float value"),
        (["describe", "{plain}", "--clippr", "norm"], "did you mean '--clipper'?"),
        (["describe", "{plain}", "--clipper", "norm", "--beta=1"], "unrecognized arguments"),
        (["describe", "{plain}", "--clipper"], "expected one argument"),
        (["describe", "{plain}", "--import", "no_such_module"], "no_such_module"),
        (["nothing"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, files, capsys):
    paths = {name: files / f"{name}.keras" for name in ("plain", "bare", "broken")}
    arguments = [a.format(**paths) for a in arguments]
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert status == 2 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert message in output.err


def test_doctor_trains_a_step(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"keras_gradclip {kgc.__version__}, Python ")  # of a checkout, too
    assert f"Keras {keras.__version__}, backend " in text and "\nmatplotlib " in text
    assert "ok: a gradient of 4, clipped to 0.1, moved a weight from 2 to 1.9" in text
    assert "inner update compiled: yes" in text or "inner update compiled: no" in text
