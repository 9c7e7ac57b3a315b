"""What one optimizer step of a weight follows from: moments, and the settings of their group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AdamSettings:
    """The numbers of one parameter's Adam update.

    Args:
        param: Name of the parameter, if it is known.
        beta1: Decay rate of exp_avg.
        beta2: Decay rate of exp_avg_sq.
        eps: What is added to the root.
        lr: Learning rate; None where the file does not say.
        weight_decay: Per unit of lr; None where the file does not say.
        step: Number of steps done; None where the file does not say.
    """

    param: str | None
    beta1: float
    beta2: float
    eps: float
    lr: float | None
    weight_decay: float | None
    step: float | None


@dataclass(frozen=True)
class Moments(AdamSettings):
    """What the Adam update of one parameter needs.

    Args:
        param: Name of the parameter, if it is known.
        beta1: Decay rate of exp_avg.
        beta2: Decay rate of exp_avg_sq.
        eps: What is added to the root.
        lr: Learning rate; None where the file does not say.
        weight_decay: Per unit of lr; None where the file does not say.
        step: Number of steps done; None where the file does not say.
        exp_avg: Name of the first moment.
        exp_avg_sq: Name of the second moment by whose root the update is divided (amsgrad's is max_exp_avg_sq).
        weight: Name of the weight; None where it is not among the tensors.
    """

    exp_avg: str
    exp_avg_sq: str
    weight: str | None


@dataclass(frozen=True)
class MomentumSettings:
    """How one step moves a weight, where that follows from a momentum alone.

    Args:
        lr: Learning rate; None where the file does not say.
        update: The rms of the update, of which lr times as much is added to the weight; None if the update is the
            momentum itself.
        orthogonal: The update is the momentum with all its singular values made equal: small ones are amplified.
    """

    lr: float | None
    update: float | None
    orthogonal: bool


@dataclass(frozen=True)
class Momentum(MomentumSettings):
    """A momentum from which alone a weight's step follows: that of SGD, Lion, Muon, and of RMSprop where it has one.

    Args:
        lr: Learning rate; None where the file does not say.
        update: The rms of the update; None if the update is the momentum itself.
        orthogonal: The update is the momentum with all its singular values made equal.
        momentum: Name of the momentum.
        weight: Name of the weight.
    """

    momentum: str
    weight: str


@dataclass(frozen=True)
class QuantisedState:
    """A state that another package keeps quantised.

    Args:
        package: The package (statecodec/quantised.py).
        bits: Of a number.
        shape: Of the state.
        codes: Name of the tensor of codes.
        scales: Name of the tensor of scales.
        table: Name of the tensor of what codes stand for; None where they are numbers.
    """

    package: str
    bits: int
    shape: tuple[int, ...]
    codes: str
    scales: str
    table: str | None

    def renamed(self, name: Callable[[str], str]) -> QuantisedState:
        """Give its tensors other names.

        Args:
            name: From old to new.

        Returns:
            The same state.
        """
        table = None if self.table is None else name(self.table)
        return replace(self, codes=name(self.codes), scales=name(self.scales), table=table)


@dataclass(frozen=True)
class QuantisedMoments(AdamSettings):
    """The Adam update of one weight, whose moments another package keeps quantised.

    Args:
        param: Name of the parameter, if it is known.
        beta1: Decay rate of exp_avg.
        beta2: Decay rate of exp_avg_sq.
        eps: What is added to the root.
        lr: Learning rate; None where the file does not say.
        weight_decay: Per unit of lr; None where the file does not say.
        step: Number of steps done; None where the file does not say.
        exp_avg: The first moment.
        exp_avg_sq: The second moment.
        weight: Name of the weight.
    """

    exp_avg: QuantisedState
    exp_avg_sq: QuantisedState
    weight: str

    def renamed(self, name: Callable[[str], str]) -> QuantisedMoments:
        """Give the tensors of both states, and the weight, other names.

        Args:
            name: From old to new.

        Returns:
            The same update.
        """
        first, second = self.exp_avg.renamed(name), self.exp_avg_sq.renamed(name)
        return replace(self, exp_avg=first, exp_avg_sq=second, weight=name(self.weight))
