"""The site: README, guide, reference and notebooks. `make docs` builds it."""

import re
from importlib.util import find_spec
from pathlib import Path

import bnjax

project = "bnjax"
version = release = bnjax.__version__
copyright = "The authors of bnjax, Apache 2.0"  # what the theme prints below each page

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
default_role = "py:obj"  # code, and a link where it is a public name
nb_execution_mode = "off"  # the notebooks show the outputs that they were stored with
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
pygments_style, pygments_dark_style = "default", "github-dark"
html_favicon = "icon.svg"
html_title = f"bnjax {version}"
html_copy_source = False

# MathJax is a part of the site, without what it reads aloud with and draws as SVG.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0])
html_static_path = [str(MATHJAX / "static"), "site.css"]
html_css_files = ["site.css"]
mathjax_path = "mathjax/tex-chtml.js"
myst_update_mathjax = False
mathjax3_config = {"loader": {"load": ["input/asciimath"]}}
exclude_patterns = ["mathjax/sre", "mathjax/output/svg*", "mathjax/*-svg*", "mathjax/mml*"]


def read(app, what, name, obj, options, lines):
    """From docstrings as they read best in `help` to reStructuredText."""
    text = "\n".join(lines) + "\n"
    text = text.replace("\nAttributes:\n", "\nArgs:\n")  # a dataclass is made from them
    text = re.sub(r"(?m)^(  \w+,[\w, ]*,)\n +", r"\1 ", text)  # names on two lines
    head, *sections = re.split(r"(?m)^(?=\w+:\n {2})", text)
    head = re.sub(r"(?m)(?<=\n\n)( {2}\S.*\n)+", formulas, head)
    head = re.sub(r"(?m)^(\|.*\|\n)+", table, head)
    text = "".join([head, *sections]).replace("*args, **kwargs:", r"\*args, \*\*kwargs:")
    lines[:] = re.sub(r"(?<![`|\w])\|(?=\w)", r"\|", text).split("\n")


def formulas(match):
    """Indented, two spaces between them; MathJax reads AsciiMath."""
    parts = re.split(r"[,;] {2,}|\n *", match[0].strip())
    return "".join(f".. math::\n   :no-wrap:\n\n   `{asciimath(p)}`\n\n" for p in parts)


def asciimath(formula):
    """Words are quoted, but for those that AsciiMath knows."""
    known = "sqrt|sum|log|max|min|mu|sigma|delta|epsilon"
    word = rf"(?<![A-Za-z])(?!(?:{known})(?![a-z]))[a-z.]{{2,}}(?![a-z])"
    formula = re.sub(rf"{word}(?: {word})*", r'"\g<0>"', formula)
    return formula.replace("  ", " quad ").replace("<-", "larr").replace("m1", "m_1")


def table(match):
    """A Markdown table."""
    head, _, *rows = (row.strip("|\n") for row in match[0].splitlines())
    return "\n   ".join([".. csv-table::", ":delim: |", ":header-rows: 1", "", head, *rows, "\n"])


def shorten(app, what, name, obj, options, signature, result):
    """Defaults by their names, and without flax's own fields."""
    if signature is None:  # data
        return None
    signature = re.sub(r", parent=<.*?>, name=None", "", signature)
    return re.sub(r"<\w+ '?(?:\w+\.)*(\w+).*?>", r"\1", signature), result


def setup(app):
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", read, priority=400)  # before napoleon
