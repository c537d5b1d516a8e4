"""The site: `make docs`."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_gradclip

project = "keras_gradclip"
author = "The keras_gradclip contributors"
copyright = author
release = version = keras_gradclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# The notebooks run in the tests; the site shows what they left.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# A page includes it.
exclude_patterns = ["results/*.md"]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": False}

exclude_patterns = ["results/*.md"]  # parts of other pages

html_theme = "furo"
html_title = f"keras_gradclip {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {
    "source_repository": "https://github.com/keras-gradclip/keras-gradclip",
    "source_branch": "main",
    "source_directory": "docs/",
}


def _literal(match):
    """A fenced example or a table, as a block that is shown as it is."""
    language = match["language"] or "text"
    body = match["code"] or match["table"]
    return f"\n.. code-block:: {language}\n\n" + re.sub(r"^(?=.)", "    ", body, flags=re.M) + "\n"


def _as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are Markdown in fences, tables and bars; autodoc reads reStructuredText."""
    blocks = r"^```(?P<language>\w*)\n(?P<code>.*?)^```\n?|(?P<table>(?:^\|.*\n)+)"
    parts = re.split(
        r"(^ *\.\. code-block::.*\n(?:(?: +.*)?\n)*)",
        re.sub(blocks, _literal, "\n".join(lines) + "\n", flags=re.M | re.S),
        flags=re.M,
    )
    if what == "property":  # napoleon takes what stands before a colon there for a type
        parts[0] = parts[0].replace(": ", " – ", 1)
    lines[:] = "".join(
        part if place % 2 else re.sub(r"(?<!\\)\|", r"\|", part) for place, part in enumerate(parts)
    ).split("\n")


def setup(app):
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=400)
