"""A request body becomes Python in one way, and a strict one.

What Python's json lets through and PostgreSQL, or the next reader, does not: NaN and infinities, duplicate keys, numbers beyond 64
bits, NUL characters, lone surrogates, bottomless nesting. 400 is for what is no JSON object, 422 for one with impossible content.
"""

from __future__ import annotations

import codecs
import json
import math
from typing import Any, NoReturn

import falcon

from jobsys.api.problem import Problem
from jobsys.errors import InvalidSubmission

LIMIT = 1024 * 1024
"""The largest body taken, in bytes, where MAX_BODY says nothing else."""
DEPTH = 32
"""How deep objects and arrays may nest."""
MOST_KEYS = 10_000
"""How many keys one object may have…"""
LONGEST_KEY = 1000
"""…and how many characters each of them."""


def read_object(req: falcon.Request, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in the body of `req`. Raises Problem (400, 408, 413, 415) or InvalidSubmission (422)."""
    if req.content_type != "application/json":
        check_content_type(req, ("application/json",))
    check_encoding(req)
    return parse_object(_read(req, limit))


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises Problem (400) when it is none, InvalidSubmission when its content can't be kept."""
    if not raw:
        raise Problem(400, "the body is empty; send a JSON object, {} if there is nothing to say")
    value = parse(raw)
    if not isinstance(value, dict):
        raise Problem(400, "the body must be a JSON object")
    return value


def parse(raw: bytes) -> Any:
    """The value that `raw` says in JSON. Raises Problem (400), and InvalidSubmission for what can't be kept."""
    try:
        value = decoder.decode(raw.decode())
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        mark = ": it must not begin with a byte order mark" if raw.startswith(codecs.BOM_UTF8) else f": {error}"
        raise Problem(400, f"the body is not JSON{mark}") from None
    except RecursionError:
        raise too_deep() from None
    # Only an escape can smuggle in a NUL or a surrogate, and only many brackets can be deep: most bodies need no second look.
    if b"\\u" in raw or raw.count(b"{") + raw.count(b"[") > DEPTH:
        inspect(value)
    return value


def inspect(value: Any) -> None:
    """Raise Problem (400) for what nests too deeply, InvalidSubmission for text that can't be kept."""
    _inspect(value, [], DEPTH)


def check_encoding(req: falcon.Request) -> None:
    """Raise Problem (415) for a compressed body, unread: a few bytes of it could become any number."""
    if "HTTP_CONTENT_ENCODING" not in req.env and "HTTP_TRANSFER_ENCODING" not in req.env:
        return
    codings = (req.get_header("Content-Encoding", default="identity"), req.get_header("Transfer-Encoding", default="chunked").lower())
    if codings != ("identity", "chunked"):  # gunicorn takes "gzip, chunked" in pieces, and leaves the gzip to us
        raise Problem(415, "the body must not be compressed")


def check_content_type(req: falcon.Request, taken: tuple[str, ...]) -> str:
    """The media type of the body, which is one of `taken`."""
    if req.content_type is None and not req.content_length and not req.get_header("Transfer-Encoding"):
        return taken[0]
    media_type, parameters = falcon.parse_header(req.content_type or "")
    if media_type.lower() not in taken or parameters.get("charset", "utf-8").lower() not in ("utf-8", "utf8"):
        raise Problem(415, f"the body must be {' or '.join(taken[:2])} in UTF-8")
    return media_type.lower()


def _read(req: falcon.Request, limit: int) -> bytes:
    length = req.content_length
    if length is None:
        # Without a length the body ends where the server says it does, and a server that doesn't say would wait for ever.
        length = limit + 1 if req.env.get("wsgi.input_terminated") else 0
    elif length > limit:
        raise too_large(limit)
    raw = read_some(req, length)
    if len(raw) > limit:
        raise too_large(limit)
    if len(raw) < (req.content_length or 0):
        raise Problem(400, f"the body ended after {len(raw)} of {length} bytes")
    return raw


def read_some(req: falcon.Request, size: int) -> bytes:
    """The next bytes of the body, up to `size`. Raises Problem (408, 400)."""
    try:
        return req.stream.read(size)
    except OSError:
        raise Problem(408, "the body did not arrive") from None
    except Exception as error:  # whatever the server at hand raises for a transfer coding it can't make sense of
        raise Problem(400, f"the body can't be read: {type(error).__name__}") from None


def _inspect(value: Any, loc: list[str | int], depth: int) -> None:
    """`loc` is where it stands; with an error it says where that stands. (A megabyte may hold half a million values.)"""
    if isinstance(value, str):
        _inspect_text(value, loc)
    elif isinstance(value, (dict, list)):
        if depth == 0:
            raise too_deep()
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                _inspect_text(key, loc)
            if item is not None and not isinstance(item, (int, float)):
                loc.append(key)
                _inspect(item, loc, depth - 1)
                loc.pop()


def _inspect_text(text: str, loc: list[str | int]) -> None:
    if "\0" in text:
        raise InvalidSubmission.of(loc, "contains a NUL character, which can't be stored")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidSubmission.of(loc, "contains half of a surrogate pair, which is no text") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Problem(400, f"the key {json.dumps(twice[:100])} stands twice in one object")
    if len(made) > MOST_KEYS:
        raise InvalidSubmission.of([], f"has an object with more than {MOST_KEYS} keys")
    if made and max(map(len, made)) > LONGEST_KEY:
        raise InvalidSubmission.of([], f"has a key of more than {LONGEST_KEY} characters: {max(made, key=len)[:50]}…")
    return made


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        raise InvalidSubmission.of([], f"the number {text[:30]} does not fit into 64 bits")
    return number


def _number(text: str) -> float:
    if math.isinf(number := float(text)):
        raise InvalidSubmission.of([], f"the number {text[:30]} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise Problem(400, f"the body is not JSON: {name} is no number there")


decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_integer, parse_float=_number, object_pairs_hook=_object)


def too_deep() -> Problem:
    """What to raise for bottomless nesting."""
    return Problem(400, f"the body nests deeper than {DEPTH} levels")


def too_large(limit: int) -> Problem:
    """What to raise for a body of more than `limit` bytes."""
    return Problem(413, f"the body is larger than {limit} bytes")
