"""What users do to weights and gradients between steps: kernels cope as operator-by-operator steps do."""

import pytest
import torch
from torch import nn

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.device import jit

pytest.importorskip("triton")
if jit.interprets():
    import tests.interpreting  # noqa: F401

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def linear(rows, columns, generator):
    """A layer whose weights depend only on the generator."""
    layer = nn.Linear(columns, rows, device=DEVICE)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) - 0.5)
    return layer


def optimizer_of(parameters, fused, **options):
    return ProdigyPlusScheduleFree(parameters, d0=1e-3, fused=fused, **options)


def give_gradients(parameters, generator):
    for p in parameters:
        p.grad = (torch.rand(p.shape, generator=generator) - 0.2).to(p)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("loads", [False, True], ids=["the model", "a new model that loads"])
def test_weights_become_of_another_dtype(dtypes, loads):
    """State stays in the dtype it has: p0, for example, in that of the weights at the start."""
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(1)
        model = linear(9, 17, generator).to(dtypes[0])
        optimizer = optimizer_of(model.parameters(), fused)
        for step in range(8):
            if step == 4 and loads:
                old, model = optimizer.state_dict(), linear(9, 17, generator).to(dtypes[1])
                optimizer = optimizer_of(model.parameters(), fused)
                optimizer.load_state_dict(old)
            elif step == 4:
                model.to(dtypes[1])
            give_gradients(model.parameters(), generator)
            optimizer.step()
        found.append([p.detach().float() for p in model.parameters()])
        found[-1] += [torch.tensor(list(optimizer.scalars(names=["d", "d_hat"]).values()))]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=0)


def test_some_states_are_of_another_dtype():
    """A frozen trunk is thawed after the model has become bfloat16: its state is new, the head's is not."""
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(1)
        trunk, head = linear(4, 3, generator), linear(2, 4, generator)
        trunk.requires_grad_(False)
        parameters = [*trunk.parameters(), *head.parameters()]
        optimizer = optimizer_of(parameters, fused)
        for step in range(6):
            if step == 3:
                trunk.bfloat16().requires_grad_(True)
                head.bfloat16()
            give_gradients([p for p in parameters if p.requires_grad], generator)
            optimizer.step()
        assert {value.dtype for p in parameters for value in optimizer.state[p].values()} == {
            torch.float32,
            torch.bfloat16,
        }
        found.append([p.detach().float() for p in parameters])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=2**-7, atol=0)


def test_a_state_that_kernels_cannot_read_moves_without_them():
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(1)
        layer = linear(4, 3, generator)
        optimizer = optimizer_of(layer.parameters(), fused)
        for step in range(4):
            if step == 2:
                for state in optimizer.state.values():
                    state["z"] = state["z"].half()
            give_gradients(layer.parameters(), generator)
            optimizer.step()
        found.append([p.detach() for p in layer.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cut", [lambda data: data[:3], lambda data: data.view(4, 6)], ids=["rows", "view"])
def test_another_shape_at_the_same_address_is_seen(cut):
    """The old memory still exists, but part of it no longer belongs to the parameter."""
    for fused in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 24, device=DEVICE).view(6, 4))
        optimizer = optimizer_of([p], fused)
        for _ in range(3):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        p.grad = None
        p.data = cut(p.data)
        p.grad = torch.full_like(p, 0.5)
        before = p.detach().clone()
        with pytest.raises(RuntimeError, match=r"is of shape .*, and was of shape \(6, 4\)"):
            optimizer.step()
        assert torch.equal(p, before)


@pytest.mark.parametrize("forgets", [False, True], ids=["reused", "found anew"])
def test_another_dtype_at_the_same_address_is_seen(forgets):
    """As when weights live in a flat buffer, and its owner widens them in place."""
    found = []
    for fused in (False, True):
        buffer = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
        p = nn.Parameter(buffer[:16].view(torch.bfloat16))
        p.data.copy_(torch.linspace(-1, 1, 8))
        p.grad_dtype = None
        optimizer = optimizer_of([p], fused, step_size="balance")
        for step in range(6):
            if step == 3:
                wide, p.grad = p.detach().float(), None
                p.data = buffer[:32].view(torch.float32)
                p.data.copy_(wide)
            if forgets:
                optimizer._cache.steps.reusable = None
            p.grad = torch.linspace(0.5, 1, 8, device=DEVICE)
            optimizer.step()
        found.append(p.detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=2**-8, atol=0)


def test_negative_gradients():
    """autograd sets the negative bit on the gradient of an imaginary part that is conjugated."""
    found = []
    for fused in (False, True):
        real, imaginary = (nn.Parameter(torch.tensor([value], device=DEVICE)) for value in (0.5, 0.7))
        optimizer = optimizer_of([real, imaginary], fused)
        for step in range(6):
            optimizer.zero_grad()
            gain = torch.complex(real, imaginary).conj()
            x = torch.complex(torch.linspace(-1, 1, 8), torch.linspace(1, 2, 8) * (step + 1)).to(DEVICE)
            (gain * x - (1 - 2j) * x).abs().square().mean().backward()
            optimizer.step()
        assert imaginary.grad.is_neg()
        found.append(torch.cat((real, imaginary)).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("muon", [False, True], ids=["Adam", "Muon"])
def test_autograd_sees_that_weights_have_moved(muon):
    """As with any optimiser, a second backward pass through weights that have since moved is an error."""
    generator = torch.Generator().manual_seed(1)
    first, second = linear(4, 3, generator), linear(2, 4, generator)
    optimizer = optimizer_of([first.weight, second.weight], True, use_muon_pp=muon)
    loss = second(first(torch.ones(5, 3, device=DEVICE)).tanh()).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
