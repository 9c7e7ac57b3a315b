"""Hostile checkpoints: nothing runs, only LayoutError comes out, time and memory stay small."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statecodec.errors import LayoutError, MalformedCheckpoint
from statecodec.layouts import locate, tree
from statecodec.layouts.pickle.nodes import Opaque
from statecodec.layouts.pickle.opcodes import TABLE
from statecodec.layouts.pickle.reader import read_pickle
from statecodec.layouts.pickle.rebuild import _KNOWN
from tests.layouts.support import locate_bytes, pickle_of, tree_of_bytes, zip_of

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """Unpickling this calls a function of the file's choosing."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def python2_global(module: str, name: str, *args: bytes) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_that_would_create_a_file_do_not(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    attacks = [
        Runs(os.system, f"touch {marker}"),
        Runs(exec, f"open({str(marker)!r}, 'w')"),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(open, str(marker), "w"),
        Runs(os.mkdir, str(marker)),
        Runs(subprocess.check_call, ["touch", str(marker)]),
    ]
    for i, attack in enumerate(attacks):
        data = pickle.dumps({"weights": attack}, protocol)
        path = tmp_path / f"{i}.pt"
        path.write_bytes(zip_of(data, {}))
        locate(path)
        found = tree(path)
        assert "opaque" in repr(found["weights"])
    assert not marker.exists()


GADGETS = {
    "reduce of a reduce": python2_global("builtins", "getattr", b"cos\nsystem\n", text("__call__")),
    "operator.attrgetter": python2_global("operator", "attrgetter", text("system")) + b"cos\n__doc__\n\x85R",
    "builtins.__import__": python2_global("builtins", "__import__", text("os")),
    "python 2 name": python2_global("__builtin__", "eval", text("open('executed', 'w')")),
    "inst": b"(" + text("touch executed") + b"ios\nsystem\n",
    "obj": b"(cos\nsystem\n" + text("touch executed") + b"o",
    "newobj": b"cos\nsystem\n" + text("touch executed") + b"\x85\x81",
    "newobj_ex": b"cos\nsystem\n" + text("touch executed") + b"\x85}\x92",
    "build with a setter": b"cargparse\nNamespace\n)\x81}" + text("__class__") + b"cos\nsystem\nsb",
    "stack_global": text("os") + text("system") + b"\x93" + text("touch executed") + b"\x85R",
    "numpy loads": python2_global("numpy", "load", text("executed")),
    "torch.load": python2_global("torch", "load", text("executed")),
    "runpy": python2_global("runpy", "_run_code", text("open('executed','w')"), b"}"),
    "rebuild with a hostile type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n"
    + text("touch executed")
    + b"\x85}tR",
    "defaultdict factory": b"ccollections\ndefaultdict\ncos\nsystem\n\x85RK\x01K\x02s",
}


@pytest.mark.parametrize("body", GADGETS.values(), ids=GADGETS.keys())
def test_gadgets_are_only_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    path.write_bytes(zip_of(b"\x80\x02" + body + b".", {}))
    locate(path)
    tree(path)
    assert not (tmp_path / "executed").exists()


def test_modules_that_a_file_names_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    path = tmp_path / "x.pt"
    path.write_bytes(zip_of(b"\x80\x02cevil_module\nThing\n)\x81.", {}))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from statecodec.layouts import locate, tree; "
        f"locate({str(path)!r}); print(tree({str(path)!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "<opaque evil_module.Thing>")


# ---- lies about sizes


def storage(numel: int, key: str = "0") -> bytes:
    number = b"\x8a\x0a" + numel.to_bytes(10, "little", signed=True)
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number + b"tQ"


def integers(*values: int) -> bytes:
    return b"(" + b"".join(b"\x8a\x0a" + v.to_bytes(10, "little", signed=True) for v in values) + b"t"


def lying_tensor(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel, key) + integers(offset)[1:-1]
        + integers(*shape) + integers(*stride) + b"\x89}tR."
    )  # fmt: skip


LIES = {
    "short record": lying_tensor(16, 0, (16,), (1,)),
    "huge storage": lying_tensor(1 << 60, 0, (16,), (1,)),
    "negative storage": lying_tensor(-1, 0, (1,), (1,)),
    "shape past the end": lying_tensor(2, 0, (3,), (1,)),
    "offset past the end": lying_tensor(2, 2, (1,), (1,)),
    "stride past the end": lying_tensor(2, 0, (2,), (1 << 40,)),
    "negative offset": lying_tensor(2, -1, (1,), (1,)),
    "negative stride": lying_tensor(2, 1, (2,), (-1,)),
    "negative shape": lying_tensor(2, 0, (-1,), (1,)),
    "overflowing shape": lying_tensor(2, 0, (1 << 62, 1 << 62), (0, 0)),
    "gigantic dimension": lying_tensor(2, 0, (1 << 70,), (0,)),
    "rank": lying_tensor(2, 0, (1,) * 500, (1,) * 500),
    "strides missing": lying_tensor(2, 0, (1, 1), (1,)),
    "no such storage": lying_tensor(2, 0, (1,), (1,), key="../../etc/passwd"),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES.keys())
def test_lying_tensors_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedCheckpoint):
        locate_bytes(zip_of(data, {"0": bytes(8)}))
    with pytest.raises(MalformedCheckpoint):
        tree_of_bytes(zip_of(data, {"0": bytes(8)}))


def test_an_expanded_tensor_stays_a_description() -> None:
    """2^50 elements on two numbers: legal (torch.save of an expanded tensor), never materialised."""
    data = zip_of(lying_tensor(2, 0, (1 << 50,), (0,)), {"0": bytes(8)})
    assert [(r.nbytes, r.lossless) for r in locate_bytes(data).files[0].regions] == [(4, True)]
    assert tree_of_bytes(data).numel() == 1 << 50


# ---- bombs, each in a process of its own whose memory is watched

BOMBS = {
    "deep list": b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuple": b")" + b"\x85" * 200_000 + b".",
    "deep dict": b"}N" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "billion laughs": b"]q\0"
    + b"".join(b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e" for i in range(200))
    + b".",
    "self reference": b"]q\0h\0ah\0ah\0a.",
    "huge memo index": b"]r\xff\xff\xff\xff.",
    "huge integer": b"\x8b\xff\xff\xff\x7f.",
    "huge string": b"X\xff\xff\xff\xff.",
    "huge bytes": b"\x8e" + b"\xff" * 8 + b".",
    "huge frame": b"\x95" + b"\xff" * 8 + b".",
    "long decimal": b"L" + b"9" * 200_000 + b"L\n.",
    "many lists": b"]" * 2_000_000 + b".",
    "many marks": b"(" * 2_000_000 + b".",
    "many memos": b"N" + b"\x94" * 2_000_000 + b".",
    "many duplicates": b"N" + b"2" * 2_000_000 + b".",
    "one tensor named a million times": b"]("
    + lying_tensor(2, 0, (1,), (1,))[2:-1]
    + b"q\1"
    + b"h\1" * 1_000_000
    + b"e.",
    "tensors on a long path": b"".join(
        b"}(" + text("t") + lying_tensor(2, 0, (1,), (1,))[2:-1] + text("k" * 200) for _ in range(3000)
    )
    + b"N"
    + b"u" * 3000
    + b".",
    "colliding keys": b"}("
    + b"".join(b"\x8a\x0a" + ((2**61 - 1) * i).to_bytes(10, "little") + b"N" for i in range(1, 40_000))
    + b"u.",
}

WATCH = """
import json, resource, sys, time
from statecodec.errors import LayoutError
from statecodec.layouts import locate, tree
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
locate(sys.argv[1])
for path in sys.argv[2:]:
    before, start = peak(), time.process_time()
    outcome = []
    for read in (locate, tree):
        try:
            read(path)
            outcome.append("read")
        except LayoutError as error:
            outcome.append(type(error).__name__)
    print(json.dumps([outcome, peak() - before, time.process_time() - start]))
"""


def test_bombs_cost_little_time_and_memory(tmp_path: Path) -> None:
    harmless = tmp_path / "harmless.pt"
    torch.save({"a": torch.zeros(2)}, harmless)
    paths = []
    for i, body in enumerate(BOMBS.values()):
        paths.append(tmp_path / f"{i}.pt")
        paths[-1].write_bytes(zip_of(b"\x80\x02" + body, {"0": bytes(8)}))
    command = [sys.executable, "-c", WATCH, str(harmless), *map(str, paths)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(BOMBS)
    for name, (outcome, grown, _) in zip(BOMBS, lines, strict=True):
        assert grown < 256, (name, outcome, grown)
    refused = {name for name, (outcome, _, _) in zip(BOMBS, lines, strict=True) if "MalformedCheckpoint" in outcome}
    assert {
        n for n in BOMBS if n.startswith(("huge int", "huge s", "huge b", "huge f", "long", "many", "one", "coll"))
    } <= refused


# ---- damage: truncation at many offsets, random flips, random opcodes


def rich_file() -> bytes:
    w = torch.randn(4, 4)
    state = {
        "model": {"a.weight": w, "tied": w, "t": w.t(), "b": torch.ones(3).bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4, 4), "exp_avg_sq": torch.zeros(4, 4)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}],
        },
        "sparse": torch.eye(2).to_sparse(),
        "extra": [1, "two", (3.0, None), {4}],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


RICH = rich_file()


def read_all(data: bytes) -> bool:
    """Whether the file is read; anything but a LayoutError is let through."""
    try:
        locate_bytes(data)
        tree_of_bytes(data)
    except LayoutError:
        return False
    return True


def test_every_truncation_is_refused() -> None:
    for size in range(0, len(RICH), 7):
        assert not read_all(RICH[:size]), size


def test_seeded_bit_flips_give_only_our_errors() -> None:
    rng = random.Random(0)
    read = 0
    for _ in range(1500):
        data = bytearray(RICH)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        read += read_all(bytes(data))
    assert 0 < read < 1500  # payload flips are read, header flips are not


PICKLE = pickle_of(
    {"a": torch.zeros(4, 4), "b": [torch.ones(2).t(), (1, {2: 3})], "o": torch.nn.Parameter(torch.ones(1))}
)


def read_pickle_alone(data: bytes) -> None:
    """Past the CRC that protects it in an archive: the reader alone must hold."""
    storages = {"0": bytes(64), "1": bytes(8), "2": bytes(4)}
    read_all(zip_of(data, storages))


def test_seeded_pickle_damage_gives_only_our_errors() -> None:
    rng = random.Random(1)
    for _ in range(1500):
        data = bytearray(PICKLE)
        for _ in range(rng.choice((1, 2, 4))):
            if rng.random() < 0.5:
                data[rng.randrange(len(data))] = rng.randrange(256)
            else:
                at = rng.randrange(len(data))
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(20)]
        read_pickle_alone(bytes(data))


OPCODES = [bytes([op]) for op in range(256) if "_refused" not in TABLE[op].__qualname__]
ATOMS = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(
        [b"(", b"t", b"]", b"}", b"N", b"K\1", b"q\0", b"h\0", b"R", b"b", b"u", b"e", b"s", b"a", b"\x81", b"Q", b"."]
    ),
    st.sampled_from(
        [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", text("storage")]
    ),
    st.sampled_from([storage(2), integers(2), integers(1), lying_tensor(2, 0, (2,), (1,))[2:-1], b"ctorch\nfloat32\n"]),
    st.sampled_from([b"c" + f"{module}\n{name}\n".encode() for module, name in _KNOWN]),
    st.binary(max_size=4),
)


@settings(max_examples=400)
@given(st.lists(ATOMS, max_size=40))
def test_random_opcodes_give_only_our_errors(atoms: list[bytes]) -> None:
    read_pickle_alone(b"\x80\x02" + b"".join(atoms) + b".")


def test_truncated_pickles_are_malformed() -> None:
    for size in range(len(PICKLE)):
        with pytest.raises(MalformedCheckpoint):
            read_pickle(PICKLE[:size])


@pytest.mark.parametrize("op", [b"\x82\1", b"\x84\1\0\0\0", b"\x97", b"\x98", b"Pid\n", b"\xff", b"\0"])
def test_opcodes_that_torch_never_writes_are_refused_by_name(op: bytes) -> None:
    with pytest.raises(MalformedCheckpoint, match=r"torch never does|no pickle opcode"):
        read_pickle(b"\x80\x04N" + op + b".")


def test_newer_protocols_are_refused_by_name() -> None:
    with pytest.raises(MalformedCheckpoint, match="protocol 6"):
        read_pickle(b"\x80\x06N.")


def test_an_unknown_global_is_opaque() -> None:
    node = read_pickle(b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.")
    assert isinstance(node, Opaque)
    assert (node.module, node.name, node.args) == ("os", "system", ("true",))
