"""The job types that ship, one file each: a payload model and a function. A file put here is registered with the others.

They are written as everyone's job types are, from `jobsys` and libraries alone, and so run without a database.
"""

from __future__ import annotations

import functools

from jobsys.settings import Settings


@functools.lru_cache(maxsize=1)
def settings() -> Settings:
    """The configuration of this process, read when the first job asks for it. `settings.cache_clear()` makes the next one read it anew."""
    return Settings()
