"""Optimizers that keep their states in the format: train with compressed states, save without re-encoding, resume from
any checkpoint.

    from statecodec.optim import AdamW
    opt = AdamW(model.named_parameters(), lr=3e-4, moments="companded8", master_weights="split24")

How it is built: an optimizer class (`adamw.py`, `sgd.py`, `lion.py`, `foam.py`, `slimadam.py`, `lorapre.py`, `muon.py`)
checks options and picks a Method per parameter; the Method says which states it keeps in which codec, and steps one
parameter. The arithmetic itself stands once in `kernels.reference.steps` (compiled for CPUs in `kernels.cpu.steps`);
`kernels.fused` is the contract of backends that step whole groups in one launch. `base.py` is torch's interface over
it, `interop.py` every direction of state dicts.
"""

from statecodec.optim.adamw import Adam, AdamW
from statecodec.optim.base import StateOptimizer
from statecodec.optim.foam import FOAM
from statecodec.optim.gradient_release import GradientRelease, enable_gradient_release
from statecodec.optim.interop import LoadReport, StateChange
from statecodec.optim.lion import Lion
from statecodec.optim.lorapre import LoRAPre
from statecodec.optim.muon import Muon
from statecodec.optim.numerics import InvisibleStep, check_numerics
from statecodec.optim.sgd import SGD, SGDW
from statecodec.optim.slimadam import SlimAdam
from statecodec.optim.weights import fp32_state_dict, load_fp32_state_dict

__all__ = [
    "FOAM", "SGD", "SGDW", "Adam", "AdamW", "GradientRelease", "InvisibleStep", "Lion", "LoRAPre", "LoadReport", "Muon",
    "SlimAdam", "StateChange", "StateOptimizer", "check_numerics", "enable_gradient_release", "fp32_state_dict",
    "load_fp32_state_dict",
]  # fmt: skip
