"""The documents' Python blocks run, in order, as a reader would paste them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))]

# Each page has names of its own; one process, since TensorFlow alone takes seconds to import.
RUNNER = """
import json, sys
for page, code in json.loads(sys.stdin.read()).items():
    print(f"== {page}")
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
"""


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)


def run_pages(names, folder):
    """The output of the pages' blocks, run one after the other in a separate process."""
    code = json.dumps({name: "\n".join(blocks(name)) for name in names})
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=code,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_code_blocks_of_the_first_pages_run(tmp_path):
    pytest.importorskip("tensorflow")
    names = ["docs/nan_on_several_gpus.md", "README.md", "docs/migrating.md"]
    shown = run_pages(names, tmp_path)
    assert re.search(r"Keras: +\[-inf -inf\]\nkeras_gradclip: \[1. 1.\]", shown), shown
    assert ".*head/.*" in shown and "UpdateRatioClip" in shown


@pytest.mark.slow
def test_the_code_blocks_of_the_other_pages_run(tmp_path):
    names = [
        "docs/five_minutes.md",
        "docs/devices.md",
        "docs/clippers.md",
        "docs/index.md",
        "docs/choosing.md",
    ]
    assert run_pages(names, tmp_path).count("==") == len(names)


def test_the_readme_can_be_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in (*PAGES, "CONTRIBUTING.md", "recipes/README.md", "tuning/README.md"):
        for target in re.findall(r"(?:`|^ *|\n)make ([a-z0-9-]+)", (ROOT / name).read_text()):
            assert target in targets, f"{name} names `make {target}`"


def test_every_linked_file_exists():
    for name in (*PAGES, "CONTRIBUTING.md", "recipes/README.md", "tuning/README.md"):
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name} links to {link}"


def test_every_printed_command_finds_its_environment():
    """A bare `python recipes/...` fails unless .venv is activated."""
    for name in (*PAGES, "recipes/README.md"):
        bare = re.search(r"(?<![\w/])python (recipes|tuning)/\S+", (ROOT / name).read_text())
        assert not bare, f"{name}: write .venv/bin/{bare[0]}"


def test_no_text_installs_what_no_index_has():
    """The package is not in an index yet: pip installs it from a checkout."""
    sources = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.ipynb")]
    for folder in ("keras_gradclip", "recipes", "tuning", "docs"):
        sources += [p for kind in ("py", "md") for p in (ROOT / folder).rglob(f"*.{kind}")]
    assert len(sources) > 100
    for path in sources:
        found = re.search(r"pip install[^`#\n]*keras[-_]gradclip", path.read_text("utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_the_first_example_of_each_first_page_lets_the_library_choose():
    for name in ("README.md", "docs/index.md", "docs/five_minutes.md", "docs/choosing.md"):
        first = next(block for block in blocks(name) if "ClippedOptimizer" in block)
        assert '"auto"' in first, f"{name} begins with a threshold that a reader cannot know"
