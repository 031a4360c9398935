"""What a job can do to itself, to its process and to the record of its end. abusive_types.py makes jobs of it."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import dramatiq
import psutil
from dramatiq.broker import MessageProxy

from jobsys import Job
from jobsys.errors import JobStopped

WAYS: dict[str, Callable[[Job], Any]] = {}
"""How to misbehave, by name."""


def way(function: Callable[[Job], Any]) -> Callable[[Job], Any]:
    WAYS[function.__name__] = function
    return function


# --- raising


def _raising(error: BaseException | type[BaseException]) -> Callable[[Job], NoReturn]:
    def fail(_: Job) -> NoReturn:
        raise error

    return fail


def _str(text: Callable[[Any], str]) -> Exception:
    return type("Unspeakable", (Exception,), {"__str__": text, "__repr__": text})()


def _exit(_: Any) -> str:
    raise SystemExit("from within __str__")


def _chain(links: int) -> Exception:
    error = outermost = RuntimeError("the outermost")
    for number in range(links):
        error.__cause__ = RuntimeError(f"cause {number}")
        error = error.__cause__
    return outermost


def _cycle() -> Exception:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__context__, two.__context__ = two, one
    return one


class _Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class Nameless(Exception, metaclass=_Nameless):
    pass


class Traceless(Exception):
    @property
    def __traceback__(self) -> Any:  # type: ignore[override]
        raise SystemExit("no traceback")


class Unserialisable(Exception):
    def __init__(self) -> None:
        super().__init__(self, threading.Lock(), lambda: None)

    def __reduce__(self) -> NoReturn:
        raise TypeError("not to be pickled")


ERRORS: dict[str, Any] = {
    "sys.exit": SystemExit(0),
    "SystemExit without a status": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "BaseException": BaseException("the base"),
    "CancelledError": asyncio.CancelledError,
    "StopIteration": StopIteration,
    "an unasked JobStopped": JobStopped("because I say so"),
    "NUL in its text": RuntimeError("before\x00after"),
    "a lone surrogate in its text": RuntimeError("lone \ud800"),
    "10 MB of text": RuntimeError("x" * 10_000_000),
    "__str__ raises": _str(lambda self: 1 / 0),  # type: ignore[arg-type,return-value]
    "__str__ recurses for ever": _str(lambda self: str(self)),
    "__str__ exits": _str(_exit),
    "__str__ is no text": _str(lambda self: 5),  # type: ignore[arg-type,return-value]
    "unserialisable": Unserialisable(),
    "a class name of 1 MB": type("E" * 1_000_000, (Exception,), {}),
    "a class without a name": Nameless,
    "an error without a traceback": Traceless(),
    "a deep chain of causes": _chain(10_000),
    "a cycle of contexts": _cycle(),
    "a delay that is no number": dramatiq.Retry("later", delay="soon"),
}
if sys.version_info >= (3, 11):
    ERRORS["a group of 10,000"] = builtins.ExceptionGroup("many", [RuntimeError(str(number)) for number in range(10_000)])
    nested: Exception = RuntimeError("the innermost")
    for _ in range(5_000):
        nested = builtins.ExceptionGroup("a group", [nested])
    ERRORS["5,000 groups in each other"] = nested
WAYS.update({how: _raising(error) for how, error in ERRORS.items()})


@way
def recursion(job: Job) -> Any:
    return recursion(job)


@way
def no_memory_for_its_error(job: Job) -> Any:
    """Dramatiq notes an error by a call; there may be no memory for that."""

    def fail(message: Any, error: BaseException) -> None:
        if message.message_id == job.id:
            raise MemoryError
        message._exception = error

    MessageProxy.stuff_exception = fail
    raise RuntimeError("is lost")


@way
def too_much_memory(job: Job) -> Any:
    """As where memory is limited: what the job holds is still there when its failure is written down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size + 50_000_000, before[1]))
    threading.Timer(2, resource.setrlimit, (resource.RLIMIT_AS, before)).start()
    hoard: list[Any] = []
    for piece in (1_000_000, 100_000, 1000):
        with contextlib.suppress(MemoryError):
            while True:
                hoard.append(bytearray(piece))
    raise MemoryError(len(hoard))


# --- returning


class Evil:
    def __repr__(self) -> str:
        raise SystemExit("from within __repr__")

    __str__ = __repr__


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _returning(value: Any) -> Callable[[Job], Any]:
    return lambda job: value


_own: list[Any] = []
_own.append(_own)
UNSTORABLE = {
    "NaN": float("nan"),
    "bytes that are no text": b"\xff\xfe",
    "nesting 10,000 deep": _deep(10_000),
    "NUL": "a\x00b",
    "a lone surrogate": "\ud800",
    "an object with an evil repr": Evil(),
    "a list that holds itself": _own,
    "a number too long to write": 10**5000,
}
STORABLE = {"a set": {1}, "a string of 10 MB": "x" * 10_000_000, "nesting 500 deep": _deep(500)}
WAYS.update({f"returns {how}": _returning(value) for how, value in {**UNSTORABLE, **STORABLE}.items()})


# --- reporting


@way
def logs_100_000_lines(job: Job) -> None:
    for number in range(100_000):
        job.log(f"line {number}")


@way
def logs_10_MB(job: Job) -> None:
    job.log("x" * 10_000_000)
    job.log("NUL \x00, lone \ud800")
    job.progress(0.5, "half\x00way \ud800" + "x" * 1_000_000)


@way
def progress_NaN(job: Job) -> None:
    job.progress(float("nan"))


# --- changing what belongs to the whole process


@way
def leaves_the_directory(job: Job) -> None:
    os.chdir("/")


@way
def umask(job: Job) -> None:
    os.umask(0o027)


@way
def signal_handlers(job: Job) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@way
def leaves_threads(job: Job) -> None:
    for _ in range(10):
        threading.Thread(target=time.sleep, args=(3600,)).start()

    def die() -> None:
        raise RuntimeError("a thread of the job's own")

    threading.Thread(target=die).start()


@way
def closes_stdout(job: Job) -> None:
    sys.stdout.close()
    raise RuntimeError("and fails")


@way
def closes_stderr(job: Job) -> None:
    sys.stderr.close()
    raise RuntimeError("and fails")


@way
def little_recursion(job: Job) -> None:
    for limit in range(1, 100):
        with contextlib.suppress(RecursionError):
            sys.setrecursionlimit(limit)
            return


@way
def closes_every_descriptor(job: Job) -> None:
    os.closerange(3, 1000)


# --- forking


@way
def forks_and_both_return(job: Job) -> int:
    job.log("said before the fork")
    return os.fork()


@way
def forks_and_the_child_fails(job: Job) -> None:
    if os.fork() == 0:
        raise RuntimeError("the child")


@way
def forks_and_ends_the_child(job: Job) -> int:
    """As multiprocessing does."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b".")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- not ending


@way
def loops(job: Job) -> None:
    while True:
        pass


@way
def loops_and_catches_everything(job: Job) -> None:
    until = time.monotonic() + 3600
    while time.monotonic() < until:
        try:
            while True:
                pass
        except BaseException:
            pass


@way
def sleeps_in_python(job: Job) -> None:
    time.sleep(3600)


@way
def sleeps_in_c(job: Job) -> None:
    ctypes.CDLL(None).sleep(3600)


@way
def waits_for_a_lock(job: Job) -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


@way
def catastrophic_regex(job: Job) -> None:
    """Holds the interpreter all the time: no thread of the process runs again."""
    re.match(r"(a+)+$", "a" * 60 + "b")


# --- ending the process


@way
def os_exit(job: Job) -> None:
    os._exit(0)


@way
def segfault(job: Job) -> None:
    ctypes.string_at(0)


@way
def abort(job: Job) -> None:
    os.abort()


@way
def killed_for_its_memory(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
