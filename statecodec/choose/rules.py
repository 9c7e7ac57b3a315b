"""Ordered rules, first match wins.

A rule is written `PATTERN=CODEC`. PATTERN is a shell pattern over the tensor's name or its parameter's name, or a role,
each optionally with conditions after a colon:

    exp_avg_sq=companded(curve=log)          every second moment
    *.wte.*=raw                              by name
    weight:fp32,ndim>=2,numel>=4096=split    fp32 weights of two or more dimensions and at least 4096 elements
    *.v_proj.weight:exp_avg_sq=shared        the second moments of these parameters, not the parameters themselves
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from statecodec.checkpoint.base import TensorInfo
from statecodec.codecs import Encoding, Raw
from statecodec.dtypes import SHORT
from statecodec.errors import CodecError, PolicyError, UsageError
from statecodec.roles import ROLES, family

_CONDITION = re.compile(r"(ndim|numel|cols)(>=|<=|==|<|>)(\d{1,18})")
_MAX_RULES_BYTES = 16 << 20


@dataclass(frozen=True)
class Rule:
    """How tensors that match a pattern and conditions are stored.

    Args:
        pattern: A shell pattern over the tensor's name or its parameter's name, or a role.
        encoding: How what matches is stored.
        conditions: All must hold: a dtype, a role, or a comparison such as `numel>=4096`.
    """

    pattern: str
    encoding: Encoding
    conditions: tuple[str, ...] = ()

    def matches(self, tensor: TensorInfo) -> bool:
        """Whether this rule is for a tensor.

        Args:
            tensor: The tensor.

        Returns:
            True if pattern and conditions match.
        """
        if self.pattern in ROLES:
            named = self.pattern in (tensor.role, family(tensor.role))
        else:
            named = fnmatchcase(tensor.name, self.pattern) or (
                tensor.param is not None and fnmatchcase(tensor.param, self.pattern)
            )
        return named and all(_holds(condition, tensor) for condition in self.conditions)

    def __str__(self) -> str:
        where = ":" + ",".join(self.conditions) if self.conditions else ""
        return f"{self.pattern}{where}={self.encoding}"


@dataclass(frozen=True)
class Policy:
    """Ordered rules; a tensor that no rule matches is kept `raw`.

    Args:
        rules: The rules; the first that matches decides.

    Example:
        >>> from statecodec.dtypes import FLOAT32
        >>> policy = Policy((parse_rule("*.wte.*=raw"), parse_rule("weight:ndim>=2=split")))
        >>> tensor = TensorInfo("model.h.0.weight", "weight", "h.0.weight", (64, 64), FLOAT32)
        >>> str(policy.encoding_for(tensor))
        'split'
    """

    rules: tuple[Rule, ...]

    def rule_for(self, tensor: TensorInfo) -> Rule | None:
        """The first rule that matches a tensor.

        Args:
            tensor: The tensor.

        Returns:
            The rule; None if none matches.
        """
        return next((rule for rule in self.rules if rule.matches(tensor)), None)

    def unmatched(self, tensors: Iterable[TensorInfo]) -> tuple[Rule, ...]:
        """The rules that match no tensor: misspelt, or made for another model.

        Args:
            tensors: All tensors of a checkpoint.

        Returns:
            These rules, in order.
        """
        left = list(self.rules)
        for tensor in tensors:
            if not left:
                break
            left = [rule for rule in left if not rule.matches(tensor)]
        return tuple(left)

    def refuse_changes(self, hint: str) -> None:
        """Refuse rules that store what changed since a base, where there is no base.

        Args:
            hint: What to do, for the message.

        Raises:
            UsageError: If there is such a rule.
        """
        for rule in self.rules:
            if rule.encoding.change is not None:
                raise UsageError(f"rule {rule}: it stores what changed since a base checkpoint; {hint}")

    def encoding_for(self, tensor: TensorInfo) -> Encoding:
        """How a tensor is stored by the first rule that matches it.

        Args:
            tensor: The tensor.

        Returns:
            The rule's encoding; `raw` if none matches.
        """
        rule = self.rule_for(tensor)
        return rule.encoding if rule else Encoding(Raw())


def parse_rule(text: str) -> Rule:
    """Make a rule from its text.

    Args:
        text: `PATTERN[:CONDITION,...]=CODEC`.

    Returns:
        The rule.

    Raises:
        PolicyError: If it cannot be read.

    Example:
        >>> parse_rule("weight:fp32,numel>=4096=split(low_bits=16)").conditions
        ('fp32', 'numel>=4096')
    """
    depth, equals = 0, -1
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        comparison = text[i - 1 : i] in ("<", ">", "=") or text[i + 1 : i + 2] == "="
        if char == "=" and depth == 0 and not comparison:
            equals = i
            break
    if equals <= 0:
        raise PolicyError(f"rule {text!r}: expected PATTERN=CODEC, for example 'exp_avg_sq=companded(curve=log)'")
    left, right = text[:equals].strip(), text[equals + 1 :].strip()
    pattern, _, where = left.partition(":")
    conditions = tuple(c.strip() for c in where.split(",") if c.strip())
    for condition in conditions:
        if condition not in SHORT and condition not in ROLES and not _CONDITION.fullmatch(condition):
            raise PolicyError(
                f"rule {text!r}: condition {condition!r} is neither a dtype ({', '.join(SHORT)}), nor a role, "
                "nor like 'ndim>=2', 'numel>=4096'"
            )
    try:
        return Rule(pattern.strip() or "*", Encoding.parse(right), conditions)
    except CodecError as error:
        raise PolicyError(f"rule {text!r}: {error}") from error


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read rules from a JSON file.

    An entry whose codec is null (an SNR rule that shares nothing) leaves its tensors to later rules.

    Args:
        path: The file: a list of rule texts, or {"rules": [text or {"pattern", "codec", "role"}, ...]}; `role` may be
            left out.

    Returns:
        The rules, in order.

    Raises:
        PolicyError: If the file or a rule in it cannot be read.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_RULES_BYTES:
            raise PolicyError(f"rules file {path}: larger than {_MAX_RULES_BYTES} bytes")
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"rules file {path}: {error}") from error
    entries = document.get("rules") if isinstance(document, dict) else document
    if not isinstance(entries, list):
        raise PolicyError(f"rules file {path}: expected a list of rules, or an object with one under 'rules'")
    rules = (_entry(path, entry) for entry in entries)
    return tuple(rule for rule in rules if rule is not None)


def unmatched_notes(rules: Policy, tensors: Iterable[TensorInfo], *, strict: bool) -> tuple[str, ...]:
    """A note that names the rules which match no tensor. Raises PolicyError instead if `strict`."""
    unmatched = [str(rule) for rule in rules.unmatched(tensors)]
    if not unmatched:
        return ()
    more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
    verb = "rule matches" if len(unmatched) == 1 else "rules match"
    message = f"{len(unmatched)} {verb} no tensor: {', '.join(unmatched[:5])}{more}; `inspect --all` lists the names"
    if strict:
        raise PolicyError(message)
    return (message,)


def policy(groups: Iterable[Sequence[Rule]]) -> Policy:
    """One policy of several groups of rules, the earlier ones first."""
    return Policy(tuple(rule for group in groups for rule in group))


def _entry(path: Path, entry: object) -> Rule | None:
    if isinstance(entry, str):
        return parse_rule(entry)
    if isinstance(entry, dict) and isinstance(entry.get("pattern"), str):
        role, codec = entry.get("role"), entry.get("codec")
        if role is not None and role not in ROLES:
            raise PolicyError(f"rules file {path}: role {str(role)[:40]!r} is none of {', '.join(ROLES)}")
        if codec is None and "dims" in entry:
            return None
        if isinstance(codec, str):
            return parse_rule(f"{entry['pattern']}{':' + role if role else ''}={codec}")
    raise PolicyError(f"rules file {path}: a rule is text or has 'pattern' and 'codec', not {str(entry)[:80]!r}")


def _holds(condition: str, tensor: TensorInfo) -> bool:
    if condition in SHORT:
        return tensor.dtype == SHORT[condition]
    if condition in ROLES:
        return condition in (tensor.role, family(tensor.role))
    match = _CONDITION.fullmatch(condition)
    assert match is not None  # parse_rule checked it
    quantity, operator, bound = match.group(1), match.group(2), int(match.group(3))
    value = {"ndim": len(tensor.shape), "numel": tensor.numel, "cols": tensor.shape[-1] if tensor.shape else 1}[
        quantity
    ]
    return {
        ">=": value >= bound,
        "<=": value <= bound,
        "==": value == bound,
        "<": value < bound,
        ">": value > bound,
    }[operator]
