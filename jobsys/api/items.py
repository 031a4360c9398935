"""Many objects in one body: a JSON array of them, or one a line, read one after the other.

The body is never in memory as a whole: what can be said of one object is said before the next one is read.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import falcon

from jobsys.api import body
from jobsys.api.problem import Problem
from jobsys.errors import InvalidSubmission

LIMIT = 16 * 1024 * 1024
"""The largest body taken, in bytes."""
PIECE = 65_536
LINES = ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines")
"""The media types of one object a line: none of them is registered, and each is in use."""

_SPACE = re.compile(r"[ \t\n\r]*")
_VALUES = frozenset('["-0123456789tfn')
_TOO_LARGE = "is larger than {} bytes"


def read(req: falcon.Request, limit: int = body.LIMIT) -> Iterator[dict[str, Any] | InvalidSubmission]:
    """The objects in the body of `req` as they arrive, each of at most `limit` bytes; in the place of one that can't be kept, what is wrong
    with it. Where there is no telling where the next one begins it raises Problem or InvalidSubmission, with the item's number."""
    media_type = body.check_content_type(req, ("application/json", *LINES))
    body.check_encoding(req)
    pieces = _pieces(req, LIMIT)
    return _from_lines(pieces, limit) if media_type in LINES else _from_array(pieces, limit)


def _from_lines(pieces: Iterator[bytes], limit: int) -> Iterator[dict[str, Any] | InvalidSubmission]:
    number, rest = 0, b""
    for piece in chain(pieces, [b"\n"]):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.strip():
                continue
            if len(line) > limit:
                yield InvalidSubmission.of([], _TOO_LARGE.format(limit))
            else:
                yield _numbered(number, line)
            number += 1
        if len(rest) > limit:
            raise InvalidSubmission.of([number], _TOO_LARGE.format(limit))


def _numbered(number: int, line: bytes) -> dict[str, Any] | InvalidSubmission:
    try:
        value = body.parse(line)
        return value if isinstance(value, dict) else InvalidSubmission.of([], "must be an object")
    except InvalidSubmission as error:
        return error
    except Problem as problem:
        raise _in_item(number, problem) from None


def _from_array(pieces: Iterator[bytes], limit: int) -> Iterator[dict[str, Any] | InvalidSubmission]:
    text = _Text(pieces)
    if text.next() != "[":
        raise Problem(400, "the body must be a JSON array of objects, or hold one object a line and say that it is application/x-ndjson")
    text.at += 1
    number = 0
    while number or text.next() != "]":
        yield text.object(number, limit)
        number += 1
        follows = text.next()
        if follows == "]":
            break
        if follows != ",":
            raise Problem(400, f"the body is not JSON: after item {number - 1} there must be a comma or the end of the array")
        text.at += 1
    text.at += 1
    if text.next():
        raise Problem(400, "the body is not JSON: something follows the array")


class _Text:
    """The text of a body: as much of it as is needed at a time."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._ended = False
        self._text = ""
        self.at = 0

    def next(self) -> str:
        """The next character that is no space, which stays the next one; "" at the end."""
        while True:
            self.at = _SPACE.match(self._text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._read_on():
                return ""

    def object(self, number: int, limit: int) -> dict[str, Any] | InvalidSubmission:
        """The object that begins here, which is then behind us."""
        if self.next() != "{":
            if self.next() in _VALUES:
                raise InvalidSubmission.of([number], "must be an object")
            raise Problem(400, f"the body is not JSON: there must be an object at item {number}")
        complaint = ""
        while True:
            try:
                value, end = body.decoder.raw_decode(self._text, self.at)
                break
            except (ValueError, RecursionError, Problem, InvalidSubmission) as error:
                # It may only be that not all of it is here. An error that more text doesn't change is one.
                before, complaint = complaint, f"{type(error).__name__} {getattr(error, 'msg', error)} {getattr(error, 'pos', 0) - self.at}"
                genuine = complaint == before and "Unterminated" not in complaint
                if not genuine and len(self._text) - self.at > limit:
                    raise InvalidSubmission.of([number], _TOO_LARGE.format(limit)) from None
                if genuine or not self._read_on():
                    raise _error_of_item(number, error, self.at) from None
        text, self.at = self._text[self.at : end], end
        if len(text.encode()) > limit:
            return InvalidSubmission.of([], _TOO_LARGE.format(limit))
        try:
            if "\\u" in text or text.count("{") + text.count("[") > body.DEPTH:
                body.inspect(value)
        except InvalidSubmission as error:
            return error
        except Problem as problem:
            raise _in_item(number, problem) from None
        return value

    def _read_on(self) -> bool:
        """Read as much again as there is and was not used, so that no text is looked at more than twice over; False at the end."""
        rest = self._text[self.at :]
        parts, wanted = [rest], max(len(rest), 1)
        while wanted > 0 and not self._ended:
            piece = next(self._pieces, b"")
            self._ended = not piece
            try:
                parts.append(self._decode(piece, final=self._ended))
            except UnicodeDecodeError:
                raise Problem(400, "the body is not UTF-8") from None
            wanted -= len(parts[-1])
        self._text, self.at = "".join(parts), 0
        return len(self._text) > len(rest)


def _error_of_item(number: int, error: Exception, start: int) -> Exception:
    if isinstance(error, InvalidSubmission):
        return InvalidSubmission([{"loc": [number, *each["loc"]], "msg": each["msg"]} for each in error.errors])
    if isinstance(error, json.JSONDecodeError):
        return _in_item(number, Problem(400, f"is not JSON: {error.msg}, {error.pos - start} characters into it"))
    return _in_item(number, error if isinstance(error, Problem) else body.too_deep())


def _in_item(number: int, problem: Problem) -> Problem:
    said = (problem.description or "").removeprefix("the body ")
    return Problem(400, f"item {number}: {said}", errors=[{"loc": [number], "msg": said}])


def _pieces(req: falcon.Request, limit: int) -> Iterator[bytes]:
    """The body as it arrives, all of it."""
    length = req.content_length
    if length is not None and length > limit:
        raise body.too_large(limit)
    most = length if length is not None else limit + 1 if req.env.get("wsgi.input_terminated") else 0
    got = 0
    while got < most and (piece := body.read_some(req, min(PIECE, most - got))):
        got += len(piece)
        if got > limit:
            raise body.too_large(limit)
        yield piece
    if not got:
        raise Problem(400, "the body is empty; send a JSON array of objects, or one object a line")
    if length is not None and got < length:
        # Each line before would be a whole one.
        raise Problem(400, f"the body ended after {got} of {length} bytes")
