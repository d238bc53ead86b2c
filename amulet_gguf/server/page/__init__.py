"""The page for people: files of HTML, CSS and JavaScript, made into one document.

One document takes one request. So nothing but "/" must be open to a browser that cannot send a key yet,
and hashes name exactly the scripts and styles that may run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re
from typing import Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_SCRIPT: Final = re.compile(r'<script src="([\w./-]+)"></script>')
_STYLE: Final = re.compile(r'<link rel="stylesheet" href="([\w./-]+)">')


def page_response(request: Request) -> Response:
    """Return the page, or that the browser's copy of it is still right."""
    html, headers = _page()
    if headers["etag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return HTMLResponse(html, headers=headers)


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
    """Return the page and its headers."""
    html = _read("page.html")
    html, styles = _inlined(html, _STYLE, "style")
    html, scripts = _inlined(html, _SCRIPT, "script")
    # Trusted types: nothing may turn a text into HTML, not even a library that knows how to.
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    etag = f'"{hashlib.sha256((html + policy).encode()).hexdigest()[:32]}"'
    return html, {"content-security-policy": policy, "cache-control": "no-cache", "etag": etag}


def _inlined(html: str, reference: re.Pattern[str], tag: str) -> tuple[str, str]:
    """Return a document with the files it refers to written into it, and their hashes for its policy."""
    hashes = []

    def inline(match: re.Match[str]) -> str:
        content = _read(match[1])
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"'sha256-{digest}'")
        return f"<{tag}>{content}</{tag}>"

    html = reference.sub(inline, html)
    return html, " ".join(hashes)


def _read(name: str) -> str:
    return importlib.resources.files(__name__).joinpath(name).read_text("utf-8")
