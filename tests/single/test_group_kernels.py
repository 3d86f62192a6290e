"""The kernels that update the groups' numbers, against the same operator by operator.

Groups of all kinds take part at once, with numbers such as they have in the middle of a run.
"""

import random
from dataclasses import fields

import pytest
import torch

from prodigyplus import ProdigyPlusScheduleFree, options
from prodigyplus.device.jit import interprets
from prodigyplus.engine.groups import Groups
from prodigyplus.terms.device_constants import Constants
from prodigyplus.terms.group_numbers import COUNTS, FLOATS

pytest.importorskip("triton")
if interprets():
    import tests.interpreting  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

KINDS = (
    {},
    {"lr": 0.3, "weight_decay": 0.1},
    {"lr": torch.tensor(0.7), "weight_decay": 0.1, "weight_decay_by_lr": False},
    {"lr": torch.tensor(float("nan"))},
    {"lr": torch.tensor(float("inf"))},
    {"lr": torch.tensor(-0.5)},
    {"lr": 0.0},
    {"lr": torch.tensor(0.0)},
    {"lr": 0.0, "step_size": "balance"},
    {"use_bias_correction": True},
    # RAdam's length tends to 4.025; it rectifies above 4.
    {"use_bias_correction": True, "betas": (0.9, 0.602)},
    {"use_bias_correction": True, "use_schedulefree": False, "warmup_steps": 5},
    {"warmup_steps": 30, "schedulefree_c": 30.0, "betas": (0.9, 0.95)},
    {"warmup_steps": 1, "schedulefree_c": 0.5},
    {"use_adopt": True, "use_schedulefree": False},
    {"use_speed": True, "d0": 1e-5},
    {"use_speed": True, "d_coef": 2.0},
    {"use_speed": "relative"},
    {"use_speed": "relative", "d_coef": 3.0},
    {"beta4": 0.9, "beta3": 0.8},
    {"d_limiter": False, "eps": None, "use_stableadamw": False},
    {"d_coef": 0.5},
    {"prodigy_steps": 1},
    {"step_size": "balance"},
    {"step_size": "balance", "lr": 0.3, "warmup_steps": 30},
    {"step_size": "balance", "use_adopt": True},
)

# The ways in which groups can share a step size.
SHARING = ({"split_groups": False}, {"split_groups_mean": False}, {"split_groups_mean": True}, "mixed")


def groups_of(sharing, draw):
    """Two equal ``Groups`` of all kinds with drawn numbers: the first uses kernels, the second operators."""
    kinds = [dict(kind) for kind in KINDS]
    for index, kind in enumerate(kinds):
        kind |= SHARING[index % 3] if sharing == "mixed" else sharing
        kind["params"] = [torch.nn.Parameter(torch.ones(2, device=DEVICE))]
    optimizer = ProdigyPlusScheduleFree(kinds)
    columns = optimizer._cache.steps.columns(optimizer._view)
    for name, values in drawn_numbers(optimizer.param_groups, draw).items():
        columns[name].copy_(torch.tensor(values, dtype=torch.float64))
    pair = []
    for by_kernels in (True, False):
        copies = [{**group, "calls": 3, "fused": True} for group in optimizer.param_groups]
        pair.append(Groups(copies, type(columns)(copies, DEVICE), Constants()))
        assert pair[-1]._kernels is not None
        if not by_kernels:
            pair[-1]._kernels = None
    return pair


def drawn_numbers(groups, draw):
    """Numbers such as the groups may have in a run, by name."""
    numbers = {name: [10 ** draw.uniform(-6, -2) for _ in groups] for name in FLOATS}
    # The least d that is drawn, and how many are still at d0; how many count in the mean, and by what the
    # others' d is divided.
    low, started, counting, apart = draw.choice(
        ((-6, 0.3, 0.5, 1), (-6, 0.3, 0.0, 1), (-2.5, 0.0, 0.5, 30), (-6, 1.0, 0.0, 1))
    )
    numbers["in_mean"] = [float(draw.random() < counting) for _ in groups]
    numbers["d"] = [
        g["d0"] if draw.random() < started else 10 ** draw.uniform(low, -2) / (1 if counts else apart)
        for g, counts in zip(groups, numbers["in_mean"], strict=True)
    ]
    numbers["weight_sum"] = [draw.choice((0, 1, 1)) * value for value in numbers["weight_sum"]]
    steps = draw.choice(((0, 1, 3), (0, 29, 30, 31), (30, 31, 500)))
    later = draw.choice((0, 5))  # how many more steps those have made that share no step size
    numbers["k"] = [
        draw.choice((0, 1, 7) if g["use_adopt"] else steps) + (0 if g["split_groups_mean"] else later)
        for g in groups
    ]
    numbers["skipped"] = [draw.choice((0, 5)) for _ in groups]
    numbers["max_d_numerator"] = [10 ** draw.uniform(-12, -3) for _ in groups]
    for index, group in enumerate(groups):
        largest = numbers["d_denom" if group["step_size"] == "balance" else "max_d_numerator"][index]
        numbers["d_numerator"][index] = largest * draw.choice((draw.uniform(-0.5, 1.0), 1.0))
    return numbers


def step(groups, square, present, evidence, *, initializes):
    """One step of the groups' numbers; returns everything that it has set."""
    learns = groups.begin(square, present, initializes=initializes)
    found = {"learns": learns.double()}
    for dtype in (torch.float64, torch.float32):
        for index, of_group in enumerate(groups.group_steps):
            n = of_group.step_numbers(DEVICE, dtype)
            found |= {
                (dtype, index, name): value.double()
                for name, value in n._asdict().items()
                if name != "packed"
            }
            assert n.gate.dtype == {torch.float64: torch.int64, torch.float32: torch.int32}[dtype]
    for of_group, (product, norm) in zip(groups.group_steps, evidence, strict=True):
        of_group.observe([1], product, norm)
    groups.end(groups.totals(), learns)
    return found | {name: groups.columns[name].double() for name in (*FLOATS, *COUNTS)}


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_as_operator_by_operator(sharing, seed, monkeypatch):
    # As on a GPU, where the host does not read a tensor's value.
    monkeypatch.setattr(options, "_is_on_host", lambda tensor: False)
    draw = random.Random(f"{sharing} {seed}")
    for square in (0.0, float("nan"), float("inf"), *[1.0] * 5) if sharing == "mixed" else [1.0] * 7:
        pair = groups_of(sharing, draw)
        present = torch.tensor([float(draw.choice((0, 1, 2, 3))) for _ in KINDS], device=DEVICE).double()
        evidence = [
            torch.tensor(
                [[drawn_product(draw)], [draw.choice((0.0, 1.0, 1.0)) * 10 ** draw.uniform(-9, 2)]]
            ).double()
            for _ in KINDS
        ]
        initializes = draw.choice((True, False))
        found, expected = (
            step(
                groups,
                torch.tensor(square, device=DEVICE).double(),
                present,
                [values.to(DEVICE).unbind() for values in evidence],
                initializes=initializes,
            )
            for groups in pair
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert not value.isnan().any(), name
            # Kernels compute powers as exponentials of logarithms; RAdam subtracts powers of β2 from 1.
            torch.testing.assert_close(found[name], value, rtol=1e-9 if "beta2" in name else 1e-12, atol=0)


def drawn_product(draw):
    return draw.choice((1, -1)) * 10 ** draw.uniform(-6, 0)


def test_lrs_are_read_where_they_are():
    """The next step uses a new lr, whether its tensor was changed in place or the group has a new number.

    Options that have not changed are not sent again.
    """
    lr = torch.tensor(1.0)
    p = torch.nn.Parameter(torch.ones(2, 2, device=DEVICE))
    optimizer = ProdigyPlusScheduleFree([{"params": [p], "lr": lr}], fused=True)

    def effective():
        p.grad = torch.ones_like(p)
        optimizer.step()
        group = optimizer.param_groups[0]
        return (group["effective_lr"] / group["lr"]).item()

    alone = effective()
    lr.fill_(0.5)
    assert effective() < alone
    optimizer.param_groups[0]["lr"] = 0.25
    effective()
    table = optimizer._cache.steps.columns(optimizer._view).sent_options
    sent = table._table
    effective()
    assert table._table is sent
    assert table._table[0].item() == 0.25


def test_every_option_is_known_to_them():
    """Fails for a new option until it is listed: in the kernels, or as one that changes no number."""
    in_kernels = {
        *("lr", "betas", "beta3", "beta4", "d0", "d_coef", "d_limiter", "use_speed", "prodigy_steps", "eps"),
        *("weight_decay", "weight_decay_by_lr", "warmup_steps", "use_bias_correction", "use_adopt"),
        *("use_schedulefree", "schedulefree_c", "split_groups", "split_groups_mean", "step_size"),
    }
    change_no_number = {
        *("factored", "factored_fp32", "use_stableadamw", "use_cautious", "use_grams", "use_orthograd"),
        *("use_focus", "use_muon_pp", "muon_fp32", "muon_quintic", "muon_batched", "stochastic_rounding"),
        *("bfloat16_z", "slice_p", "compile", "fused", "fused_back_pass"),
    }
    assert in_kernels | change_no_number == {field.name for field in fields(options.Options)}
