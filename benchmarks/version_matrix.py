"""Run the core tests on pairs of Keras and TensorFlow, each in an environment of its own from PyPI.

    python benchmarks/version_matrix.py [--only 3.12 ...] [--quick] [--again]

Prints a table and writes docs/results/versions.csv after each pair; what an interrupted run has
from this commit is not run again. Needs 3 GB of disk and a quarter of an hour a
pair; with --quick, a few minutes. A Python named below that is not on the PATH as `python3.x` is
replaced by the one that runs this; the table says which Python it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "versions.csv"
ENVIRONMENT = ROOT / ".venv-matrix"

# Python, Keras, TensorFlow, NumPy, KerasTuner: the oldest, each minor version, the newest, nightly.
# TensorFlow 2.19 and 2.20 are bound to a tensorboard that needs an old setuptools.
PAIRS = [
    ("3.11", "3.12.0", "2.19.0", "1.26.4", "1.4.7"),
    ("3.11", "3.13.2", "2.20.0", "2.2.6", "1.4.8"),
    ("3.12", "3.14.1", "2.19.1", "2.1.3", "1.4.8"),
    ("3.13", "3.15.1", "2.21.0", "2.4.6", "1.4.8"),
    ("3.12", "3.15.1", "2.22.0rc0", "2.4.6", "1.4.8"),
    ("3.13", "nightly", "2.22.0rc0", "2.4.6", "1.4.8"),
]
TESTS = [
    "tests/clippers",
    "tests/diagnostics",
    "tests/optimizer",
    "tests/test_compat.py",
    "tests/test_gate.py",
    "tests/test_kernels.py",
    "tests/test_misuse.py",
    "tests/test_model.py",
    "tests/tuning/test_hypermodel.py",
    "tests/tuning/test_space.py",
    "tests/tuning/test_oracles.py",
]
# What a new host is most likely to break: private names, the model, saved files, a resumed run, and
# the first promise on several devices.
QUICK = [
    "tests/test_compat.py",
    "tests/test_model.py",
    "tests/clippers/test_stateful.py::test_a_resumed_run_goes_on_bit_for_bit",
    "tests/optimizer/test_saved_files.py",
    "tests/optimizer/test_distribution.py::test_a_threshold_bounds_the_weight_change",
]
COLUMNS = [
    *("python", "keras", "tensorflow", "numpy", "keras_tuner", "keras_gradclip", "commit"),
    *("tests", "passed", "failed", "skipped", "seconds", "failures"),
]
INSTALLED = """
import importlib.metadata as m, json, platform, keras, tensorflow, numpy, keras_gradclip
print(json.dumps({"python": platform.python_version(), "keras": keras.__version__,
    "tensorflow": tensorflow.__version__, "numpy": numpy.__version__,
    "keras_tuner": m.version("keras-tuner"), "keras_gradclip": keras_gradclip.__version__}))
"""


def available(pair: tuple[str, ...]) -> tuple[str, ...]:
    """The pair, with a Python that is there."""
    command = shutil.which(f"python{pair[0]}")
    # pyenv has a command for each Python that some project of the machine uses.
    if command and subprocess.run([command, "--version"], capture_output=True).returncode == 0:
        return pair
    return ("{}.{}".format(*sys.version_info), *pair[1:])


def install(python: str, keras: str, tensorflow: str, numpy: str, keras_tuner: str) -> Path:
    """A fresh environment with these versions and the checkout; its interpreter."""
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    subprocess.run([f"python{python}", "-m", "venv", ENVIRONMENT], check=True)
    executable = ENVIRONMENT / "bin" / "python"

    def pip(*arguments: str) -> None:
        command = [executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-cache-dir", *arguments], check=True)

    pinned = [f"tensorflow=={tensorflow}", f"numpy=={numpy}", f"keras-tuner=={keras_tuner}"]
    if keras != "nightly":
        pinned.append(f"keras=={keras}")
    bound = "tensorboard" if tensorflow < "2.21" else "tensorboard>=2.21"
    pip(*pinned, bound, "scipy", "scikit-learn", "pytest", "pytest-timeout", "setuptools<81")
    if keras == "nightly":
        subprocess.run([executable, "-m", "pip", "uninstall", "-qy", "keras"], check=True)
        # TensorFlow may have brought it, and its files are gone with those of keras.
        pip("--pre", "--no-deps", "--force-reinstall", "keras-nightly")
        pip("--no-deps", "-e", ".")
        pip("jinja2", "matplotlib")
    else:
        pip("-e", ".[report]", *pinned)  # refused if pyproject.toml does not allow the pair
    return executable


def run(executable: Path, tests: list[str]) -> dict[str, object]:
    """Run the tests; the row of the table."""
    started = time.monotonic()
    report = ENVIRONMENT / "report.xml"
    subprocess.run(
        [
            executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-o",
            "timeout=900",
            f"--junitxml={report}",
            *tests,
        ],
        cwd=ROOT,
        check=False,
    )
    shown = subprocess.run(
        [executable, "-c", INSTALLED], cwd=ROOT, check=True, capture_output=True, text=True
    )
    row: dict[str, object] = json.loads(shown.stdout.splitlines()[-1])
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    names = {
        case.get("name", "")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    }
    return row | {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(time.monotonic() - started),
        "failures": " ".join(sorted(names)),
    }


def finished() -> list[dict[str, str]]:
    """The rows that were written before."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: dict[str, str]) -> tuple[str, ...]:
    """What makes two rows the same pair."""
    keras = "nightly" if "dev" in row["keras"] else row["keras"]
    return (row["python"].rpartition(".")[0], keras, row["tensorflow"].replace("-", ""))


def write(rows: list[dict[str, str]]) -> None:
    """Write the table, the pairs in the order of `PAIRS`."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    order = {pair[1:3]: place for place, pair in enumerate(PAIRS)}
    rows.sort(key=lambda row: order.get(key(row)[1:], len(order)))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Run what is missing; how many of the pairs run now had failures or could not be built."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="the Keras versions to run, by their beginning")
    parser.add_argument("--quick", action="store_true", help="a few tests of each kind")
    parser.add_argument(
        "--again", action="store_true", help="also what the file has of this commit"
    )
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    bad = 0
    kind, tests = ("quick", QUICK) if options.quick else ("core", TESTS)
    for pair in map(available, PAIRS):
        rows = finished()
        known = {key(r) for r in rows if commit and (r["commit"], r["tests"]) == (commit, kind)}
        if options.only and not pair[1].startswith(tuple(options.only)):
            continue
        if pair[:3] in known and not options.again:
            continue
        print(f"Python {pair[0]}, Keras {pair[1]}, TensorFlow {pair[2]} ...", flush=True)
        try:
            row = run(install(*pair), tests)
            row |= {"commit": commit, "tests": kind}
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"not run: {error}", flush=True)
            bad += 1
            continue
        finally:
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        bad += row["failed"] != 0
        # A few tests take the place of no whole run.
        stay = [
            old for old in rows if key(old) != pair[:3] or (old["tests"], kind) == ("core", "quick")
        ]
        write([*stay, row])
    for row in finished():
        print(*(row[column] for column in COLUMNS), sep="\t")
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
