"""Optimizers on DTensor parameters: every rank's step is the unsharded step, on 1 to 4 ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from statecodec import optim
from statecodec.codecs import EncodedTensor, Folded, Raw
from statecodec.errors import OptimizerError
from statecodec.optim.owners import rounds as owners_of_rounds
from statecodec.optim.sharding import whole
from tests.distributed.ranks import Ranks
from tests.optim.helpers import EVERY, bits, gradients, parameters, relative

# What goes element by element, or block by block of a row.
EXACT = [k for k in EVERY if not k.startswith(("slimadam", "lorapre", "muon"))]
SHARED = ["slimadam", "slimadam-companded"]
WHOLE = ["muon", "lorapre", "lorapre-muon"]
MATRICES = [k for k, p in parameters().items() if p.ndim > 1]


def placed(x: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


class Twins:
    """The same parameters whole and sharded, each with an optimizer, stepped with the same gradients."""

    def __init__(
        self, name: str, mesh: DeviceMesh, placements: Any, dtype: torch.dtype = torch.float32,
        only: Iterable[str] = MATRICES,
    ) -> None:  # fmt: skip
        self.mesh, self.placements = mesh, placements
        self.own = {k: p for k, p in parameters(dtype).items() if k in only}
        self.cut = {k: nn.Parameter(placed(p.detach(), mesh, placements)) for k, p in self.own.items()}
        self.plain, self.split = EVERY[name](self.own.items()), EVERY[name](self.cut.items())

    def step(self, steps: int = 3) -> Twins:
        for step in range(steps):
            for k, p in self.own.items():
                g = gradients(step)[k].to(p.dtype)
                p.grad, self.cut[k].grad = g, placed(g, self.mesh, self.placements)
            self.plain.step()
            self.split.step()
        return self

    def parts(self, k: str) -> dict[tuple[str, str], Tensor]:
        return {
            (name, part): t
            for name, state in self.split.state[self.cut[k]].items()
            if isinstance(state, EncodedTensor)
            for part, t in state.parts.items()
        }

    def check_weights(self) -> None:
        for k, p in self.own.items():
            assert torch.equal(whole(self.cut[k].detach()), p.detach()), k

    def check_states(self) -> None:
        """Every stored part, put together, is that of the whole parameter."""
        for k, p in self.own.items():
            for (name, part), t in self.parts(k).items():
                assert bits(whole(t)) == bits(self.plain.state[p][name].parts[part]), (k, name, part)


def same_as_whole(names: list[str], dtype: torch.dtype) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names:
        twins = Twins(name, mesh, [Shard(0)], dtype).step()
        twins.check_weights()
        twins.check_states()
        for k, p in twins.cut.items():
            assert all(isinstance(t, DTensor) and t.placements == p.placements for t in twins.parts(k).values())
            assert all(len(t.to_local()) == len(p.to_local()) for t in twins.parts(k).values())
        assert twins.split.state_nbytes() <= twins.plain.state_nbytes()
        dense, expected = (o.state_dict(dense=True)["state"] for o in (twins.split, twins.plain))
        assert bits({i: {k: whole(v) for k, v in s.items()} for i, s in dense.items()}) == bits(expected)
        masters = [(twins.split.master_weight(twins.cut[k]), twins.plain.master_weight(twins.own[k])) for k in MATRICES]
        assert all(torch.equal(whole(a), b) for a, b in masters)


@pytest.mark.parametrize(("n", "dtype"), [(1, torch.bfloat16), (3, torch.float32), (4, torch.bfloat16)])
def test_a_sharded_step_is_the_whole_step_bit_for_bit(ranks: Ranks, n: int, dtype: torch.dtype) -> None:
    """24, 40 and 50 rows are uneven on 3 and 4 ranks, 6 on 4 ranks leave the last one nothing."""
    ranks.run(n, same_as_whole, EXACT, dtype)


def vectors() -> None:
    """They are exact where they are sharded: on another number of ranks the cuts would fall elsewhere."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    twins = Twins("adamw-dense", mesh, [Shard(0)], only=["a.bias"]).step()
    twins.check_weights()
    twins.check_states()
    twins = Twins("adamw", mesh, [Shard(0)], only=["a.bias"]).step()
    assert all(s.codec == Raw() for s in twins.split.state[twins.cut["a.bias"]].values() if hasattr(s, "codec"))
    few = nn.Parameter(placed(torch.ones(2), mesh, [Shard(0)]))  # smaller than the world
    one = optim.AdamW([few], lr=1.0, weight_decay=0.0)
    few.grad = placed(torch.ones(2), mesh, [Shard(0)])
    one.step()
    assert torch.allclose(whole(few.detach()), torch.zeros(2), atol=1e-5)


def test_vectors_are_exact(ranks: Ranks) -> None:
    ranks.run(3, vectors)


def columns() -> None:
    """Rows of 70 on 2 ranks are cut at 35, which is no multiple of a group; of 128, at 64, which is one."""
    mesh = init_device_mesh("cpu", (2,))
    twins = Twins("adamw", mesh, [Shard(1)], torch.bfloat16, only=["a.weight"]).step()
    assert all(s.codec == Raw() for s in twins.split.state[twins.cut["a.weight"]].values() if hasattr(s, "codec"))
    twins = Twins("adamw-dense", mesh, [Shard(1)], torch.bfloat16, only=["a.weight", "conv.weight"]).step()
    twins.check_weights()
    twins.check_states()
    torch.manual_seed(0)
    w, g = torch.randn(6, 128), torch.randn(6, 128)
    for make in (optim.AdamW, optim.Lion, lambda p, **o: optim.FOAM(p, moments="companded8", level=1, **o)):
        own, cut = nn.Parameter(w.clone()), nn.Parameter(placed(w, mesh, [Shard(1)]))
        own.grad, cut.grad = g, placed(g, mesh, [Shard(1)])
        pair = [make([("w", p)], lr=1e-2, dense_below=0) for p in (own, cut)]
        for _ in range(3):
            [optimizer.step() for optimizer in pair]
        assert torch.equal(whole(cut.detach()), own.detach())
        for name, state in pair[0].state[own].items():
            if isinstance(state, EncodedTensor):
                found = pair[1].state[cut][name]
                assert found.codec == state.codec
                assert bits({k: whole(t) for k, t in found.parts.items()}) == bits(state)
                assert isinstance(state.codec, Folded) or found.parts["scales"].placements == (Shard(1),)
    odd = nn.Parameter(placed(torch.randn(6, 70), mesh, [Shard(1)]))
    odd.grad = placed(torch.randn(6, 70), mesh, [Shard(1)])
    with pytest.raises(OptimizerError, match="cut inside blocks of 4 columns"):
        optim.FOAM([("w", odd)], lr=1e-2).step()


def test_columns_are_cut_between_groups_or_the_states_stay_exact(ranks: Ranks) -> None:
    ranks.run(2, columns)


def two_dimensions() -> None:
    """HSDP, and FSDP2's rows of tensor parallel rows or columns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)], [Shard(0), Shard(1)]):
        for name in ("adamw", "lion", "sgd") if placements[1] != Shard(1) else ("adamw-dense", "sgd-plain"):
            twins = Twins(name, mesh, placements, torch.bfloat16).step()
            twins.check_weights()
            twins.check_states()


def test_two_dimensional_meshes(ranks: Ranks) -> None:
    ranks.run(4, two_dimensions)


def shared_moments(names: list[str]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    calls = []
    counted = dist.all_reduce
    for name in names:
        twins = Twins(name, mesh, [Shard(0)])
        dist.all_reduce = lambda *a, **k: calls.append(0) or counted(*a, **k)
        calls.clear()
        twins.step()
        dist.all_reduce = counted
        across = [k for k in twins.cut if twins.split.recipe(twins.cut[k], twins.split.param_groups[0]).across]
        assert len(calls) == (3 if across else 0), "one message a step, however many parameters"
        for k, p in twins.own.items():
            assert relative(whole(twins.cut[k].detach()) - parameters()[k], p - parameters()[k]) < 1e-5, k
            for (state, part), t in twins.parts(k).items():
                if part == "mean.data":
                    assert t.placements == ((Replicate(),) if t.shape[0] == 1 else (Shard(0),))
                    assert relative(whole(t), twins.plain.state[p][state].parts[part]) < 1e-5
                    everywhere = [torch.empty_like(t.to_local()) for _ in range(mesh.size())]
                    if t.shape[0] == 1:
                        dist.all_gather(everywhere, t.to_local())
                        assert all(torch.equal(x, everywhere[0]) for x in everywhere), "also where a shard is empty"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_shared_moments_are_summed_in_one_message_and_rounding_is_all_that_differs(ranks: Ranks, n: int) -> None:
    ranks.run(n, shared_moments, SHARED)


def whole_matrices(names: list[str]) -> None:
    """One exchange a direction for each batch of matrices; its owner does what one process does."""
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    messages, counted = [], dist.all_to_all_single
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            twins = Twins(name, mesh, [Shard(0)], dtype)
            dist.all_to_all_single = lambda *a, **k: messages.append(0) or counted(*a, **k)
            messages.clear()
            twins.step()
            dist.all_to_all_single = counted
            shapes = {
                p.shape for p in twins.own.values() if twins.plain.recipe(p, twins.plain.param_groups[0]).method.whole
            }
            assert len(messages) == (3 * 2 * len(shapes) if n > 1 else 0)
            twins.check_weights()
            twins.check_states()
            factors = [t for k in twins.cut for (_, part), t in twins.parts(k).items() if part in ("left", "right")]
            assert all(t.placements == (Replicate(),) for t in factors)
            assert bool(factors) == name.startswith("lorapre")


@pytest.mark.parametrize("n", [1, 3, 4])
def test_cut_matrices_are_stepped_by_their_owners_bit_for_bit(ranks: Ranks, n: int) -> None:
    """Uneven rows, and on 4 ranks a matrix of which the last one has nothing."""
    ranks.run(n, whole_matrices, WHOLE)


def whole_matrices_otherwise() -> None:
    """Cut between columns; on a mesh of which one dimension cuts; a gradient that is not finite; the owners' shares."""
    mesh = init_device_mesh("cpu", (2,))
    twins = Twins("lorapre", mesh, [Shard(1)], torch.bfloat16, only=["a.weight", "b.weight", "conv.weight"]).step()
    twins.check_weights()
    twins.check_states()
    torch.manual_seed(0)
    w, g = torch.randn(6, 128), torch.randn(6, 128)
    own, cut = nn.Parameter(w.clone()), nn.Parameter(placed(w, mesh, [Shard(1)]))
    pair = [optim.Muon([("w", p)], lr=1e-2, dense_below=0) for p in (own, cut)]
    for step in range(3):
        grad = g * torch.nan if step == 1 else g
        own.grad, cut.grad = grad, placed(grad, mesh, [Shard(1)])
        for optimizer in pair:
            optimizer.step()
    assert torch.equal(whole(cut.detach()), own.detach())
    assert bits(whole(pair[1].state[cut]["momentum_buffer"].parts["codes"])) == bits(
        pair[0].state[own]["momentum_buffer"].parts["codes"]
    )
    assert pair[0].skipped() == pair[1].skipped() == {"w": 1}, "every rank knows"
    params = [nn.Parameter(placed(torch.randn(8, 40), mesh, [Shard(0)])) for _ in range(5)]
    optimizer = optim.Muon(params)
    ((some, owners),) = owners_of_rounds(optimizer, [params])
    assert list(some) == params
    assert sorted(owners.count(r) for r in range(2)) == [2, 3]


def owned_in_a_plane() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()]):
        Twins("muon", mesh, placements, torch.bfloat16).step().check_weights()
    for name in WHOLE:
        with pytest.raises(OptimizerError, match=r"a\.weight: .* needs all of a hidden matrix"):
            Twins(name, mesh, [Shard(0), Shard(1)], only=["a.weight"]).step()
    partial = DTensor.from_local(torch.ones(2, 2), mesh, [Replicate(), torch.distributed.tensor.Partial()])
    with pytest.raises(OptimizerError, match="only a sum"):
        optim.AdamW([nn.Parameter(partial)])


@pytest.mark.parametrize(("n", "check"), [(2, whole_matrices_otherwise), (4, owned_in_a_plane)])
def test_where_matrices_are_cut(ranks: Ranks, n: int, check: Any) -> None:
    ranks.run(n, check)


def stochastic() -> None:
    """Different draws for different ranks' elements, also where rows are cut."""
    mesh = init_device_mesh("cpu", (2,))
    for placements in ([Shard(0)], [Shard(1)]):
        p = nn.Parameter(placed(torch.ones(64, 64, dtype=torch.bfloat16), mesh, placements))
        p.grad = placed(torch.ones(64, 64, dtype=torch.bfloat16), mesh, placements)
        optim.SGD([p], lr=2.0**-10, stochastic_rounding=True, master_weights=None).step()
        full = whole(p.detach())
        halves = full.split(32, placements[0].dim)
        assert 0.1 < (full != 1).double().mean() < 0.4
        assert not torch.equal(*halves)


def test_ranks_round_with_draws_of_their_own(ranks: Ranks) -> None:
    ranks.run(2, stochastic)


def fused() -> None:
    """Kernels are given this rank's part, here two rows or none; interpreted, as there is no GPU."""
    from tests.kernels.ptx import assembly

    assembly.install()
    mesh = init_device_mesh("cpu", (4,))
    own = parameters(torch.bfloat16)["conv.weight"]
    cut = nn.Parameter(placed(own.detach(), mesh, [Shard(0)]))
    pair = [optim.AdamW([p], lr=1e-2, dense_below=0, fused=True) for p in (own, cut)]
    own.grad = gradients(0)["conv.weight"].bfloat16()
    cut.grad = placed(own.grad, mesh, [Shard(0)])
    for optimizer in pair:
        optimizer.step()
    assert len(pair[1]._launches) == 1
    assert torch.equal(whole(cut.detach()), own.detach())


def test_fused_steps_see_shards(ranks: Ranks) -> None:
    pytest.importorskip("triton")
    ranks.run(4, fused)
