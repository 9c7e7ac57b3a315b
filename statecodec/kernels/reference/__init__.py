"""The executable specification: every kernel in plain torch operations, written to be read."""

from statecodec.kernels.reference.centring import byte_counts, centre, uncentre
from statecodec.kernels.reference.companding import decode_companded, encode_companded
from statecodec.kernels.reference.folding import fold_mean, unfold
from statecodec.kernels.reference.forms import form_of
from statecodec.kernels.reference.grid import decode_direction, decode_uniform, encode_direction, encode_uniform
from statecodec.kernels.reference.logarithm import decode_logarithmic, encode_logarithmic
from statecodec.kernels.reference.narrowing import narrow, widen
from statecodec.kernels.reference.prediction import add_prediction, factors_of
from statecodec.kernels.reference.splitting import decode_split, encode_split
from statecodec.kernels.reference.statistics import compare, compare_updates, size, update_size

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
    "size",
    "uncentre",
    "unfold",
    "update_size",
    "widen",
]
