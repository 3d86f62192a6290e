"""What each option does, where its formula comes from, and what it costs: the table of docs/options.md.

    python benchmarks/option_costs.py [--out docs]

The costs are counted in steps of the optimiser itself, on one process and on two ranks of a process group
that sends nothing (torch's fake one). An option that has no line here is an error.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.tables import Page, parser
from harness.tensors import state_bytes
from harness.watching import Watch, collective, moved
from harness.workers import simulated
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus import options as package
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

SIDE = 1024  # of the square matrix that bytes are counted on
SMALL = 20  # a tensor of fewer elements than the matrix's by this factor is not counted
LAYERS = 4  # of the model that all-reduces are counted on, with a matrix each

# ---------------------------------------------------------------------------------------- texts


# A row for each option, with further lines indented: its name, its description and its source; then what it
# is measured with, if that is not its name, and what is set as well, in the baseline too. Where passes cannot
# be counted, and nothing else changes, `passes` has the text for that column.
CHOICES = """
step_size="balance" | A step size from Schedule-Free's equilibrium. The first to try:
  [research.md](research.md).
  | source: here
use_schedulefree=False | Adam's first moment in place of Schedule-Free's average. When you bring a schedule.
  | source: on: {2405.15682}
factored=False | A second moment for every element. When factors train worse.
  | source: on: {1804.04235, eq. 4}
factored_fp32=False | The factors in the gradient's dtype. For bfloat16, when the last bytes count.
  | source: 2.0.1 | dtype: bfloat16
stochastic_rounding=False | Rounds to nearest: faster, but steps below a weight's last bit are lost. For
  comparison.
  | source: 2.0.1 | dtype: bfloat16
bfloat16_z=True | z as its distance from y, in bfloat16. When state matters:
  [performance.md](performance.md).
  | source: here
compile=True | The defaults' passes through `torch.compile`. On devices: [performance.md](performance.md).
  | source: here | passes: two, compiled
fused=False | On a GPU: torch operators in place of the Triton kernels. For comparison.
  | source: here
fused_back_pass=True | Moves weights within the backward pass. When gradients do not fit:
  [fused.md](fused.md).
  | source: [tutorial](https://pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html)
use_stableadamw=False | No scaling down of large updates. Where d stays small.
  | source: on: {2304.13013}
eps=None | Adam-atan2: bounded updates without an epsilon. When gradients may be as small as `eps`.
  | source: {2407.05872, eq. 34} | given: eps=None, use_stableadamw=False
use_bias_correction=True | RAdam's warm-up. When the first steps do harm; d then starts to grow later.
  | source: {1908.03265, algorithm 2}
use_adopt=True | Normalises a gradient by those before it, to converge with any β2. When Adam does not.
  | source: {2411.02853}
use_cautious=True | Drops the elements of a move whose sign disagrees with the gradient's, and scales up the
  rest. May train faster.
  | source: {2411.16085, algorithm 1}
use_grams=True | A move's magnitudes with its gradient's signs. To try instead of Cautious.
  | source: {2412.17107, algorithm 1}
use_orthograd=True | Leaves out of an update what only scales the weights. Against overfitting.
  | source: {2501.04697, eq. 9}
use_muon_pp=True | Muon: matrices by their whole gradient, orthogonalised. For hidden ones:
  [muon.md](muon.md).
  | source: [blog](https://kellerjordan.github.io/posts/muon), {2505.16932}
muon_fp32=True (with Muon) | Orthogonalises in float32, and sends that. For comparison.
  | beside: use_muon_pp=True
muon_quintic=True (with Muon) | The first Muon's polynomial, not Polar Express's. For comparison.
  | source: [blog](https://kellerjordan.github.io/posts/muon), {2505.16932} | beside: use_muon_pp=True
muon_batched=True (with Muon) | Tensors of three or more dimensions are batches of matrices. For experts.
  | beside: use_muon_pp=True
use_focus=True | The gradient's sign, and a pull on the weights (see below). When gradients are noisy.
  | source: {2501.12243, algorithm 1} | given: use_focus=True, factored=False
use_speed=True | SPEED: d by the signs of the progress alone. When d does not grow.
  | source: 1.9.0
use_speed="relative" | 2.0.1's SPEED: d by the average progress. When d does not grow, or for several
  networks.
  | source: 2.0.1
prodigy_steps=N | Freezes d at the N-th step, and frees its state. When d never stops growing.
  | source: 2.0.1; {2409.20325} | given: prodigy_steps=2
slice_p=1 | Prodigy's statistics of every element, not of every 11th. For very small models.
  | source: prodigyopt 1.1.2
split_groups=False | One d for all groups, as in Prodigy itself. When groups are parts of one network.
  | source: prodigyopt 1.1.2
split_groups_mean=False | Each group moves by its own d, not by their harmonic mean. For several networks.
  | source: 2.0.1
"""

NUMBERS = """
lr | Multiplies the step size. Leave it, or let a schedule move it.
  | given: lr=0.5
betas | β1, weight of the average in the training weights, or first moment's decay; β2, the second's.
  | given: betas=(0.95, 0.999)
beta3 | Decay of Prodigy's statistics; None: sqrt(β2).
  | given: beta3=0.9
beta4 | 0: d never shrinks. Above: d is a running average with this decay; None: with β2.
  | given: beta4=None
d0 | The first d. Raise it if d takes long to start to grow.
  | given: d0=1e-05
d_coef | Multiplies the estimate of d: 0.5 for smaller steps, 2 for larger.
  | given: d_coef=2.0
d_limiter | Lets d grow by at most 2^¼ a step, times a d_coef above 1.
  | given: d_limiter=False
weight_decay | Decoupled, taken at the training weights.
  | given: weight_decay=0.1
weight_decay_by_lr | Multiplies the decay with the step size. If False, choose a far smaller decay.
  | given: weight_decay_by_lr=False | beside: weight_decay=0.1
schedulefree_c | Above 0: a step's weight in the average is multiplied with (1−β1) times this, and up to 1.
  | given: schedulefree_c=8.0
warmup_steps | Lets the step size grow linearly over so many steps. Prodigy's own growth is one already.
  | given: warmup_steps=10
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """The description of a setting of an option, and what it is measured with; the option comes first."""

    given: Mapping[str, Any]
    what: str
    source: str
    dtype: torch.dtype
    beside: Mapping[str, Any]
    passes: str


def told(texts: str) -> dict[str, Told]:
    """The rows of a text, by their names."""
    found = {}
    for line in texts.strip().replace("\n  ", " ").splitlines():
        name, what, *others = line.split(" | ")
        said = dict(other.split(": ", 1) for other in others)
        found[name] = Told(
            given=settings(said.get("given", name.partition(" (")[0])),
            what=what,
            source=linked(said.get("source", "")),
            dtype=torch.bfloat16 if "dtype" in said else torch.float32,
            beside=settings(said.get("beside", "")),
            passes=said.get("passes", ""),
        )
    return found


def settings(arguments: str) -> dict[str, Any]:
    """Options, from the text of a call's arguments."""
    call = ast.parse(f"options({arguments})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {its.arg: ast.literal_eval(its.value) for its in call.keywords if its.arg is not None}


def linked(text: str) -> str:
    """A text with links for the arXiv numbers in its braces; a place in the paper may follow the number."""
    return re.sub(r"{([\d.]+)(.*?)}", r"[\1](https://arxiv.org/abs/\1)\2", text)


def check_texts() -> None:
    """Check that every option of the signature is described.

    Raises:
        SystemExit: One is not, or is no longer an option.
    """
    signature = set(inspect.signature(ProdigyPlusScheduleFree).parameters) - {"params"}
    names = {next(iter(its.given)) for its in (told(CHOICES) | told(NUMBERS)).values()}
    if signature != names:
        raise SystemExit(f"CHOICES and NUMBERS differ from the signature in {sorted(signature ^ names)}.")


# ------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Cost:
    """What an optimiser keeps, moves and sends with some options, or the difference from others."""

    state: float  # bytes per parameter
    passes: float  # reads and writes of the whole parameter, in its dtype
    reduces: int  # all-reduces of a step
    further: float  # and how many more for each additional bucket

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.state - other.state,
            self.passes - other.passes,
            self.reduces - other.reduces,
            self.further - other.further,
        )


# Dicts cannot be keys of a cache; their items can.
Items = tuple[tuple[str, Any], ...]
Make = Callable[[nn.Parameter], torch.optim.Optimizer]


def cost(dtype: torch.dtype, **given: Any) -> Cost:
    """The cost of some options."""
    return _cost(tuple(given.items()), dtype)


@functools.cache
def _cost(items: Items, dtype: torch.dtype) -> Cost:
    given = dict(items)
    state, passes = state_and_passes(made_with(given), dtype)
    reduces = all_reduces(given, 1 << 30)
    further = (all_reduces(given, 1) - reduces) / (LAYERS - 1)
    return Cost(state, passes, reduces, further)


def state_and_passes(make: Make, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """The state after two steps, in bytes per parameter, and the passes of the third, on one process."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SIDE, SIDE, dtype=dtype))
    toward = torch.randn_like(weight)

    def traffic(step: Callable[[], object] | None) -> int:
        weight.grad = None
        loss = (weight * toward).sum()
        with Watch(note=functools.partial(moved, least=weight.numel() // SMALL)) as watch:
            loss.backward()  # type: ignore[no-untyped-call]
            if step:
                step()
        return sum(watch.calls)

    backward = traffic(None)
    optimizer = make(weight)
    for _ in range(2):
        traffic(optimizer.step)
    return state_bytes(optimizer) / weight.numel(), (traffic(optimizer.step) - backward) / weight.nbytes


def made_with(given: Mapping[str, Any]) -> Make:
    """The optimiser with some options, of one parameter."""

    def make(weight: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = ProdigyPlusScheduleFree([weight], **given)
        if given.get("fused_back_pass"):
            optimizer.fuse_backward(nn.ParameterList([weight]))
        return optimizer

    return make


def all_reduces(given: Mapping[str, Any], bucket_bytes: int) -> int:
    """How many all-reduces the third step makes on two ranks under FSDP2, which makes none itself."""
    with simulated(2):
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(LAYERS)))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)  # Shard(0)
        groups = [{"params": list(layers.parameters())} for layers in (model[:2], model[2:])]
        optimizer = ShardedProdigyPlusScheduleFree(groups, bucket_bytes=bucket_bytes, **given)
        if given.get("fused_back_pass"):
            optimizer.fuse_backward(model)
        for _ in range(3):
            loss = model(torch.ones(2, 8)).square().sum()
            with Watch(note=collective) as watch:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        return sum(call is not None and call[0] == "all-reduce" for call in watch.calls)


# ---------------------------------------------------------------------------------------- report

INTRODUCTION = f"""\
Every option of `ProdigyPlusScheduleFree`, what it is for, and what it costs beyond the defaults; what it
does to the loss of small tasks is in [evidence.md](evidence.md). "2.0.1" and "1.9.0" are versions of
[prodigy-plus-schedule-free](https://pypi.org/project/prodigy-plus-schedule-free/).
Where a cost has two values, the second is without Schedule-Free, compared with the defaults without it.

- State: bytes per parameter that the optimiser keeps, for a {SIDE:,} × {SIDE:,} matrix; in float32, unless
  the option is for bfloat16.
- Passes: the bytes that a step (the third) reads and writes, divided by the matrix's own, which are 4 per
  parameter, or 2 in bfloat16. Each operation counts separately: it reads its tensors and writes its results
  once, and what it changes in place it reads and writes. Tensors under a {SMALL}th of the matrix, such as
  factors, do not count; Prodigy's samples do.
- All-reduces: those of a step with two groups on two ranks under FSDP2, and how many more for each bucket of
  updates after the first ([scale.md](scale.md) has other layouts)."""

NOTES = """\
## Notes

- `ShardedProdigyPlusScheduleFree` has four more arguments, for the whole optimiser: `bucket_bytes`,
  `replicas`, `process_group` and `all_to_all` ([API](reference.md)).
- Every option may be set per parameter group. Groups with `split_groups=False` share d under the options of
  the first of them.
- On a GPU, kernels move float32 and bfloat16 weights, except in groups with Cautious, Grams, ADOPT, OrthoGrad
  or FOCUS: these move operator by operator, with a launch for each of some 45 operators and each shape.
  With `fused_back_pass`, parameters move by kernels one by one, as their gradients come. Weights that are
  not contiguous, of a subclass of `Tensor`, or of more than 2³⁰ elements on a rank move by operators too,
  without notice; `fused=True` makes that an error where options, dtypes or devices are the reason. GPUs other
  than NVIDIA's have not been tried.
- `use_schedulefree`, `use_focus`, `use_muon_pp`, `use_speed="relative"`, `factored`, `factored_fp32`,
  `bfloat16_z`, `slice_p`, `step_size` decide what state there is, and are fixed from a parameter's first step
  on. The others may change between two steps, and are checked when they do. Once `prodigy_steps` has passed,
  d stays frozen.
- `step_size="balance"`: Prodigy's own options have no effect on it (`beta3`, `d_limiter`, `slice_p`; `d0`
  has hardly any), or are switched off with a warning. Groups that would share a mean of step sizes
  (`split_groups_mean=True`) then have one step size, from the evidence of all, as with
  `split_groups=False`. Balance adapts the product lr·d. So another `lr` only changes where it starts, and
  balance works against a schedule. Keep lr constant. On a mesh, the evidence of Muon's groups takes a small
  all-reduce for each wave of matrices.
- `split_groups_mean=True` (2.0.1's default is False) moves every group by the harmonic mean of d over the
  groups with evidence: those whose d has grown at least tenfold from d0; after step 30 it must also have
  come to a tenth of the other groups' mean. In the first 30 steps, a group counts as soon as its d has left
  d0. So a group does not hold the others back if its gradients are zero or pure noise, if it is frozen at
  its start, or if it has just been added; it moves by the mean. The optimiser warns once if the step sizes
  that count are more than a hundredfold apart. If a single network's parameters are in several groups only
  for their weight decay, use `split_groups=False`.
- A group of a few elements has few samples, so its step size may be down to chance: leave it in the mean, or
  merge it into another group. `d_coef` far above 1 amplifies chance too. If a run goes on long after it has
  converged, use `prodigy_steps`: as gradients vanish, the steps of any Adam become noise of the size of its
  step size.
- `beta4=None` starts slowly: the estimate may exceed d by a factor of at most 2^¼ (by 19 %), and d makes
  only 1 % of the way to it in a step.
- Do not combine SPEED with strong weight decay: it ignores the size of the evidence, so the steady pull of
  the decay may weigh as much as the gradients. 2.0.1's documentation has the same warning for its SPEED.
- FOCUS, as in 2.0.1: the average of the weights is weighted with d², so while d grows it covers only the last
  few steps. It is not divided by the sum of d². Where d is far below 1, as it mostly is, the average is
  therefore close to zero, and the pull is towards zero.
- Muon's passes are those of Newton–Schulz, mostly in bfloat16. Its time goes into matrix products, which
  passes do not show ([muon.md](muon.md)). On a mesh it also sends matrices, which are not among the
  all-reduces.

## What excludes what

The optimiser warns once, and continues as it says after the colon.
"""

DIFFERENT = """\
## Where 2.0.1 does otherwise

- ADOPT without Schedule-Free: 2.0.1 divides the gradient by the deviation of d times the gradient, so that
  its step size never leaves d0. Here both use d times the gradient.
- Cautious without Schedule-Free: 2.0.1 computes its mask and does not apply it. Here it is applied.
- OrthoGrad: here tensors of one element are left alone, and a step fades out where its direction is parallel
  to the weights. 2.0.1 makes a full step there, along nothing but rounding error.
- `d_coef` below 2^-¼ with `d_limiter`: 2.0.1 limits d's estimate before it multiplies, so that d never leaves
  d0. Here, for a `d_coef` below 1, the product is limited.
- Factored second moments of tensors that are taller than wide: here the row factor is divided by its mean.
  2.0.1 takes that mean over a dimension of size one.
- `p0`, from where progress is measured: here in the weight's dtype. 2.0.1 rounds it to bfloat16, and takes
  the rounding as progress: on pure noise d grows a hundredfold, and from a small d0 it may never start.
- `split_groups_mean`: here True by default, and over groups with evidence only; 2.0.1 takes all groups.
- Muon: 2.0.1 no longer has it. 1.9.0 runs the first Muon's polynomial for six iterations and divides by a
  running average of the rms; here a direction has an rms of 1, as Adam's has, and no memory.
- `lr=0` in a group: here the group then adds nothing to the evidence. In 2.0.1 it does, and with
  `split_groups=False` it holds the d of all groups down.
- The move of y: 2.0.1 first moves y towards z, and then by the step. Late in a run of float32 weights the
  first is less than half of their last bit, and is lost at every step, so that x stands still. Here the two
  are added up before they are added to y.
- `add_param_group` in mid-run: here the group trains, after a warm-up over 1/(1 − β2) steps. 2.0.1 ends with
  a KeyError at the next step.
- `fused_back_pass`: here a call of `step()` ends each step. 2.0.1 counts parameters, and miscounts if one is
  unused."""


def compared(told: Told) -> list[Cost]:
    """What a setting costs beyond the defaults, with Schedule-Free and without."""
    if told.passes:
        return [Cost(0, 0, 0, 0)]
    if {"use_schedulefree", "step_size"} & told.given.keys():
        return [cost(told.dtype, **told.given) - cost(told.dtype)]
    bases: tuple[dict[str, Any], ...] = {**told.beside}, {**told.beside, "use_schedulefree": False}
    return [cost(told.dtype, **base, **told.given) - cost(told.dtype, **base) for base in bases]


def both(texts: Iterable[str]) -> str:
    """A cell of one text or two, where they differ."""
    return " / ".join(dict.fromkeys(texts))


def more(value: float, form: str) -> str:
    """A difference with its sign, or 0."""
    text = f"{value:{form}}"
    return text.replace("-", "−") if float(text) else "0"


def more_reduces(c: Cost) -> str:
    """The cell for all-reduces."""
    further = f", {more(c.further, '+.3g')} a bucket" if c.further else ""
    return f"{more(c.reduces, '+d')}{further}"


def choices() -> Iterator[list[str]]:
    """The lines of the first table."""
    for name, dtype in (("the defaults", torch.float32), ("the defaults (bfloat16)", torch.bfloat16)):
        costs = [cost(dtype), cost(dtype, use_schedulefree=False)]
        state, passes = both(f"{c.state:.3g}" for c in costs), both(f"{c.passes:.1f}" for c in costs)
        reduces = both(f"{c.reduces}, {c.further:.3g} a bucket" for c in costs)
        yield [name, "", linked("{2306.06101}, {2405.15682}"), state, passes, reduces]
    for name, its in told(CHOICES).items():
        costs = compared(its)
        bfloat16 = " (bfloat16)" if its.dtype == torch.bfloat16 else ""
        state = both(more(c.state, "+.3g") for c in costs)
        passes = its.passes or both(more(c.passes, "+.1f") for c in costs)
        yield [f"`{name}`{bfloat16}", its.what, its.source, state, passes, both(map(more_reduces, costs))]


def numbers() -> Iterator[list[str]]:
    """The lines of the second table.

    Raises:
        SystemExit: An option costs something that the table has no column for.
    """
    for name, its in told(NUMBERS).items():
        costs = compared(its)
        if any(c.state or c.reduces or c.further for c in costs):
            raise SystemExit(f"{name} costs more than passes: move it from NUMBERS to CHOICES.")
        default = inspect.signature(ProdigyPlusScheduleFree).parameters[name].default
        yield [f"`{name}={default!r}`", its.what, both(more(c.passes, "+.1f") for c in costs)]


def main() -> None:
    """Measure, print, and write what was asked for."""
    cli = parser(__doc__)
    cli.add_argument("--out", type=Path, metavar="FOLDER", help="for options.md")
    args = cli.parse_args()
    torch.set_num_threads(1)
    check_texts()
    page = Page("Options", args.out)
    page.tell(f"{INTRODUCTION}\n")
    columns = "option | what it does, and when to use it | source | state: | passes: | all-reduces:"
    page.table(columns, choices())
    state, passes = state_and_passes(lambda weight: torch.optim.AdamW([weight], foreach=True))
    page.tell(
        f"\nFor comparison, torch's AdamW keeps {state:.3g} bytes and makes {passes:.1f} passes (foreach).",
        "\nThe numbers, which cost neither state nor all-reduces:\n",
    )
    page.table("option and default | what it does | passes:", numbers())
    page.tell(f"\n{NOTES}", *(f"- {exclusion.note}." for exclusion in package._EXCLUSIONS), f"\n{DIFFERENT}")
    page.save("options.md")


if __name__ == "__main__":
    main()
