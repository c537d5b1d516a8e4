"""`python -m keras_gradclip`: its three commands, and one line for every mistake."""

import keras
import pytest
from run_files import CLIPPED, write_run

import keras_gradclip as kgc
from keras_gradclip.__main__ import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model compiled with a clipper, and a plain one."""
    folder = tmp_path_factory.mktemp("models")
    for name, model_class in (("clipped", kgc.ClippedModel), ("plain", keras.Model)):
        inputs = keras.Input((4,))
        model = model_class(inputs, keras.layers.Dense(3, name="head")(inputs))
        clipper = {"clipper": kgc.NormClip(2.0)} if name == "clipped" else {}
        model.compile("sgd", "mse", **clipper)
        model.save(folder / f"{name}.keras")
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


def test_every_selectable_clipper_has_its_flags_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["describe", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for alias in kgc.clippers.selectable():
        assert f"--clipper {alias}: --" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["report", "nowhere"], "holds no monitor.csv"),
        (["describe", "nowhere.keras"], "there is no file 'nowhere.keras'"),
        (["describe", "{broken}"], "cannot be loaded as a Keras model"),
        (["describe", "{plain}"], "was compiled without a clipper"),
        (["describe", "{plain}", "--clipper", "norn"], "Did you mean 'norm'?"),
        (["describe", "{plain}", "--clipper", "norm", "--max-norm=-1"], "`max_norm` must be"),
        (["describe", "{plain}", "--clipper", "norm", "--max-norm=x"], "invalid float value"),
        (["describe", "{plain}", "--clipper", "norm", "--beta=1"], "unrecognized arguments"),
        (["describe", "{plain}", "--clipper"], "expected one argument"),
        (["describe", "{plain}", "--import", "no_such_module"], "no_such_module"),
        (["nothing"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, files, capsys):
    arguments = [
        a.format(plain=files / "plain.keras", broken=files / "broken.keras") for a in arguments
    ]
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
    assert f"Keras {keras.__version__} (tested: 3.12 to" in text
    assert "ok: a gradient of 4, clipped to 0.1, moved a weight from 2 to 1.9" in text
    assert "inner update compiled: yes" in text or "inner update compiled: no" in text
    assert "knows: Whether a built optimizer has state for a variable" in text
