"""Dicts that show when they were changed: an optimizer's `state`, and the states of each parameter in it.

A prepared step holds the tensors that it found. Looking at all of them again at every step takes longer than the rest
of what is looked at: five for each parameter, whose memory is mostly in no cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar


class Watched(dict[Any, Any]):
    """A dict; `latest` is another object whenever a value of any of them was replaced, added or taken out.

    The object is new after the change, so who looks at it before looking at the values misses nothing.
    """

    latest: ClassVar[object] = object()

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.get(key, Watched) is not value:  # `state["step"] += 1` puts back what was there
            super().__setitem__(key, value)
            Watched.latest = object()


def _noted(change: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(change)
    def noted(self: Watched, *args: Any, **kwargs: Any) -> Any:
        try:
            return change(self, *args, **kwargs)
        finally:
            Watched.latest = object()

    return noted


for _change in (dict.__delitem__, dict.__ior__, dict.clear, dict.pop, dict.popitem, dict.setdefault, dict.update):
    setattr(Watched, _change.__name__, _noted(_change))


class WatchedStates(Watched, defaultdict[Any, Any]):
    """The states of all parameters; a `defaultdict`, as in torch."""
