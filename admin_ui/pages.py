"""Pages from templates, and the files they need.

Each page has a partial of its own (`overview.html` includes `_overview.html`); a request with `HX-Request` gets the partial alone.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import falcon
import jinja2

from admin_ui import reasons, wording
from admin_ui.addresses import HOME
from jobsys.job_types import priority_name

REFRESH = 5
"""Seconds between two looks at the system by an open page."""
MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


class Pages:
    """The templates and static files below `folder`, read once."""

    def __init__(self, folder: Path) -> None:
        self._files = {file.name: file.read_bytes() for file in (folder / "static").iterdir() if file.suffix in MEDIA_TYPES}
        versions = {name: hashlib.sha256(body).hexdigest()[:12] for name, body in self._files.items()}
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals.update(
            home=HOME, refresh=REFRESH, static=lambda name: f"{HOME}/static/{name}?v={versions[name]}", plural=wording.plural
        )
        words = ("number", "ago", "exact", "span", "pretty", "clipped")
        self._templates.filters.update({name: getattr(wording, name) for name in words}, pace=reasons.pace, priority=priority_name)

    def show(self, req: falcon.Request, resp: falcon.Response, page: str, **context: Any) -> None:
        """Answer with a page, or its partial, that nobody keeps and that runs nothing but our own files."""
        partial = req.get_header("HX-Request") == "true"
        template = self._templates.get_template("_partial.html" if partial else f"{page}.html")
        given = {"page": page, "now": datetime.now(timezone.utc), "flash": None, "poll": None, "again": None}
        resp.content_type = falcon.MEDIA_HTML
        resp.cache_control = ["no-store"]
        resp.vary = ["HX-Request"]
        resp.set_header("Content-Security-Policy", POLICY)
        resp.text = template.render({**given, **context}).strip()

    def send_file(self, resp: falcon.Response, name: str) -> bool:
        """Answer with a static file; False when there is none of this name. Its version is in its address, so browsers may keep it."""
        if name not in self._files:
            return False
        resp.content_type = MEDIA_TYPES[Path(name).suffix]
        resp.data = self._files[name]
        resp.cache_control = ["private", "max-age=31536000", "immutable"]
        return True
