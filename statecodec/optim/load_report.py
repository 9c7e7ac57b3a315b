"""What loading a state changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StateChange:
    """What loading did to one state.

    Args:
        param: The parameter's name, or its position.
        state: The state's name.
        kind: `encoded` (into the form it is kept in), `converted` (from another state), `reset` (starts afresh),
            `dropped` (saved, but not kept here), `missing` (nothing was saved of this parameter: it starts afresh) or
            `unused` (saved, but for no parameter here).
        source: The form in which it was saved.
        stored_as: The codec in which it is kept.
        relative_rms: ||loaded - saved|| / ||saved||; None where there is nothing to compare.
    """

    param: str | int
    state: str
    kind: str
    source: str
    stored_as: str
    relative_rms: float | None = None


@dataclass(frozen=True)
class LoadReport:
    """What `load_state_dict` changed; empty if every state went in bit for bit.

    Args:
        changes: The states that were encoded, converted, reset, dropped, missing or unused.
        notes: Other differences from what was saved, and their reasons.
        update_rms: Relative error of the Adam direction m / sqrt(v), by parameter.
    """

    changes: tuple[StateChange, ...] = ()
    notes: tuple[str, ...] = ()
    update_rms: Mapping[str | int, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether training continues with the same numbers."""
        return all(c.kind == "encoded" and c.relative_rms == 0 for c in self.changes)

    def __str__(self) -> str:
        lines = list(self.notes)
        for c in self.changes:
            loss = "" if c.relative_rms is None else f", relative rms error {c.relative_rms:.2e}"
            lines.append(f"{c.param}: {c.state} {c.kind} ({c.source} -> {c.stored_as}{loss})")
        lines += [f"{p}: error of the Adam update {e:.2e}" for p, e in self.update_rms.items()]
        return "\n".join(lines) or "every state loaded bit for bit"


@dataclass
class ChangeLog:
    """Collects a LoadReport."""

    changes: list[StateChange] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    update_rms: dict[str | int, float] = field(default_factory=dict)

    def add(
        self, param: str | int, state: str, kind: str, source: str, stored_as: str = "nothing", rms: float | None = None
    ) -> None:
        """Note one StateChange."""
        self.changes.append(StateChange(param, state, kind, source, stored_as, rms))

    def report(self) -> LoadReport:
        """What was collected, without repeated notes."""
        return LoadReport(tuple(self.changes), tuple(dict.fromkeys(self.notes)), dict(self.update_rms))
