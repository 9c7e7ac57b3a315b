"""Our own files with documents that lie, checkpoints with settings that make no sense, and inputs that are no files."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import statecodec
from statecodec.codecs.chunking import Chunk
from statecodec.errors import FormatError, StatecodecError, UnknownLayout
from statecodec.format import ItemSpec, Reader, Writer

Document = dict[str, Any]


def adam(path: Path, shape: tuple[int, ...] = (80, 64), **group: Any) -> Path:
    """A checkpoint with the state of one parameter."""
    torch.manual_seed(0)
    state = {"exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape), "step": torch.tensor(1e9)}
    groups = [{"params": [0], "betas": (0.9, 0.999), "eps": 1e-8, "lr": 1e-3, **group}]
    optimizer = {"state": {0: state}, "param_groups": groups}
    torch.save({"model": {"w": torch.randn(shape)}, "optimizer": optimizer}, path)
    return path


def forge(source: Path, target: Path, lie: Callable[[Document], None]) -> Path:
    """A copy of a compressed file whose checksums hold, with another document."""
    with Reader(source) as reader:
        document = copy.deepcopy(dict(reader.document))
        lie(document)
        items = [ItemSpec(i.name, i.encoding, i.shape, i.dtype, dict(i.attributes), i.companions) for i in reader.items]
        with Writer(target, items, force=True) as writer:
            for number, item in enumerate(reader.items):
                for k, chunk in enumerate(item.chunks):
                    cut = Chunk(chunk.start, chunk.stop, chunk.shape)
                    writer.append(writer.pack(number, cut, reader.read_chunk(number, k)))
            writer.close(document)
    return target


def setting(*path: Any) -> Callable[[Document], None]:
    """A lie that sets the last of `path` at the place that the others lead to."""
    *keys, last, value = path

    def lie(document: Document) -> None:
        place: Any = document
        for key in keys:
            place = place[key]
        place[last] = value

    return lie


LIES = {
    "a step beyond floats": setting("files", 0, "moments", "settings", 0, 5, 10**400),
    "no beta": setting("files", 0, "moments", "settings", 0, 0, None),
    "no eps": setting("files", 0, "moments", "settings", 0, 2, None),
    "no first moment": setting("files", 0, "moments", "exp_avg", 0, None),
    "moments of no item": setting("files", 0, "moments", "exp_avg", 0, 1000),
    "fewer first moments": setting("files", 0, "moments", "exp_avg", []),
    "settings of nobody": setting("files", 0, "moments", "kind", 0, 7),
    "regions beyond the end": setting("files", 0, "regions", "gap", 0, 1 << 40),
    "regions before the start": setting("files", 0, "regions", "gap", 0, -1),
    "regions of no item": setting("files", 0, "regions", "item", 0, 1 << 70),
    "views of no region": setting("files", 0, "views", [[0, 1000]]),
    "views without end": setting("files", 0, "views", [[0, 2]] * 1000),
    "views that are no rows": setting("files", 0, "views", [[0, 1, 2]]),
    "checksums beyond the end": setting("files", 0, "crcs", "offset", 0, 1 << 40),
    "checksums at no place": setting("files", 0, "crcs", "at", [[]]),
    "more bytes than floats count": setting("source", "bytes", 10**400),
    "fewer bytes than none": setting("source", "bytes", -1),
    "a name that is no text": setting("source", "name", 5),
    "a framework that is no text": setting("source", "framework", 5),
    "a framework that moves the cursor": setting("source", "framework", "\x1b[2J"),
    "no file": setting("files", []),
    "overlapping checksums": setting("files", 0, "crcs", [[0, 1000, [0]]] * 10_000),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lying_document_is_refused(tmp_path: Path, lie: Callable[[Document], None]) -> None:
    packed = tmp_path / "a.sc.safetensors"
    statecodec.compress(adam(tmp_path / "a.pt"), packed)
    forged = forge(packed, tmp_path / "forged.sc.safetensors", lie)
    for use in (statecodec.inspect, statecodec.load, lambda path: statecodec.diff(path, packed)):
        with pytest.raises(FormatError):
            use(forged)
    with pytest.raises(FormatError):
        statecodec.restore(forged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def directory(tmp_path: Path) -> Path:
    """A compressed directory: `a`, `b` of the same size, and `c`, a hard link to `a`."""
    source = tmp_path / "run"
    source.mkdir()
    for name in "ab":
        (source / name).write_bytes(name.encode() * 5000)
    os.link(source / "a", source / "c")
    statecodec.compress(source, tmp_path / "run.sc.safetensors")
    return tmp_path / "run.sc.safetensors"


def test_an_item_fills_one_place_only(tmp_path: Path) -> None:
    def repeat(document: Document) -> None:
        document["files"][1]["skeleton"] = document["files"][0]["skeleton"]

    with pytest.raises(FormatError, match="two places"):
        statecodec.inspect(forge(directory(tmp_path), tmp_path / "forged", repeat))


def test_a_hard_link_that_claims_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such earlier file"):
        statecodec.load(forge(directory(tmp_path), tmp_path / "forged", setting("files", 2, "bytes", 1 << 50)))


@pytest.mark.parametrize("name", ["..", "", "a\0b", "../../x", "\x1b[31m", "x\ny"])
def test_the_stored_name_stays_beside_the_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    statecodec.compress(adam(tmp_path / "a.pt"), tmp_path / "a.sc.safetensors")
    forged = forge(tmp_path / "a.sc.safetensors", folder / "forged", setting("source", "name", name))
    report = statecodec.restore(forged)
    restored = Path(report.path)
    assert restored.parent == folder
    assert restored.is_file()
    assert restored.name.isprintable()


@pytest.mark.parametrize("betas", [(2.0, 3.0), (1.0, 1.0), (-0.5, 0.999)])
def test_betas_that_are_none(tmp_path: Path, betas: tuple[float, float]) -> None:
    source = adam(tmp_path / "a.pt", betas=betas)
    statecodec.compress(source, tmp_path / "a.sc.safetensors", verify=True)


def test_diff_of_checkpoints_with_other_shapes(tmp_path: Path) -> None:
    a, b = adam(tmp_path / "a.pt"), adam(tmp_path / "b.pt", (64, 64))
    report = statecodec.diff(a, b)
    assert report.updates == ()
    assert any("exp_avg: not comparable" in note for note in report.notes)


@pytest.mark.timeout(30)
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    other = adam(tmp_path / "a.pt")
    for use in (statecodec.inspect, statecodec.load, statecodec.open, lambda path: statecodec.diff(other, path)):
        with pytest.raises(UnknownLayout):
            use(pipe)
    for verb in (statecodec.verify, statecodec.restore):
        with pytest.raises(StatecodecError):
            verb(pipe)


def test_dropped_moments_may_have_been_infinite(tmp_path: Path) -> None:
    source = adam(tmp_path / "a.pt")
    content = torch.load(source)
    content["optimizer"]["state"][0]["exp_avg"][0, 0] = float("inf")
    torch.save(content, source)
    report = statecodec.compress(source, tmp_path / "a.sc.safetensors", preset="weights", verify=True)
    assert "training cannot resume" in report.notes[-1]


def test_errors_beyond_float64_are_left_out(tmp_path: Path) -> None:
    """Squares of 1e200 overflow, and JSON has no infinity."""
    source, huge = adam(tmp_path / "a.pt"), torch.full((80, 64), 1e200, dtype=torch.float64)
    content = torch.load(source)
    content["optimizer"]["state"][0]["exp_avg"] = huge
    torch.save(content, source)
    report = statecodec.compress(source, tmp_path / "a.sc.safetensors", preset="weights", verify=True)
    (tensor,) = (t for t in report.tensors if t.name.endswith("exp_avg"))
    assert tensor.error == {"max_abs": 1e200}
