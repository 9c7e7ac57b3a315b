"""SNR during training, at the schedule of the paper (SlimAdam, section 3.1): a few dozen measurements in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecodec.choose.architectures import recognise
from statecodec.choose.snr import CUTOFF, Dims, LayerSNR, snr
from statecodec.choose.snr_rules import rules_document, write_rules
from statecodec.codecs import EncodedTensor, Folded, LowRank, Shared
from statecodec.errors import UsageError
from statecodec.lazy import torch
from statecodec.names import bare_name

if TYPE_CHECKING:
    from torch import Tensor

Schedule = Callable[[int], bool]


def paper_schedule(step: int) -> bool:
    """Step 1, every 100 steps below 1000, every 1000 from there on."""
    return step == 1 or (step > 0 and step % (100 if step < 1000 else 1000) == 0)


class SNRTracker:
    """Follows the SNR of a live optimizer's second moments.

    Works with torch.optim.Adam and AdamW and with the optimizers of this library. The measured run must keep whole
    second moments: shared, folded or low-rank ones have nothing left to measure. Between measurements a step costs one
    comparison; only sums of ratios are kept. Sharded (DTensor) states are gathered for the measurement.

    Args:
        optimizer: The optimizer of the run.
        named_parameters: The model's `named_parameters()`.
        schedule: Takes a step, counted from 1, and says whether to measure at it. By default step 1, every 100 steps
            below 1000, and every 1000 from there on.

    Source:
        SlimAdam (arXiv 2503.01843), section 3.1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> tracker = SNRTracker(optimizer, model.named_parameters())
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> tracker.step(), tracker.steps
        (True, (1,))
        >>> [rule["pattern"] for rule in tracker.rules()["rules"]]
        ['weight']
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        schedule: Schedule = paper_schedule,
    ) -> None:
        self._optimizer, self._schedule = optimizer, schedule
        self._params = {bare_name(name): p for name, p in named_parameters}  # rules name the bare model's parameters
        self._layers = recognise({name: tuple(p.shape) for name, p in self._params.items()})
        self._count = 0
        self._steps: list[int] = []
        self._sums: dict[str, dict[Dims, tuple[float, int]]] = {}

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were measured."""
        return tuple(self._steps)

    def step(self) -> bool:
        """Call after every optimizer step; True if this one was measured."""
        self._count += 1
        if not self._schedule(self._count):
            return False
        self.measure()
        return True

    @torch.no_grad()
    def measure(self) -> None:
        """Measure now, whatever the schedule says.

        Raises:
            UsageError: If the optimizer does not keep whole second moments.
        """
        for name, param in self._params.items():
            if not self._layers[name].shareable or not param.numel():
                continue
            moment = _second_moment(self._optimizer.state.get(param, {}), name)
            if moment is None:
                continue
            sums = self._sums.setdefault(name, {})
            for dims, ratio in snr(moment).items():
                if not math.isnan(ratio):
                    total, count = sums.get(dims, (0.0, 0))
                    sums[dims] = (total + ratio, count + 1)
        self._steps.append(self._count)

    def layers(self) -> list[LayerSNR]:
        """The averages over the measured steps; vectors and norms are included, as not shareable.

        Returns:
            One record a parameter.

        Raises:
            UsageError: Before the first measurement.
        """
        if not self._sums:
            raise UsageError(
                "no second moment has been measured yet: call step() after optimizer.step(), from step 1 on"
            )
        snrs = []
        for name, param in self._params.items():
            ratios = {dims: total / count for dims, (total, count) in self._sums.get(name, {}).items()}
            snrs.append(LayerSNR(name, tuple(param.shape), ratios, self._layers[name].shareable))
        return snrs

    def rules(self, cutoff: float = CUTOFF, basis: str = "type") -> dict[str, Any]:
        """Make the content of a rules file.

        Args:
            cutoff: Share only dimensions whose SNR is above this.
            basis: `layer`, `type` or `table`, as for `Analysis.rules`.

        Returns:
            A dict that JSON can hold, as `save_rules` writes it.

        Raises:
            UsageError: Before the first measurement.
            PolicyError: For another basis.
        """
        return rules_document(self.layers(), cutoff, basis)

    def save_rules(self, path: str | Path, cutoff: float = CUTOFF, basis: str = "type") -> None:
        """Write a rules file for `compress(rules_file=...)` and for SlimAdam.

        Args:
            path: The file.
            cutoff: Share only dimensions whose SNR is above this.
            basis: `layer`, `type` or `table`, as for `Analysis.rules`.

        Raises:
            UsageError: Before the first measurement.
            PolicyError: For another basis.
        """
        write_rules(self.rules(cutoff, basis), path)

    def state_dict(self) -> dict[str, Any]:
        """What has been measured, for a checkpoint (plain lists and numbers)."""
        sums = {n: [[list(d), total, count] for d, (total, count) in s.items()] for n, s in self._sums.items()}
        return {"count": self._count, "steps": list(self._steps), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Args:
            state: What `state_dict` gave.

        Raises:
            UsageError: If it has parameters that this model lacks.
        """
        unknown = [name for name in state["sums"] if name not in self._params]
        if unknown:
            raise UsageError(f"the saved SNRs are of parameters this model lacks: {', '.join(unknown[:3])}")
        self._count, self._steps = int(state["count"]), [int(s) for s in state["steps"]]
        self._sums = {
            name: {tuple(dims): (float(total), int(count)) for dims, total, count in rows}
            for name, rows in state["sums"].items()
        }


def _second_moment(state: Mapping[str, Any], name: str) -> Tensor | None:
    moment = state.get("exp_avg_sq")
    if isinstance(moment, EncodedTensor):
        if isinstance(moment.codec, (Shared, Folded, LowRank)):
            raise UsageError(
                f"{name}: its second moment is stored as {moment.codec.name}; the SNR needs a run that keeps it whole"
            )
        return moment.decode()
    if not isinstance(moment, torch.Tensor):
        return None
    # A sharded tensor's local rows would be measured as if they were all there are.
    return moment.full_tensor() if hasattr(moment, "full_tensor") else moment
