"""Settings of the documentation site: `make docs` builds it into build/site, strictly and without a
network.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout, whichever one is installed

from sphinx.application import Sphinx  # noqa: E402
from sphinx.errors import ExtensionError  # noqa: E402

import paged_kv  # noqa: E402

project = "paged_kv"
author = "the paged_kv authors"
release = version = paged_kv.__version__
copyright = "the paged_kv authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
try:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import paged_kv.integrations.lightzero
except ImportError:  # its page documents what can only be imported beside LightZero
    exclude_patterns.append("api/lightzero.md")
try:
    import paged_kv.integrations.huggingface
except ImportError:  # and beside transformers
    exclude_patterns.append("api/huggingface.md")

FLAT = (
    "index",
    "tutorial",
    "moving_over",
    "how_it_works",
    "safety",
    "design",
    "memory_order",
    "glossary",
    "site",
)  # pages with none below them
# Pages that may not be there: some are written beside their code, two need a client.
OPTIONAL = {
    "tools": ("recording", "report", "estimate", "benchmarks"),
    "api/index": ("lightzero", "huggingface"),
}

# Markdown as GitHub reads it, and headings that can be linked to.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# Strict: a name in a signature that leads nowhere is an error, but for names of other packages.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|numpy|np|npt|collections|typing|threading|os|pathlib|sortedcontainers|prometheus_client)\b.*",
    ),
    (r"py:class", r"transformers\..*|paged_kv\.integrations\.huggingface\.feeding\..*"),
    (r"py:class", r"(.*\.)?(Target|PolicyMaker|EntryShelf|Shelf|Files)|paged_kv\.index\.Cache"),
    # what verbs are made of: read by recordings, and no page of the reference
    (
        r"py:class",
        r"paged_kv\.(pages\.(change\.(Change|Told)|books\.Books|storage\.Storage|buffers\.Form"
        r"|tiers\.scratch\.ScratchFiles)|cache\.T|linears\.scope\.LinearScope)",
    ),
]
default_role = "code"  # docstrings write `names` as Markdown does

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
maximum_signature_line_length = 180
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "paged_kv"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in FLAT}
html_context = {"default_mode": "auto"}
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}


def only_pages_there(app: Sphinx, page: str, source: list[str]) -> None:
    """Take the optional pages that this build has not out of the list that names them."""
    folder = page.rpartition("/")[0]
    for name in OPTIONAL.get(page, ()):
        if f"{folder}/{name}".lstrip("/") not in app.env.found_docs:
            source[0] = re.sub(rf"^{name}\n", "", source[0], flags=re.MULTILINE)


def nothing_from_elsewhere(app: Sphinx, error: Exception | None) -> None:
    """End the build where a page would load a script, a style or a picture from a network."""
    if error is None:
        for page in sorted(app.outdir.rglob("*.html")):
            found = re.search(
                r"""(<link\b[^>]*\shref|\ssrc)=["']?(https?:)?//[^"'>]*""", page.read_text()
            )
            if found:
                raise ExtensionError(
                    f"{page.relative_to(app.outdir)} loads from elsewhere: {found.group()}"
                )


def setup(app: Sphinx) -> None:
    """Sphinx calls this once."""
    # LightZero's libraries make everybody log every step, the parser included
    logging.getLogger().handlers.clear()
    logging.getLogger().setLevel(logging.WARNING)
    app.connect("source-read", only_pages_there)
    app.connect("build-finished", nothing_from_elsewhere)
