"""Job ids: UUIDs of version 7 (RFC 9562), so that sorting by id is sorting by time of creation. And the ids of requests that bring none."""

from __future__ import annotations

import os
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from random import Random

_lock = threading.Lock()
_last = 0
_random_words: Iterator[tuple[int]] = iter(())
"""Taken many at a time: asking the operating system for each id gives the interpreter's lock away."""
_of_requests = Random()  # which are shown to anybody, and keep no secret


def _begin_anew() -> None:
    global _lock, _random_words
    _lock, _random_words = threading.Lock(), iter(())
    _of_requests.seed()


os.register_at_fork(after_in_child=_begin_anew)


def new_job_id() -> str:
    """A new id, greater than every other this process made: a millisecond's worth of the clock, a counter in its 12 spare bits, 62
    random bits."""
    global _last, _random_words
    with _lock:
        word = next(_random_words, None)
        if word is None:
            _random_words = struct.iter_unpack("Q", os.urandom(4096))
            word = next(_random_words)
        # Milliseconds and counter are one number of 60 bits; more than 4096 ids in a millisecond borrow from the next one.
        _last = max(_last + 1, time.time_ns() // 1_000_000 << 12)
        moment = _last
    random = word[0] >> 2 | 1 << 63
    text = f"{moment >> 12:012x}7{moment & 0xFFF:03x}{random:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def is_job_id(text: object) -> bool:
    """Whether `text` is a UUID in its canonical form, in either case."""
    try:
        return isinstance(text, str) and str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def new_request_id() -> str:
    """16 hexadecimal digits."""
    return f"{_of_requests.getrandbits(64):016x}"
