"""What a button sends, and the token that proves one of our own pages drew the button.

The token is an HMAC over the user and the day. Its key comes from the settings, so every web process makes the same one.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    import falcon

    from jobsys.settings import Settings

FORM_LIMIT = 16_384
GRACE = timedelta(hours=1)
"""How far into the next day a token still counts: for a page that was open at midnight UTC."""


class Tokens:
    """Makes and checks the CSRF tokens of one installation."""

    def __init__(self, settings: Settings) -> None:
        credentials = (*(settings.admin_credentials or ("", "")), settings.viewer_pass or "", settings.jwt_secret or "")
        parts = ("jobsys admin ui", *credentials, settings.database_url or "")
        self._key = hashlib.sha256("\0".join(parts).encode()).digest()

    def make(self, user: str, now: datetime | None = None) -> str:
        """The token for this user on this day (UTC)."""
        day = (now or datetime.now(timezone.utc)).date()
        return hmac.new(self._key, f"{day} {user}".encode(), hashlib.sha256).hexdigest()

    def fits(self, token: str, user: str, now: datetime | None = None) -> bool:
        """Whether `token` was made for this user today, or yesterday when today is less than an hour old."""
        now = now or datetime.now(timezone.utc)
        given = token.encode()
        return any(hmac.compare_digest(given, self.make(user, at).encode()) for at in (now, now - GRACE))


def read_form(req: falcon.Request) -> dict[str, str]:
    """The fields of a form post, each once; `id`, which may be there many times, with commas between. Empty when the body is no such form,
    or longer than any of ours."""
    if (req.content_type or "").split(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        return {}
    body = req.bounded_stream.read(FORM_LIMIT + 1)
    if len(body) > FORM_LIMIT:
        return {}
    fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: ",".join(values) if name == "id" else values[-1] for name, values in fields.items()}
