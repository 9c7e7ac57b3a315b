"""What is found out about the tensors of one file, in terms of the nodes of its object graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeAlias

from statecodec.layouts.base import StatePart
from statecodec.layouts.facts.quantised import QuantisedNodes
from statecodec.layouts.moments import AdamSettings, MomentumSettings
from statecodec.layouts.pickle.nodes import TensorNode
from statecodec.layouts.protocol import Facts
from statecodec.roles import Role

WeightNode: TypeAlias = "tuple[FileRoles, TensorNode]"
"""A weight, and the file that it is in."""


@dataclass(frozen=True)
class AdamNodes(AdamSettings):
    """A pair of moments as tensor nodes; the states are in one file, the weight may be in another."""

    exp_avg: TensorNode
    exp_avg_sq: TensorNode
    weight: WeightNode | None


@dataclass(frozen=True)
class QuantisedAdamNodes(AdamSettings):
    """The same of moments that another package keeps quantised."""

    exp_avg: QuantisedNodes
    exp_avg_sq: QuantisedNodes
    weight: WeightNode


@dataclass(frozen=True)
class MomentumNodes(MomentumSettings):
    """A momentum and its weight, as tensor nodes."""

    momentum: TensorNode
    weight: WeightNode


@dataclass
class FileRoles:
    """What is found out about one file's tensors, by their index."""

    facts: Facts
    roles: dict[int, Role] = field(default_factory=dict)
    """Absent means "other"."""
    params: dict[int, str] = field(default_factory=dict)
    """Names of parameters."""
    adam: list[AdamNodes] = field(default_factory=list)
    quantised: list[QuantisedAdamNodes] = field(default_factory=list)
    single: list[MomentumNodes] = field(default_factory=list)
    tensors: dict[int, str] = field(default_factory=dict)
    """Names of the logical tensors that are the node's, wholly and alone."""
    encoded: dict[int, StatePart] = field(default_factory=dict)
    """Parts of encoded states."""

    @property
    def path(self) -> str:
        """The file's path."""
        return self.facts.path

    @property
    def folder(self) -> str:
        """The path of the folder that it is in."""
        return str(PurePosixPath(self.path).parent)


Weights: TypeAlias = "Mapping[str, WeightNode]"
"""By name."""
