"""Small parameters that move as one stack move as each would alone, to the bit."""

import copy
import io

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.engine import driver
from prodigyplus.terms import stacks
from tests import option_table as table
from tests.single.problems import Fed, assert_same, pair, run, snapshot
from tests.watching import Watch

# Several of each shape, but only one (7,). Those of four dimensions are channels-last.
SHAPES = (
    *[()] * 3,
    *[(1,)] * 2,
    *[(5,)] * 3,
    *[(40,)] * 4,
    (7,),
    *[(40, 33)] * 3,
    *[(3, 5, 34)] * 2,
    *[(36, 4, 3, 3)] * 3,
    *[(0, 3)] * 2,
    *[(2, 3, 4, 4)] * 2,
)

OPTIONS = [{}, *table.packed(table.elementwise(table.alone() + table.together()), most=10)]


class Problem(Fed):
    """Gradients have the memory format of their parameters, as autograd makes them."""

    def __init__(self, *shapes, dtype=torch.float32, seed=0):
        super().__init__(*shapes, dtype=dtype, seed=seed)
        for p in self.parameters:
            if p.ndim == 4:
                p.data = p.data.to(memory_format=torch.channels_last)

    def backward(self):
        super().backward()
        for p in self.parameters:
            p.grad = torch.empty_like(p).copy_(p.grad)


def build(shapes=SHAPES, dtype=torch.float32, **options):
    """A problem with every stack's members spread over two groups, the second with its own options."""
    problem = Problem(*shapes, dtype=dtype)
    first, second = (
        [p for number, p in enumerate(problem.parameters) if (number % 4 == 2) == rare]
        for rare in (False, True)
    )
    groups = [{"params": first}, {"params": second, "weight_decay": 0.05, "slice_p": 3}]
    return problem, ProdigyPlusScheduleFree(groups, **options)


def memories(optimizer, key="z"):
    """How many tensors the state has under this key, and how many storages they lie in."""
    kept = [state[key] for state in optimizer.state.values() if key in state and state[key].numel()]
    return len(kept), len({value.untyped_storage().data_ptr() for value in kept})


def without_texts(value):
    """The value without its strings, so that it can be compared with a tolerance."""
    if isinstance(value, dict):
        return {key: without_texts(its) for key, its in value.items() if not isinstance(its, str)}
    return [without_texts(its) for its in value] if isinstance(value, (list, tuple)) else value


def in_both_ways(monkeypatch, act, key="z"):
    """Snapshots and metrics of the optimiser that ``act`` returns: with stacks, and without."""
    results = []
    for small in (driver.SMALL, -1):
        monkeypatch.setattr(driver, "SMALL", small)
        optimizer = act()
        values, stored = memories(optimizer, key)
        assert (stored < values) == (small >= 0), "only the first run has stacks"
        results.append((*snapshot(optimizer), optimizer.metrics()))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=table.text_of)
def test_the_same_bits_as_each_for_itself(options, dtype, monkeypatch):
    def act():
        problem, optimizer = build(dtype=dtype, **options)
        run(optimizer, problem, 7)  # more steps than prodigy_steps
        return optimizer

    key = "z" if options.get("use_schedulefree", True) else "exp_avg"
    if options.get("bfloat16_z") and dtype == torch.float32:
        key = "z_minus_y"
    stacked, alone = in_both_ways(monkeypatch, act, key)
    balances = options.get("step_size") == "balance"
    if options.get("use_orthograd") and (dtype == torch.float64 or balances):
        # OrthoGrad's dot products are torch.bmm() in float64. For one pair that is another kernel than for
        # several, which sums in another order. Rounding to narrower weights hides this, but d sees it: a
        # direction's factor that is rounded the other way is off by a last bit of float32, 6e-8.
        close = {"rtol": 1e-6, "atol": 1e-12} if balances else {"rtol": 1e-13, "atol": 1e-16}
        torch.testing.assert_close(without_texts(stacked), without_texts(alone), **close)
    else:
        assert_same(stacked, alone)
    for group in alone[2]:
        assert group["step"] == 7
        assert group["denominator"] > 0


def test_rounding_to_the_nearest(monkeypatch):
    def act():
        problem, optimizer = build(dtype=torch.bfloat16, stochastic_rounding=False)
        run(optimizer, problem, 12)
        return optimizer

    assert_same(*in_both_ways(monkeypatch, act))


def test_members_of_different_strides(monkeypatch):
    """Some members are channels-last, one is transposed; the weights stay so.

    A stack is row-major, and sums its elements in that order. So sums are rounded differently than without
    stacks, and the runs agree only up to that.
    """

    def act():
        problem = Problem(*[(6, 4, 5, 5)] * 3, *[(12, 40)] * 2)
        optimizer = ProdigyPlusScheduleFree(problem.parameters)
        problem.parameters[1].data = problem.parameters[1].data.contiguous()
        p, q = problem.parameters[0], problem.parameters[3]
        q.data = q.data.t().contiguous().t()
        run(optimizer, problem, 12)
        assert p.is_contiguous(memory_format=torch.channels_last)
        assert q.stride() == (1, 12)
        return optimizer

    torch.testing.assert_close(*map(without_texts, in_both_ways(monkeypatch, act)), rtol=1e-6, atol=1e-12)


# ------------------------------------------------------------------------- parameters come and go


def some_without(problem, optimizer):
    for step in range(12):
        problem.backward()
        for number, p in enumerate(problem.parameters):
            if (5 * number + 7 * step) % 3 == 0 or (step == 6 and p.ndim):
                p.grad = None
        optimizer.step()
    return problem, optimizer


def now_and_then_without_the_first(problem, optimizer):
    """The rest of a stack lies in the stack's storage, but not at its start."""
    run(optimizer, problem, 1)
    firsts = {(id(group), p.shape): p for group in optimizer.param_groups for p in group["params"][::-1]}
    for step in range(11):
        problem.backward()
        if step % 3:
            for p in firsts.values():
                p.grad = None
        optimizer.step()
    return problem, optimizer


def first_seen_late(problem, optimizer):
    """States of one shape that were created at different steps."""
    for step in range(12):
        problem.backward()
        for p in problem.parameters[step + 1 :: 2]:
            p.grad = None
        optimizer.step()
    return problem, optimizer


def reordered(problem, optimizer):
    run(optimizer, problem, 5)
    for group in optimizer.param_groups:
        group["params"].reverse()
    run(optimizer, problem, 4)
    params = optimizer.param_groups[0]["params"]
    params[:] = params[1::2] + params[::2]
    run(optimizer, problem, 4)
    return problem, optimizer


def joined_by_a_group(problem, optimizer):
    run(optimizer, problem, 5)
    more = Problem(*SHAPES, dtype=problem.parameters[0].dtype, seed=1)
    optimizer.add_param_group({"params": more.parameters, "use_speed": True})
    problem.parameters += more.parameters
    run(optimizer, problem, 8)
    return problem, optimizer


def changed_options(problem, optimizer):
    """A group's options may be changed between steps."""
    run(optimizer, problem, 4)
    optimizer.param_groups[0]["use_cautious"] = True
    run(optimizer, problem, 4)
    optimizer.param_groups[1].update(lr=0.5, weight_decay=0.0)
    run(optimizer, problem, 4)
    return problem, optimizer


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded_into_a_fresh_one(problem, optimizer):
    run(optimizer, problem, 5)
    groups = [{"params": list(group["params"])} for group in optimizer.param_groups]
    fresh = ProdigyPlusScheduleFree(groups)
    fresh.load_state_dict(saved(optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    run(fresh, problem, 7)
    assert_same(optimizer.state_dict(), before)
    return problem, fresh


def loaded_into_a_used_one(problem, optimizer):
    run(optimizer, problem, 5)
    state = optimizer.state_dict()
    kept, loaded = copy.deepcopy(state), copy.deepcopy(state)
    weights = [p.detach().clone() for p in problem.parameters]
    # Steps in which only some take part, so that even the state is elsewhere.
    some_without(problem, optimizer)
    optimizer.load_state_dict(loaded)
    with torch.no_grad():
        for p, weight in zip(problem.parameters, weights, strict=True):
            p.copy_(weight)
    run(optimizer, problem, 7)
    assert_same(loaded, kept)  # it was neither changed nor shared
    return problem, optimizer


def copied(problem, optimizer):
    run(optimizer, problem, 5)
    its = copy.deepcopy((problem, optimizer))
    run(optimizer, problem, 3)
    before = snapshot(optimizer)
    problem_copy, optimizer_copy = its
    run(optimizer_copy, problem_copy, 8)
    assert_same(snapshot(optimizer), before)
    run(optimizer, problem, 5)
    assert_same(snapshot(optimizer_copy), snapshot(optimizer))
    return its


def evaluated(problem, optimizer):
    for _ in range(6):
        run(optimizer, problem, 2)
        optimizer.eval()
        with optimizer.averaged_parameters():
            pass
        optimizer.train()
    with optimizer.averaged_parameters():
        assert optimizer.holds_average
    run(optimizer, problem, 2)
    return problem, optimizer


def bad_once(problem, optimizer):
    for step, number in enumerate((None, None, 1, 8, 14, None, 20, None)):
        before = snapshot(optimizer)
        problem.backward()
        if number is not None:
            grad = problem.parameters[number].grad
            grad[(-1,) * grad.ndim] = (float("nan"), float("inf"))[step % 2]
        optimizer.step()
        if number is not None:
            now = snapshot(optimizer)
            assert_same(now[0], before[0])
            assert_same(now[1]["state"], before[1]["state"])
    assert [int(group["skipped_steps"]) for group in optimizer.metrics()] == [4, 4]
    return problem, optimizer


HISTORIES = [
    some_without,
    now_and_then_without_the_first,
    first_seen_late,
    reordered,
    joined_by_a_group,
    changed_options,
    loaded_into_a_fresh_one,
    loaded_into_a_used_one,
    copied,
    evaluated,
    bad_once,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda f: f.__name__)
def test_the_same_bits_whatever_comes_between(history, dtype, monkeypatch):
    assert_same(*in_both_ways(monkeypatch, lambda: history(*build(dtype=dtype))[1]))


@pytest.mark.parametrize("history", [some_without, first_seen_late, joined_by_a_group, bad_once])
def test_states_of_many_tensors_that_come_and_go(history, monkeypatch):
    options = {"use_speed": "relative", "prodigy_steps": 7, "use_cautious": True}
    assert_same(*in_both_ways(monkeypatch, lambda: history(*build(**options))[1]))


# ---------------------------------------------------------------------- fused with the backward pass


class Model(nn.Module):
    """Equal layers; one is never used, and one only in every second step."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6)).to(dtype)
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        for number, layer in enumerate(self.layers[:-1]):
            if number != 2 or self.steps % 2:
                x = layer(x).tanh()
        return x.square().mean()


def trained(dtype, *, fused, bad=None, by_hand=()):
    """An optimiser after 12 steps.

    Args:
        dtype: The model's.
        fused: Whether it moves weights within the backward pass.
        bad: The number of a parameter whose gradient is not finite in step 4.
        by_hand: The steps in which gradients are set by hand, without a backward pass.
    """
    model = Model(dtype)
    optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=fused, weight_decay=0.01)
    if fused:
        optimizer.fuse_backward(model)
    draw = torch.Generator().manual_seed(0)
    for step in range(12):
        x = torch.randn(4, 12, generator=draw).to(dtype)
        if step in by_hand:
            for number, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=draw).to(dtype)
                if (step, number) == (4, bad):
                    p.grad.view(-1)[3] = float("nan")
        else:
            model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_backward_pass_each_for_itself(dtype):
    plain, fused = (snapshot(trained(dtype, fused=fused)) for fused in (False, True))
    for _, state in (plain, fused):
        del state["param_groups"][0]["fused_back_pass"]
    assert plain[1]["param_groups"][0]["d"] > 1e-6
    assert_same(fused, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, 0, 3, 11])
def test_what_backward_has_left_moves_as_one_but_is_skipped_each_for_itself(bad, dtype, monkeypatch):
    def act():
        return trained(dtype, fused=True, bad=bad, by_hand=range(2, 12))

    stacked, alone = in_both_ways(monkeypatch, act)
    assert_same(stacked, alone)
    assert alone[2][0]["skipped_steps"] == (bad is not None)
    assert alone[2][0]["step"] == 12
    assert all(weight.isfinite().all() for weight in stacked[0])


# --------------------------------------------------------------------------------- one storage


def test_states_share_one_memory_and_stay_there():
    problem, optimizer = build()
    run(optimizer, problem, 1)

    def addresses():
        return {
            (number, key): (value.data_ptr(), value.untyped_storage().data_ptr())
            for number, p in enumerate(problem.parameters)
            for key, value in optimizer.state[p].items()
        }

    first = addresses()
    stacks_of = {
        (group, p.shape): [q for q in optimizer.param_groups[group]["params"] if q.shape == p.shape]
        for group in (0, 1)
        for p in optimizer.param_groups[group]["params"]
    }
    several = [members for members in stacks_of.values() if len(members) > 1]
    assert len(several) >= 5
    for members in several:
        for key in optimizer.state[members[0]]:
            values = [optimizer.state[p][key] for p in members]
            assert len({value.untyped_storage().data_ptr() for value in values}) == 1, key
            if values[0].numel():
                total = sum(value.nbytes for value in values)
                assert values[0].untyped_storage().nbytes() == total, key
                assert len({value.data_ptr() for value in values}) == len(values), key
    run(optimizer, problem, 3)
    optimizer.eval()
    optimizer.train()
    run(optimizer, problem, 1)
    assert addresses() == first


def test_a_stack_that_has_not_all_its_members_is_not_copied_if_they_are_neighbours():
    problem, optimizer = pair(*[(40,)] * 5)
    run(optimizer, problem, 1)
    first = [optimizer.state[p]["z"].data_ptr() for p in problem.parameters]
    problem.backward()
    problem.parameters[0].grad = problem.parameters[4].grad = None
    optimizer.step()
    run(optimizer, problem, 1)
    assert [optimizer.state[p]["z"].data_ptr() for p in problem.parameters] == first


def test_a_copy_has_a_memory_of_its_own():
    problem, optimizer = build()
    run(optimizer, problem, 2)
    _, its = copy.deepcopy((problem, optimizer))
    values = [value for state in optimizer.state.values() for value in state.values()]
    where = {value.untyped_storage().data_ptr() for value in values}
    assert memories(its) == memories(optimizer)
    for state in its.state.values():
        assert not {v.untyped_storage().data_ptr() for v in state.values() if v.numel()} & where


@pytest.mark.parametrize("limit", ["STACK_BYTES", "bucket_bytes"])
def test_stacks_stay_below_the_limit(limit, monkeypatch):
    """Ten vectors of 160 bytes are stacked by threes, and larger ones not at all."""

    def act():
        problem, optimizer = pair(*[(40,)] * 10, *[(200,)] * 2)
        if limit == "bucket_bytes":
            optimizer._exchange = driver.OneProcess()
            optimizer._exchange.bucket_bytes = 8 * 500
        run(optimizer, problem, 8)
        return optimizer

    if limit == "STACK_BYTES":
        monkeypatch.setattr(driver, "STACK_BYTES", 500)
    optimizer = act()
    sizes = [state["z"].untyped_storage().nbytes() for state in optimizer.state.values()]
    assert sizes == [480] * 9 + [160] + [800] * 2
    assert_same(*in_both_ways(monkeypatch, act))


def test_the_limit_is_of_the_arithmetic():
    """For bfloat16 weights, too, the limit counts float32 bytes: those of a direction."""
    problem, optimizer = pair(*[(driver.SMALL,)] * 40, dtype=torch.bfloat16)
    run(optimizer, problem, 1)
    sizes = {state["z"].untyped_storage().nbytes() for state in optimizer.state.values()}
    assert sizes == {driver.STACK_BYTES // 2, 8 * driver.SMALL * 2}


def test_what_is_large_is_moved_alone():
    problem, optimizer = pair(*[(driver.SMALL,)] * 2, *[(driver.SMALL + 1,)] * 2)
    run(optimizer, problem, 1)
    storages = [state["z"].untyped_storage().data_ptr() for state in optimizer.state.values()]
    assert storages[0] == storages[1]
    assert len(set(storages)) == 3


def test_what_differs_is_no_stack():
    """Parameters that differ in dtype, group or shape do not share a stack."""
    parameters = [nn.Parameter(torch.ones(6, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 2]
    parameters += [nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(2, 3))]
    optimizer = ProdigyPlusScheduleFree([{"params": parameters[:4]}, {"params": parameters[4:]}])
    for _ in range(2):
        for p in parameters:
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
    storages = [optimizer.state[p]["z"].untyped_storage().data_ptr() for p in parameters]
    assert storages[0] == storages[2]
    assert storages[1] == storages[3]
    assert len(set(storages)) == 4


def test_states_of_different_dtypes_are_no_stack(monkeypatch):
    """Tensors are loaded in the dtype that they were saved in, so states of one stack may come to differ."""

    def act():
        problem, optimizer = pair(*[(40,)] * 4)
        run(optimizer, problem, 3)
        state = optimizer.state_dict()
        state["state"][1]["exp_avg_sq"] = state["state"][1]["exp_avg_sq"].double()
        optimizer.load_state_dict(state)
        run(optimizer, problem, 3)
        dtypes = [optimizer.state[p]["exp_avg_sq"].dtype for p in problem.parameters]
        assert dtypes == [torch.float32, torch.float64, torch.float32, torch.float32]
        return optimizer

    assert_same(*in_both_ways(monkeypatch, act))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_is_no_larger_than_its_tensors(dtype):
    problem, optimizer = pair(*[(4000,)] * 12, *[(60, 70)] * 12, dtype=dtype)
    run(optimizer, problem, 2)
    state = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    tensors = sum(value.nbytes for its in state["state"].values() for value in its.values())
    assert file.tell() < 1.1 * tensors
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), state)


def test_share_moves_tensors_once():
    tensors = [torch.full((3, 2), float(number)) for number in range(4)]
    expected = torch.stack(tensors)
    together = stacks.stack_view(tensors)
    assert_same(together, expected)
    assert_same(torch.stack(tensors), expected)
    again = stacks.stack_view(tensors)
    assert again.data_ptr() == together.data_ptr() == tensors[0].data_ptr()
    assert_same(again, expected)
    again.add_(1)
    assert_same(torch.stack(tensors), expected + 1)
    some = stacks.stack_view(tensors[1:3])
    assert some.data_ptr() == tensors[1].data_ptr() != together.data_ptr()
    assert_same(some, expected[1:3] + 1)
    for few in (tensors[::-1], tensors[::2], tensors[:1]):
        assert_same(stacks.stack_view(few), torch.stack(few))
    assert_same(torch.stack(tensors), expected + 1)


def test_neighbours_by_accident():
    """Two storages that an allocator happens to place next to each other are not one stack."""
    memory = bytearray(64)
    tensors = [torch.frombuffer(memory, dtype=torch.float32, count=8, offset=at) for at in (0, 32)]
    assert tensors[1].data_ptr() == tensors[0].data_ptr() + 32
    assert_same(stacks.stack_view(tensors), torch.zeros(2, 8))


def test_members_that_come_and_go_leave_no_memory_behind():
    problem, optimizer = pair(*[(4000,)] * 12)
    run(optimizer, problem, 1)
    for step in range(5):
        problem.backward()
        for p in problem.parameters[1 : 2 * step + 2]:
            p.grad = None
        problem.parameters[11].grad = None
        optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    assert sum(storages.values()) < 1.1 * sum(value.nbytes for value in tensors)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 1.1 * sum(value.nbytes for value in tensors)


# ------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_calls_for_many_parameters(dtype, monkeypatch):
    problem, optimizer = pair(*[(40,)] * 200, dtype=dtype)
    run(optimizer, problem, 1)
    calls = []
    for small in (driver.SMALL, -1):
        monkeypatch.setattr(driver, "SMALL", small)
        problem.backward()
        with Watch() as watch:
            optimizer.step()
        calls.append(len(watch.calls))
    assert calls[0] < 5 * 200 < calls[1]
