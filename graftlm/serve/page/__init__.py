"""The page at `/`: files that a browser runs as they are. No build step, no framework, nothing from elsewhere.

The files answer without a key, as they hold nothing secret. What they ask the server for needs it: the page asks the
user for the key, and keeps it for the life of the tab (sessionStorage).

Answers of a model are a stranger's text. Two things keep them text: the code makes nodes and never parses HTML
(`markdown.js`), and the policy below forbids it to (trusted types), as it forbids scripts in the markup and requests
to other hosts.
"""

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

INDEX = "index.html"

FILES = {
    INDEX: "text/html",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "chat.js": "text/javascript",
    "compare.js": "text/javascript",
    "conversation.js": "text/javascript",
    "data.js": "text/javascript",
    "dom.js": "text/javascript",
    "export.js": "text/javascript",
    "markdown.js": "text/javascript",
    "message.js": "text/javascript",
    "runs.js": "text/javascript",
    "settings.js": "text/javascript",
    "sse.js": "text/javascript",
}
"""Every file there is, with its type; a name that is not here is no file."""

PATHS = frozenset({"/", *(f"/page/{name}" for name in FILES)})
"""The paths of the page, which need no key."""

POLICY = "; ".join(
    [
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def gets() -> dict[str, Callable[..., Any]]:
    """Path -> what answers it. All files are read now, so that a request opens none."""
    texts = {name: files(__name__).joinpath(name).read_bytes() for name in FILES}

    def answer(name: str) -> Response:
        return Response(texts[name], headers=HEADERS, media_type=FILES[name])

    async def index() -> Response:
        return answer(INDEX)

    async def file(name: str) -> Response:
        if name not in texts:
            raise HTTPException(404)
        return answer(name)

    return {"/": index, "/page/{name:path}": file}
