"""Every error this library raises on purpose.

    StatecodecError                 code
    |-- UsageError                  usage                 the call itself is wrong (exit code 2 on the command line)
    |-- CodecError                  codec
    |   |-- UnknownCodec            codec.unknown         no codec of that name
    |   |-- InvalidCodec            codec.invalid         a field of the codec's config is out of its range
    |   |-- UnsupportedTensor       codec.unsupported     the codec does not take this dtype or shape
    |   `-- UnencodableValues       codec.values          NaN, infinities, negatives ... that the codec would falsify
    |-- BackendUnavailable          backend.unavailable   an explicitly asked-for kernel backend is not there
    |-- FormatError                 format                one of our own files is not what it says
    |   |-- CorruptFile             format.corrupt        a checksum does not match
    |   |-- UnsupportedVersion      format.version        written by a newer major version, or an unknown codec version
    |   `-- LimitExceeded           format.limit          refused before allocating: the Reader's limits
    |-- LayoutError                 layout
    |   |-- UnknownLayout           layout.unknown        not a checkpoint file we can locate tensors in
    |   |-- LegacyTorchFile         layout.legacy         a pre-1.6 torch.save stream
    |   |-- MalformedCheckpoint     layout.malformed      truncated, lying or hostile input file
    |   `-- UnsafeCheckpoint        layout.unsafe         unpickling it could run code, and safe_only was asked for
    |-- PolicyError                 policy                a rule or rules file that cannot be read
    |-- OutputExists                output.exists         the destination is there and --force was not given
    |-- OutputFailed                output.failed         the output cannot be written: disk full, no such directory ...
    |-- VerificationFailed          verify.failed         the file is intact but not what it was compared with
    `-- OptimizerError              optim                 a state or setting that the optimizer cannot take

`code` is stable: the CLI's --json and the HTTP service report it, and scripts may depend on it.
"""

from __future__ import annotations


class StatecodecError(Exception):
    """Base of every deliberate error; `code` is a stable identifier."""

    code = "error"


class UsageError(StatecodecError):
    """The call itself is wrong."""

    code = "usage"


class CodecError(StatecodecError):
    """A codec could not do what was asked."""

    code = "codec"


class UnknownCodec(CodecError):
    """No codec of that name is registered."""

    code = "codec.unknown"


class InvalidCodec(CodecError):
    """A field of a codec's config is unknown or out of its range."""

    code = "codec.invalid"


class UnsupportedTensor(CodecError):
    """The codec does not take this dtype or shape."""

    code = "codec.unsupported"


class UnencodableValues(CodecError):
    """The tensor holds values (NaN, infinities, negatives ...) that the codec would falsify."""

    code = "codec.values"


class BackendUnavailable(StatecodecError):
    """A kernel backend that was asked for by name is not available."""

    code = "backend.unavailable"


class FormatError(StatecodecError):
    """One of our own files is not what it says it is."""

    code = "format"


class CorruptFile(FormatError):
    """A checksum does not match the bytes."""

    code = "format.corrupt"


class UnsupportedVersion(FormatError):
    """The file needs a newer reader."""

    code = "format.version"


class LimitExceeded(FormatError):
    """Refused before allocating: the file claims more than the Reader's limits allow."""

    code = "format.limit"


class LayoutError(StatecodecError):
    """A source checkpoint could not be read."""

    code = "layout"


class UnknownLayout(LayoutError):
    """Not a checkpoint file that tensors can be located in."""

    code = "layout.unknown"


class LegacyTorchFile(LayoutError):
    """A torch.save file from before torch 1.6 (a bare pickle stream)."""

    code = "layout.legacy"


class MalformedCheckpoint(LayoutError):
    """A truncated, lying or hostile checkpoint file."""

    code = "layout.malformed"


class UnsafeCheckpoint(LayoutError):
    """Whoever unpickles this checkpoint lets it import what can run code; with `safe_only` that is refused."""

    code = "layout.unsafe"


class PolicyError(StatecodecError):
    """A rule or a rules file cannot be read."""

    code = "policy"


class OutputExists(StatecodecError):
    """The destination exists and overwriting was not asked for."""

    code = "output.exists"


class OutputFailed(StatecodecError):
    """The output cannot be written: disk full, I/O error, no such directory, no permission."""

    code = "output.failed"


class VerificationFailed(StatecodecError):
    """The file is intact but differs from what it was compared with."""

    code = "verify.failed"


class OptimizerError(StatecodecError):
    """A state or a setting that the optimizer cannot take."""

    code = "optim"
