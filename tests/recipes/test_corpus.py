"""Broken input: each case of `corpus/recipes.toml` ends in its one line; nothing is written."""

import tomllib
from pathlib import Path

import pytest

from recipes.registry import find_recipe
from recipes.training import main

with (Path(__file__).resolve().parents[1] / "corpus" / "recipes.toml").open("rb") as _file:
    CASES = tomllib.load(_file)["case"]


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["line"][:40].replace("\0", ""))
def test_one_line(case, tmp_path, monkeypatch, capsys):
    inputs, work = tmp_path / "in", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if "tf_config" in case:
        monkeypatch.setenv("TF_CONFIG", case["tf_config"])
    for name, text in case.get("files", {}).items():
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        (inputs / name).write_text(text)
    before = files_in(tmp_path)

    argv = [word.replace("{tmp}", str(inputs)) for word in case["argv"]]
    assert main(find_recipe("resnet50"), argv) == 2

    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if line not in errors]
    assert len(errors) == 1 and all(o.startswith(("skipped: ", "warning: ")) for o in others), lines
    assert case["line"].replace("{tmp}", str(inputs)) in errors[0]
    assert files_in(tmp_path) == before and not any(work.iterdir())
