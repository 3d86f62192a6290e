"""The check that ranks agree: silent after any training, but it reports whatever one rank has changed."""

import contextlib
import copy
import itertools
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree, check_replicas, replicas
from tests import option_table as table
from tests.dist.meshes import MESHES, Placed, for_muon, pieces_of, whole
from tests.dist.sharding import WRAPS, ranks, wrap
from tests.models import Walks, fit, loss_of
from tests.single.problems import Fed, assert_same, pair, run
from tests.watching import Watch

STEPS = 3

_OF_STATE = ("use_speed", "use_schedulefree", "factored", "prodigy_steps", "use_focus", "use_muon_pp")
OPTIONS = table.packed(table.alone(table.named("passes")) + table.together(_OF_STATE), most=10)


def groups(parameters, use_muon_pp=False, **options):
    return for_muon(parameters, **options) if use_muon_pp else [{"params": parameters, **options}]


def bits_of(optimizer):
    """Copies of all that the optimiser has on this rank: tensors, and the groups' entries."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [[p, *optimizer.state.get(p, {}).values()] for p in parameters]
    numbers = [
        {name: (str(type(value)), copy.deepcopy(value)) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    return [[pieces_of(tensor.detach()).clone() for tensor in its] for its in tensors], numbers


# ------------------------------------------------------------------------------------- nothing is wrong


def fed_run(mesh_name, options, checked):
    placed = Placed(Fed(*MESHES[mesh_name].shapes), MESHES[mesh_name])
    optimizer = ShardedProdigyPlusScheduleFree(groups(placed.parameters, **options))

    def check():
        if not checked:
            return
        before = bits_of(optimizer)
        with CommDebugMode() as seen:
            optimizer.check_replicas()
        assert {str(kind): count for kind, count in seen.get_comm_counts().items()} == {"c10d.allreduce_": 1}
        assert_same(bits_of(optimizer), before)

    check()
    for _ in range(STEPS):
        placed.backward()
        check()
        optimizer.step()
        check()
    optimizer.eval()
    check()
    with optimizer.averaged_parameters():
        check()
    optimizer.load_state_dict(optimizer.state_dict())
    check()
    optimizer.train()
    placed.backward()
    optimizer.step()
    return bits_of(optimizer)


@pytest.mark.parametrize(
    ("mesh_name", "options"),
    [
        *((name, {}) for name in MESHES),
        *zip(
            itertools.cycle(("fsdp_tp_uneven", "empty", "mixed", "hsdp", "two_meshes")),
            OPTIONS,
            strict=False,
        ),
    ],
    ids=str,
)
def test_one_all_reduce_that_changes_nothing(pool, mesh_name, options):
    with_checks, without = (
        pool.run(MESHES[mesh_name].ranks, fed_run, mesh_name, options, checked) for checked in (True, False)
    )
    assert_same(with_checks, without)


def bytes_sent(repeat):
    placed = Placed(Fed(*MESHES["hsdp"].shapes * repeat), MESHES["hsdp"])
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters)
    run(optimizer, placed, 1)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        optimizer.check_replicas()
    return [call.args[0].nbytes for call in all_reduce.call_args_list]


def test_its_bytes_do_not_depend_on_parameters(pool):
    assert [pool.run(4, bytes_sent, repeat) for repeat in (1, 3)] == [[[8192]] * 4] * 2


def real_run(wrap_name, dtype):
    model, called, number, count = wrap(wrap_name, dtype)
    make = ProdigyPlusScheduleFree if "ddp" in wrap_name else ShardedProdigyPlusScheduleFree
    optimizer = make(model.named_parameters())
    # The mesh of a parameter that tensor parallelism leaves alone does not have its axis.
    group = model.blocks[0].up.weight.device_mesh["tp"].get_group() if "_tp" in wrap_name else None
    for _ in range(STEPS):
        fit(called, optimizer, Walks(), 2, number, count)
        check_replicas(optimizer, group)
    norm = model.blocks[0].norm1.bias
    return [
        complaint_of(optimizer, flipped(tensor), 1, group) for tensor in (norm, optimizer.state[norm]["p0"])
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrap_name", WRAPS)
def test_real_models(pool, wrap_name, dtype):
    first, *others = pool.run(ranks(wrap_name), real_run, wrap_name, dtype)
    assert others == [first] * len(others)
    for message, what in zip(first, ("the weights", "state 'p0'"), strict=True):
        has_copies = wrap_name not in ("fsdp2", "fsdp4")
        assert (f"{what} of parameter 'blocks.0.norm1.bias': rank " in message) == has_copies
        assert (message == "") != has_copies


# ---------------------------------------------------------------------------------- something is wrong


def complaint_of(optimizer, change=None, rank=0, group=None):
    """The check's message, or "", while ``change`` applies on one rank."""
    with change if change and dist.get_rank() == rank else contextlib.nullcontext():
        try:
            check_replicas(optimizer, group)
        except RuntimeError as error:
            return str(error)
    return ""


@contextlib.contextmanager
def flipped(tensor, element=0, bit=0):
    """Flip one bit of an element."""
    local = pieces_of(tensor.detach()).view(-1)
    bits = local.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()])
    bits[element] ^= (torch.tensor(1) << bit).to(bits.dtype)
    yield
    bits[element] ^= (torch.tensor(1) << bit).to(bits.dtype)


@contextlib.contextmanager
def swapped(tensor):
    """Swap the first element and the last."""
    local = pieces_of(tensor.detach()).view(-1)
    first, last = local[0].item(), local[-1].item()
    assert first != last
    local[0], local[-1] = last, first
    yield
    local[0], local[-1] = first, last


@contextlib.contextmanager
def changed(mapping, key, value):
    before = mapping[key]
    mapping[key] = value
    yield
    mapping[key] = before


@contextlib.contextmanager
def without(mapping, key):
    taken = mapping.pop(key)
    yield
    mapping[key] = taken


@contextlib.contextmanager
def frozen(p):
    p.requires_grad_(False)
    yield
    p.requires_grad_(True)


@contextlib.contextmanager
def one_less(parameters):
    last = parameters.pop()
    yield
    parameters.append(last)


@contextlib.contextmanager
def one_group_more(optimizer):
    optimizer.add_param_group({"params": []})
    yield
    optimizer.param_groups.pop()


def bit(key, element=0):
    return lambda optimizer, p: flipped(optimizer.state[p][key], element)


def number(key, value):
    return lambda optimizer, p: changed(optimizer.param_groups[0], key, value)


IT = "parameter 0 of param_groups[0]"
IS = "torch.float32 of shape (32, 64) in placements (Replicate(), Shard(dim=0)), "
HAS = (
    "state 'exp_avg_sq_col' (torch.float32), 'exp_avg_sq_mean' (torch.float32), "
    "'exp_avg_sq_row' (torch.float32), 'p0' (torch.float32), 's' (torch.bfloat16), 'z' (torch.float32)"
)
HAS_NO_Z = HAS.removesuffix(", 'z' (torch.float32)")

# By mesh and options: a rank, what is changed there in an optimiser or its first parameter, and the message
# on all ranks, with # for a hash. On the mesh "hsdp", ranks 0 and 2 have the same pieces, as have 1 and 3.
CASES = {
    ("hsdp", ()): [
        (3, lambda o, p: flipped(p, 7, 31), f"the weights of {IT}: rank 1: #; rank 3: #"),
        (0, lambda o, p: swapped(p), f"the weights of {IT}: rank 0: #; rank 2: #"),
        (2, bit("z"), f"state 'z' of {IT}: rank 0: #; rank 2: #"),
        (1, lambda o, p: swapped(o.state[p]["z"]), f"state 'z' of {IT}: rank 1: #; rank 3: #"),
        (1, bit("p0", -1), f"state 'p0' of {IT}: rank 1: #; rank 3: #"),
        (2, bit("s", 2), f"state 's' of {IT}: rank 0: #; rank 2: #"),
        (3, bit("exp_avg_sq_row", 1), f"state 'exp_avg_sq_row' of {IT}: rank 1: #; rank 3: #"),
        # An average over the dimension that is cut: all shards have the same.
        (3, bit("exp_avg_sq_col", 63), f"state 'exp_avg_sq_col' of {IT}: rank 3: #; rank 0, 1, 2: #"),
        (1, number("d", torch.tensor(2.0)), "'d' of param_groups[0]: rank 1: 2.0, #; rank 0, 2, 3: 1.03"),
        (0, number("k", torch.tensor(9)), "'k' of param_groups[0]: rank 0: 9, #; rank 1, 2, 3: 3, #"),
        (2, number("calls", 4), "'calls' of param_groups[0]: rank 2: 4; rank 0, 1, 3: 3"),
        (
            3,
            number("train_mode", False),
            "'train_mode' of param_groups[0]: rank 3: False; rank 0, 1, 2: True",
        ),
        (2, number("lr", 0.5), "'lr' of param_groups[0]: rank 2: 0.5; rank 0, 1, 3: 1.0"),
        (1, number("beta4", None), "'beta4' of param_groups[0]: rank 1: None; rank 0, 2, 3: 0.0"),
        (1, lambda o, p: without(o.state, p), f"{IT}: rank 1: {IS}no state; rank 0, 2, 3: {IS}{HAS}"),
        (1, lambda o, p: without(o.state[p], "z"), f"{IT}: rank 1: {IS}{HAS_NO_Z}; rank 0, 2, 3: {IS}{HAS}"),
        (0, lambda o, p: frozen(p), f"{IT}: rank 0: frozen, {IS}{HAS}; rank 1, 2, 3: {IS}{HAS}"),
        (2, lambda o, p: one_group_more(o), "param_groups: rank 2: 2 of them; rank 0, 1, 3: 1 of them"),
        (
            0,
            lambda o, p: one_less(o.param_groups[0]["params"]),
            "parameter 7 of param_groups[0]: rank 0: nothing; ",
        ),
    ],
    ("hsdp", ("use_muon_pp=True",)): [
        (3, bit("z"), f"state 'z' of {IT}: rank 1: #; rank 3: #"),
        (3, bit("s"), f"state 's' of {IT}: rank 1: #; rank 3: #"),
    ],
    ("tp", ("use_schedulefree=False", "factored=False", "use_speed=relative")): [
        (
            1,
            lambda o, p: flipped(o.param_groups[0]["params"][6]),
            "the weights of parameter 6 of param_groups[0]: ",
        ),
        (
            0,
            lambda o, p: bit("exp_avg")(o, o.param_groups[0]["params"][6]),
            "state 'exp_avg' of parameter 6 ",
        ),
        (1, bit("max_l1"), f"state 'max_l1' of {IT}: rank 0: 0."),
    ],
    # Pieces that rightly differ, one of which is empty; and what ranks have in common nevertheless.
    ("uneven", ()): [
        (1, lambda o, p: flipped(p), ""),
        (0, bit("s"), ""),
        (3, bit("exp_avg_sq_mean"), f"state 'exp_avg_sq_mean' of {IT}: rank 3: "),
        (3, lambda o, p: without(o.state, p), f"{IT}: rank 3: "),
        (
            3,
            lambda o, p: without(o.state, o.param_groups[0]["params"][7]),
            "parameter 7 of param_groups[0]: rank 3: ",
        ),
        (
            2,
            lambda o, p: one_less(o.param_groups[0]["params"]),
            "parameter 8 of param_groups[0]: rank 2: nothing; ",
        ),
    ],
}
NAMED = {table.text_of(options): options for options in table.alone()}


def complaints(mesh_name, options):
    placed = Placed(Fed(*MESHES[mesh_name].shapes), MESHES[mesh_name])
    given = {key: value for name in options for key, value in NAMED[name].items()}
    optimizer = ShardedProdigyPlusScheduleFree(groups(placed.parameters, **given))
    run(optimizer, placed, STEPS)
    found = []
    for rank, change, _ in CASES[mesh_name, options]:
        found.append(complaint_of(optimizer, change(optimizer, optimizer.param_groups[0]["params"][0]), rank))
        optimizer.check_replicas()
    return found


@pytest.mark.parametrize(("mesh_name", "options"), CASES, ids=str)
def test_every_rank_says_who_differs_and_in_what(pool, mesh_name, options):
    found, *others = pool.run(MESHES[mesh_name].ranks, complaints, mesh_name, options)
    assert others == [found] * len(others)
    for message, (_, _, expected) in zip(found, CASES[mesh_name, options], strict=True):
        title, *lines = message.split("\n  ") if message else [""]
        pattern = re.escape(expected).replace("\\#", "hash [0-9a-f]{16}")
        assert (title == "ranks that have to agree do not:" and len(lines) == 1) or not expected, message
        assert re.match(pattern, lines[0] if lines else ""), message


def everywhere():
    placed = Placed(Fed(*MESHES["hsdp"].shapes * 20), MESHES["hsdp"])
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters)
    with contextlib.ExitStack() as all_of_them:
        if dist.get_rank() == 2:
            for p in placed.parameters:
                all_of_them.enter_context(flipped(p))
        return complaint_of(optimizer)


def test_many_differences_are_counted(pool):
    message, *others = pool.run(4, everywhere)
    assert others == [message] * 3
    _, *lines, rest = message.split("\n  ")
    assert len(lines) == 10
    assert all("the weights of parameter" in line for line in lines)
    # There are 150 more; those that share a bin count once.
    assert 130 <= int(re.fullmatch(r"and at least (\d+) more", rest)[1]) <= 150
    assert replicas._some([str(rank) for rank in range(11)], ", ") == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"


def exchanged(what):
    """In one copy, two tensors have been exchanged: those of two parameters, or of two ranks."""
    placed = Placed(Fed((4, 6), (4, 6)), MESHES["hsdp"])
    optimizer = ShardedProdigyPlusScheduleFree(placed.parameters)
    halves = [whole(p).chunk(2) for p in placed.parameters]
    rank = dist.get_rank()
    for number, p in enumerate(placed.parameters):
        if rank > 1:
            of_parameter, of_rank = (1 - number, rank % 2) if what == "parameters" else (number, 1 - rank % 2)
            pieces_of(p.detach()).copy_(halves[of_parameter][of_rank])
    # With all in one sum, where they might cancel.
    with mock.patch.object(replicas, "_BINS", 2):
        return complaint_of(optimizer)


@pytest.mark.parametrize("what", ["parameters", "ranks"])
def test_differences_do_not_cancel(pool, what):
    for message in pool.run(4, exchanged, what):
        assert message.count("the weights of parameter") == 4


# ----------------------------------------------------------------------------------- copies of plain tensors


def two_replicas(make, passes_group):
    """Two models with two replicas each: stages of a pipeline if ``passes_group``, else independent."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "copy"))
    problem = Fed((40, 12), (9,), seed=mesh.get_local_rank("stage"))
    options = {"process_group": mesh.get_group("stage")} if passes_group else {}
    optimizer = make(problem.parameters, **options)
    run(optimizer, problem, STEPS)
    copies, p = mesh.get_group("copy"), problem.parameters[0]
    return [
        complaint_of(optimizer),
        complaint_of(optimizer, group=copies),
        complaint_of(optimizer, flipped(p), 2, copies),
        complaint_of(optimizer, number("lr", 0.5)(optimizer, p), 3, copies),
    ]


def test_stages_of_a_pipeline_with_replicas(pool):
    untold, right, weights, lr = pool.run(4, two_replicas, ShardedProdigyPlusScheduleFree, True)[0]
    assert [line.split(": ")[0] for line in untold.split("\n  ")[1:]] == [
        "rank 0",
        "rank 1",
        "rank 2",
        "rank 3",
    ]
    assert "pass the group of those ranks as replicas" in untold
    assert right == ""
    assert re.search(f"the weights of {re.escape(IT)}: rank 2: .*; rank 3: ", weights)
    for one, other in ((1, 3), (2, 3)):
        assert f"'lr' of param_groups[0]: rank {one}: 1.0; rank {other}: 0.5" in lr


def test_models_that_share_nothing(pool):
    for make in (ProdigyPlusScheduleFree, ShardedProdigyPlusScheduleFree):
        first, *others = pool.run(4, two_replicas, make, False)
        assert others == [first] * 3
        untold, right, weights, lr = first
        assert f"the weights of {IT}: rank 0, 1: " in untold
        assert right == ""
        assert re.search(f"the weights of {re.escape(IT)}: rank 2: .*; rank 3: ", weights)
        assert lr.split("\n  ")[1:] == ["'lr' of param_groups[0]: rank 2: 1.0; rank 3: 0.5"]


def stages_without_replicas():
    """Two stages, of which the first has no parameters."""
    problem = Fed(*[(40, 12), (9,)][dist.get_rank() :])
    parameters = problem.parameters if dist.get_rank() else []
    optimizer = ShardedProdigyPlusScheduleFree([{"params": parameters}], process_group=dist.group.WORLD)
    run(optimizer, problem, STEPS)
    return [complaint_of(optimizer), complaint_of(optimizer, number("d_coef", 2.0)(optimizer, None), 1)]


def test_stages_of_a_pipeline_without_replicas(pool):
    line = "'d_coef' of param_groups[0]: rank 0: 1.0; rank 1: 2.0"
    assert pool.run(2, stages_without_replicas) == [["", f"ranks that have to agree do not:\n  {line}"]] * 2


def own_replicas():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "copy"))
    problem = Fed((40, 12), seed=mesh.get_local_rank("model"))
    optimizer = ShardedProdigyPlusScheduleFree(problem.parameters, replicas=mesh.get_group("copy"))
    return complaint_of(optimizer), complaint_of(optimizer, group=dist.group.WORLD)


def test_the_optimisers_own_replicas(pool):
    for own, given in pool.run(4, own_replicas):
        assert own == ""
        assert f"the weights of {IT}: rank 0, 1: " in given


# ----------------------------------------------------------------------------------------- when it is called


def between_backward_and_step():
    model, called, number, count = wrap("fsdp2")
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True)
    optimizer.fuse_backward(model)
    messages = []
    for _ in range(STEPS):
        loss_of(called, Walks().next().chunk(count)[number]).backward()
        on_both = complaint_of(optimizer)
        no_step = changed(vars(optimizer._cache.steps), "current", None)
        messages += [on_both, complaint_of(optimizer, no_step, 0)]
        optimizer.step()
        optimizer.check_replicas()
    return messages


def test_not_within_a_step(pool):
    first, second = pool.run(2, between_backward_and_step)
    assert first == second
    for on_both, on_one in zip(first[::2], first[1::2], strict=True):
        assert "rank 0: a backward pass has moved parameters" in on_both
        assert "rank 0" not in on_one
        assert "rank 1: a backward pass has moved parameters" in on_one
        assert "call optimizer.step() first" in on_one


def alone():
    problem, optimizer = pair((40, 12))
    run(optimizer, problem, STEPS)
    check_replicas(optimizer)


def test_of_one_process(pool):
    alone()
    pool.run(1, alone)
    problem, optimizer = pair((40, 12), fused_back_pass=True)
    optimizer.fuse_backward(nn.ParameterList(problem.parameters))
    problem.parameters[0].sum().backward()
    with pytest.raises(RuntimeError, match="no step"):
        check_replicas(optimizer)


def test_no_parameters(pool):
    pool.run(2, nothing)


def nothing():
    check_replicas(ShardedProdigyPlusScheduleFree([{"params": []}]))


# ------------------------------------------------------------------------------------------------- the hash


def hash_of(tensor):
    return int(replicas._hash_of_bits(tensor))


DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [7, 1 << 19])
def test_every_bit_in_its_place_counts(monkeypatch, dtype, chunk):
    monkeypatch.setattr(replicas, "_CHUNK", chunk)
    tensor = torch.randn(5, 6).mul(100).to(dtype)
    seen = [hash_of(part) for part in (tensor, tensor[:4], tensor[1:], tensor[:0])]
    for element in range(30):
        for number in range(8 * tensor.element_size()):
            with flipped(tensor, element, number):
                seen.append(hash_of(tensor))
    assert len(set(seen)) == len(seen)
    assert hash_of(tensor) == seen[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [7, 1 << 19])
def test_what_a_sum_would_miss(monkeypatch, dtype, chunk):
    monkeypatch.setattr(replicas, "_CHUNK", chunk)
    tensor = torch.arange(1, 31).to(dtype)
    others = [tensor.clone() for _ in range(3)]
    others[0][[3, 20]] = tensor[[20, 3]]
    others[1][[3, 20]] += torch.tensor([1, -1]).to(dtype)
    if dtype.is_floating_point:
        others[2][[3, 20]] *= -1
    else:
        others[2][[3, 20]] ^= 4
    assert len({hash_of(one) for one in (tensor, *others, tensor.roll(15))}) == 5


def test_a_text_has_the_same_hash_in_every_process():
    """Python's own hash differs between processes, unless they are forked, as in these tests."""
    assert replicas._hash("a text") == 6008937231813765456


def test_two_elements_have_two_hashes():
    """Also two that would collide if right shifts carried the sign in."""
    word = 12345
    mirrored = (-1 - word - 2 * replicas._GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)
    assert hash_of(torch.tensor([word])) != hash_of(torch.tensor([mirrored]))


def test_nan_and_zero_are_their_bits():
    """A NaN equals only the NaN with the same bits, and 0 differs from −0."""
    nan = torch.full((3,), float("nan"))
    assert hash_of(nan) == hash_of(nan.clone())
    zero = torch.zeros(3)
    with flipped(nan):
        other = hash_of(nan)
    assert len({hash_of(nan), other, hash_of(zero), hash_of(-zero)}) == 4


@pytest.mark.parametrize("chunk", [1, 10, 1 << 19])
def test_strides_and_chunks_do_not_count(monkeypatch, chunk):
    tensor = torch.randn(3, 1, 7, 5)
    expected = hash_of(tensor)
    monkeypatch.setattr(replicas, "_CHUNK", chunk)
    assert hash_of(tensor) == expected
    for other in (
        tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        torch.stack([tensor] * 2, -1)[..., 1],
    ):
        assert not other.is_contiguous()
        assert hash_of(other) == expected
    assert hash_of(tensor.to(memory_format=torch.channels_last)) == expected


def test_its_memory_is_bounded():
    """Also for a tensor that must be copied to be read in order; each tensor here has 32 MiB."""
    for tensor in (
        torch.zeros(8 << 20),
        torch.zeros(16 << 20, dtype=torch.bfloat16),
        torch.zeros(2, 2 << 20, dtype=torch.float64).t(),
    ):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            replicas._hash_of_bits(tensor)
        now = most = 0
        for event in seen.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        assert 4 << 20 <= most <= 12 * 1.001 * (1 << 20)


def test_the_host_does_not_wait():
    problem, optimizer = pair((40, 12), (9,))
    run(optimizer, problem, STEPS)
    values = [problem.parameters[0], *optimizer.state[problem.parameters[0]].values(), "a text"]
    with Watch(reads=False):
        replicas._hashes([replicas._Item("", (0, 1), value) for value in values])


def diverged_to_nan():
    problem = Fed((40, 12))
    optimizer = ProdigyPlusScheduleFree(problem.parameters)
    run(optimizer, problem, STEPS)
    problem.parameters[0].data.fill_(float("nan"))
    return complaint_of(optimizer), complaint_of(optimizer, flipped(problem.parameters[0]), 1)


def test_copies_of_nan_agree(pool):
    for message, other in pool.run(2, diverged_to_nan):
        assert message == ""
        assert f"the weights of {IT}: rank 0: " in other
