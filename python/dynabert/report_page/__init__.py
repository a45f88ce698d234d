"""One HTML page about a trained model, whole in itself: no network, no other file.

`build_document` gathers what the page shows, `render_page` puts it into the template: style, script
and data are all in the page, and a content security policy lets nothing else run. What users named
(tasks, folders, labels) is data, and becomes text only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from dynabert.report_page.document import Command, Sources, build_document
from dynabert.report_page.peaks import PeakFile, measure_peaks

__all__ = ["Command", "PeakFile", "Sources", "build_document", "measure_peaks", "render_page"]

_SCRIPTS = ("logic.js", "parts.js", "sections.js", "page.js")


def render_page(document: Mapping[str, Any], plain_text: str = "") -> str:
    """The page as HTML.

    Args:
        document: What `build_document` returned.
        plain_text: What a reader sees who has scripts switched off.

    Raises:
        ValueError: The document holds a value JSON cannot express, such as NaN.
    """
    style = _asset("page.css")
    # One script and one scope: the parts name each other freely, and the page nothing.
    script = "(() => {\n" + "\n".join(map(_asset, _SCRIPTS)) + "})();\n"
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "title": html.escape(f"{document['name']}: elastic report"),
        "policy": html.escape(policy, quote=True),
        "style": style,
        "script": script,
        "data": embed_json(document),
        "plain_text": html.escape(plain_text),
    }
    page = _asset("page.html")
    # In one pass, so that nothing inside a part is taken for a place.
    pieces = page.split("%%")
    assert set(pieces[1::2]) == set(parts), "the template has other places"
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces)


def embed_json(document: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever strings it holds."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the policy calls an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
