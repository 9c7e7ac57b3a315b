"""Which parameters are hidden matrices: FOAM, LoRAPre and Muon treat those, and leave the rest to Adam."""

from __future__ import annotations

import re

from torch import Tensor

from statecodec.optim.method import Group, matrix_shape

# Whole words of a dotted name that mark an embedding or an output head, whatever the model family calls it.
_EXEMPT = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|tok_emb|pos_emb|lm_head|heads?|classifier|output(?=\.weight$)|unembed\w*)(\.|$)"
)


def is_hidden_matrix(param: Tensor, name: str | None, group: Group) -> bool:
    """Whether a parameter is a matrix inside the network.

    The group's `matrix` option (True or False) decides if it is set. Otherwise: at least two dimensions, more than one
    row and column, and a name (if parameters were given with names) that is not an embedding's or a head's. Convolution
    kernels count, as out x everything else.
    """
    if param.ndim < 2 or min(matrix_shape(tuple(param.shape))) < 2:
        return False
    if group.get("matrix") is not None:
        return bool(group["matrix"])
    return name is None or _EXEMPT.search(name) is None
