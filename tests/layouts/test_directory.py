"""Directories: by content, deterministic, links and special files refused, damaged files carried with a note."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from statecodec.errors import LayoutError, UnknownLayout
from statecodec.files import Identity
from statecodec.layouts import list_path, locate, tree
from statecodec.layouts.locate import locate_listing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoint-3"
    (root / "empty" / "inner").mkdir(parents=True)
    (root / "sub").mkdir()
    save_file({"w": torch.ones(4, 4)}, root / "model.safetensors")
    torch.save({"x": torch.zeros(3)}, root / "sub" / "optimizer.pt")
    (root / "trainer_state.json").write_text('{"step": 3}')
    (root / "zero.bin").write_bytes(b"")
    return root


def test_files_by_content_sorted_with_empty_directories(folder: Path) -> None:
    source = locate(folder)
    assert source.is_directory
    assert [(f.path, f.layout) for f in source.files] == [
        ("model.safetensors", "safetensors"),
        ("sub/optimizer.pt", "torch_zip"),
        ("trainer_state.json", "opaque"),
        ("zero.bin", "opaque"),
    ]
    assert [f.path for f in source.folders] == ["", "empty", "empty/inner", "sub"]
    assert source == locate(folder)
    assert all(f.note is None for f in source.files)


def test_modes_are_kept(folder: Path) -> None:
    (folder / "zero.bin").chmod(0o600)
    (folder / "sub").chmod(0o711)
    folder.chmod(0o700)
    source = locate(folder)
    assert {f.path: f.mode for f in source.files}["zero.bin"] == 0o600
    assert {f.path: f.mode for f in source.folders} == {"": 0o700, "sub": 0o711, "empty": 0o755, "empty/inner": 0o755}


def test_every_file_carries_its_identity(folder: Path) -> None:
    for file in locate(folder).files:
        assert file.identity == Identity.of((folder / file.path).stat())
    (only,) = locate(folder / "model.safetensors").files
    assert only.identity == Identity.of((folder / "model.safetensors").stat())


def test_hard_links_are_found(folder: Path) -> None:
    os.link(folder / "model.safetensors", folder / "sub" / "best.safetensors")
    files = {f.path: f for f in locate(folder).files}
    link = files["sub/best.safetensors"]
    assert (link.same_as, link.layout, link.regions) == ("model.safetensors", "safetensors", ())
    assert files["model.safetensors"].same_as is None


@pytest.mark.parametrize("what", ["truncated", "legacy", "text"])
def test_what_cannot_be_read_is_carried_with_a_note(folder: Path, what: str) -> None:
    path = folder / "odd.pt"
    if what == "truncated":
        torch.save({"x": torch.randn(100)}, path)
        path.write_bytes(path.read_bytes()[:-30])
    elif what == "legacy":
        torch.save({"x": torch.randn(100)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_text("nothing known")
    file = next(f for f in locate(folder).files if f.path == "odd.pt")
    assert (file.layout, file.regions) == ("opaque", ())
    assert (file.note is None) == (what == "text")
    assert tree(folder)["odd.pt"] == path.read_bytes()


def test_symbolic_links_are_refused_by_name(folder: Path) -> None:
    (folder / "sub" / "link").symlink_to("/etc/passwd")
    with pytest.raises(UnknownLayout, match=r"sub/link is a symbolic link; .*cp -rL"):
        locate(folder)


def test_linked_directories_are_refused(folder: Path) -> None:
    (folder / "up").symlink_to("..", target_is_directory=True)
    with pytest.raises(UnknownLayout, match="up is a symbolic link"):
        locate(folder)


def test_pipes_are_refused_without_waiting(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnknownLayout, match="pipe is a device, socket or pipe"):
        locate(folder)
    with pytest.raises(UnknownLayout, match="neither a file nor a directory"):
        locate(folder / "pipe")


def test_the_root_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder, target_is_directory=True)
    assert locate(tmp_path / "latest").files == locate(folder).files


def test_an_empty_directory_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(UnknownLayout, match="holds no file"):
        locate(tmp_path)
    (tmp_path / "inner" / "file").touch()
    assert [file.path for file in locate(tmp_path).files] == ["inner/file"]


def test_tree_of_a_directory(folder: Path) -> None:
    found = tree(folder)
    assert list(found) == ["model.safetensors", "sub/optimizer.pt", "trainer_state.json", "zero.bin"]
    assert torch.equal(found["model.safetensors"]["w"], torch.ones(4, 4))
    assert found["trainer_state.json"] == b'{"step": 3}'


def test_a_file_that_is_replaced_after_it_was_listed_is_not_read(folder: Path) -> None:
    listing = list_path(folder)
    save_file({"w": torch.zeros(4, 4)}, folder / "other")
    os.replace(folder / "other", folder / "model.safetensors")
    with pytest.raises(LayoutError, match=r"model\.safetensors was changed or replaced"):
        locate_listing(listing, folder)


def test_a_file_that_becomes_a_link_after_it_was_listed_is_not_followed(folder: Path) -> None:
    listing = list_path(folder)
    (folder / "zero.bin").unlink()
    (folder / "zero.bin").symlink_to("model.safetensors")
    with pytest.raises(OSError, match="symbolic links"):
        locate_listing(listing, folder)
