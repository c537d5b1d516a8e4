"""Broken input: each case of `*.toml` here ends in its one line; nothing is written.

A file says at its top which command it is for. A case has

- argv: {tmp} in it is the folder of its files, {long} a name of 4,000 characters, {search}
  the options of `starting_points`;
- line: a part of the line that it must give; status: the exit status, 2 if nothing is said;
- start: what is copied into {tmp} first, of `starting_points`; removed: names; folders: names; cut:
  pattern to how many bytes are left;
- files: name to text; hex: name to bytes; made: name to one of `made_files`;
- environment: variables; leaves: files that it may write.

Cases of `library.toml` are expressions, each of which must raise a ValueError.
"""

import importlib
import shutil
import tomllib
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")

from made_files import FILES
from starting_points import RUN, SEARCH

import keras_gradclip as kgc
from recipes.registry import RECIPES, find_recipe
from recipes.training import main

pytestmark = pytest.mark.usefixtures("blank_pictures")
HERE = Path(__file__).resolve().parent
TOOLS = ("calibrate", "cluster", "compare", "zoo")
WORDS = {
    "{run}": [*RUN, "--output", "{tmp}/run"],
    "{search}": [*SEARCH, "--output", "{tmp}/search"],
}


def cases():
    for path in sorted(HERE.glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        shared = {key: value for key, value in content.items() if key != "case"}
        for number, case in enumerate(content["case"], 1):
            words = "".join(c for c in case["line"][:40] if c.isprintable() and c.isascii())
            # Four in five of the commands' take minutes together: `make test-slow` has them.
            is_slow = "argv" in case and number % 5
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(shared | case, id=f"{path.stem}-{number}-{words}", marks=marks)


CASES = list(cases())
OF_COMMANDS = [case for case in CASES if "argv" in case.values[0]]
OF_THE_LIBRARY = [case for case in CASES if "call" in case.values[0]]


def run(command, argv):
    """The exit status of a command."""
    if command in RECIPES:
        return main(find_recipe(command), argv)
    if command == "tiny":
        return main(importlib.import_module("tiny_recipe").RECIPE, argv)
    if command == "search":
        return importlib.import_module("tuning.search").main(argv)
    if command == "evidence":
        return importlib.import_module("benchmarks.evidence").main(argv)
    if command in TOOLS:
        return importlib.import_module(f"recipes.tools.{command}").main(argv)
    try:
        return importlib.import_module(f"{command}.__main__").main(argv)
    except SystemExit as end:  # argparse ends the process
        return end.code


def lay_out(case, folder, start):
    """Writes the files of a case."""
    if "start" in case:
        shutil.copytree(start(case["start"]), folder / case["start"])
    for name in case.get("removed", ()):
        (folder / name).unlink()
    for name in case.get("folders", ()):
        (folder / name).mkdir(parents=True)
    written = {
        **{name: text.encode() for name, text in case.get("files", {}).items()},
        **{name: bytes.fromhex(text) for name, text in case.get("hex", {}).items()},
        **{name: FILES[word]() for name, word in case.get("made", {}).items()},
    }
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for pattern, size in case.get("cut", {}).items():
        for path in folder.glob(pattern):
            path.write_bytes(path.read_bytes()[:size])


def contents(folder):
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", OF_COMMANDS)
def test_a_command_ends_in_one_line(case, tmp_path, monkeypatch, capsys, start):
    inputs, work = tmp_path / "in", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    lay_out(case, inputs, start)
    monkeypatch.chdir(work)
    for name, value in case.get("environment", {}).items():
        monkeypatch.setenv(name, value)
    before = contents(tmp_path)
    capsys.readouterr()  # what the start said

    def filled(text):
        return text.replace("{tmp}", str(inputs)).replace("{long}", "n" * 4000)

    argv = [filled(part) for word in case["argv"] for part in WORDS.get(word, [word])]
    status = run(case["command"], argv)

    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if line not in errors]
    assert len(errors) == 1 and all(o.startswith(("skipped: ", "warning: ")) for o in others), lines
    assert filled(case["line"]) in errors[0]
    assert status == case.get("status", 2)
    after = contents(tmp_path)
    for name in case.get("leaves", ()):
        after.pop(f"in/{name}", None)
        before.pop(f"in/{name}", None)
    assert after == before


@pytest.mark.parametrize("case", OF_THE_LIBRARY)
def test_a_call_raises_one_line(case):
    with pytest.raises(ValueError) as raised:
        eval(case["call"], {"kgc": kgc, "keras": keras, "np": np})
    text = str(raised.value)
    assert case["line"] in text and "\n" not in text
