"""The jit behind every kernel: machine code that releases the GIL, kept on disk where there is a place for it.

numba keeps compiled code in a folder that it can write, and fails where there is none. Here such a kernel is compiled
once per process instead. A folder named by NUMBA_CACHE_DIR that can only be read serves what it holds: this is how an
image or a service hands out code that was compiled once, and that nothing else may change.

The first kernel that a process has to compile is announced through the logger `statecodec`, since it takes seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, ClassVar, TypeVar

import numba
from numba.core import caching

F = TypeVar("F", bound=Callable[..., Any])
# numba carries no types.
_Locator: Any = caching.UserProvidedCacheLocator
_FunctionCache: Any = caching.FunctionCache
_NullCache: Any = caching.NullCache
_Impl: Any = caching.FunctionCache._impl_class


_log = logging.getLogger("statecodec")


@cache
def _announce() -> None:
    _log.info("compiling kernels for this machine, which takes some seconds and is done once")


class _GivenFolder(_Locator):  # type: ignore[misc]
    """NUMBA_CACHE_DIR, also when it can only be read."""

    def ensure_cache_path(self) -> None:
        """Raise OSError unless the folder can be written, or is there to be read."""
        try:
            super().ensure_cache_path()
        except OSError:
            if not os.path.isdir(self.get_cache_path()):
                raise


class _Storage(_Impl):  # type: ignore[misc]
    _locator_classes: ClassVar = [_GivenFolder, *_Impl._locator_classes[1:]]


class _Cache(_FunctionCache):  # type: ignore[misc]
    """numba's cache of one function; code that cannot be kept is still used."""

    _impl_class = _Storage

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Compiled code from the folder; None if there is none, so that it is compiled now."""
        overload = super().load_overload(sig, target_context)
        if overload is None:
            _announce()
        return overload

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep compiled code, if the folder takes it."""
        with suppress(OSError):
            super().save_overload(sig, data)


class _NoCache(_NullCache):  # type: ignore[misc]
    """Where code cannot be kept: compiled in every process."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        """Nothing is kept."""
        _announce()


def compiled(function: F, **options: Any) -> F:
    """Compile a function with numba when it is first called.

    Args:
        function: a plain Python function on numpy arrays and scalars.
        options: numba's own, such as `error_model` and `fastmath`.

    Returns:
        The dispatcher, called like the function.
    """
    dispatcher: Any = numba.njit(nogil=True, **options)(function)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError:  # no folder at all: a read-only installation without a home
        dispatcher._cache = _NoCache()
    typed: F = dispatcher
    return typed
