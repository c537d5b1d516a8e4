"""The README's Python blocks run, in order, as a reader would paste them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)


def test_the_code_blocks_of_the_readme_run(capsys):
    pytest.importorskip("tensorflow")
    code = blocks("README.md")
    assert len(code) >= 5
    namespace = {}
    for number, block in enumerate(code):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    out = capsys.readouterr().out
    assert ".*/bias" in out and "NormClip" in out


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md"):
        for target in re.findall(r"(?:`|^ *|\n)make ([a-z0-9-]+)", (ROOT / name).read_text()):
            assert target in targets, f"{name} names `make {target}`"


def test_every_linked_file_exists():
    for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name} links to {link}"
