"""One line per event: for people on standard error, for machines as JSON lines in LOG_FILE. Ours, Dramatiq's and gunicorn's alike.

An event is a few fixed words, what varies are its values: `log = logs.get(__name__); log.info("job finished", seconds=0.2)`.
The ids of the request and the job in whose course a line is logged are on it (see trail.py), other libraries' lines included; so is
whatever is bound with `structlog.contextvars.bound_contextvars(…)`. What users sent can neither start a new line nor steer a terminal,
and passwords are masked.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.typing import EventDict

from jobsys import secrecy, trail
from jobsys.errors import SettingsError
from jobsys.secrecy import mask
from jobsys.settings import Settings

INFO = logging.INFO
FILE_BYTES = 50_000_000
"""LOG_FILE is renamed to LOG_FILE.1 when it has grown to this size, and that to LOG_FILE.2, …"""
FILES_KEPT = 5
LONGEST_VALUE = 2_000
LONGEST_TRACEBACK = 20_000

LONGEST_LOCK = 2.0
"""Seconds that a line waits for those of other threads."""
READER_PATIENCE = 0.5
"""Seconds that a line waits for whoever reads the stream; while nobody does, the next ones don't wait at all."""

_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
_ESCAPES = {
    code: {10: "\\n", 13: "\\r", 9: "\\t"}.get(code, f"\\u{code:04x}")
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_BARE = re.compile(r'[^ ="]+')
_ESCAPES_IN_TRACEBACKS = {code: text for code, text in _ESCAPES.items() if code != 10}


class Log(BoundLogger):
    """structlog's logger over the standard library's, made cheap for lines that are off (about 0.3 µs), and for the many others."""

    def debug(self, event: str | None = None, *args: Any, **values: Any) -> Any:
        """Log what helps to follow one job, and is usually off."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self._say(logging.DEBUG, event, *args, **values)

    def info(self, event: str | None = None, *args: Any, **values: Any) -> Any:
        """Log what an operator wants to have read."""
        if self._logger.isEnabledFor(logging.INFO):
            self._say(logging.INFO, event, *args, **values)

    def _say(self, level: int, event: str | None, *args: Any, **values: Any) -> None:
        """Log the line; without structlog and the standard library, which take three quarters of the time, where both would only bring it
        to our own handlers."""
        name = logging.getLevelName(level)
        bound: EventDict = {**self._context, **values, "event": "" if event is None else event}
        if args or "exc_info" in bound or "stack_info" in bound or not _reaches_ours_only(self._logger):
            self._proxy_to_logger(name.lower(), event, *args, **values)
            return
        with contextlib.suppress(Exception):  # see Forgiving
            for key, value in structlog.contextvars.get_contextvars().items():
                bound.setdefault(key, value)
            said = _masked(_follow_trail(None, "", bound))
            said["_record"], said["_from_structlog"] = _Origin(self._logger.name, name, time.time(), os.getpid()), True
            for handler in _ours:
                handler.say({**said})


class _Origin(NamedTuple):
    """What our lines take from a LogRecord."""

    name: str
    levelname: str
    created: float
    process: int


_ours: list[Forgiving] = []
"""The handlers of `configure`."""


def _reaches_ours_only(logger: logging.Logger) -> bool:
    """Whether a line of this logger comes to all of our handlers and to nobody else, unfiltered."""
    at: logging.Logger | None = logger
    while at is not None and not at.filters and not at.disabled:
        if at.parent is None:
            return at.handlers == _ours and not any(handler.level or handler.filters for handler in _ours)
        if at.handlers or not at.propagate:
            return False
        at = at.parent
    return False


def get(name: str) -> Log:
    """The logger of a module: `log = logs.get(__name__)`. Can be made before `configure` and works without it."""
    processors: Any = [structlog.contextvars.merge_contextvars, _follow_trail, ProcessorFormatter.wrap_for_formatter]
    return cast(Log, structlog.wrap_logger(logging.getLogger(name), processors, wrapper_class=Log).bind())


def configure(settings: Settings, *, process: str) -> None:
    """Send every log line of this process where it belongs. `process` ("web", "worker", …) stands on the lines.

    On a terminal, and with FORCE_COLOR, lines are short and coloured (not with NO_COLOR); elsewhere they carry the whole time,
    the process and its pid. Processes may share LOG_FILE. Raises SettingsError when it can't be written.
    """
    secrecy.learn(settings)
    short = sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))
    colours = short and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    handlers: list[Forgiving] = [Stream(sys.stderr, lambda event: _line(event, process, short=short, colours=colours))]
    if settings.log_file is not None:
        try:
            handlers.append(SharedFile(settings.log_file, lambda event: _json_line(event, process)))
        except OSError as error:
            raise SettingsError(f"LOG_FILE: {settings.log_file} can't be written: {error.strerror}") from None

    root = logging.getLogger()
    _ours[:] = handlers
    before, root.handlers[:] = list(root.handlers), handlers
    for handler in before:
        if isinstance(handler, SharedFile):
            handler.close()
    root.setLevel(settings.log_level)
    for chatty in ("asyncio", "mail.log"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    threading.excepthook = _log_dead_thread


def printable(value: Any) -> str:
    """The text of `value` on one line, with whatever could steer a terminal escaped."""
    text = str(value)
    return text if text.isprintable() else text.translate(_ESCAPES)


def gunicorn_logger_class() -> type:
    """For gunicorn's setting `logger_class`: its lines go where all others go."""
    from gunicorn.glogging import Logger

    class Lines(Logger):
        def setup(self, cfg: Any) -> None:
            super().setup(cfg)
            for log in (self.error_log, self.access_log):
                log.handlers.clear()
                log.propagate = True
                log.setLevel(logging.NOTSET)

        def warning(self, msg: str, *args: Any, **values: Any) -> None:
            """A request that is none is quoted by gunicorn, and what it quotes may be a header with a password."""
            super().warning(msg.partition("'")[0].rstrip(" :") if msg.startswith("Invalid request") else msg, *args, **values)

    return Lines


class Forgiving(logging.Handler):
    """Writes what `render` makes of events. A line that can't be written is lost, and not the thread that logs it: a job may have closed
    the stream, the disk may be full."""

    _lock_is_lost = False

    def __init__(self, render: Callable[[EventDict], str]) -> None:
        super().__init__()
        self._render = render
        self.setFormatter(_formatter(lambda event: self._render(_masked(event))))

    def say(self, event: EventDict) -> None:
        """Write the event, if that is possible. It is masked already."""
        with contextlib.suppress(Exception):
            self._write_alone(self._render(event))

    def handle(self, record: logging.LogRecord) -> bool:
        """Write the record, if that is possible."""
        with contextlib.suppress(Exception):
            if self.filter(record):
                self._write_alone(self.format(record))
        return True

    def _write_alone(self, text: str) -> None:
        # A thread that met the end of its stack, or of all memory, may have left the lock taken: the others must not wait for ever.
        lock: Any = self.lock
        if not lock.acquire(timeout=0 if self._lock_is_lost else LONGEST_LOCK):
            self._lock_is_lost = True
            return
        self._lock_is_lost = False
        try:
            self.write(text)
        finally:
            lock.release()

    def write(self, text: str) -> None:
        """Write the line. Called under the handler's lock."""
        raise NotImplementedError


class Stream(Forgiving):
    """Writes lines to a stream. When nobody reads that (a terminal that was stopped, a full pipe) lines are lost, and counted."""

    _has_descriptor = False

    def __init__(self, stream: Any, render: Callable[[EventDict], str]) -> None:
        super().__init__(render)
        self.stream = stream
        self._lost = 0
        self._writable = select.poll()
        with contextlib.suppress(OSError, ValueError):  # no descriptor at all: then writing tells
            self._writable.register(stream.fileno(), select.POLLOUT)
            self._has_descriptor = True

    def write(self, text: str) -> None:
        """Write the line, unless that would have to wait for a reader for longer than READER_PATIENCE."""
        text += "\n"
        # There is room for so many bytes where poll says that there is any.
        size = len(text) if len(text.encode(errors="replace")) <= select.PIPE_BUF else select.PIPE_BUF // 4
        for start in range(0, len(text), size):
            if not self._takes_more(0 if self._lost else READER_PATIENCE):
                self._lost += 1
                return
            if self._lost:
                lost, self._lost = self._lost, 0
                get(__name__).warning("nobody read the log for a while", lost=lost)
            self.stream.write(text[start : start + size])
            self.stream.flush()

    def _takes_more(self, patience: float) -> bool:
        return not self._has_descriptor or bool(self._writable.poll(patience * 1000))


class SharedFile(Forgiving):
    """Appends lines to a file that other processes append to and rotate as well.

    A line is one `write` to a file opened for appending, which the kernel keeps whole. Whoever finds the file grown to `FILE_BYTES`
    renames it, under a lock on it that only one gets; the others see that the name leads elsewhere and follow. So does an external
    logrotate. A full disk costs lines, not the process, and is said once on standard error.
    """

    def __init__(self, path: Path, render: Callable[[EventDict], str], *, limit: int = FILE_BYTES, keep: int = FILES_KEPT) -> None:
        super().__init__(render)
        self.path, self.limit, self.keep = path.absolute(), limit, keep
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._failed = False
        self._file = self._open()

    def write(self, text: str) -> None:
        """Write the line. Called under the handler's lock."""
        line = (text + "\n").encode(errors="backslashreplace")
        try:
            self._follow()
            if os.write(self._file, line) < len(line):
                os.write(self._file, b"\n")
            self._failed = False
        except OSError as error:
            if not self._failed:
                print(f"LOG_FILE {self.path} can't be written: {error.strerror}; lines are lost until it can", file=sys.stderr)
            self._failed = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        super().close()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _follow(self) -> None:
        try:
            there = os.stat(self.path)
            if os.path.samestat(there, os.fstat(self._file)) and not (there.st_size >= self.limit and self._rotate()):
                return
        except FileNotFoundError:
            pass
        stale, self._file = self._file, self._open()
        os.close(stale)

    def _rotate(self) -> bool:
        # The lock is taken on a descriptor of its own: forked processes share the other one, and with it would share the lock.
        guard = self._open()
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(guard), os.stat(self.path)):
                return True
            for number in range(self.keep - 1, 0, -1):
                if os.path.exists(f"{self.path}.{number}"):
                    os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
            os.replace(self.path, f"{self.path}.1")
            return True
        except OSError:  # somebody else is at it, or the directory is not ours to change: write on
            return False
        finally:
            os.close(guard)


def _follow_trail(_logger: Any, _name: str, event: EventDict) -> EventDict:
    for name, value in trail.values().items():
        event.setdefault(name, value)
    return event


def _formatter(render: Callable[[EventDict], str]) -> ProcessorFormatter:
    return ProcessorFormatter(
        foreign_pre_chain=[structlog.contextvars.merge_contextvars, _follow_trail, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.format_exc_info,
            lambda _logger, _name, event: render(event),
        ],
    )


def _masked(event: EventDict) -> EventDict:
    return {key: value if key[:1] == "_" else _presentable(key, value) for key, value in event.items()}


def _presentable(key: str, value: Any) -> Any:
    """The value without secrets, and cut when it is long: a log line is no place for a million rows."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if _is_secret(key):
        return "***"
    if type(value) is str and len(value) <= LONGEST_VALUE:  # as almost always
        return mask(value.rstrip("\n"))
    text = _as_json(value) if isinstance(value, (dict, list, tuple)) else str(value).rstrip("\n")
    longest = LONGEST_TRACEBACK if key == "exception" else LONGEST_VALUE
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {len(text) - longest:,} more characters … {text[-longest // 2 :]}"
    elif isinstance(value, (dict, list, tuple)) and mask(text) == text:
        return value
    return mask(text)


@lru_cache(1000)
def _is_secret(key: str) -> bool:
    return secrecy.SECRET_KEY.search(key) is not None


def _line(event: EventDict, process: str, *, short: bool, colours: bool) -> str:
    record, own = event.pop("_record"), event.pop("_from_structlog")
    level = record.levelname.lower()
    traceback = event.pop("exception", "") or event.pop("stack_info", None)
    said, job_id = printable(event.pop("event", "")), event.pop("job_id", None)
    if short:
        words = [_paint(datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3], "2", colours)]
    else:
        words = [_paint(_utc(record.created), "2", colours)]
    words.append(_level(level, colours))
    if not short:
        words.append(f"{process}[{record.process}]")
    words.append(_paint(said, "1" if level != "debug" else "2", colours))
    if job_id:
        words.append(_paint(printable(job_id), "36", colours))
    words += [_name(key, colours) + _quoted(printable(_text(value))) for key, value in event.items()]
    if not own and not record.name.startswith("jobsys"):
        words.append(_paint(f"({record.name})", "2", colours))
    line = " ".join(words)
    if traceback:
        line += "".join(f"\n    {each}" for each in str(traceback).translate(_ESCAPES_IN_TRACEBACKS).split("\n") if each)
    return line


def _paint(text: str, colour: str, colours: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colours else text


@lru_cache(10)
def _level(level: str, colours: bool) -> str:
    return _paint(f"{level:<8}", _COLOURS.get(level, "0"), colours)


@lru_cache(1000)
def _name(key: str, colours: bool) -> str:
    return _paint(f"{printable(key)}=", "2", colours)


def _json_line(event: EventDict, process: str) -> str:
    record = event.pop("_record")
    del event["_from_structlog"]
    head = {"time": _utc(record.created), "level": record.levelname.lower(), "event": event.pop("event", "")}
    source = {"logger": record.name, "process": process, "pid": record.process}
    return _as_json({**head, **event, **source, **event}).translate(_ESCAPES)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _text(value: Any) -> str:
    return _as_json(value) if isinstance(value, (dict, list, tuple)) else str(value)


def _quoted(text: str) -> str:
    return text if _BARE.fullmatch(text) else '"' + text.replace('"', '\\"') + '"'


def _utc(seconds: float) -> str:
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{_whole_second(whole)}.{milliseconds:03}Z"


@lru_cache(8)
def _whole_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _log_dead_thread(args: Any) -> None:
    if args.exc_type is not SystemExit:
        thread = args.thread.name if args.thread else None
        get("jobsys").critical("a thread died", thread=thread, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
