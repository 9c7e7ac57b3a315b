"""What every optimizer of this library must do, whatever its method.

Subclass `OptimizerContract` in a test file and give it a `make` fixture: a function from parameters (anything that
torch.optim takes) to an optimizer. Options that encode small tensors too make the suite stricter.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statecodec import optim
from statecodec.codecs import EncodedTensor
from statecodec.codecs.plain import is_plain, to_plain
from statecodec.errors import OptimizerError
from tests.optim.helpers import bits, gradients, parameters, run

Make = Callable[[Any], optim.StateOptimizer]
DTYPES = [torch.float32, torch.bfloat16]


def plain_only(value: Any) -> bool:
    """Whether a value is made of what torch.load(weights_only=True) and other languages understand."""
    if isinstance(value, dict):
        return all(isinstance(k, str | int) and plain_only(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(plain_only(v) for v in value)
    return value is None or type(value) in (bool, int, float, str) or type(value) is Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nested value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, EncodedTensor):
        yield from value.parts.values()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


def everything(optimizer: optim.StateOptimizer, params: dict[str, nn.Parameter]) -> Any:
    return bits({"params": {k: p.detach() for k, p in params.items()}, "state": optimizer.state_dict()})


class OptimizerContract:
    """The suite; `make` is the one thing it needs."""

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError

    def trained(self, make: Make, dtype: torch.dtype = torch.float32, steps: int = 3, **group: Any) -> Any:
        params = parameters(dtype)
        optimizer = make([{"params": list(params.items()), **group}])
        run(optimizer, params, range(steps))
        return optimizer, params

    # --- saving and loading

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_state_dict_goes_through_a_file_bit_for_bit(self, make: Make, dtype: torch.dtype) -> None:
        optimizer, _ = self.trained(make, dtype)
        state = optimizer.state_dict()
        assert plain_only(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        again = make(parameters(dtype, seed=5).items())
        again.load_state_dict(torch.load(file, weights_only=True))
        assert bits(again.state_dict()) == bits(state)
        assert again.load_report.exact
        assert str(again.load_report) == "every state loaded bit for bit"

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_resuming_is_never_having_stopped(self, make: Make, dtype: torch.dtype) -> None:
        optimizer, params = self.trained(make, dtype)
        others = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
        again = make([{"params": list(others.items())}])
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, params, range(3, 6))
        run(again, others, range(3, 6))
        assert everything(again, others) == everything(optimizer, params)

    def test_nothing_loaded_aliases_what_it_came_from(self, make: Make) -> None:
        optimizer, params = self.trained(make, torch.bfloat16, lr=torch.tensor(1e-2), note=[1, [2]])
        saved = optimizer.state_dict()
        before = bits(saved)
        again = make(parameters(torch.bfloat16).items())
        again.load_state_dict(saved)
        for tensor in tensors([again.state_dict(), list(again.state.values())]):
            tensor.zero_()
        again.param_groups[0]["note"][1].append(3)
        assert bits(saved) == before
        assert everything(optimizer, params)["state"] == before

    def test_a_state_dict_leaves_the_live_optimizer_alone_while_it_is_built(self, make: Make) -> None:
        """A checkpoint thread may build it while the training thread steps: here, a hook that runs in between."""
        (optimizer, params), (twin, twin_params) = self.trained(make), self.trained(make)
        for dense in (False, True):
            handle = optimizer.register_state_dict_pre_hook(lambda o: run(o, params, range(3, 4)))
            optimizer.state_dict(dense=dense)
            handle.remove()
            run(twin, twin_params, range(3, 4))
        assert everything(optimizer, params) == everything(twin, twin_params)

    def test_before_the_first_step(self, make: Make) -> None:
        optimizer, params = self.trained(make, steps=0)
        state = optimizer.state_dict()
        assert state["state"] == {}
        again = make(params.items())
        again.load_state_dict(state)
        assert again.load_report.exact
        run(again, params, range(1))

    @pytest.mark.parametrize(
        "twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
    )
    def test_copies_and_pickles_carry_on(self, make: Make, twin_of: Any) -> None:
        """deepcopy and pickle keep the states beside the parameters (both in one object), as torch's optimizers do."""
        optimizer, params = self.trained(make, torch.bfloat16)
        twin, twin_params = twin_of((optimizer, params))
        run(twin, twin_params, range(3, 5))
        run(optimizer, params, range(3, 5))
        assert everything(twin, twin_params) == everything(optimizer, params)

    # --- groups

    def test_a_group_keeps_the_keys_that_schedulers_and_users_put_into_it(self, make: Make) -> None:
        optimizer, params = self.trained(make, steps=1, name="all of them")
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
        optimizer.step()
        scheduler.step()
        again = make(parameters().items())
        again.load_state_dict(optimizer.state_dict())
        group = again.param_groups[0]
        assert group["name"] == "all of them"
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in optimizer.param_groups[0].items() if k != "params"
        }
        with warnings.catch_warnings():  # a scheduler made in the middle of a run says that no step came before it
            warnings.simplefilter("ignore", UserWarning)
            resumed = torch.optim.lr_scheduler.OneCycleLR(
                again, 0.1, total_steps=9, cycle_momentum=False, last_epoch=scheduler.last_epoch
            )
        run(again, params, range(1))
        resumed.step()

    def test_numbers_may_be_numpys(self, make: Make) -> None:
        optimizer, params = self.trained(make, lr=np.float32(1e-2), weight_decay=np.float64(0.1), seed=np.int64(3))
        twin, twin_params = self.trained(make, lr=float(np.float32(1e-2)), weight_decay=0.1, seed=3)
        assert everything(optimizer, params) == everything(twin, twin_params)
        optimizer.param_groups[0]["lr"] = np.float64(1e-2)  # a LambdaLR whose function uses numpy
        state = optimizer.state_dict()
        assert plain_only(state)
        for values in state["state"].values():
            values["step"] = np.int64(3)
        state["param_groups"][0]["lr"] = np.float32(0.5)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert all(s["step"] == 3 for s in optimizer.state_dict()["state"].values())
        assert plain_only(optimizer.state_dict())

    def test_a_parameter_may_be_replaced_and_others_may_join(self, make: Make) -> None:
        optimizer, params = self.trained(make, torch.bfloat16)
        group = optimizer.param_groups[0]
        old = bits({k: optimizer.state[p] for k, p in params.items() if k != "a.weight"})
        params["a.weight"] = nn.Parameter(torch.full((12, 70), 0.1, dtype=torch.bfloat16))  # pruned, in another shape
        group["params"][0] = params["a.weight"]
        assert bits({k: optimizer.state[p] for k, p in params.items() if k != "a.weight"}) == old
        params["late"] = nn.Parameter(torch.full((6, 70), 0.1))
        group["params"].append(params["late"])
        params["later"] = nn.Parameter(torch.full((3, 40), 0.1))
        optimizer.param_groups.append({**optimizer.defaults, "params": [params["later"]], "lr": 1e-2})
        for p in params.values():
            p.grad = torch.ones_like(p)
        before = {k: p.detach().clone() for k, p in params.items()}
        optimizer.step()
        assert all(bool((p != before[k]).any()) for k, p in params.items())
        assert {k: int(optimizer.state[p]["step"]) for k, p in params.items()} == {
            k: 1 if k in ("a.weight", "late", "later") else 4 for k in params
        }
        saved = optimizer.state_dict()
        assert sorted(saved["state"]) == list(range(len(params)))
        *first, last = params.items()
        again = make([{"params": first}, {"params": [last]}])
        again.load_state_dict(saved)
        assert again.load_report.exact

    # --- parameters that change

    @pytest.mark.parametrize("after", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("before", [torch.bfloat16, torch.float32], ids=str)
    def test_a_model_may_change_its_dtype(self, make: Make, before: torch.dtype, after: torch.dtype) -> None:
        """As `model.to(dtype)` does it: the parameters stay the same objects.

        The weight as the optimizer sees it stays what it was, and a parameter that needs a master weight gets one.
        """
        optimizer, params = self.trained(make, before)
        if after == torch.float64 and not self.takes_fp64(make):
            pytest.skip("keeps fp32 states")
        if after == torch.float16 and optimizer.param_groups[0]["stochastic_rounding"]:
            pytest.skip("stochastic rounding is for bf16")
        exact = {k: optimizer.master_weight(p).double() for k, p in params.items()}
        for p in params.values():
            p.data, p.grad = p.data.to(after), None
        for k, p in params.items():
            narrower = before == torch.float32 and after in (torch.bfloat16, torch.float16)
            kept = optimizer.master_weight(p).double()
            tolerance = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[after] if narrower else 2.0**-17
            assert ((kept - exact[k]).abs() <= exact[k].abs() * tolerance + 1e-6).all(), k
        start = {k: optimizer.master_weight(p) for k, p in params.items()}
        run(optimizer, params, range(3, 5))
        for k, p in params.items():
            split = after in (torch.bfloat16, torch.float16) and optimizer.param_groups[0]["master_weights"]
            assert ("weight_low" in optimizer.state[p]) == bool(split), k
            assert p.dtype == after
            assert bool((optimizer.master_weight(p) != start[k]).any())
        others = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
        again = make(others.items())
        again.load_state_dict(optimizer.state_dict())
        assert again.load_report.exact
        run(optimizer, params, range(5, 6))
        run(again, others, range(5, 6))
        assert bits(others) == bits(params)

    def takes_fp64(self, make: Make) -> bool:
        params = {k: nn.Parameter(p.detach().double()) for k, p in parameters().items()}
        try:
            run(make(params.items()), params, range(1))
        except OptimizerError:
            return False
        return True

    def test_a_state_of_another_shape_is_refused_by_name(self, make: Make) -> None:
        optimizer, params = self.trained(make)
        if not set(optimizer.state[params["a.weight"]]) - {"step", "skipped"}:
            pytest.skip("keeps no state that has a shape")
        params["a.weight"].data = torch.ones(100, 70)
        params["a.weight"].grad = torch.ones(100, 70)
        with pytest.raises(OptimizerError, match=r"a\.weight.*\(100, 70\)"):
            optimizer.step()

    def test_plain_forms_put_into_the_state_are_taken(self, make: Make) -> None:
        """ZeroRedundancyOptimizer writes what it loads straight into `state`."""
        (optimizer, params), (twin, twin_params) = (
            self.trained(make, torch.bfloat16),
            self.trained(make, torch.bfloat16),
        )
        for p in params.values():
            optimizer.state[p] = {
                k: to_plain(v) if isinstance(v, EncodedTensor) else v.to(torch.float64)
                for k, v in optimizer.state[p].items()
            }
            assert any(map(is_plain, optimizer.state[p].values())) or len(optimizer.state[p]) == 2
        run(optimizer, params, range(3, 5))
        run(twin, twin_params, range(3, 5))
        assert everything(optimizer, params) == everything(twin, twin_params)

    # --- what is around it

    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_no_default_dtype_changes_a_step(self, make: Make, default: torch.dtype) -> None:
        expected = everything(*self.trained(make, torch.bfloat16))
        usual = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            optimizer, params = self.trained(make, torch.bfloat16)
            found = everything(optimizer, params)
            for state in optimizer.state.values():
                state["step"].fill_(2048)
            run(optimizer, params, range(1))
            counts = {int(state["step"]) for state in optimizer.state.values()}
            again = make(parameters(torch.bfloat16).items())
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            loaded = everything(again, params)
        finally:
            torch.set_default_dtype(usual)
        assert found == expected
        assert counts == {2049}
        assert loaded == everything(optimizer, params)

    def test_no_default_device_changes_a_step(self, make: Make) -> None:
        expected = everything(*self.trained(make, torch.bfloat16))
        given, grads = parameters(torch.bfloat16), [gradients(step, torch.bfloat16) for step in range(3)]
        with torch.device("meta"):
            optimizer = make([{"params": list(given.items())}])
            for step in range(3):
                for k, p in given.items():
                    p.grad = grads[step][k]
                optimizer.step()
            saved = optimizer.state_dict()
            again = make([{"params": list(given.items())}])
            again.load_state_dict(saved)
            dense = again.state_dict(dense=True)
            again.load_state_dict(dense)
            optim.invisible_steps(again)
        assert everything(optimizer, given) == expected
        assert all(t.device.type == "cpu" for t in tensors([saved, dense, again.state_dict()]))

    # --- reports

    def test_what_is_missing_or_fits_nothing_is_reported(self, make: Make) -> None:
        optimizer, _ = self.trained(make)
        state = optimizer.state_dict()
        del state["state"][1]
        again = make(parameters().items())
        again.load_state_dict(state)
        assert not again.load_report.exact
        assert "a.bias" in str(again.load_report)
        state = optimizer.state_dict()
        state["state"][77] = state["state"][0]
        again.load_state_dict(state)
        assert not again.load_report.exact
        assert "77" in str(again.load_report)
        state = optimizer.state_dict()
        state["state"][0]["velocity"] = torch.zeros(24, 70)
        again.load_state_dict(state)
        assert not again.load_report.exact
        assert "velocity" in str(again.load_report)
