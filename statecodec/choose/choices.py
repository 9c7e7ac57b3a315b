"""Which codec each tensor of a checkpoint gets, and why: a chain of stages that refine choices and never replace them.

forced                      bytes that are no tensor, and storage that several views share: bit for bit
the caller's rules          the first that matches decides, and no later stage touches the tensor
the preset                  the first of its rules that matches
the budget                  weights and moments, each by its own optimizer step (`chooser`)
a base                      tensors that are smaller as what changed since it (`since_base`)
other tensors               what is smaller beside another tensor (`derived`), and what is equal to one (`copies`)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from statecodec import codecs
from statecodec.checkpoint.source import SourceCheckpoint
from statecodec.checkpoint.source_items import SourceItem
from statecodec.choose import presets
from statecodec.choose.rules import Policy, Rule, unmatched_notes
from statecodec.choose.shortfalls import Kept, Shortfall
from statecodec.choose.step_size import StepSize
from statecodec.codecs import Codec, Encoding
from statecodec.errors import UnsupportedTensor
from statecodec.roles import MOMENT_ROLES, family

_RAW = Encoding(codecs.Raw())


@dataclass(frozen=True)
class Choice:
    """How one tensor is stored, and why.

    `encoding`: the codec, and whether its parts are stored or what changed of them since a base. `settled`: later
    stages leave it alone. `unit`: one optimizer step in the unit of the codec's error sums, where that is known.
    `step`: of a first moment that is stored as a direction, the update that it belongs to. `most`: the largest rms
    error in the unit of the codec's error sums, where one is promised. `companions`: role -> name of the tensor that
    the codec needs. `otherwise`: the codec for values that this one refuses; raw for those that it refuses too.
    `shortfall`: why a budget does not bound it, where it is about the tensor.
    """

    encoding: Encoding
    reason: str
    settled: bool = False
    unit: float | None = None
    most: float | None = None
    step: StepSize | None = None
    companions: Mapping[str, str] = field(default_factory=dict)
    otherwise: Codec = field(default_factory=codecs.Raw)
    shortfall: Shortfall | None = None

    @property
    def codec(self) -> Codec:
        """The codec whose parts are stored, or what changed of them."""
        return self.encoding.codec

    @property
    def exact(self) -> bool:
        """Whether the tensor comes back bit for bit."""
        return self.encoding.exact


@dataclass(frozen=True)
class Choices(Mapping[str, Choice]):
    """A choice for every item of a checkpoint, by name; `notes` are for the report.

    `unmet` says what a preset stands for and could not do here, `kept` what the promise of a budget came to.
    """

    by_name: Mapping[str, Choice]
    notes: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    kept: Kept = field(default_factory=Kept)

    def __getitem__(self, name: str) -> Choice:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def uses_base(self) -> bool:
        """Whether any tensor is stored as what changed since a base."""
        return any(choice.encoding.change for choice in self.by_name.values())

    def noted(self, *notes: str) -> Choices:
        """The same choices with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def updated(self, choices: Mapping[str, Choice]) -> Choices:
        """The same choices with those of some tensors replaced; tensors that are settled stay as they are."""
        open_ones = {name: c for name, c in choices.items() if not self.by_name[name].settled}
        return replace(self, by_name={**self.by_name, **open_ones})


def by_rules(source: SourceCheckpoint, caller_policy: Policy, preset: str, *, strict: bool = False) -> Choices:
    """The first stages: forced choices, the caller's rules, the preset.

    A rule that matches no tensor is a note. Raises PolicyError for an unknown preset and, if `strict`, for such a rule.
    """
    rules = Policy(presets.preset(preset).rules)
    companions = {m.exp_avg: {"exp_avg_sq": m.exp_avg_sq} for m in source.moments}
    tensors = (item for item in source.items if item.region is not None)
    chosen, notes = {}, [*source.notes, *unmatched_notes(caller_policy, tensors, strict=strict)]
    for item in source.items:
        chosen[item.name], note = _first(item, caller_policy, rules, preset, companions)
        notes.extend(note)
    dropped = sum(isinstance(c.codec, codecs.Dropped) for c in chosen.values())
    if dropped:
        notes.append(f"{dropped} tensors are dropped and restore as zeros: training cannot resume from this file")
    unmet = tuple(_unmet(source, chosen, preset))
    return Choices(chosen, (*notes, *unmet), unmet)


Companions = Mapping[str, Mapping[str, str]]  # tensor -> role -> the tensor that it may need


def _first(
    item: SourceItem, caller_policy: Policy, preset: Policy, name: str, companions: Companions
) -> tuple[Choice, tuple[str, ...]]:
    if item.region is None:
        return Choice(_RAW, "bytes that are not tensors", settled=True), ()
    rule = caller_policy.rule_for(item)
    encoding = rule.encoding if rule is not None else preset.encoding_for(item)
    if encoding == _RAW:
        return Choice(encoding, _because(rule, name), settled=rule is not None or item.bytes_only), ()
    if item.region.lossless:
        reason = "kept exact, because several different views share its storage"
        return Choice(_RAW, reason, settled=True), (f"{item.name}: {reason}",)
    try:
        encoding.parts(item.shape, item.dtype)
        needed = {role: _companion(item, role, companions) for role in encoding.codec.needs}
    except UnsupportedTensor as error:
        return Choice(_RAW, f"kept exact: {error}", settled=True), (f"{item.name}: kept exact: {error}",)
    return Choice(encoding, _because(rule, name), settled=rule is not None, companions=needed), ()


def _companion(item: SourceItem, role: str, companions: Companions) -> str:
    name = companions.get(item.name, {}).get(role)
    if name is None:
        raise UnsupportedTensor(f"no {role} is known to belong to it")
    return name


def _because(rule: Rule | None, preset: str) -> str:
    return f"rule {rule}" if rule is not None else f"preset {preset}"


def _unmet(source: SourceCheckpoint, chosen: Mapping[str, Choice], preset: str) -> Iterator[str]:
    """What the preset stands for and found no tensors for."""
    roles = Counter(family(item.role) for item in source.items if item.region is not None)
    if preset == "lossless" or not any(roles[role] for role in roles if role not in ("step",)):
        return
    if preset == "weights" and not any(isinstance(c.codec, codecs.Dropped) for c in chosen.values()):
        yield "preset weights: no optimizer state was recognised here, so nothing is dropped"
    elif not any(roles[role] for role in ("weight", *MOMENT_ROLES)):
        yield f"preset {preset}: no weights and no optimizer state were recognised here, so everything is kept exact"
    if any(item.state is not None for item in source.items):
        yield f"preset {preset}: encoded states of a live optimizer are kept as they are (`convert --to torch` decodes)"
    others = (i for i in source.items if i.role == "other" and i.state is None)
    states = sum(1 for i in others if ".state." in f".{i.name}" and i.numel >= 4096)
    if states and preset != "lossless":
        yield f"preset {preset}: {states} large tensors of optimizer states are of no known kind and are kept exact"
