"""How a stored item holds its tensor: by a codec's parts, or by what changed of them since a base checkpoint.

Written as text like a codec, with the change in front: `delta`, `delta(inner=split)`, `residual(inner=companded)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from statecodec.codecs.base import FLOATS, Codec
from statecodec.codecs.cast import Cast
from statecodec.codecs.changes import Change, changed_specs
from statecodec.codecs.companded import Companded
from statecodec.codecs.logarithmic import Logarithmic
from statecodec.codecs.parts import PartSpec
from statecodec.codecs.raw import Raw
from statecodec.codecs.spec import format_codec, from_config, parse
from statecodec.codecs.split import Split
from statecodec.codecs.uniform import Uniform
from statecodec.dtypes import FLOAT32, DType
from statecodec.errors import InvalidCodec, UnsupportedTensor, UnsupportedVersion

_VERSION = 1  # the version of changes in files
_DEFAULT: Mapping[Change, Codec] = {Change.PARTS: Raw(), Change.VALUES: Companded()}
INNER: Mapping[Change, tuple[type[Codec], ...]] = {
    Change.PARTS: (Raw, Cast, Split, Companded, Logarithmic, Uniform),
    Change.VALUES: (Cast, Companded, Uniform),
}
"""The codecs that there are changes of."""
_WITH_INNER = re.compile(r"\s*(?:\(\s*(?:inner\s*=(?P<inner>.*?),?\s*)?\))?\s*", re.DOTALL)


@dataclass(frozen=True)
class Encoding:
    """How a stored item holds its tensor: by a codec's parts, or by what changed of them since a base.

    Args:
        codec: The codec of the stored parts: of the tensor itself, or (VALUES) of its difference from the base's
            tensor.
        change: How what is stored relates to the base; None where the item needs no base.

    Raises:
        InvalidCodec: If there is no such change of that codec.

    Example:
        >>> str(Encoding.parse("delta(inner=split)")), Encoding.parse("raw").exact
        ('delta(inner=split)', True)
    """

    codec: Codec
    change: Change | None = None

    def __post_init__(self) -> None:
        if self.change is None:
            return
        taken = INNER[self.change]
        if not isinstance(self.codec, taken):
            names = ", ".join(codec.name for codec in taken)
            raise InvalidCodec(f"{self.change.value}: inner={self.codec.name}, expected one of {names}")
        if self.change is Change.VALUES and isinstance(self.codec, Companded) and not self.codec.signed:
            raise InvalidCodec(f"{self.change.value}: inner must be signed, {format_codec(self.codec)} is not")

    @property
    def exact(self) -> bool:
        """Whether the tensor comes back bit for bit."""
        return self.standalone is not None and self.standalone.exact

    @property
    def standalone(self) -> Codec | None:
        """The codec of the tensor's own parts, once the base has been added; None of a change of values."""
        return None if self.change is Change.VALUES else self.codec

    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        """Every stored part of a tensor of this shape and dtype, in storage order.

        Args:
            shape: The tensor's shape.
            dtype: The tensor's dtype.

        Returns:
            The parts by name.

        Raises:
            UnsupportedTensor: If the codec, or the change, does not take such a tensor.
        """
        if self.change is None:
            return self.codec.parts(shape, dtype)
        if self.change is Change.PARTS:
            return changed_specs(self.codec.parts(shape, dtype))
        if dtype not in FLOATS:
            raise UnsupportedTensor(f"{self.change.value} takes fp32, fp16, bf16 or fp64 tensors, not {dtype}; use raw")
        return {f"{self.change.value}.{k}": s for k, s in self.codec.parts(shape, FLOAT32).items()}

    def nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Bytes of all parts of a tensor, before packing.

        Args:
            shape: The tensor's shape.
            dtype: The tensor's dtype.

        Returns:
            The number of bytes.

        Raises:
            UnsupportedTensor: If the codec, or the change, does not take such a tensor.
        """
        return sum(spec.nbytes for spec in self.parts(shape, dtype).values())

    def settled(self, shape: tuple[int, ...]) -> Encoding:
        """This encoding without settings that make no difference for a shape (see `Codec.settled`).

        Args:
            shape: The tensor's shape.

        Returns:
            An encoding that makes the same parts of such a tensor.
        """
        return Encoding(self.codec.settled(shape), self.change)

    def config(self) -> dict[str, Any]:
        """JSON config, as manifests have it."""
        if self.change is None:
            return self.codec.config()
        return {"name": self.change.value, "version": _VERSION, "inner": self.codec.config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Encoding:
        """Make an encoding from its JSON config, which is not trusted.

        Args:
            config: What `config` gave.

        Returns:
            The encoding.

        Raises:
            UnknownCodec: If there is no codec of that name.
            InvalidCodec: If a field is unknown or out of its range.
            UnsupportedVersion: If the codec or the change is of a version that is not known here.
        """
        change = _named(config.get("name"))
        if change is None:
            return cls(from_config(config))
        unknown = sorted(map(str, config.keys() - {"name", "version", "inner"}))
        if unknown:
            raise InvalidCodec(f"{change.value} has no field {unknown[0][:40]!r}; its field is: inner")
        version = config.get("version", _VERSION)
        if type(version) is not int or version != _VERSION:
            raise UnsupportedVersion(f"{change.value} version {str(version)[:40]}: this reader knows {_VERSION}")
        return cls(from_config(config["inner"]) if "inner" in config else _DEFAULT[change], change)

    @classmethod
    def parse(cls, text: str) -> Encoding:
        """Make an encoding from its text.

        Args:
            text: A codec's text, or `delta`, `delta(inner=CODEC)`, `residual` or `residual(inner=CODEC)`.

        Returns:
            The encoding.

        Raises:
            UnknownCodec: If there is no codec of that name.
            InvalidCodec: If the text cannot be read, or a field is unknown or out of its range.
            UnsupportedVersion: If the text states a version that is not known here.
        """
        word = re.match(r"\s*(\w*)", text)
        change = _named(word.group(1)) if word is not None else None
        if word is None or change is None:
            return cls(parse(text))
        rest = _WITH_INNER.fullmatch(text, word.end())
        if rest is None:
            raise InvalidCodec(f"{text!r}: expected {change.value} or {change.value}(inner=CODEC)")
        inner = rest.group("inner")
        return cls(_DEFAULT[change] if inner is None else parse(inner), change)

    def __str__(self) -> str:
        """The shortest text that `parse` turns into this encoding."""
        if self.change is None:
            return format_codec(self.codec)
        inner = "" if self.codec == _DEFAULT[self.change] else f"(inner={format_codec(self.codec)})"
        return f"{self.change.value}{inner}"


def _named(name: object) -> Change | None:
    return next((change for change in Change if change.value == name), None)
