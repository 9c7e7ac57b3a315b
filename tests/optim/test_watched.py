"""A dict that shows that it was changed, by whatever way a dict can be changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from statecodec.optim.watched import Watched, WatchedStates

KEPT, NEW = [1], [1]  # equal, and not the same


def grow(state: dict[str, Any]) -> None:
    state |= {"b": NEW}


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "set": lambda state: state.__setitem__("a", NEW),
    "add": lambda state: state.__setitem__("b", KEPT),
    "delete": lambda state: state.__delitem__("a"),
    "pop": lambda state: state.pop("a"),
    "popitem": lambda state: state.popitem(),
    "clear": lambda state: state.clear(),
    "setdefault": lambda state: state.setdefault("b", KEPT),
    "update": lambda state: state.update(a=NEW),
    "or": grow,
}


def changed(change: Callable[[Watched], Any], state: Watched) -> bool:
    before = Watched.latest
    change(state)
    return Watched.latest is not before


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noted_and_made(change: Callable[[dict[str, Any]], Any]) -> None:
    state, plain = Watched(a=KEPT), {"a": KEPT}
    assert changed(change, state)
    change(plain)
    assert list(state) == list(plain)
    assert all(state[k] is v for k, v in plain.items())


def test_nothing_that_changes_a_dict_is_left_out() -> None:
    """Of what Python's dict has, all but these only look, or make another dict."""
    looking = {"copy", "fromkeys", "get", "items", "keys", "values"}
    changing = {name for name in vars(dict) if not name.startswith("_")} - looking
    assert changing | {"__setitem__", "__delitem__", "__ior__"} <= vars(Watched).keys()


def test_looking_and_putting_back_is_no_change() -> None:
    def look(state: Watched) -> None:
        state["a"] += [2]  # as `state["step"] += 1`: the same object again
        assert state.get("b") is None
        assert list(state.items()) == [("a", [1, 2])]

    assert not changed(look, Watched(a=[1]))


def test_a_failed_change_raises_as_a_dict_does() -> None:
    with pytest.raises(KeyError, match="b"):
        Watched(a=KEPT).pop("b")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_copies_are_watched(copied: Callable[[Watched], Watched]) -> None:
    again = copied(Watched(a=KEPT))
    assert type(again) is Watched
    assert again == {"a": KEPT}
    assert changed(lambda state: state.update(a=NEW), again)


def test_the_states_of_all_parameters_are_a_defaultdict_that_is_watched() -> None:
    states = WatchedStates(dict)
    assert changed(lambda states: states["p"].update(a=KEPT), states)
    assert states == {"p": {"a": KEPT}}
    assert changed(lambda states: states.__setitem__("p", dict(states["p"])), states)
    again = [copy.copy(states), copy.deepcopy(states), pickle.loads(pickle.dumps(states))]
    assert all(type(other) is WatchedStates and other == states for other in again)
    assert all(changed(lambda states: states.pop("p"), other) for other in again)
    assert not changed(lambda states: states.get("q"), states)
