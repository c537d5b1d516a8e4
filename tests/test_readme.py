"""The README's Python blocks run, in order, as a reader would paste them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)


def test_the_code_blocks_of_the_readme_run(tmp_path):
    """In a process of their own, as TensorFlow's collective operations want it."""
    pytest.importorskip("tensorflow")
    code = blocks("README.md")
    assert len(code) >= 5
    script = tmp_path / "readme.py"
    script.write_text("\n".join(code))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ".*/bias" in done.stdout and "NormClip" in done.stdout


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md"):
        for target in re.findall(r"(?:`|^ *|\n)make ([a-z0-9-]+)", (ROOT / name).read_text()):
            assert target in targets, f"{name} names `make {target}`"


def test_every_linked_file_exists():
    for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name} links to {link}"
