"""Optimizers with encoded states: train, save without re-encoding, and resume from any checkpoint.

    from statecodec.optim import AdamW
    opt = AdamW(model.named_parameters(), lr=3e-4, moments="companded8", master_weights="split24")

How it is built, from the bottom: a Method (`method.py`) says which states one parameter has, in which codecs, and steps
them; the arithmetic itself is `kernels.reference.steps`, compiled for CPUs in `kernels.cpu.steps`. `states.py` finds
each parameter's method and keeps its states; `adopting.py` makes states of whatever form fit it. `saving.py` and
`loading.py` are the two directions of state dicts, `fusing.py` hands whole groups to a backend, and `base.py` is
torch's interface over all of it. An optimizer (`adamw.py`, `sgd.py`, `lion.py`, `foam.py`, `slimadam.py`, `lorapre.py`,
`muon.py`) checks its options and picks the methods.
"""

from statecodec.optim.adamw import Adam, AdamW
from statecodec.optim.base import StateOptimizer
from statecodec.optim.cast_model import cast_model
from statecodec.optim.foam import FOAM
from statecodec.optim.fp32 import fp32_state_dict, load_fp32_state_dict
from statecodec.optim.gradient_release import GradientRelease, enable_gradient_release
from statecodec.optim.groups import decay_groups, with_names
from statecodec.optim.lion import Lion
from statecodec.optim.load_report import LoadReport, StateChange
from statecodec.optim.lorapre import LoRAPre
from statecodec.optim.muon import Muon
from statecodec.optim.numerics import InvisibleStep, invisible_steps
from statecodec.optim.sgd import SGD, SGDW
from statecodec.optim.slimadam import SlimAdam

# Every optimizer, by its name in checkpoints. A new one is a file and a row here.
OPTIMIZERS: dict[str, type[StateOptimizer]] = {
    cls.algorithm: cls for cls in (AdamW, Adam, SGD, SGDW, Lion, FOAM, SlimAdam, LoRAPre, Muon)
}

__all__ = [
    "FOAM",
    "OPTIMIZERS",
    "SGD",
    "SGDW",
    "Adam",
    "AdamW",
    "GradientRelease",
    "InvisibleStep",
    "Lion",
    "LoRAPre",
    "LoadReport",
    "Muon",
    "SlimAdam",
    "StateChange",
    "StateOptimizer",
    "cast_model",
    "decay_groups",
    "enable_gradient_release",
    "fp32_state_dict",
    "invisible_steps",
    "load_fp32_state_dict",
    "with_names",
]  # fmt: skip
