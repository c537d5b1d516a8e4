"""The HTML pages of `templates/`, filled with a run's figures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def render(template: str, **context: object) -> str:
    """A page or a part of one, from a file in `templates/`."""
    return _templates().get_template(template).render(**context)


@functools.cache
def _templates() -> jinja2.Environment:
    import jinja2  # here: whoever trains does not need it

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
