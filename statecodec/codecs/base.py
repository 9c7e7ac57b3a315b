"""What a codec is, and what it makes.

A codec is a frozen dataclass whose fields are its JSON config. From (config, shape, dtype) alone `parts()` states
every stored part's dtype and shape: that gives byte counts, file headers before encoding, the check of an untrusted
file before any allocation and the zero state of a live optimizer.

Tensors are seen as rows: `()` is 1 x 1, `(n,)` is 1 x n, `(n, ...)` is n x the rest. Nothing ever crosses a row, so a
tensor may be cut between rows (and inside a row at multiples of `align()`), each piece encoded alone, and the pieces'
parts concatenated: the result equals encoding it whole. A codec whose `align()` is None needs the whole tensor.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from statecodec import dtypes, kernels
from statecodec.codecs.parts import NO_COMPANIONS, Companions, PartSpec
from statecodec.codecs.rows import FIRST, LAST, rows_cols
from statecodec.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType
from statecodec.elementwise import as_fp32
from statecodec.errors import FormatError, InvalidCodec, UnencodableValues, UnsupportedTensor, UsageError
from statecodec.kernels.fused import StateStorage
from statecodec.kernels.reference.statistics import Comparison
from statecodec.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_FLAG_TEXTS = {
    kernels.NAN: "NaN",
    kernels.INF: "infinities (or sums or casts beyond fp32)",
    kernels.NEGATIVE: "negative values in an unsigned state",
    kernels.OUT_OF_RANGE: "values beyond fp16's range",
}

FLOATS = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)


def renamed(fields: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The fields of a config with one of them under its new name."""
    return {new if key == old else key: value for key, value in fields.items()}


@dataclass(frozen=True)
class Codec(ABC):
    """A number representation for one tensor.

    Subclasses are frozen dataclasses; their fields are the config. They raise InvalidCodec for a field out of its
    range.

    Example:
        >>> import torch
        >>> from statecodec.codecs import parse
        >>> encoded = parse("uniform(step=0.5)").encode(torch.tensor([0.1, 0.9, -2.0]))
        >>> encoded.parts["codes"], encoded.decode()
        (tensor([ 0,  2, -4], dtype=torch.int32), tensor([ 0.,  1., -2.]))
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    """Roles of the companions without which a tensor is neither encoded nor decoded."""
    needs_decoded: ClassVar[bool] = False
    """Whether encoding takes the companions as the reader will have them, not as they were before they were encoded."""
    repeats: ClassVar[bool] = False
    """Whether it takes a companion of its own dtype whatever that is, also one that needs companions itself."""
    exact: ClassVar[bool] = False
    """Whether a tensor that is not refused comes back bit for bit."""

    @abstractmethod
    def parts(self, shape: tuple[int, ...], dtype: DType) -> dict[str, PartSpec]:
        """Every stored part of a tensor of this shape and dtype, in storage order.

        Args:
            shape: The tensor's shape.
            dtype: The tensor's dtype.

        Returns:
            The parts by name.

        Raises:
            UnsupportedTensor: If the codec does not take such a tensor.
        """

    @abstractmethod
    def encode_into(
        self, x: Tensor, parts: Mapping[str, Tensor], backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> Comparison | None:
        """Encode a tensor into preallocated parts.

        Args:
            x: The tensor: contiguous, of any shape.
            parts: What `parts` says, allocated on x's device; overwritten.
            backend: The kernels to encode with.
            companions: The values of the tensors that `needs` names, by role, with as many elements as x (see
                `needs_decoded`).

        Returns:
            The sums of the error made, where the codec knows them without decoding; else None.

        Raises:
            UnencodableValues: If x holds values that the codec would falsify.
            UsageError: If a companion is missing.
        """

    @property
    def portable(self) -> bool:
        """Whether parts and decoded values have the same bits on every device.

        Not so where torch sums or multiplies.
        """
        fields = (getattr(self, f.name) for f in dataclasses.fields(self))
        return all(value.portable for value in fields if isinstance(value, Codec))

    @property
    def in_pieces(self) -> bool:
        """Whether `decode_piece` works.

        Only codecs that need the whole tensor to encode, but not to decode, have it.
        """
        return False

    def decode_piece(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], start: int, out: Tensor, backend: kernels.Backend
    ) -> None:
        """Decode a piece of a tensor, in memory for that piece only.

        Args:
            parts: The parts of the whole tensor.
            shape: The whole tensor's shape.
            start: The piece's first element in the flattened tensor.
            out: The piece as (rows, columns), contiguous: whole rows (see `rows_cols`), or within one row. Overwritten.
            backend: The kernels to decode with.

        Raises:
            NotImplementedError: Unless `in_pieces`.
        """
        raise NotImplementedError(self.name)

    @abstractmethod
    def decode_into(
        self, parts: Mapping[str, Tensor], out: Tensor, backend: kernels.Backend, companions: Companions = NO_COMPANIONS
    ) -> None:
        """Decode parts into a tensor.

        Args:
            parts: As `encode_into` wrote them.
            out: The tensor: contiguous, in its own shape and dtype, on the device of the parts. Overwritten.
            backend: The kernels to decode with.
            companions: The decoded values of the tensors that `needs` names, by role.

        Raises:
            UsageError: If a companion is missing.
        """

    @abstractmethod
    def error_bound(self, x: Tensor, companions: Companions = NO_COMPANIONS) -> Tensor:
        """Elementwise bound on |decode(encode(x)) - x|.

        Args:
            x: The tensor before encoding.
            companions: Those of `needs`. The bound holds where they decode to exactly what they were.

        Returns:
            float64, in the shape of x; 0 where the codec is exact.
        """

    def rows_cols(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How this codec sees a tensor as a matrix of rows.

        Args:
            shape: The tensor's shape.

        Returns:
            (rows, columns).
        """
        return rows_cols(shape)

    def settled(self, shape: tuple[int, ...]) -> Codec:
        """This codec without settings that make no difference for a shape, such as `rows=last` up to two dimensions.

        Args:
            shape: The tensor's shape.

        Returns:
            A codec that makes the same parts of such a tensor.
        """
        if len(shape) > 2:
            return self
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changes: dict[str, Any] = {k: v.settled(shape) for k, v in fields.items() if isinstance(v, Codec)}
        if fields.get("rows") == LAST:
            changes["rows"] = FIRST
        return dataclasses.replace(self, **changes) if changes else self

    @classmethod
    def upgraded(cls, version: int, fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Translate the config of an earlier version of this codec.

        Args:
            version: The config's version.
            fields: Its fields.

        Returns:
            The fields with which this version means the same; None if there was no such version.
        """
        return None

    def align(self, shape: tuple[int, ...]) -> int | None:
        """Where a row may be cut.

        Args:
            shape: The tensor's shape.

        Returns:
            Cut points inside a row must be multiples of this many elements; None if the tensor cannot be cut at all.
        """
        return 1

    def encode(self, x: Tensor, backend: str | None = None, companions: Companions = NO_COMPANIONS) -> EncodedTensor:
        """Encode a whole tensor.

        Args:
            x: The tensor, of any shape and device.
            backend: `reference`, `cpu` or `triton`; by default the one for x's device.
            companions: The values of the tensors that `needs` names, by role.

        Returns:
            The encoded tensor, on x's device.

        Raises:
            UnsupportedTensor: If the codec does not take such a tensor.
            UnencodableValues: If x holds values that the codec would falsify.
            BackendUnavailable: If the named backend is not there.
            UsageError: If a companion is missing.
        """
        shape, x = tuple(x.shape), x.detach().contiguous()
        chosen = kernels.resolve(backend, x.device)
        specs = self.parts(shape, dtypes.of(x.dtype))
        parts = {k: torch.empty(s.shape, dtype=s.dtype.torch, device=x.device) for k, s in specs.items()}
        self.encode_into(x, parts, chosen, companions)
        return EncodedTensor(self, shape, x.dtype, parts)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> EncodedTensor:
        """Encode an all-zero tensor without making one: all parts are zero.

        Args:
            shape: The tensor's shape.
            dtype: The tensor's dtype.
            device: Where the parts go.

        Returns:
            The encoded tensor.

        Raises:
            UnsupportedTensor: If the codec does not take such a tensor.
        """
        specs = self.parts(shape, dtypes.of(dtype))
        return EncodedTensor(
            self, shape, dtype, {k: torch.zeros(s.shape, dtype=s.dtype.torch, device=device) for k, s in specs.items()}
        )

    def nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Bytes of all parts of a tensor, before packing.

        Args:
            shape: The tensor's shape.
            dtype: The tensor's dtype.

        Returns:
            The number of bytes.

        Raises:
            UnsupportedTensor: If the codec does not take such a tensor.
        """
        return sum(spec.nbytes for spec in self.parts(shape, dtype).values())

    def stored(self) -> StateStorage | None:
        """How fused optimizer steps are told what the parts hold; None if they cannot step this codec's parts."""
        return None

    def config(self) -> dict[str, Any]:
        """JSON config: {"name": ..., "version": ..., field: value, ...}; nested codecs are nested configs."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {
            k: v.config() if isinstance(v, Codec) else list(v) if isinstance(v, tuple) else v for k, v in fields.items()
        }
        return {"name": self.name, "version": self.version, **plain}

    def companion(self, companions: Companions, like: Tensor) -> Tensor:
        """The values of the one companion that this codec needs.

        Args:
            companions: Values by role.
            like: The tensor to be encoded or decoded.

        Returns:
            Flat fp32 values on the device of `like`.

        Raises:
            UsageError: If the companion is missing or has another number of elements.
        """
        (role,) = self.needs
        values = companions.get(role)
        if values is None or values.numel() != like.numel():
            there = "nothing" if values is None else f"{values.numel()} elements"
            raise UsageError(f"{self.name} needs the {role} of the same {like.numel()} elements, found {there}")
        return as_fp32(values.detach().to(like.device).contiguous()).view(-1)

    def require_float(self, dtype: DType) -> None:
        """Refuse a dtype other than fp32, fp16, bf16 and fp64.

        Args:
            dtype: The tensor's dtype.

        Raises:
            UnsupportedTensor: For another dtype.
        """
        if dtype not in FLOATS:
            raise UnsupportedTensor(f"{self.name} takes fp32, fp16, bf16 or fp64 tensors, not {dtype}; use raw")

    def require(self, condition: bool, message: str) -> None:
        """Refuse a field that is out of its range.

        Args:
            condition: Whether it is within.
            message: What was found and what is expected.

        Raises:
            InvalidCodec: If the condition does not hold, with the codec's name and the message.
        """
        if not condition:
            raise InvalidCodec(f"{self.name}: {message}")

    def require_inner(self, inner: Codec) -> None:
        """Refuse an inner codec that cannot encode a tensor from its values alone.

        Args:
            inner: The codec for what this one makes of a tensor.

        Raises:
            InvalidCodec: If it needs companions.
        """
        self.require(not inner.needs, f"inner={inner.name} needs companions, which means do not have")

    def refuse(self, flags: int) -> None:
        """Refuse the values that an encoding kernel complained about.

        Args:
            flags: What the kernel returned: bits of `kernels.NAN`, `INF`, `NEGATIVE` and `OUT_OF_RANGE`; 0 for nothing.

        Raises:
            UnencodableValues: If any bit is set, with what it means.
        """
        if flags:
            kinds = ", ".join(text for bit, text in _FLAG_TEXTS.items() if flags & bit)
            raise UnencodableValues(
                f"{self.name} cannot represent this tensor: it holds {kinds}; raw keeps it as it is"
            )


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor in encoded form.

    Args:
        codec: How it is encoded.
        shape: The decoded tensor's shape.
        dtype: The decoded tensor's dtype.
        parts: The encoded parts by name, in the dtypes and shapes that `codec.parts` says.

    Raises:
        FormatError: If the parts do not fit the codec, shape and dtype.
    """

    codec: Codec
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        specs = self.codec.parts(self.shape, dtypes.of(self.dtype))
        actual = {k: PartSpec(dtypes.of(t.dtype), tuple(t.shape)) for k, t in self.parts.items()}
        if actual != specs:
            raise FormatError(f"parts of {self.codec} for {self.dtype} {self.shape}: expected {specs}, found {actual}")

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(t.numel() * t.element_size() for t in self.parts.values())

    @property
    def device(self) -> torch.device:
        """The device of the parts; the CPU if there are none."""
        for part in self.parts.values():
            return part.device
        return torch.device("cpu")

    def decode(
        self, out: Tensor | None = None, backend: str | None = None, companions: Companions = NO_COMPANIONS
    ) -> Tensor:
        """Decode the tensor.

        Args:
            out: Where to, contiguous, of the same shape and dtype; by default a new tensor.
            backend: `reference`, `cpu` or `triton`; by default the one for the parts' device.
            companions: The decoded values of the tensors that the codec needs, by role.

        Returns:
            The decoded tensor: `out`, if there is one.

        Raises:
            BackendUnavailable: If the named backend is not there.
            UsageError: If a companion is missing.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.codec.decode_into(self.parts, out, kernels.resolve(backend, self.device), companions)
        return out

    def to(self, device: torch.device | str) -> EncodedTensor:
        """Move or copy the parts to a device.

        Args:
            device: The device.

        Returns:
            The same encoding with its parts there.
        """
        return EncodedTensor(self.codec, self.shape, self.dtype, {k: t.to(device) for k, t in self.parts.items()})
