"""Generated tests draw the same examples at every run, so that a fault shows in the change that brought it.

`make campaign` draws new ones. None of them has a time limit of its own: the first call of a kernel compiles it.
"""

from __future__ import annotations

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, as some frameworks do

settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("campaign", deadline=None)
settings.load_profile("campaign" if os.environ.get("STATECODEC_RANDOM") else "suite")
