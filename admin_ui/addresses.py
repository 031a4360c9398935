"""The addresses of the pages. Whatever a link or a redirect is made of goes through here and stays below /admin/ui."""

from __future__ import annotations

from urllib.parse import parse_qs, quote, urlencode

HOME = "/admin/ui"
FILTERS = ("status", "type", "queue", "group", "q")
"""What the list of jobs can be narrowed by."""


def address(*path: str, **query: str | None) -> str:
    """A page's path from its parts, each quoted, with a query of what is not None or empty."""
    asked = {name: value for name, value in query.items() if value}
    return "/".join([HOME, *(quote(part, safe="") for part in path)]) + (f"?{urlencode(asked)}" if asked else "")


def return_address(back: str, job_id: str, **said: str) -> str:
    """Where a button leads back to: its page, with what was done in the query.

    `back` is "job", "jobs?…" or anything else for the overview; of its query only the list's own filters survive.
    """
    where, _, query = back.partition("?")
    if where == "job" and job_id:
        return address("jobs", job_id, **said)
    if where == "jobs":
        asked = parse_qs(query)
        return address("jobs", **{name: asked[name][-1] for name in (*FILTERS, "cursor") if name in asked}, **said)
    return address(**said)
