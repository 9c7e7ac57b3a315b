"""DeepSpeed's ZeRO: files of DeepSpeed 0.16.9 itself (save_zero.py), and files of any sizes in the same structure."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import statecodec
from statecodec.errors import MalformedCheckpoint
from statecodec.layouts import Run, Source, list_memory, locate, tree, zero
from statecodec.layouts.locate import locate_listing
from tests.contracts.layout import check_located, contents_of, same
from tests.layouts.written_zero import all_saved, small, written

NAMES = ["zero1", "zero1_bf16_optimizer", "zero2", "zero3"]


def values(source: Source, files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    """Every tensor, put together from its pieces."""
    found = {}
    regions = {file.path: file.regions for file in source.files}
    for tensor in source.tensors:
        dtype = tensor.dtype.torch
        whole = torch.empty(tensor.shape, dtype=dtype).flatten()
        for piece in tensor.pieces:
            region = regions[piece.file][piece.region]
            data = bytearray(files[piece.file][region.offset : region.offset + region.nbytes])
            run = piece.part or Run(0, whole.numel())
            assert isinstance(run, Run)
            if data:
                whole[run.start : run.stop] = torch.frombuffer(data, dtype=dtype)
        found[tensor.name] = whole.view(tensor.shape)
    return found


# ---- what DeepSpeed wrote


@pytest.mark.parametrize("name", NAMES)
def test_masters_are_what_deepspeed_makes_of_them(name: str, deepspeed: Path) -> None:
    source = locate(deepspeed / name)
    files = contents_of(deepspeed / name)
    check_located(source, files)
    assert {f.layout for f in source.files if f.path != "latest"} == {"zero"}
    found = values(source, files)
    by_role = {role: {t.param: t for t in source.tensors if t.role == role} for role in ("master", "weight", "exp_avg")}
    masters = {param: found[t.name] for param, t in by_role["master"].items()}
    assert set(masters) == {"emb.weight", "fc.weight", "fc.bias", "out.weight", "out.bias"}
    assert any(len(t.pieces) > 1 for t in by_role["master"].values())
    if (deepspeed / f"{name}.pt").exists():
        expected = torch.load(deepspeed / f"{name}.pt")
        for param, value in masters.items():
            assert torch.equal(value, expected[param]), param
        for param in {"frozen.weight", "frozen.bias"} & set(expected):
            assert torch.equal(found[by_role["weight"][param].name], expected[param]), param
    assert {"frozen.weight", "frozen.bias"} <= set(by_role["weight"])
    if name != "zero3":
        for param, value in masters.items():
            weight = by_role["weight"][param]
            assert torch.equal(found[weight.name], value.bfloat16()), param
            assert [p.part for p in weight.pieces] == [p.part for p in by_role["master"][param].pieces]


@pytest.mark.parametrize("name", NAMES)
def test_moments_have_their_settings(name: str, deepspeed: Path) -> None:
    found = {m.param: m for m in locate(deepspeed / name).moments}
    assert set(found) == {"emb.weight", "fc.weight", "fc.bias", "out.weight", "out.bias"}
    for param, moments in found.items():
        assert (moments.beta1, moments.beta2, moments.lr, moments.step) == (0.9, 0.95, 1e-3, 3)
        assert moments.weight_decay == (0.1 if param.endswith("weight") else 0.0)
        assert moments.weight == f"global_step3:optimizer.state.{param}.fp32_param"


def test_the_tree_is_every_file_by_name(deepspeed: Path) -> None:
    content = tree(deepspeed / "zero2")
    assert list(content) == ["global_step3", "latest"]
    model = torch.load(deepspeed / "zero2" / "global_step3" / "mp_rank_00_model_states.pt")
    assert same(content["global_step3"]["mp_rank_00_model_states.pt"], model)


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_comes_back(name: str, deepspeed: Path, tmp_path: Path) -> None:
    statecodec.compress(deepspeed / name, tmp_path / "x.sc.safetensors", preset="lossless")
    statecodec.restore(tmp_path / "x.sc.safetensors", tmp_path / "back")
    assert contents_of(tmp_path / "back") == contents_of(deepspeed / name)
    framework = f"DeepSpeed ZeRO-{name[4]}, 3 ranks"
    assert statecodec.inspect(tmp_path / "x.sc.safetensors").source["framework"] == framework
    report = statecodec.inspect(deepspeed / name)
    assert report.source["framework"] == framework
    assert framework in str(report)
    with statecodec.open(tmp_path / "x.sc.safetensors") as checkpoint, statecodec.open(deepspeed / name) as original:
        key = "global_step3:optimizer.state.emb.weight.exp_avg"
        assert torch.equal(checkpoint.read(key), original.read(key))


# ---- any sizes


SIZES = st.lists(st.integers(0, 7), max_size=3)


@settings(deadline=None, max_examples=40)
@given(
    stage=st.sampled_from([2, 3]),
    shapes=st.lists(st.lists(SIZES, min_size=1, max_size=4), min_size=1, max_size=3),
    ranks=st.integers(1, 5),
    align=st.integers(1, 9),
    keep_padding=st.booleans(),
)
def test_every_parameter_is_found_whatever_the_sizes(
    stage: int, shapes: list[list[list[int]]], ranks: int, align: int, keep_padding: bool
) -> None:
    groups = [{f"p{g}.{i}": torch.randn(size) for i, size in enumerate(sizes)} for g, sizes in enumerate(shapes)]
    files = all_saved(written(stage, groups, ranks, align=align, keep_padding=keep_padding))
    source = locate_listing(list_memory(files, is_directory=True), Path("x"))
    check_located(source, files)
    assert {file.layout for file in source.files} == {"zero"}
    found = values(source, files)
    for name, param in ((n, p) for group in groups for n, p in group.items() if p.numel()):
        assert torch.equal(found[f"x:optimizer.state.{name}.fp32_param"], param)
        assert torch.equal(found[f"x:optimizer.state.{name}.exp_avg"], param + 1)
        assert torch.equal(found[f"x:optimizer.state.{name}.exp_avg_sq"], param + 2)
        if stage != 3:
            assert torch.equal(found[f"x:module.{name}"], param.bfloat16())


# ---- checkpoints that are not whole, or lie


OPTIM = "x/zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "x/mp_rank_00_model_states.pt"


def own(files: dict[str, Any], rank: int = 1) -> Any:
    return files[OPTIM.format(rank)]["optimizer_state_dict"]


def no_last_rank(files: dict[str, Any]) -> None:
    del files[OPTIM.format(1)]


def no_first_rank(files: dict[str, Any]) -> None:
    del files[OPTIM.format(0)]


def a_rank_too_many(files: dict[str, Any]) -> None:
    files[OPTIM.format(2)] = files[OPTIM.format(1)]


def no_model(files: dict[str, Any]) -> None:
    del files[MODEL]


def two_of_one_rank(files: dict[str, Any]) -> None:
    files["x/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"] = files[OPTIM.format(0)]


def a_shard_of_another_world(files: dict[str, Any]) -> None:
    files[OPTIM.format(1)] = small_of(3)[OPTIM.format(1)]


def small_of(ranks: int) -> dict[str, Any]:
    return written(2, [{"a": torch.randn(5, 3), "b": torch.randn(7)}, {"c": torch.randn(4)}], ranks, align=4)


def a_shard_of_another_stage(files: dict[str, Any]) -> None:
    files[OPTIM.format(1)] = small(3)[OPTIM.format(1)]


def short_master(files: dict[str, Any]) -> None:
    own(files)["single_partition_of_fp32_groups"][0] = own(files)["single_partition_of_fp32_groups"][0][:-1].clone()


def long_moment(files: dict[str, Any]) -> None:
    own(files)["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(100)


def no_moment(files: dict[str, Any]) -> None:
    del own(files)["base_optimizer_state"]["state"][0]["exp_avg"]


def of_another_dtype(files: dict[str, Any]) -> None:
    own(files)["single_partition_of_fp32_groups"][0] = own(files)["single_partition_of_fp32_groups"][0].double()


def the_same_memory(files: dict[str, Any]) -> None:
    state = own(files)["base_optimizer_state"]["state"][0]
    state["exp_avg_sq"] = state["exp_avg"][:]


def no_tensor(files: dict[str, Any]) -> None:
    own(files)["single_partition_of_fp32_groups"][0] = None


def other_paddings(files: dict[str, Any]) -> None:
    own(files)["group_paddings"] = [n + 8 for n in own(files)["group_paddings"]]


def fewer_groups(files: dict[str, Any]) -> None:
    own(files)["single_partition_of_fp32_groups"].pop()


def a_larger_parameter(files: dict[str, Any]) -> None:
    files[MODEL]["param_shapes"][0]["b"] = torch.Size([70])


def a_huge_parameter(files: dict[str, Any]) -> None:
    files[MODEL]["param_shapes"][0]["b"] = torch.Size([1 << 40, 1 << 40])


def no_shape(files: dict[str, Any]) -> None:
    files[MODEL]["param_shapes"][0]["b"] = "big"


def twice_the_same_name(files: dict[str, Any]) -> None:
    files[MODEL]["param_shapes"][1]["a"] = files[MODEL]["param_shapes"][1].pop("c")


def other_weights(files: dict[str, Any]) -> None:
    files[MODEL]["module"]["a"] = torch.zeros(3, 5).bfloat16()


def another_mapping(files: dict[str, Any]) -> None:
    own(files)["param_slice_mappings"] = [OrderedDict(b=Address(0, 7)), OrderedDict()]


class Address:
    """As deepspeed.utils.tensor_fragment.fragment_address is pickled: a global and its attributes."""

    def __init__(self, start: int, numel: int) -> None:
        self.start, self.numel = start, numel


LIES: list[Callable[[dict[str, Any]], None]] = [
    no_last_rank, no_first_rank, a_rank_too_many, no_model, two_of_one_rank, a_shard_of_another_world,
    a_shard_of_another_stage, short_master, long_moment, no_moment, of_another_dtype, the_same_memory, no_tensor,
    other_paddings, fewer_groups, a_larger_parameter, a_huge_parameter, no_shape, twice_the_same_name, other_weights,
    another_mapping,
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_lies_are_errors_and_bytes_in_a_directory(lie: Callable[[dict[str, Any]], None]) -> None:
    objects = small()
    lie(objects)
    listing = list_memory(all_saved(objects), is_directory=True)
    with pytest.raises(MalformedCheckpoint, match=r"^x"):
        zero.locate(listing.of(listing.files, "x"))
    source = locate_listing(listing, Path("x"))
    assert source.tensors == ()
    assert {file.layout for file in source.files} == {"opaque"}
    assert (source.files[0].note or "").startswith("x")


def test_a_frozen_partition_that_is_missing() -> None:
    objects = small(3)
    for rank in range(2):
        about = objects[f"x/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = dict(
            objects[f"x/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"]
        )
        about["frozen_param_shapes"] = OrderedDict(f=torch.Size([3, 3]))
        about["frozen_param_fragments"] = {"f": torch.ones(5)} if rank == 0 else {}
    listing = list_memory(all_saved(objects), is_directory=True)
    with pytest.raises(MalformedCheckpoint, match=r"zero_pp_rank_1_mp_rank_00_model_states.pt: its part of 'f'"):
        zero.locate(listing.of(listing.files, "x"))


def test_of_a_tied_weight_the_name_with_a_master_counts() -> None:
    objects = small()
    module = objects[MODEL]["module"]
    objects[MODEL]["module"] = {"other": module["a"], **module}
    source = locate_listing(list_memory(all_saved(objects), is_directory=True), Path("x"))
    (weight,) = (t for t in source.tensors if t.role == "weight" and t.param == "a")
    assert (weight.name, len(weight.pieces)) == ("x:module.a", 2)
    assert "other" not in {t.param for t in source.tensors}


def test_experts_are_located_file_by_file() -> None:
    objects = small()
    for rank in range(2):
        own(objects, rank)["partition_count"] = [2, 1]
    files = all_saved(objects)
    source = locate_listing(list_memory(files, is_directory=True), Path("x"))
    check_located(source, files)
    assert f"{MODEL}:module.a" in {t.name for t in source.tensors}


def test_two_model_parallel_ranks_are_told_apart() -> None:
    objects = small()
    objects |= {path.replace("mp_rank_00", "mp_rank_01"): value for path, value in objects.items()}
    files = all_saved(objects)
    source = locate_listing(list_memory(files, is_directory=True), Path("x"))
    check_located(source, files)
    names = {t.name for t in source.tensors if t.role == "master" and t.param == "a"}
    assert names == {f"x:mp_rank_{i:02d}.optimizer.state.a.fp32_param" for i in range(2)}


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("place", [OPTIM.format(1), MODEL])
def test_nothing_is_run(place: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    objects = small()
    objects[place]["evil"] = Runs(f"touch {marker}")
    listing = list_memory(all_saved(objects), is_directory=True)
    assert locate_listing(listing, Path("x")).tensors
    tree(listing, lambda path, offset, nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    objects[place] = Runs(f"touch {marker}")
    locate_listing(list_memory(all_saved(objects), is_directory=True), Path("x"))
    assert not marker.exists()
