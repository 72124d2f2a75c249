"""How `make docs` builds these pages: Sphinx reads the Markdown, and the command line describes itself."""

from typing import Any

import cafe

project = "cafe"
copyright = "the authors of cafe, Apache-2.0"  # noqa: A001  # the name Sphinx asks for
version = release = cafe.__version__
extensions = ["myst_nb", "sphinx_click", "sphinx.ext.autodoc"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
autodoc_typehints = "description"
default_role = "code"  # of docstrings: single backticks are code
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_js_files = ["access.js"]
myst_heading_anchors = 3
smartquotes = False  # options begin with two hyphens
html_theme = "furo"
html_title = f"cafe {release}"
exclude_patterns = ["_build"]
linkcheck_ignore = [r"http://(localhost|127\.0\.0\.1)"]


def setup(app: Any) -> None:
    """Show the asterisks of patterns in help texts as they are."""
    for part in ("description", "options"):
        app.connect(f"sphinx-click-process-{part}", _escape_asterisks)


def _escape_asterisks(app: Any, context: Any, lines: list[str]) -> None:
    lines[:] = [line.replace("*", r"\*") for line in lines]
