"""The command that calibrates a recipe: against a monitored run, its files, its refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_recipe import RECIPE as TINY

import keras_gradclip as kgc
from recipes.errors import RecipeError
from recipes.tools import calibrate
from recipes.training import main, run

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
    """A calibration of the tiny recipe's whole run: (folder, Calibration, choices)."""
    folder = tmp_path_factory.mktemp("calibration") / "new"
    found, choices = calibrate.calibrate(TINY, QUIET, 75.0, None, 8, folder)
    return folder, found, choices


def test_it_watches_the_run_that_the_recipe_would_train(calibrated, tmp_path):
    _, found, _ = calibrated
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
    folder, found, choices = calibrated
    kinds = ("norm", "absolute", "exponential", "adaptive", "update_ratio", "rms")
    names = {f"clip-{kind}.json" for kind in kinds} | {"clip-percentile.json"}
    assert {c.name for c in choices} == names  # 24 updates are too few for schedules
    assert {p.name for p in folder.iterdir()} == names | {
        *("calibration.csv", "calibration.png", "config.json", "watched.npz")
    }
    for choice in choices:
        clipper = kgc.get(json.loads((folder / choice.name).read_text())["clipper"])
        assert isinstance(clipper, kgc.Clipper)
        assert len(choice.shares) == calibrate.EIGHTHS
        assert all(0 <= share <= 1 for share in choice.shares)
    by_name = {c.name: c for c in choices}
    assert by_name["clip-norm.json"].overall == pytest.approx(0.25, abs=0.01)
    with (folder / "calibration.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == found.layers
    for row in rows:
        for kind in kinds:
            want = found.thresholds[kind][row["layer"]]
            shown = float(row[kind]) if row[kind] else None
            assert shown == (None if want is None else pytest.approx(want, rel=1e-5))
            saved = found.saved_threshold(kind, row["layer"])
            shown = float(row[f"{kind}_saved"]) if row[f"{kind}_saved"] else None
            assert shown == (None if saved is None else pytest.approx(saved, rel=1e-5))
        spread = [float(row[f"norm_{q}"]) for q in ("min", "p10", "median", "p90", "max")]
        assert spread == sorted(spread)
    with Image.open(folder / "calibration.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize(
    "name",
    [
        "clip-norm.json",
        *(
            pytest.param(f"clip-{k}.json", marks=pytest.mark.slow)
            for k in ("absolute", "percentile")
        ),
    ],
)
def test_the_recipe_trains_with_them(calibrated, tmp_path, name):
    folder, _, _ = calibrated
    flags = ["--clip-config", str(folder / name), "--epochs", "1", "--limit-steps", "4"]
    assert main(TINY, [*flags, "--output", str(tmp_path / "run"), *QUIET]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["clip_config"] == json.loads((folder / name).read_text())["clipper"]


def test_another_percentile_needs_no_training(calibrated, monkeypatch, capsys):
    folder, found, _ = calibrated
    monkeypatch.setattr(calibrate, "watch", lambda *_: pytest.fail("it watched again"))
    again, _ = calibrate.calibrate(TINY, QUIET, 50.0, None, 8, folder)
    assert "measured before" in capsys.readouterr().out
    for k, layer in enumerate(found.layers):
        for kind in ("norm", "absolute", "rms"):
            want = np.median(found.samples[kind][:, k])
            assert again.thresholds[kind][layer] == pytest.approx(want, rel=1e-5)
    assert again.kernels == found.kernels
    with pytest.raises(RecipeError, match="other options"):
        calibrate.calibrate(TINY, ["--batch-size", "32"], 50.0, None, 8, folder)
    with pytest.raises(RecipeError, match="other options"):
        calibrate.calibrate(TINY, QUIET, 50.0, 3, 8, folder)


def test_the_command_line(tmp_path, capsys):
    output = str(tmp_path / "c")
    flags = ["resnet50", "--steps", "4", "--output", output, "--seed", "3", "--clipper", "none"]
    assert calibrate.main([*flags, "--verbose", "line"]) == 0
    said = capsys.readouterr().out
    assert "measured 4 of 4 steps" in said
    for word in ("conv1", "predictions", "clip-norm.json", "clip-percentile.json", "4 updates are"):
        assert word in said
    command = said.strip().splitlines()[-1].strip()
    assert command.startswith("python recipes/resnet50.py --seed 3 --verbose line --clip-config ")
    assert Path(command.split()[-1]).exists()


def test_it_watches_unclipped_unless_told():
    assert calibrate.watched_options(TINY, QUIET).clipper == "none"
    assert calibrate.watched_options(TINY, ["--threshold", "0.2"]).threshold == 0.2
    assert calibrate.watched_options(TINY, ["--clipper", "norm"]).clipper == "norm"


def test_accumulation_counts_updates(tmp_path):
    rest = [*QUIET, "--accumulate", "2", "--epochs", "1"]
    found, _ = calibrate.calibrate(TINY, rest, 90.0, None, 8, tmp_path / "c")
    assert found.updates == 4


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--percentile", "0"], "--percentile 0"),
        (["--percentile", "101"], "--percentile 101"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "25"], "24 updates"),
        (["--segments", "0"], "--segments 0"),
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


def test_damaged_files_and_interruption(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "c"
    flags = ["resnet50", "--output", str(folder), *QUIET, "--steps", "2"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "watch", interrupt)
        assert calibrate.main(flags) == 130
    assert not folder.exists()
    assert calibrate.main(flags) == 0
    whole = (folder / "watched.npz").read_bytes()
    (folder / "watched.npz").write_bytes(whole[: len(whole) // 2])
    assert calibrate.main(flags) == 2
    assert "watched.npz" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert calibrate.main(["resnet50", "--output", str(tmp_path / "file"), *QUIET]) == 2


def made_up(norms):
    """A Calibration of given norms `[updates, layers]`."""
    layers = [f"layer{i}" for i in range(norms.shape[1])]
    samples = dict.fromkeys(("norm", "absolute", "exponential", "adaptive", "rms"), norms)
    samples["global"] = np.sqrt((norms**2).sum(axis=1))
    kernels = {layer: ["kernel"] for layer in layers}
    return kgc.Calibration(layers, kernels, samples, percentile=90.0)


@pytest.mark.parametrize(
    "drift, want",
    [
        ("none", "clip-norm.json"),
        ("steps", "clip-norm-schedule.json"),
        ("steep", "clip-percentile.json"),
    ],
)
def test_what_clips_evenly_follows_from_the_drift(drift, want, tmp_path):
    """Stationary norms: constants; norms of eight levels: a schedule; else the last norms."""
    rng = np.random.default_rng(0)
    noise = rng.lognormal(sigma=0.2, size=(400, 3))
    levels = {
        "none": np.ones(400),
        "steps": np.repeat(0.5 ** np.arange(8), 50),
        "steep": 0.98 ** np.arange(400),
    }[drift]
    segments = {"steep": 2}.get(drift, 8)
    found = made_up(noise * levels[:, None])
    choices = calibrate.choices(found, segments, tmp_path)
    assert calibrate.steady(choices).name == want
    constant = next(c for c in choices if c.name == "clip-norm.json")
    assert constant.overall == pytest.approx(0.1, abs=0.01)
    calibrate.draw(tmp_path / "picture.png", found, segments, drift)
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("fall", [0.98, 0.7, 1.05])
def test_what_clips_nothing_is_not_praised(fall, tmp_path, capsys):
    """Norms that only fall are never above the last ones; that rise, always."""
    found = made_up(np.repeat(fall ** np.arange(40)[:, None], 3, axis=1))
    choices = calibrate.choices(found, 1, tmp_path)
    last = next(c for c in choices if c.name == "clip-percentile.json")
    assert not last.fits
    calibrate.show(found, choices, tmp_path, "python recipes/tiny.py")
    printed = capsys.readouterr().out
    assert "clips evenly." not in printed
    assert "no file for norms clips evenly (clip-percentile.json: " in printed
    assert f"--clip-config {tmp_path / last.name}" not in printed
    assert f"--clip-config {tmp_path / 'clip-norm.json'}" in printed


def test_a_file_that_clips_nothing_is_called_a_guard(tmp_path, capsys):
    rng = np.random.default_rng(0)
    found = made_up(rng.lognormal(sigma=0.2, size=(80, 3)))
    samples = {**found.samples, "update_ratio": np.full((80, 3), 1e-5)}
    found = kgc.Calibration(found.layers, found.kernels, samples, percentile=90.0)
    choices = calibrate.choices(found, 1, tmp_path)
    calibrate.show(found, choices, tmp_path, "python recipes/tiny.py")
    printed = capsys.readouterr().out
    assert "clip-update_ratio.json would have clipped nothing in this run" in printed
    assert printed.count("would have clipped nothing") == 1


def test_what_the_files_would_clip_is_what_their_clippers_clip(tmp_path):
    """Norms fed to the clippers themselves, update after update."""
    import keras

    rng = np.random.default_rng(1)
    norms = rng.lognormal(size=(80, 2)) * np.linspace(5, 0.1, 80)[:, None]
    found = made_up(norms)
    variables = []
    for layer in found.layers:
        with keras.name_scope(layer):
            variables.append(keras.Variable(np.zeros((1,), "float32"), name="kernel"))
    choices = {c.name: c for c in calibrate.choices(found, 4, tmp_path)}
    for name in ("clip-norm.json", "clip-norm-schedule.json", "clip-percentile.json"):
        clipper = kgc.get(json.loads((tmp_path / name).read_text())["clipper"])
        optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1e-12), clipper, telemetry=True)
        optimizer.build(variables)
        hits = []
        for row in norms:
            optimizer.apply([keras.ops.convert_to_tensor([x], "float32") for x in row], variables)
            hits.append(float(optimizer.read_telemetry()["clip_fraction"]))
            optimizer.reset_telemetry()
        eighths = [np.mean(part) for part in np.array_split(hits, calibrate.EIGHTHS)]
        np.testing.assert_allclose(choices[name].shares, eighths, atol=1e-6)
