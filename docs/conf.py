"""The site: ``sphinx-build -W docs build/site``. Nothing is fetched, fonts and scripts come with the theme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import deepdisc_ops
from deepdisc_ops.cli import app as command_line

project = "deepdisc_ops"
author = "the deepdisc_ops authors"
copyright = author  # noqa: A001  # Sphinx's name
release = version = deepdisc_ops.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["conf.py"]
suppress_warnings = ["misc.highlighting_failure"]  # YAML with an ellipsis in it

html_theme = "pydata_sphinx_theme"
html_title = "deepdisc_ops"
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2, "footer_start": [], "footer_end": []}
html_math_renderer = "mathml"  # which browsers draw themselves; MathJax would be fetched
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_ipywidgets_js: dict[str, Any] = {}  # they would be fetched
nb_execution_mode = "off"  # tests/docs executes them; their outputs are kept

default_role = "py:obj"  # docstrings name things in single backticks
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
copybutton_prompt_text = "$ "


def write_commands(_: Any) -> None:
    """The reference of all verbs, from the program itself."""
    from typer.cli import get_docs_for_click

    command = typer.main.get_command(command_line)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="deepdisc-ops", title="Commands")
    path = Path(__file__).parent / "reference" / "commands.md"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def visit_math(translator: Any, node: nodes.Element) -> None:
    """A formula as MathML."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Have the reference written before pages are read, and formulas as MathML."""
    app.connect("builder-inited", write_commands)
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
