"""The benchmark runs at toy size; its results are not checked."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")
BENCH = Path(__file__).resolve().parents[1] / "benchmarks/bench.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_the_benchmark_runs_and_leaves_its_table(tmp_path):
    done = run(
        *("--tiny", "--rounds", "2", "--frameworks", "tensorflow", "--out", str(tmp_path)),
        *("--only", "clip", "operations", "reductions", "devices", "processes"),
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert "TensorFlow" in lines[0]
    rows = list(csv.DictReader(lines[1:]))
    clips = {r["contestant"]: r for r in rows if r["part"] == "clip"}
    for name in ("AbsoluteClip", "Keras clipvalue", "NormClip global", "AdaClip"):
        assert float(clips[name]["low"]) > 0
        assert int(clips[name]["samples"]) == 2
    operations = {r["contestant"]: r for r in rows if r["part"] == "operations: clip"}
    assert float(operations["AbsoluteClip"]["median"]) <= 2
    reductions = [r for r in rows if r["part"] == "reductions"]
    assert reductions and all(float(r["median"]) == 1 for r in reductions)
    for part in ("devices", "processes"):
        found = {(r["set"], r["contestant"]): float(r["median"]) for r in rows if r["part"] == part}
        assert found[f"2 {part}", "NormClip global"] > 0
        assert ("exponent", "AbsoluteClip") in found
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_chief_of_simulated_workers_is_measured(tmp_path):
    script, table = BENCH.with_name("search_scale.py"), tmp_path / "scale.csv"
    command = [sys.executable, str(script), "--workers", "4", "--trials", "20", "--seconds", "0.2"]
    done = subprocess.run(
        [*command, "--out", str(table)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and rows[-1]["trials"] == "19 to 20"
    assert all(float(row["trials an hour"]) > 0 for row in rows)


def test_an_unknown_part_is_named():
    done = run("--only", "speed")
    assert done.returncode == 2
    assert "speed" in done.stderr and "clip" in done.stderr
