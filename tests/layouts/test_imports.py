"""What unpickling would import: found in every place where a pickle can lie, with Python's own unpickler as oracle."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pickle
import shutil
import struct
import tarfile
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch._weights_only_unpickler as torch_safe
from hypothesis import given
from hypothesis import strategies as st

from statecodec.layouts import imports as looked_for
from statecodec.layouts import list_memory, list_path
from statecodec.layouts.imports import FileImports, file_imports
from statecodec.layouts.pickle import machine, reader
from statecodec.layouts.pickle.harmless import _HARMLESS, is_harmless
from tests.layouts.support import pickle_of, zip_of
from tests.layouts.test_hostile import GADGETS, Runs

SYSTEM = ("posix", "system")
ATTACK = Runs(os.system, "touch executed")


def of_bytes(data: bytes) -> FileImports | None:
    return next(file_imports(list_memory({"x": data})), None)


def dangerous(found: FileImports | None) -> set[tuple[str, str]]:
    assert found is not None
    return {pair for pair in found.names if not is_harmless(*pair)}


class Anything(dict[Any, Any]):
    """Takes part in whatever a pickle does to it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Anything:
        return dict.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any) -> Anything:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    append = add = extend


class Recorder(pickle.Unpickler):
    """Python's own unpickler; it notes what it is asked to import, and imports nothing."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        # What Unpickler.find_class does first, for protocols below 3, whose spelling of modules is Python 2's.
        self.asked.add(NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name))
        return type(name, (Anything,), {})

    def persistent_load(self, pid: Any) -> Any:
        return None  # torch's own subclass looks the storage's class up by its name, too


def asked(data: bytes) -> set[tuple[str, str]]:
    recorder = Recorder(data)
    recorder.load()
    return {pair for pair in recorder.asked if pair[0] != __name__}


VALUES: list[Any] = [
    torch.arange(6.0), torch.nn.Parameter(torch.ones(2)), torch.float16, torch.device("cpu"), torch.Size([1]),
    np.arange(3), np.float64(2.0), np.dtype("i4"), collections.OrderedDict(a=1), collections.deque([1]), {1, 2},
    Path("x"), datetime.timedelta(1), argparse.Namespace(a=1), complex(1, 2), range(3), frozenset([1]), b"x", 1.5,
    os.system, ATTACK, collections.namedtuple, warnings.WarningMessage, getattr,
]  # fmt: skip


@given(st.lists(st.sampled_from(range(len(VALUES)))), st.sampled_from([2, 3, 4, 5]))
def test_names_are_those_that_python_would_import(indices: list[int], protocol: int) -> None:
    data = pickle_of([VALUES[i] for i in indices], protocol)
    found = of_bytes(zip_of(data, {str(i): b"" for i in range(len(VALUES))}))
    assert found is not None
    assert (found.names, found.unread) == (asked(data), None)


@pytest.mark.parametrize("value", [ATTACK, VALUES, {"a": 1}])
def test_what_was_read_already_is_not_read_again(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle_of([value, "x" * 70_000], 2)
    archive, runs, run = zip_of(data, {str(i): b"" for i in range(len(VALUES))}), 0, reader._run

    def counted(machine: Any) -> Any:
        nonlocal runs
        runs += 1
        return run(machine)

    monkeypatch.setattr(reader, "_run", counted)
    first = of_bytes(archive)
    reader.read_pickle(data)
    assert (of_bytes(archive), runs) == (first, 2)
    longer = pickle_of([value, ATTACK, "x" * 70_000], 2)  # other bytes are other bytes
    assert SYSTEM in dangerous(of_bytes(zip_of(longer, {str(i): b"" for i in range(len(VALUES))})))
    assert runs == 3


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [ATTACK, {"a": [ATTACK]}, os.system, collections.defaultdict(os.system)])
def test_attacks_are_found_bare_and_in_an_archive(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert dangerous(of_bytes(zip_of(data, {}))) == {SYSTEM}
    assert dangerous(of_bytes(data)) == {SYSTEM}
    if value is not os.system:  # what follows the attack does not hide it
        assert dangerous(of_bytes(data[:-1] + b"\xff" * 5000)) == {SYSTEM}


@pytest.mark.parametrize("body", GADGETS.values(), ids=GADGETS.keys())
def test_gadgets_can_run_code(body: bytes) -> None:
    for protocol in (b"", b"\x80\x02"):
        for archived in (False, True):
            data = protocol + body + b"."
            found = of_bytes(zip_of(data, {}) if archived else data)
            assert found is not None
            assert dangerous(found) or found.unread


def test_the_list_of_what_is_harmless_is_no_longer_than_torchs_own() -> None:
    allowed = set(torch_safe._get_allowed_globals())
    beyond = {f"{m}.{n}" for m, names in _HARMLESS.items() for n in names if m.startswith("torch")} - allowed
    beyond -= {f"torch.distributed.checkpoint.metadata.{n}" for n in _HARMLESS["torch.distributed.checkpoint.metadata"]}
    assert beyond == {
        "torch._tensor._rebuild_from_type", "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.nn.parameter.Buffer", "torch.torch_version.TorchVersion",
    }  # fmt: skip
    assert not is_harmless("torch.storage", "_load_from_bytes"), "it unpickles what it is given"
    assert not is_harmless("torch", "serialization.os.system")


def test_python_2_spellings_are_only_those_of_old_protocols() -> None:
    """Later ones would import a module of that name, which may lie beside the checkpoint."""
    body = b"c__builtin__\nset\n)R."
    assert dangerous(of_bytes(zip_of(b"\x80\x02" + body, {}))) == set()
    assert dangerous(of_bytes(zip_of(b"\x80\x04" + body, {}))) == {("__builtin__", "set")}


# ---- where pickles lie


def names_in(folder: Path) -> dict[str, set[tuple[str, str]]]:
    return {found.path: dangerous(found) for found in file_imports(list_path(folder))}


def unread_in(folder: Path) -> set[str]:
    return {found.path for found in file_imports(list_path(folder)) if found.unread}


def test_every_file_of_a_directory_is_looked_at(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    torch.save({"w": torch.ones(3), "x": ATTACK}, tmp_path / "bad.pt")
    (tmp_path / "rng.pkl").write_bytes(pickle.dumps({"state": np.arange(3)}))
    (tmp_path / "custom.bin").write_bytes(pickle.dumps(ATTACK, 0))
    (tmp_path / "README.md").write_text("config\nvalue\nsome text.\n")
    (tmp_path / "vocab.txt").write_text("cat\ndog\n(house\n.\n")
    (tmp_path / "config.json").write_text("{}")
    header = b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    safetensors = struct.pack("<Q", 640) + header.ljust(640) + b"\0"  # begins like a pickle of protocol 2
    (tmp_path / "model.safetensors").write_bytes(safetensors)
    assert safetensors[:2] == b"\x80\x02"
    assert names_in(tmp_path) == {"good.pt": set(), "bad.pt": {SYSTEM}, "rng.pkl": set(), "custom.bin": {SYSTEM}}
    assert unread_in(tmp_path) == set()


def test_torch_files_from_before_1_6(tmp_path: Path) -> None:
    for name, value in {"good": torch.ones(640), "bad": [torch.ones(640), ATTACK]}.items():
        torch.save(value, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=False)
    assert names_in(tmp_path) == {"good.pt": set(), "bad.pt": {SYSTEM}}
    assert unread_in(tmp_path) == set()


MAGIC, ATTACK_TEXT = 0x1950A86A20F9469CFC6C, b"cposix\nsystem\n(S'touch executed'\ntR."


@pytest.mark.parametrize(
    "before",
    [
        pickle.dumps(MAGIC, 2), b"L%dL\n.I1001\n." % MAGIC, pickle.dumps(MAGIC, 2) + b"I1001\n." + pickle.dumps({}, 2),
        *(b"\x80\x02X" + struct.pack("<I", n - 10) + bytes(n - 10) + b"0N." for n in (64, 2048, 1 << 20)),
    ],
    ids=["no mark", "none has one", "the fourth", "at 64", "at 2048", "at 1 MiB"],
)  # fmt: skip
def test_a_later_stream_cannot_hide(before: bytes) -> None:
    """Of a torch file from before 1.6 every stream is unpickled, whatever its protocol, wherever it begins."""
    for data in (before + ATTACK_TEXT, before + pickle.dumps(ATTACK), before + ATTACK_TEXT + bytes(3000)):
        assert SYSTEM in dangerous(of_bytes(data))


@pytest.mark.parametrize(
    "before",
    [
        b"I0x10\n", b"L0x10L\n", b"I1\0\n", b"NNb", b"N(e", b"N(\x90", b"N(u", b"]NaI0\nNs",
        b"\x96" + struct.pack("<Q", 1) + b"xK\1a", b"\x96" + struct.pack("<Q", 1) + b"xK\0K\1s",
        b"\x8b" + struct.pack("<i", 70_000) + bytes(70_000), b")0" * 6000,
        b"S'" + b"a" * 3000 + b"'\n",
    ],
    ids=[
        "a number in hexadecimal", "a long one", "a number up to a NUL", "no state", "nothing appended",
        "nothing added", "no keys", "an element of a list", "one of a bytearray", "a key of one", "a large number",
        "many objects", "a long text",
    ],
)  # fmt: skip
def test_what_python_reads_and_this_reader_does_not_hides_nothing(
    before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither alone nor as the fourth stream of an old torch file: it has no mark that says it is a pickle."""
    monkeypatch.setattr(looked_for, "_PREFIXES", (64, 2048))
    monkeypatch.setattr(machine, "_FREE_OBJECTS", 1000)
    data = before + ATTACK_TEXT
    assert SYSTEM in asked(data)
    for whole in (data, pickle.dumps(MAGIC, 2) + b"I1001\n." + pickle.dumps({}, 2) + data):
        found = of_bytes(whole)
        assert dangerous(found) or found.unread  # type: ignore[union-attr]


def safetensors_of(header_bytes: int, data: bytes) -> bytes:
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(data), len(data))
    return struct.pack("<Q", header_bytes) + header.ljust(header_bytes) + data


@pytest.mark.parametrize("end", [b"\n", b"'\n"])
@pytest.mark.parametrize("size", [100, 5000])
def test_a_safetensors_file_can_be_a_pickle_too(end: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header's length begins a text, which goes on to a newline in a tensor: further than is read, perhaps."""
    monkeypatch.setattr(looked_for, "_PREFIXES", (64, 2048))
    opcode = int.from_bytes(b"V\1" if end == b"\n" else b"S'", "little")
    data = safetensors_of(opcode, b"a" * size + end + ATTACK_TEXT)
    assert set(safetensors.torch.load(data)) == {"a"}
    assert SYSTEM in asked(data)
    found = of_bytes(data)
    assert dangerous(found) or found.unread  # type: ignore[union-attr]


def test_a_safetensors_file_of_zeros_is_no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the length of its header, which writers make a multiple of 8."""
    monkeypatch.setattr(looked_for, "_PREFIXES", (64, 2048))
    assert [n for n in range(256, 512, 8) if of_bytes(safetensors_of(n, bytes(5000)))] == []


def test_objects_outside_of_a_pickle_hide_nothing() -> None:
    """Before torch 1.6 modules were such objects, too; torch still takes them."""
    for outside in (b"(S'module'\nNNNtQ0", b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI01\nNtQ0"):
        found = of_bytes(pickle.dumps(MAGIC, 2) + b"I1001\n." + pickle.dumps({}, 2) + outside + ATTACK_TEXT)
        assert dangerous(found) or found.unread  # type: ignore[union-attr]


def tar_of(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def test_old_tar_archives(tmp_path: Path) -> None:
    """torch.load unpickles their member `storages`, wherever it is, whatever else the first bytes may be."""
    storages, far = {"storages": ATTACK_TEXT}, {"large": bytes(5000)}
    plain = tar_of(storages)
    unmarked = bytearray(plain[:257] + bytes(8) + plain[265:])  # tar of before 1988 had no mark
    unmarked[148:156] = b"%06o\0 " % (sum(unmarked[:148]) + 8 * ord(" ") + sum(unmarked[156:512]))
    archives = {
        "plain": plain, "unmarked": bytes(unmarked), "far": tar_of(far | storages),
        "long": tar_of({"x" * 150: b""} | storages, tarfile.PAX_FORMAT), "pickle": tar_of({"N.": b""} | storages),
        "names": tar_of({"ctorch\nFloatStorage\n.": b""} | storages),
        "many": tar_of({f"{i}": b"" for i in range(1001)}),
        "huge": plain[:156] + b"x" + plain[157:] + bytes(2 << 20),
    }  # fmt: skip
    changed = bytearray(archives["huge"])  # a header of its own for names, of 2 MiB
    changed[124:136] = b"%011o\0" % (2 << 20)
    changed[148:156] = b"%06o\0 " % (sum(changed[:148]) + 8 * ord(" ") + sum(changed[156:512]))
    archives["huge"] = bytes(changed)
    for name, data in archives.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    (tmp_path / "code.tar").write_bytes(tar_of(far | {"train.py": b"import torch"}))
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    assert unread_in(tmp_path) == {f"{name}.tar" for name in archives}


def test_programs_and_damage_count_as_able_to_run_code(tmp_path: Path) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Doubled()), tmp_path / "program.pt")
    torch.save({"w": torch.ones(300)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-100])
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(list(range(300)))[:-100])
    upper = zip_of(pickle.dumps(ATTACK), {}).replace(b"data.pkl", b"DATA.PKL")
    (tmp_path / "upper.pt").write_bytes(upper)  # torch finds it all the same
    assert unread_in(tmp_path) == {"program.pt", "cut.pt", "cut.pkl"}
    assert names_in(tmp_path)["upper.pt"] == {SYSTEM}


def of_metadata(folder: Path, change: Callable[[Any], Any]) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(change(pickle.loads((folder / ".metadata").read_bytes()))))


def test_dcp_folders(dcp_alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    shutil.copytree(dcp_alone / "nested", folder)
    assert names_in(folder) == {".metadata": set(), "__0_0.distcp": set()}
    assert unread_in(folder) == set()
    other = tmp_path / "value"
    shutil.copytree(folder, other)
    shard = other / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(ATTACK, buffer)

    def replaced(metadata: Any) -> Any:
        index, info = next((i, s) for i, s in metadata.storage_data.items() if i.fqn == "step")
        info.offset, info.length = shard.stat().st_size, len(buffer.getvalue())
        shard.write_bytes(shard.read_bytes() + buffer.getvalue())
        metadata.storage_data[index] = info
        return metadata

    of_metadata(other, replaced)
    assert names_in(other) == {".metadata": set(), "__0_0.distcp": {SYSTEM}}
    (other / "__9_0.distcp").write_bytes(ATTACK_TEXT)  # no item says that it is there
    assert names_in(other)["__9_0.distcp"] == {SYSTEM}
    of_metadata(folder, lambda metadata: (metadata, ATTACK))
    assert names_in(folder)[".metadata"] == {SYSTEM}
    assert "__0_0.distcp" in unread_in(folder), "what is in it cannot be found"


def test_hostile_sizes_are_bounded() -> None:
    many = b"\x80\x02" + b"".join(b"cm\nf%d\n0" % i for i in range(5000)) + b"N."
    found = of_bytes(zip_of(many, {}))
    assert found is not None
    assert len(found.names) == 1000
    assert "5000" in str(found.unread)
    assert "more than 1000" in str(of_bytes(b"\x80\x02N." * 1001).unread)  # type: ignore[union-attr]
    long = b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x"
    assert "claims" in str(of_bytes(long).unread)  # type: ignore[union-attr]
