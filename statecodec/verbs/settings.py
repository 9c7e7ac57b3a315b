"""The settings of a compression as one record: what `compress` takes except source and destination."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statecodec import choose
from statecodec.checkpoint.chain import BaseCheckpoint
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.choose import Policy, Rule, load_rules, parse_rule
from statecodec.choose.bounded import kept
from statecodec.choose.budget import Budget
from statecodec.choose.choices import Choices, by_rules
from statecodec.choose.chooser import by_budget
from statecodec.choose.copies import repeated
from statecodec.choose.derived import derived
from statecodec.choose.since_base import linked
from statecodec.format import Packing
from statecodec.progress import Progress
from statecodec.verbs.appending import WriteOptions
from statecodec.verbs.paths import parse_size


@dataclass(frozen=True)
class CompressSettings:
    """The settings of a compression, whatever its source and destination."""

    preset: str
    caller_policy: Policy
    """Rules of the caller's own."""
    budget: Budget
    packing: Packing
    max_shard_size: int | None
    strict: bool
    sha256: bool | None
    """As asked; None leaves it to `stores_sha256`."""

    @classmethod
    def of(
        cls,
        *,
        preset: str = "resume",
        rules: Sequence[str | Rule] = (),
        rules_file: str | Path | None = None,
        strict: bool = False,
        pack: str = "auto",
        max_shard_size: str | int | None = "5GB",
        max_step_error: float | None = None,
        max_update_error: float | None = None,
        max_weight_error: float | None = None,
        sha256: bool | None = None,
    ) -> CompressSettings:
        """Read the settings in the form in which `compress` takes them. Raises UsageError, PolicyError."""
        budget = Budget.of(
            choose.preset(preset).budget,
            max_step_error=max_step_error,
            max_update_error=max_update_error,
            max_weight_error=max_weight_error,
        )
        caller_policy = Policy((*(_rule(r) for r in rules), *(load_rules(rules_file) if rules_file else ())))
        return cls(preset, caller_policy, budget, Packing.parse(pack), parse_size(max_shard_size), strict, sha256)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return {
            "preset": self.preset,
            "rules": [str(rule) for rule in self.caller_policy.rules],
            "moments": self.budget.moments,
            "weights": self.budget.weights,
            "asked": list(self.budget.asked),
            "pack": str(self.packing),
            "max_shard_size": self.max_shard_size,
            "strict": self.strict,
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CompressSettings:
        """The inverse of `to_json`. Raises UsageError, PolicyError, KeyError."""
        return cls(
            value["preset"],
            Policy(tuple(parse_rule(rule) for rule in value["rules"])),
            Budget(value["moments"], value["weights"], tuple(value["asked"])),
            Packing.parse(value["pack"]),
            value["max_shard_size"],
            value["strict"],
            value["sha256"],
        )

    @property
    def policy(self) -> Policy:
        """All rules, the caller's own first."""
        return Policy((*self.caller_policy.rules, *choose.preset(self.preset).rules))

    @property
    def stores_sha256(self) -> bool:
        """Whether the SHA-256 of the source's files is stored: as asked, or else if they are restored bit for bit.

        It follows from the settings alone, so that all shares of a compression agree about it.
        """
        if self.sha256 is not None:
            return self.sha256
        return not self.budget and all(rule.encoding.exact for rule in self.policy.rules)

    @property
    def named_preset(self) -> str | None:
        """The preset, unless other options replaced all that it stands for."""
        replaced = "max_step_error" in self.budget.asked or len(self.budget.asked) > 1
        return None if replaced and not choose.preset(self.preset).rules else self.preset

    @property
    def promised(self) -> Budget:
        """The budget that a check compares the result with.

        What was asked for is a promise. What a preset stands for is none about tensors that the caller's own rules
        decide.
        """
        return self.budget if self.budget.asked or not self.caller_policy.rules else Budget()

    def output(self, target: Path, force: bool, threads: int, progress: Progress | None) -> WriteOptions:
        """Where and how to write."""
        return WriteOptions(target, self.packing, self.max_shard_size, force, threads, progress)

    def choose(
        self,
        source: SourceCheckpoint,
        base: BaseCheckpoint | None,
        threads: int,
        progress: Progress | None = None,
        only: Container[str] | None = None,
    ) -> Choices:
        """Choose a codec for every tensor. The budget and the base are applied to those in `only`, or to all."""
        if base is None:
            self.caller_policy.refuse_changes("give one (--base)")
        choices = by_rules(source, self.caller_policy, self.preset, strict=self.strict)
        if self.budget:
            choices = by_budget(source, choices, self.budget, threads, progress, only)
        choices = linked(source, choices, base, self.packing, only)
        choices = derived(source, choices, base, self.packing, only)
        choices = repeated(source, choices, self.packing, only)
        return replace(choices, kept=kept(source, choices, only)) if self.budget else choices


def _rule(rule: str | Rule) -> Rule:
    return parse_rule(rule) if isinstance(rule, str) else rule
