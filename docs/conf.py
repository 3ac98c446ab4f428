"""How the documentation is built: ``make docs`` runs ``docs/pages.py`` and then Sphinx with this file.

Pages load nothing from elsewhere: formulas are MathML, made here.
"""

from __future__ import annotations

import pydoc
import re
from pathlib import Path
from typing import Any

import fastapi  # noqa: F401  # before autodoc imports for type checkers, which its models do not survive
from docutils import nodes
from latex2mathml.converter import convert
from numpy.typing import ArrayLike
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import triewise
from triewise.ranking import ranking

project, author, copyright = "triewise", "The triewise developers", "the triewise developers"
version = release = triewise.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
html_theme = "furo"
html_title = f"triewise {release}"
html_math_renderer = "mathml"
html_show_sourcelink = html_copy_source = False
html_static_path = ["static"]
html_css_files = ["triewise.css"]
myst_heading_anchors = 3
default_role = "py:obj"  # `Recommender.recommend` in a docstring is a reference
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
smartquotes_action = "D"  # dashes only
add_module_names = False

log = logging.getLogger("triewise.docs")
ALIASES = {  # longest first
    stringify_annotation(ranking.ItemLists, "smart"): "~triewise.ranking.ranking.ItemLists",
    stringify_annotation(ranking.Items, "smart"): "~triewise.ranking.ranking.Items",
    stringify_annotation(ArrayLike, "smart"): "~numpy.typing.ArrayLike",
}
KNOWN: dict[str, list[str]] = {}  # whole names by their last part; filled when all pages are read


def mathml(latex: str, display: str) -> str:
    """A formula as MathML, which browsers draw themselves."""
    return convert(re.sub(r"\s+", " ", latex), display=display)


def inline_math(translator: Any, node: nodes.math) -> None:
    """Write a formula in a line."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block_math(translator: Any, node: nodes.math_block) -> None:
    """Write a formula of its own."""
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def find(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element
) -> nodes.Element | None:
    """Find a name by its end: ``trie_nll`` or ``losses.trie_nll`` is the one in this module, this wing, or anywhere.

    A name that is nowhere is code, not a link; a whole one (``triewise...``) that is nowhere is a warning.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removesuffix("()")
    package, _, name = target.rpartition(".")
    objects = env.domains["py"].data["objects"]
    if not KNOWN:
        for known in objects:
            KNOWN.setdefault(known.rpartition(".")[2], []).append(known)
    found = [known for known in KNOWN.get(name, []) if known.endswith(f".{target}")]
    if package.startswith("triewise"):  # by a door: triewise.tokens.Trie is triewise.tokens.trie.Trie
        found = [known for known in KNOWN.get(name, []) if known.startswith(f"{package}.")]
    here = str(node.get("py:module") or "")
    for place in (here, here.rpartition(".")[0], ""):
        near = [name for name in found if name.startswith(place)]
        if len(near) == 1:
            entry = objects[near[0]]
            page = app.builder.get_relative_uri(node["refdoc"], entry.docname)
            return nodes.reference("", "", shown, internal=True, refuri=f"{page}#{entry.node_id}")
    if target.startswith("triewise.") and not found and pydoc.locate(target) is None:
        log.warning("nothing is called %s", target, location=node)
    return None


def spell(
    app: Sphinx, what: str, name: str, thing: object, options: Any, given: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Types under the names that they have in the source, which Python has spelled out."""
    texts = []
    for text in (given, result):
        for long, short in ALIASES.items():
            text = text and text.replace(long, short)
        text = text and re.sub(
            r"~numpy\.ndarray\[tuple\[~typing\.Any, \.\.\.\], ~numpy\.dtype\[([^\[\]]+)\]\]",
            r"NDArray[\1]",
            text,
        )
        texts.append(text and text.replace("<factory>", "..."))
    return ("" if given == "(*args, **kwargs)" else texts[0]), texts[1]  # a protocol is not called


def skip(app: Sphinx, what: str, name: str, thing: object, skipped: bool, options: Any) -> bool | None:
    """Leave out what Python itself says about the fields of a named tuple."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None


def check_pages(app: Sphinx, error: Exception | None) -> None:
    """Fail where a page or a style would load something from elsewhere."""
    elsewhere = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=.?https?:|@import|url\(.?https?:")
    for file in [] if error else [*app.outdir.rglob("*.html"), *app.outdir.rglob("*.css")]:
        if found := elsewhere.search(file.read_text(encoding="utf-8")):
            log.warning("%s loads something from elsewhere: %s", file.name, found[0])


def setup(app: Sphinx) -> None:
    """Register the formulas and the search for names."""
    app.add_config_value(
        "this_file", Path(__file__).read_text(encoding="utf-8"), "env", str
    )  # changed: all anew
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("missing-reference", find)
    app.connect("autodoc-skip-member", skip)
    app.connect("build-finished", check_pages)
    app.connect("autodoc-process-signature", spell)
    next(field for field in PyObject.doc_field_types if field.name == "variable").label = "Attributes"
