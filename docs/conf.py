"""How the site in this folder is built: `make docs`, or sphinx-build -W docs docs/_build/html."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent / "extensions"))

from mpq.version import VERSION

project = "mpq"
author = "The mpq developers"
copyright = author
version = release = VERSION

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "plain_docstrings",
    "generated_pages",
    "plug_in_pages",
    "command_help",
]
exclude_patterns = ["_build", "extensions"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # a short name in a docstring that several modules have

html_theme = "furo"
html_title = f"mpq {VERSION}"
html_static_path = ["static"]
html_css_files = ["mpq.css"]
html_copy_source = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
