"""How pages put things: numbers and times in words, JSON short and indented, secrets masked.

Nothing here escapes HTML; the templates do, always.
"""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any

from jobsys import secrecy

MASK = "••••••"
_NUMBERS = re.compile(r"\[\n\s+([^\[\]{}\"]*?)\n\s*\]")
"""A list of numbers as json.dumps lays it out, one a line."""


def number(value: int) -> str:
    """`1234567` as `1,234,567`."""
    return f"{value:,}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 job`, `1,204 jobs`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def span(seconds: float) -> str:
    """A duration in one or two units: `40 ms`, `1.2 s`, `3 min`, `2 h 5 min`, `3 d`."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours / 24:,.0f} d"


def ago(at: datetime, now: datetime | None = None) -> str:
    """`at` as seen from now, in one unit: `just now`, `12 s ago`, `3 min ago`, `in 2 h`; a date when it is months away."""
    seconds = ((now or datetime.now(timezone.utc)) - at).total_seconds()
    distance = abs(seconds)
    if distance >= 60 * 86_400:
        return f"{at.astimezone(timezone.utc):%Y-%m-%d}"
    if distance < 1.5:
        return "just now"
    words = f"{distance / 3600:.0f} h" if 3570 <= distance < 86_400 else span(round(distance))
    return f"{words} ago" if seconds > 0 else f"in {words}"


def exact(at: datetime) -> str:
    """`2026-11-22 22:06:27.123 UTC`."""
    return f"{at.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def clock(at: datetime, now: datetime) -> str:
    """`22:06:27.123`, with its date in front when that isn't today's (UTC)."""
    text = exact(at).removesuffix(" UTC")
    return text[11:] if at.astimezone(timezone.utc).date() == now.astimezone(timezone.utc).date() else text


def masked_text(text: str) -> str:
    """Free text without what looks like a secret, and without ours."""
    return secrecy.mask(text, MASK)


def clipped(text: str, limit: int) -> str:
    """Masked text: all of it, or its first `limit` characters and how many are missing."""
    if len(text) <= limit:
        return masked_text(text)
    return f"{masked_text(text[: limit + 1_000])[:limit]}… {len(text) - limit:,} more characters"


def first_line(text: str, limit: int = 300) -> str:
    """The first line that isn't empty, masked and clipped."""
    return clipped(next((line.strip() for line in text.splitlines() if line.strip()), ""), limit)


def pretty(value: Any, limit: int = 20_000) -> str:
    """JSON to look at: indented, secrets masked, and short however big the value is."""
    text = json.dumps(_seen(value, [2_000], 0), indent=2, ensure_ascii=False)
    return clipped(_NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text), limit)


def _seen(value: Any, budget: list[int], depth: int) -> Any:
    """A copy with secrets masked that touches at most `budget` values, whatever hides beyond them."""
    budget[0] -= 1
    if isinstance(value, dict):
        if depth > 30:
            return "{…}"
        copy = {}
        for done, (key, each) in enumerate(value.items()):
            if budget[0] <= 0:
                copy["…"] = f"{len(value) - done:,} more"
                break
            copy[key[:200]] = MASK if secrecy.SECRET_KEY.search(key) and each not in (None, "", [], {}) else _seen(each, budget, depth + 1)
        return copy
    if isinstance(value, list):
        if depth > 30:
            return "[…]"
        items: list[Any] = []
        for each in value:
            if budget[0] <= 0:
                items.append(f"… {len(value) - len(items):,} more")
                break
            items.append(_seen(each, budget, depth + 1))
        return items
    return clipped(value, 4_000) if isinstance(value, str) else value
