"""Secrets in text: what looks like one, and those of our own settings wherever they stand. Hidden before anything is logged, kept or shown.

A payload is data, and its owner reads it back as it was given; only pages hide the values of fields that are named like a secret.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit

from jobsys.settings import Settings

HIDDEN = "***"
SHORTEST = 6
"""Characters that a setting needs to be hidden wherever it stands: hiding every "admin" would hide more than it protects, and tell it."""
SECRET_KEY = re.compile(
    r"passw(?:or)?d|passphrase|(?<![a-z])pass(?![a-z])|secret|token|authorization|cookie|credential|(?:api|private)[-_]?key", re.IGNORECASE
)
"""Found in the name of what is a secret."""
_LOOKS_LIKE_ONE = re.compile(
    r"""(?P<before>://[^\s:/@"']{0,64}:)[^\s/"']{1,256}(?=@)"""
    rf"""|(?P<key>(?:{SECRET_KEY.pattern})\\?["']?\s{{0,4}}[=:]\s{{0,4}})"""
    r"""(?!\s|\\?["']?(?:\*\*\*|•))(?:"(?:[^"\\]|\\.)*"|\\"[^"]*"|'(?:[^'\\]|\\.)*'|(?:(?:basic|bearer)\s+)?[^\s,;)}\]&]+)"""
    r"""|(?P<scheme>\b(?:basic|bearer)\s+)(?-i:(?=[a-z]*[A-Z0-9._~+/=-]))[\w.~+/=-]{8,}"""
    # From the beginning of the word, once it is known how that ends: who begins at each eyJ takes for ever over many of them.
    r"""|(?<![\w-])(?P<word>(?=[\w-]{8,}\.[\w-]{5,}\.)[\w-]*?)\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*""",
    re.IGNORECASE,
)
_MARK = re.compile("[=:]|earer|asic|eyJ|EARER|ASIC")
_WAYS: tuple[Callable[[str], str], ...] = (
    str,
    lambda secret: json.dumps(secret)[1:-1],
    lambda secret: json.dumps(secret, ensure_ascii=False)[1:-1],
    lambda secret: repr(secret)[1:-1],
    lambda secret: quote(secret, safe=""),
)
"""In which a secret may be written."""
_ours: set[str] = set()
_OURS = re.compile(r"(?!)")


def learn(settings: Settings) -> None:
    """Hide these settings' secrets from here on, in this process: the fields without `repr`, and the passwords in addresses."""
    global _OURS
    found = {getattr(settings, name) for name, field in type(settings).model_fields.items() if not field.repr}
    for url in (settings.database_url, settings.otel_exporter_otlp_endpoint):
        found |= _passwords_in(url or "")
    for secret in found:
        if isinstance(secret, str) and len(secret) >= SHORTEST:
            _ours.update(written(secret) for written in _WAYS)
    if _ours:
        _OURS = re.compile("|".join(re.escape(secret) for secret in sorted(_ours, key=len, reverse=True)))


def mask(text: str, hidden: str = HIDDEN) -> str:
    """`text` without secrets."""
    if _ours:
        text = _OURS.sub(hidden, text)
    if _MARK.search(text):  # most texts have none
        text = _LOOKS_LIKE_ONE.sub(lambda match: (match["before"] or match["key"] or match["scheme"] or match["word"] or "") + hidden, text)
    return text


def _passwords_in(address: str) -> set[str]:
    """The password of an address, as it is written and as it is meant."""
    import psycopg2
    from psycopg2 import extensions

    found = set()
    with contextlib.suppress(ValueError):
        found.add(urlsplit(address).password)
    with contextlib.suppress(psycopg2.ProgrammingError):  # which reads "host=… password=…", too
        found.add(extensions.parse_dsn(address).get("password"))
    return {text for each in found if each for text in (each, unquote(each))}
