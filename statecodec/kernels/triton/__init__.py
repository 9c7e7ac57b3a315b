"""The GPU backend: Triton kernels with the names, signatures and bits of `statecodec.kernels.reference`.

On CUDA tensors they compile on first use. On CPU tensors they run only under Triton's interpreter (TRITON_INTERPRET=1),
which is exact and slow: that is how they are tested without a GPU.
"""

from statecodec.kernels.triton.companding import decode_companded, encode_companded
from statecodec.kernels.triton.folding import fold_mean, unfold
from statecodec.kernels.triton.geometry import supports
from statecodec.kernels.triton.grid import (
    compare,
    decode_direction,
    decode_logarithmic,
    decode_uniform,
    encode_direction,
    encode_logarithmic,
    encode_uniform,
)
from statecodec.kernels.triton.launch import prepare
from statecodec.kernels.triton.weights import decode_split, encode_split

__all__ = [
    "compare", "decode_companded", "decode_direction", "decode_logarithmic", "decode_split", "decode_uniform",
    "encode_companded", "encode_direction", "encode_logarithmic", "encode_split", "encode_uniform", "fold_mean",
    "prepare", "supports", "unfold",
]  # fmt: skip
