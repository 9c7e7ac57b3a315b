"""The layouts, in the order in which they are asked. Adding one: its module, and its row here."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import Final

from statecodec.layouts import dcp, megatron, opaque, safetensors_file, torch_zip, zero
from statecodec.layouts.listing import Listing
from statecodec.layouts.protocol import Layout

LAYOUTS: Final[list[Layout]] = [
    dcp,
    zero,
    megatron,
    torch_zip,
    safetensors_file,
]


def claimed(listing: Listing) -> Iterator[tuple[Layout, Listing]]:
    """Every file of a listing once: a layout and the files that it claims; `opaque` gets the rest.

    A file on its own stays open while the caller works on it.
    """
    taken = {path for path, file in listing.files.items() if file.layout == opaque.name}
    paths = sorted(listing.files)
    for folder in _folders(paths):
        start = bisect_left(paths, f"{folder}/") if folder else 0
        stop = bisect_left(paths, f"{folder}0") if folder else len(paths)  # "0" follows "/"
        claim = _first_claim(listing.of([p for p in paths[start:stop] if p not in taken], folder))
        if claim is not None:
            taken.update(claim[1].files)
            yield claim
    for path, file in listing.files.items():
        if path in taken and file.layout != opaque.name:
            continue
        part = listing.of((path,))
        if file.layout == opaque.name:
            yield opaque, part
        else:
            with file.open():
                yield _first_claim(part) or (opaque, part)


def _folders(paths: list[str]) -> list[str]:
    """Every folder that has several files in or below it, outermost first."""
    counts = Counter(path[:at] for path in paths for at in (0, *(i for i, c in enumerate(path) if c == "/")))
    return sorted(folder for folder, count in counts.items() if count > 1)


def _first_claim(listing: Listing) -> tuple[Layout, Listing] | None:
    for layout in LAYOUTS:
        claim = layout.claims(listing)
        if claim is not None:
            return layout, listing.of(sorted(claim.files))
    return None
