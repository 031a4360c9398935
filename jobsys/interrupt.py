"""Raising an exception in another thread, but only where that thread permits it.

CPython delivers such an exception between any two bytecodes. In a connection pool or in Dramatiq's own code it would leave locks taken
and a process dead. So it is thrown only while the thread is inside the function it was let into, and not while it is `undisturbed` there.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_set_async_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
_here = threading.local()
_as_it_is = contextlib.nullcontext()


class Interruptible:
    """One call of a function, into which `exception` (a class) can be thrown, at most once."""

    _inside = _throwing = _thrown = False
    _thread = 0

    def __init__(self, exception: type[BaseException]) -> None:
        self._exception = exception

    @property
    def over(self) -> bool:
        """Whether the call has ended."""
        return not self._inside and self._thread != 0

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function in this thread; what it returns or raises, or the exception that was thrown into it."""
        ended = False
        result = None
        self._thread = threading.get_ident()
        outer, _here.call = getattr(_here, "call", None), self
        try:
            self._inside = True
            result = function(*args, **kwargs)
            ended = True
            self._leave()
        except self._exception:
            # Thrown at most once. It may have come too late, while leaving: then the function has ended all the same.
            self._leave()
            if not ended:
                raise
        except BaseException:
            self._leave()
            raise
        finally:
            _here.call = outer
        return result

    def throw(self) -> None:
        """Raise the exception in the thread of the call, once, if it may be disturbed right now."""
        self._throwing = True
        try:
            if self._inside and not self._thrown:
                self._thrown = True
                _set_async_exception(ctypes.c_ulong(self._thread), ctypes.py_object(self._exception))
        finally:
            self._throwing = False

    def _leave(self) -> None:
        """From here on nothing is thrown; what was set and not yet delivered is taken back. (If it is delivered on the way here, it is the
        one exception there can be.)"""
        self._inside = False
        while self._throwing:
            time.sleep(0.0001)
        if self._thrown:
            _set_async_exception(ctypes.c_ulong(self._thread), None)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        thrown_before = self._thrown
        try:
            self._leave()
            if self._thrown and not thrown_before:
                raise self._exception
            yield
        finally:
            self._inside = True


def undisturbed() -> contextlib.AbstractContextManager[None]:
    """A block into which nothing is thrown, wherever the thread is: around locks and connections."""
    call: Interruptible | None = getattr(_here, "call", None)
    return _as_it_is if call is None or not call._inside else call._undisturbed()
