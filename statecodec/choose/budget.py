"""The budget of a compression: errors as fractions of one optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from statecodec.errors import UsageError

_SAFE = 1.05  # values do not spread evenly over the codes


@dataclass(frozen=True)
class Budget:
    """The error of moments and of weights, as fractions of one optimizer step; None leaves them as they are.

    `asked` names the options that were given: each of them must find a tensor to bound.
    """

    moments: float | None = None
    weights: float | None = None
    asked: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        preset: Budget,
        *,
        max_step_error: float | None = None,
        max_update_error: float | None = None,
        max_weight_error: float | None = None,
    ) -> Budget:
        """The preset's fractions, or that of `max_step_error` for both halves, unless another option sets one.

        Raises UsageError.
        """
        options = {
            "max_step_error": max_step_error,
            "max_update_error": max_update_error,
            "max_weight_error": max_weight_error,
        }
        for name, value in options.items():
            if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
                raise UsageError(
                    f"{name}={value!r}: expected a fraction of an optimizer step above 0 and up to 1, such as 0.01"
                )
        if max_step_error is not None:
            preset = cls(max_step_error, max_step_error)
        return cls(
            max_update_error if max_update_error is not None else preset.moments,
            max_weight_error if max_weight_error is not None else preset.weights,
            tuple(name for name, value in options.items() if value is not None),
        )

    def __bool__(self) -> bool:
        return self.moments is not None or self.weights is not None

    @property
    def figures(self) -> dict[str, float]:
        """The fractions under the names that the errors have in a report's total."""
        named = {"u_rms": self.moments, "weight_step_error": self.weights}
        return {name: fraction for name, fraction in named.items() if fraction is not None}


def codes_per_octave(fraction: float) -> int:
    """Of `logarithmic`, for a step error: 8 at 1 %, 3 at 10 %, 2 at 30 %, 1 at a whole step."""
    return max(1, math.ceil(0.8 / math.sqrt(fraction) - 1e-9))


def codes_for_the_root(fraction: float) -> int:
    """Of `logarithmic`, for a root whose relative error is the fraction: 11 at 1 %, 2 at 10 %.

    Codes 1 / n of an octave apart are off by 1 / (n * sqrt(12)) octaves, and roots by half of that times ln 2.
    """
    return max(1, math.ceil(_SAFE * math.log(2) / (2 * math.sqrt(12) * fraction)))
