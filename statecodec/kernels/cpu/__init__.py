"""The CPU backend: numba kernels that release the GIL and run at a good part of memory speed.

They compile on first use (a second or two each, cached on disk) and need no compiler. Same names, same signatures and
same bits as `statecodec.kernels.reference`.
"""

from statecodec.kernels.cpu import planes
from statecodec.kernels.cpu.centring import byte_counts, centre, uncentre
from statecodec.kernels.cpu.companding import decode_companded, encode_companded
from statecodec.kernels.cpu.folding import fold_mean, unfold
from statecodec.kernels.cpu.forms import form_of
from statecodec.kernels.cpu.grid import decode_direction, decode_uniform, encode_direction, encode_uniform
from statecodec.kernels.cpu.logarithm import decode_logarithmic, encode_logarithmic
from statecodec.kernels.cpu.narrowing import narrow, widen
from statecodec.kernels.cpu.prediction import add_prediction, factors_of
from statecodec.kernels.cpu.splitting import decode_split, encode_split
from statecodec.kernels.cpu.statistics import compare, compare_updates, size, update_size

__all__ = [
    "add_prediction",
    "byte_counts",
    "centre",
    "compare",
    "compare_updates",
    "decode_companded",
    "decode_direction",
    "decode_logarithmic",
    "decode_split",
    "decode_uniform",
    "encode_companded",
    "encode_direction",
    "encode_logarithmic",
    "encode_split",
    "encode_uniform",
    "factors_of",
    "fold_mean",
    "form_of",
    "narrow",
    "planes",
    "size",
    "uncentre",
    "unfold",
    "update_size",
    "widen",
]
