"""Processes that need not import torch again."""

from __future__ import annotations

import multiprocessing
from typing import Any


def forks() -> Any:
    """Like the module multiprocessing; its processes are forked from one that has imported torch, once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp"])
    return context
