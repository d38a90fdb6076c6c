"""Sphinx's settings. `make docs` builds the pages into docs/_build/html and runs their examples."""

import sys
from pathlib import Path

import fastnn

sys.path.insert(0, str(Path(__file__).parent))

project = "fastnn"
author = "the fastnn maintainers"
version = release = fastnn.__version__

extensions = [
    "myst_parser",
    "linked_names",
    "notebook_page",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"fastnn {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_dark_style = "github-dark"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# A method that is not documented here is its parent's, and so in PyTorch's documentation.
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 90

# Every name of ours that a page refers to must exist; those of PyTorch and Python are not looked
# up, which would take the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!fastnn).*")]
# A type variable: fuse returns a model of the class that it was given.
nitpick_ignore = [("py:class", "fastnn.fusion._Model")]
