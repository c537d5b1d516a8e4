"""The command that calibrates a recipe: against a monitored run, its files, its refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_recipe import RECIPE as TINY

import keras_gradclip as kgc
from recipes.tools import calibrate
from recipes.training import main, run

pytestmark = pytest.mark.usefixtures("blank_pictures")

STEPS = 24  # three epochs of eight batches
QUIET = ["--verbose", "quiet"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    patch = pytest.MonkeyPatch()
    patch.setattr(calibrate, "find_recipe", lambda name: TINY)
    patch.setenv("COLUMNS", "200")  # a terminal wide enough to search the tables for words
    yield
    patch.undo()


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A calibration of the tiny recipe's whole run: (folder, Calibration)."""
    folder = tmp_path_factory.mktemp("calibration") / "new"
    return folder, calibrate.calibrate(TINY, QUIET, None, 75.0, folder)


def test_it_watches_the_run_that_the_recipe_would_train(calibrated, tmp_path):
    _, found = calibrated
    assert found.updates == STEPS
    monitor = kgc.ClipMonitor(every=1)
    unclipped = TINY.options(verbose="quiet", clipper="none")
    run(TINY, unclipped, tmp_path / "run", [monitor])
    norms = np.array(monitor.history["norm_before"])
    assert norms.shape[0] == STEPS
    for k, layer in enumerate(found.layers):
        mine = [i for i, path in enumerate(monitor.variables) if path.startswith(f"{layer}/")]
        want = np.sqrt((norms[:, mine] ** 2).sum(axis=1))
        np.testing.assert_allclose(found.samples["norm"][:, k], want, rtol=1e-2)
        assert found.thresholds["norm"][layer] == pytest.approx(np.percentile(want, 75), rel=1e-2)


def test_the_files(calibrated):
    folder, found = calibrated
    kinds = ("norm", "absolute", "exponential", "adaptive", "update_ratio", "rms")
    # 24 updates are too few for schedules.
    names = {f"clip-{kind}.json" for kind in kinds} | {"calibration.png"}
    assert {path.name for path in folder.iterdir()} == names
    for kind in kinds:
        saved = json.loads((folder / f"clip-{kind}.json").read_text())["clipper"]
        assert kgc.serialize(found.clip_map(kind)) == saved
    with Image.open(folder / "calibration.png") as picture:
        assert min(picture.size) > 400


def test_the_recipe_trains_with_them(calibrated, tmp_path):
    name = calibrated[0] / "clip-norm.json"
    flags = ["--clip-config", str(name), "--epochs", "1", "--limit-steps", "4"]
    assert main(TINY, [*flags, "--output", str(tmp_path / "run"), *QUIET]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["clip_config"] == json.loads(name.read_text())["clipper"]


def test_the_command_line(tmp_path, capsys):
    output = str(tmp_path / "c")
    flags = ["resnet50", "--steps", "4", "--output", output, "--seed", "3", "--clipper", "none"]
    assert calibrate.main([*flags, "--verbose", "line"]) == 0
    said = capsys.readouterr().out
    for word in ("4/4", "conv1", "predictions", "clip-norm.json", "percentile 90 of 4 updates"):
        assert word in said
    path = said.strip().splitlines()[-1].rpartition("--clip-config ")[2]
    assert path == f"{output}/clip-update_ratio.json" and Path(path).exists()


def test_it_watches_unclipped_unless_told():
    assert calibrate.options_of(TINY, QUIET).clipper == "none"
    assert calibrate.options_of(TINY, ["--threshold", "0.2"]).threshold == 0.2
    assert calibrate.options_of(TINY, ["--clipper", "norm"]).clipper == "norm"


def test_accumulation_counts_updates_and_beta_is_the_clippers(tmp_path):
    rest = [*QUIET, "--accumulate", "2", "--epochs", "1", "--clipper", "exponential"]
    found = calibrate.calibrate(TINY, [*rest, "--beta", "0.9"], None, 90.0, tmp_path / "c")
    assert found.updates == 4
    assert found.beta == 0.9


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--percentile", "0"], "--percentile 0"),
        (["--percentile", "101"], "--percentile 101"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "25"], "24 updates"),
        (["--batch-size", "none"], "--batch-size"),
        (["--resume"], "--resume"),
        (["--poison", "forward"], "diverged at step 0"),
        (["--threshold", "-1"], "threshold"),
    ],
)
def test_mistakes_end_in_one_line(flags, word, tmp_path, capsys):
    folder = tmp_path / "c"
    assert calibrate.main(["resnet50", "--output", str(folder), *QUIET, *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and word in said[-1]
    assert not folder.exists()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "measure", interrupt)
    folder = tmp_path / "c"
    assert calibrate.main(["resnet50", "--output", str(folder), *QUIET]) == 130
    assert not folder.exists()


def test_what_the_files_would_clip_is_what_their_clippers_clip(tmp_path):
    """Norms that fall, fed to the clippers themselves, update after update."""
    import keras

    rng = np.random.default_rng(1)
    norms = rng.lognormal(size=(160, 2)) * np.linspace(5, 0.1, 160)[:, None]
    samples = dict.fromkeys(("norm", "absolute", "exponential", "adaptive", "rms"), norms)
    samples["global"] = np.sqrt((norms**2).sum(axis=1))
    layers = ["layer0", "layer1"]
    found = kgc.Calibration(layers, {layer: ["kernel"] for layer in layers}, samples)
    variables = []
    for layer in layers:
        with keras.name_scope(layer):
            variables.append(keras.Variable(np.zeros((1,), "float32"), name="kernel"))
    table = calibrate.write_clippers(found, tmp_path).set_index("file")
    for name in ("clip-norm.json", "clip-norm-schedule.json"):
        clipper = kgc.get(json.loads((tmp_path / name).read_text())["clipper"])
        optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1e-12), clipper, telemetry=True)
        optimizer.build(variables)
        hits = []
        for row in norms:
            optimizer.apply([keras.ops.convert_to_tensor([x], "float32") for x in row], variables)
            hits.append(100 * float(optimizer.read_telemetry()["clip_fraction"]))
            optimizer.reset_telemetry()
        total, eighths = table.loc[name]
        assert float(total) == pytest.approx(np.mean(hits), abs=0.05)
        want = [np.mean(part) for part in np.array_split(hits, 8)]
        np.testing.assert_allclose([float(share) for share in eighths.split()], want, atol=0.5)
