"""How long a step takes beside other optimisers, and what it holds, calls and waits for: on the CPU.

    python benchmarks/step_time.py --peers FOLDER [--rounds N] [--cases NAME ...] [--json FILE] [--out docs]
    python benchmarks/step_time.py --from FILE ... [--out docs]

The other packages are installed into folders of their own below FOLDER, if they are not there yet. Each
optimiser lives in a process of its own, since one of them has our import name, with the same weights. One at
a time takes a step; a round is a step of each, in an order that is drawn, and times are compared within
rounds: what else the machine does then meets all alike. `--json` keeps all figures; `--from` reads them, and
tells and draws again.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import multiprocessing
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from state_bytes import CONTEXT, LAYERS, VOCABULARY, WIDTH
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:  # workers import this file, and draw nothing
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
WARM_UP = 5  # steps, after which state is there and what is compiled is compiled
# Seconds between two steps. The threads of OpenMP spin for some 10 ms after their work before they sleep, and
# would take time from the next process. OMP_WAIT_POLICY=passive sends them to sleep at once, but then waking
# them is part of every step: a fused AdamW over small tensors takes 1.8 times as long.
PAUSE = 0.03
START_LIMIT, FIRST_LIMIT, STEP_LIMIT, COSTS_LIMIT, END_LIMIT = 180, 1200, 180, 900, 10  # seconds
NOISE = 1 << 20  # elements that gradients are made of
PROCESS = 600 << 20  # bytes of a worker without parameters
UNKNOWN = 48  # bytes per parameter of a worker, where nothing is measured yet
SHARE = 0.9  # of the memory that is there may be taken
BUSY = 0.7  # load from which on there is a warning: threads that wait for one another then lose whole slices
LONGEST = 160  # characters of an error
LOW, HIGH = 0.1, 0.9  # quantiles that are told as the spread

# ------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True, slots=True)
class Peer:
    """A package of others, and what it needs that is not here."""

    distribution: str
    version: str
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Where it lies, below --peers."""
        return f"{self.distribution}-{self.version}"


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimiser with options, other than its defaults, and dtypes."""

    place: str  # module:class
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: Peer | None = None
    weights: torch.dtype = torch.float32
    gradients: torch.dtype | None = None  # None: the weights' own
    few: bool = False  # whether it is among the few that curves are drawn of
    colour: str = "#999999"

    def home(self, peers: Path) -> Path | None:
        """Where its files must come from; None: anywhere."""
        if self.peer is not None:
            return peers / self.peer.folder
        return None if self.place.startswith("torch.") else ROOT


PUBLISHED = Peer("prodigy-plus-schedule-free", "2.0.1")
SCHEDULEFREE = Peer("schedulefree", "1.4.1")
PRODIGY = Peer("prodigyopt", "1.1.2")
HEAVYBALL = Peer("heavyball", "3.2.1", ("opt-einsum==3.4.0",))

ADAMW, OURS = "torch.optim:AdamW", "prodigyplus:ProdigyPlusScheduleFree"
FOREACH, FUSED = "AdamW, foreach", "AdamW, fused"
# Okabe and Ito's colours, which the colour-blind tell apart: one for each package, two for ours.
CONTENDERS: dict[str, Contender] = {
    FOREACH: Contender(ADAMW, {"foreach": True}, few=True, colour="#000000"),
    FUSED: Contender(ADAMW, {"fused": True}, few=True, colour="#000000"),
    "ours": Contender(OURS, few=True, colour="#0072B2"),
    "ours, compiled": Contender(OURS, {"compile": True}, few=True, colour="#D55E00"),
    "prodigy-plus 2.0.1": Contender(OURS, {}, PUBLISHED, few=True, colour="#009E73"),
    "schedulefree 1.4.1, foreach": Contender(
        "schedulefree:AdamWScheduleFree", {"foreach": True}, SCHEDULEFREE, colour="#CC79A7"
    ),
    "schedulefree 1.4.1, for loop": Contender(
        "schedulefree:AdamWScheduleFree", {"foreach": False}, SCHEDULEFREE, colour="#CC79A7"
    ),
    "prodigyopt 1.1.2": Contender("prodigyopt:Prodigy", {"slice_p": 1}, PRODIGY, colour="#E69F00"),
    "prodigyopt 1.1.2, slice_p=11": Contender(
        "prodigyopt:Prodigy", {"slice_p": 11}, PRODIGY, colour="#E69F00"
    ),
    "heavyball 3.2.1 SFAdamW, compiled": Contender("heavyball:SFAdamW", {}, HEAVYBALL, colour="#56B4E9"),
}


class ContenderError(Exception):
    """Why an optimiser is not measured."""


def install(peer: Peer, peers: Path) -> None:
    """Put a package into its folder, unless it is there.

    Raises:
        ContenderError: pip could not.
    """
    folder = peers / peer.folder
    if folder.is_dir():
        return
    part = peers / f"{peer.folder}.part"  # what is cut short is not taken for the whole
    shutil.rmtree(part, ignore_errors=True)
    wanted = f"{peer.distribution}=={peer.version}", *peer.beside
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part), *wanted]
    try:
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=START_LIMIT)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise ContenderError(f"not installed: {said[:LONGEST]}") from error
    part.rename(folder)


# ------------------------------------------------------------------------------------------ cases

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """Parameters to step."""

    shapes: tuple[Shape, ...]
    said: str = ""
    groups: int = 1

    @property
    def parameters(self) -> int:
        """How many elements there are."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def tensors(self) -> int:
        """How many tensors they are in."""
        return len(self.shapes)


def gpt(width: int) -> tuple[Shape, ...]:
    """The tensors of the GPT-2 of ``state_bytes.py`` at another width."""
    layer = [
        shape
        for out, into in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        for shape in ((out, into), (out,))
    ]
    return (
        (VOCABULARY, width),
        (CONTEXT, width),
        *(layer + [(width,)] * 4) * LAYERS,
        (width,),
        (width,),
    )


def squares(count: int, side: int, groups: int = 1) -> Case:
    """Equal square matrices."""
    return Case(((side, side),) * count, f"{count:,} matrices of {side} × {side}", groups)


CASES: dict[str, Case] = {
    "gpt": Case(gpt(WIDTH), "a GPT-2 of width 512, its head tied"),
    "small": Case(((64,), (64, 64)) * 500, "500 vectors of 64 and 500 matrices of 64 × 64"),
    "many": squares(1000, 173),
    "size-1M": Case(gpt(64)),
    "size-10M": Case(gpt(280)),
    "size-100M": Case(gpt(976)),
    "size-500M": Case(gpt(2240)),
    "tensors-10": squares(10, 1732),
    "tensors-30": squares(30, 1000),
    "tensors-100": squares(100, 548),
    "tensors-300": squares(300, 316),
    "groups-10": squares(100, 548, 10),
    "groups-100": squares(100, 548, 100),
}
TABLE = ("gpt", "small", "many")  # in these all contenders take part, in the others few
SERIES = {  # what is drawn over what; a series may be named in the place of its cases
    "sizes": ("size-1M", "size-10M", "gpt", "size-100M", "size-500M"),
    "tensors": ("tensors-10", "tensors-30", "tensors-100", "tensors-300", "many"),
    "groups": ("tensors-100", "groups-10", "groups-100"),
}
OVER: dict[str, tuple[str, Callable[[Case], int]]] = {
    "sizes": ("parameters", lambda case: case.parameters),
    "tensors": ("tensors, 30 M parameters in all", lambda case: case.tensors),
    "groups": ("parameter groups, 30 M parameters in 100 tensors", lambda case: case.groups),
}

# ------------------------------------------------------------------------------------ in a worker


@dataclass(frozen=True, slots=True)
class Costs:
    """What a step takes besides time; bytes are per parameter."""

    held: float  # of weights and gradients
    state: float  # in ``optimizer.state``
    beside: float  # of tensors that are kept between steps elsewhere
    peak: float  # at most within a step, above what there was before it
    calls: int  # of operators, and of compiled graphs, from Python
    graphs: int  # of compiled graphs among them
    reads: int  # of values of tensors by the host

    @property
    def worker(self) -> float:
        """All of it."""
        return self.held + self.state + self.beside + self.peak


READS = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")}
MEASURED = "the step that is measured"


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, as Python calls them; not for compiled code, which it may keep from being called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.namespace != "profiler"
        return func(*args, **(kwargs or {}))


class Subject:
    """An optimiser, with parameters and gradients."""

    def __init__(self, contender: Contender, case: Case, home: Path | None) -> None:
        torch.manual_seed(0)
        self._parameters = [
            nn.Parameter(torch.randn(shape, dtype=contender.weights).mul_(0.02)) for shape in case.shapes
        ]
        # As activations are, after which malloc keeps what is freed instead of giving it back to the kernel.
        torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)
        self._noise = torch.randn(2 * NOISE).mul_(1e-2)
        self._awake = torch.zeros(1 << 18)
        dtype = contender.gradients or contender.weights
        self._gradients = [torch.zeros_like(p, dtype=dtype) for p in self._parameters]
        if dtype != contender.weights:
            for p in self._parameters:
                p.grad_dtype = dtype
        module, name = contender.place.split(":")
        found = importlib.import_module(module)
        if home is not None and not Path(found.__file__ or "").resolve().is_relative_to(home.resolve()):
            raise ImportError(f"{module} came from {found.__file__}, not from {home.name}")
        given: Any = self._parameters
        if case.groups > 1:
            given = [{"params": self._parameters[first :: case.groups]} for first in range(case.groups)]
        self._optimizer = getattr(found, name)(given, **contender.options)
        if hasattr(self._optimizer, "train"):
            self._optimizer.train()

    def ready(self) -> bool:
        """That it has been built."""
        return True

    def step(self) -> float:
        """The seconds of a step of the optimiser alone."""
        self._give()
        start = time.perf_counter()
        self._optimizer.step()
        return time.perf_counter() - start

    def warm_up(self) -> list[float]:
        """The seconds of the first steps."""
        return [self.step() for _ in range(WARM_UP)]

    def costs(self) -> Costs:
        """What a step takes besides time."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.step()  # what was there before is freed by unknown sizes; after this step, by known ones
            self._give()
            with record_function(MEASURED):
                self._optimizer.step()
        seen = within(profiled)
        calls = seen.calls
        if not seen.graphs:
            self._give()
            with Calls() as counted:
                self._optimizer.step()
            calls = counted.number
        count = sum(p.numel() for p in self._parameters)
        given = [*self._parameters, *self._gradients]
        state = list(tensors(dict(self._optimizer.state)))
        in_state, everything = storages(state), storages(living())
        mine = storages([*given, self._noise, self._awake])
        beside = sum(size for key, size in everything.items() if key not in mine and key not in in_state)
        return Costs(
            held=sum(storages(given).values()) / count,
            state=sum(size for key, size in in_state.items() if key not in mine) / count,
            beside=beside / count,
            peak=seen.peak / count,
            calls=calls,
            graphs=seen.graphs,
            reads=seen.reads,
        )

    def _give(self) -> None:
        """Write every gradient, as a backward pass does: optimisers may change them, or let go of them."""
        for number, (p, gradient) in enumerate(zip(self._parameters, self._gradients, strict=True)):
            start = 4099 * number % NOISE
            for piece in torch.split(gradient.view(-1), NOISE):
                piece.copy_(self._noise[start : start + len(piece)])
            p.grad = gradient
        self._awake.zero_()  # by all threads, which a backward pass leaves awake


@dataclass(frozen=True, slots=True)
class Profiled:
    """What a profile tells of a step."""

    calls: int  # of operators and compiled graphs, without those that they call themselves
    graphs: int
    reads: int
    peak: int  # bytes


def within(profiled: profile) -> Profiled:
    """What there is of the step that is measured."""
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    events = results.events()
    mark = next(event for event in events if event.name() == MEASURED)
    start = mark.start_ns()
    end, over = start + mark.duration_ns(), start
    calls = graphs = reads = total = peak = 0
    for event in sorted((e for e in events if start <= e.start_ns() < end), key=lambda e: e.start_ns()):
        name = event.name()
        if name == "[memory]":
            total += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, total)
            continue
        graph = name.startswith("## Call CompiledFxGraph")
        graphs += graph
        reads += name in READS
        if (graph or "::" in name) and event.start_ns() >= over:
            calls += 1
            over = event.start_ns() + event.duration_ns()
    return Profiled(calls, graphs, reads, peak)


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in what an optimiser keeps."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def living() -> Iterator[Tensor]:
    """Every plain tensor that Python has: a compiler's own, which stand for others, are of other classes."""
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type != "meta":
            yield thing


def storages(them: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each piece of memory that tensors lie in."""
    kept = (tensor.untyped_storage() for tensor in them)
    return {storage._cdata: storage.nbytes() for storage in kept}


def work(connection: Connection, name: str, case: str, home: Path | None, folder: Path) -> None:
    """A worker: does what it is told, and answers whether it could, and with what."""
    written = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # nobody has compiled before
    torch.set_num_threads(THREADS)
    if home is not None:
        sys.path.insert(0, str(home))
    try:
        subject = Subject(CONTENDERS[name], CASES[case], home)
        while (told := connection.recv()) is not None:
            connection.send((True, getattr(subject, told)()))
    except EOFError:
        return  # the parent is gone
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {(str(error).strip() or '–').splitlines()[0]}"))


# -------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Measured:
    """An optimiser in a case."""

    seconds: list[float]  # by round
    warm_up: list[float]
    costs: Costs

    @property
    def start(self) -> float:
        """The seconds that the first steps take above those of as many later ones."""
        return max(0.0, sum(self.warm_up) - len(self.warm_up) * statistics.median(self.seconds))


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case: what ran in the same rounds, and why others did not run."""

    case: str
    batches: list[dict[str, Measured]]
    missing: dict[str, str]

    def of(self, name: str) -> Measured | None:
        """One optimiser's figures."""
        return next((batch[name] for batch in self.batches if name in batch), None)

    def ratios(self, name: str, base: str) -> list[float]:
        """One optimiser's times over another's, round by round; none, if they never ran together."""
        for batch in self.batches:
            if name in batch and base in batch:
                return [a / b for a, b in zip(batch[name].seconds, batch[base].seconds, strict=True)]
        return []


class Worker:
    """A process with an optimiser, seen from the outside."""

    def __init__(self, name: str, case: str, home: Path | None, folder: Path) -> None:
        folder.mkdir()
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=work, args=(there, name, case, home, folder), daemon=True)
        self._process.start()
        there.close()

    def ask(self, told: str, limit: float) -> Any:
        """What it answers.

        Raises:
            ContenderError: It failed, or has not answered in time.
        """
        with suppress(OSError):  # a process that failed before it was asked has said why
            self._connection.send(told)
        if not self._connection.poll(limit):
            raise ContenderError(f"no answer within {limit:.0f} s")
        try:
            good, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(END_LIMIT)
            raise ContenderError(f"the process died, exit code {self._process.exitcode}") from None
        if not good:
            raise ContenderError(value[:LONGEST])
        return value

    def close(self) -> None:
        """End the process, by its own doing if it can."""
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(END_LIMIT)
        self._process.kill()
        self._process.join()
        self._connection.close()


def together(
    case: str, names: Sequence[str], peers: Path, rounds: int
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Measure optimisers in turn; and which failed, and why."""
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    warm_ups: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:

        def ask(name: str, told: str, limit: float) -> Any:
            try:
                return workers[name].ask(told, limit)
            except ContenderError as failure:
                failed[name] = str(failure)
                workers.pop(name).close()
                return None

        for number, name in enumerate(names):
            workers[name] = Worker(name, case, CONTENDERS[name].home(peers), Path(folder, str(number)))
            stack.callback(workers[name].close)
            if ask(name, "ready", START_LIMIT):
                warm_ups[name] = ask(name, "warm_up", FIRST_LIMIT)
        order = random.Random(0)
        for _ in range(rounds):
            turn = list(workers)
            order.shuffle(turn)
            for name in turn:
                time.sleep(PAUSE)
                seconds[name].append(ask(name, "step", STEP_LIMIT))
        for name in list(workers):
            costs = ask(name, "costs", COSTS_LIMIT)
            if costs is not None:
                measured[name] = Measured(seconds[name], warm_ups[name], costs)
    return measured, failed


def available() -> int:
    """The bytes of memory that processes may still take."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Needs:
    """How much memory workers take, by what those of smaller cases have taken."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}  # bytes per parameter

    def learn(self, outcome: Outcome) -> None:
        """Take note of a case; of larger ones, where fixed costs count for less, last."""
        for batch in outcome.batches:
            self._known.update({name: measured.costs.worker for name, measured in batch.items()})

    def missing(self, case: str, names: Iterable[str]) -> str:
        """What is short for optimisers at once; nothing, if they fit."""
        count, room = CASES[case].parameters, SHARE * available()
        need = sum(PROCESS + self._known.get(name, UNKNOWN) * count for name in names)
        return "" if need <= room else f"{need / 1e9:.1f} GB of memory, where {room / 1e9:.1f} are free"


def measure(case: str, names: Sequence[str], needs: Needs, peers: Path, rounds: int) -> Outcome:
    """Measure a case: all optimisers together, or each beside the fused AdamW, as memory allows."""
    batches, missing = [list(names)], {}
    if needs.missing(case, names):
        pairs = {name: [FUSED, name] for name in names if name != FUSED}
        short = {name: needs.missing(case, pair) for name, pair in pairs.items()}
        missing = {name: f"beside {FUSED} it takes {said}" for name, said in short.items() if said}
        batches = [pair for name, pair in pairs.items() if name not in missing]
    measured = []
    for batch in batches:
        figures, failed = together(case, batch, peers, rounds)
        measured.append(figures)
        missing.update(failed)
    return Outcome(case, measured, missing)


def machine() -> str:
    """The machine in words."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"{name} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {memory / 1e9:.0f} GB; "
        f"{THREADS} threads, float32; torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}"
    )


# ----------------------------------------------------------------------------------------- report

SAID = f"""\
A round is a step of each optimiser in a process of its own, in an order that is drawn; gradients are given,
and written before each step, outside its time. ÷ is the median of the ratios of a round's times, with their
{100 * LOW:.0f}th and {100 * HIGH:.0f}th percentile. Options have their defaults, but those that are named.

- state: bytes per parameter of `optimizer.state`, between steps.
- extra: bytes per parameter that a step holds at most beyond weights, gradients and state, and what is kept
  between steps elsewhere.
- calls: of operators, and of compiled graphs, from Python, per tensor. A compiled graph is one call.
- reads: values of tensors that the host reads in a step, for which it would wait on a GPU; not so those of
  torch's AdamW, whose step counts are on the host.
- start: seconds that the first {WARM_UP} steps take above as many later ones: making the state, and
  compiling, without a cache.
"""

HEAD = """\
| case | optimiser | ms | ÷ {foreach} | ÷ {fused} | state, B | extra, B | calls | reads | start, s |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def digits(value: float) -> str:
    """Three digits, if they say anything."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower end of the spread, the median, and the upper end."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at(LOW), at(0.5), at(HIGH)


def spread(values: Sequence[float]) -> str:
    """The median, and the spread."""
    if not values:
        return "–"
    low, middle, high = map(digits, quantiles(values))
    return f"{middle} ({low}–{high})"


def rows(outcome: Outcome) -> Iterator[str]:
    """The lines of a case in the table."""
    for name in CONTENDERS:
        if (measured := outcome.of(name)) is None:
            continue
        costs = measured.costs
        ratios = ("1" if name == base else spread(outcome.ratios(name, base)) for base in (FOREACH, FUSED))
        cells = [
            digits(1000 * statistics.median(measured.seconds)),
            *ratios,
            f"{costs.state:.2f}",
            f"{costs.beside + costs.peak:.2f}",
            digits(costs.calls / CASES[outcome.case].tensors),
            f"{costs.reads:,}",
            f"{measured.start:.1f}",
        ]
        yield f"| {outcome.case} | {name} | {' | '.join(cells)} |"


def scaling(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """A table of what is drawn over sizes, tensors and groups."""
    names = [name for name, contender in CONTENDERS.items() if contender.few and name != FUSED]
    names = [name for name in names if any(outcome.of(name) for outcome in outcomes.values())]
    if not names:
        return
    yield f"\n| ÷ {FUSED} | parameters, 10⁶ | tensors | groups | {' | '.join(names)} |"
    yield f"|---|{'--:|' * (3 + len(names))}"
    for case in dict.fromkeys(case for cases in SERIES.values() for case in cases):
        if case in outcomes:
            it = CASES[case]
            cells = [f"{it.parameters / 1e6:.1f}", f"{it.tensors:,}", f"{it.groups}"]
            cells += [spread(outcomes[case].ratios(name, FUSED)) for name in names]
            yield f"| {case} | {' | '.join(cells)} |"


def report(outcomes: Mapping[str, Outcome], machines: Iterable[str], rounds: str) -> Iterator[str]:
    """All that is told, a line or more at a time."""
    for machine in machines:
        yield f"{machine}; {rounds} rounds.\n"
    yield SAID
    for case in TABLE:
        if case in outcomes:
            it = CASES[case]
            yield f"- {case}: {it.said}; {it.parameters / 1e6:.1f} · 10⁶ parameters in {it.tensors:,} tensors"
    if any(case in outcomes for case in TABLE):
        yield "\n" + HEAD.format(foreach=FOREACH, fused=FUSED)
        for case in TABLE:
            if case in outcomes:
                yield from rows(outcomes[case])
    missing: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes.values():
        for name, why in outcome.missing.items():
            missing.setdefault((name, why), []).append(outcome.case)
    if missing:
        yield "\nNot measured:\n"
    for (name, why), cases in missing.items():
        yield f"- {name} ({', '.join(cases)}): `{why.replace('`', chr(39))}`"
    if set(outcomes) - set(TABLE):
        yield from scaling(outcomes)


# ----------------------------------------------------------------------------------------- charts


def draw_peers(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """A bar for each optimiser in each case of the table."""
    from matplotlib.figure import Figure

    cases = [case for case in TABLE if case in outcomes]
    names = [
        name
        for name in CONTENDERS
        if name != FUSED and any(outcomes[case].ratios(name, FUSED) for case in cases)
    ]
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for place, name in enumerate(names):
            if not (ratios := outcomes[case].ratios(name, FUSED)):
                axes.text(1.05, place, "not measured", va="center", fontsize=8, color="0.4")
                continue
            low, middle, high = quantiles(ratios)
            axes.barh(place, middle - 1, left=1, height=0.68, color=CONTENDERS[name].colour)
            axes.errorbar(
                middle, place, xerr=[[middle - low], [high - middle]], color="0.45", capsize=3, linewidth=1.2
            )
            axes.annotate(
                f"{digits(middle)} ×",
                (max(high, 1.0), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        it = CASES[case]
        axes.set(
            title=f"{case}\n{it.parameters / 1e6:.1f} M parameters, {it.tensors:,} tensors",
            xlabel=f"step time ÷ {FUSED}",
            xscale="log",
        )
        axes.title.set_fontsize(10)
        axes.axvline(1, color="black", linewidth=1)
        axes.margins(x=0.25)
        plain(axes.xaxis, axes.get_xlim())
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def draw_scaling(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Three panels: over parameters, tensors and groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, len(SERIES), sharey=True)
    for axes, (series, cases) in zip(panels, SERIES.items(), strict=True):
        label, over = OVER[series]
        present = [case for case in cases if case in outcomes]
        axes.axhline(1, color="black", linewidth=1, linestyle=":")
        for name, contender in CONTENDERS.items():
            if contender.few and name != FUSED:
                points = [(over(CASES[case]), outcomes[case].ratios(name, FUSED)) for case in present]
                curve(axes, contender.colour, points)
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.set_xticks([over(CASES[c]) for c in cases], [short(over(CASES[c])) for c in cases])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"step time ÷ {FUSED}")
    plain(panels[0].yaxis, panels[0].get_ylim())
    handles = [
        panels[0].plot([], [], "o-", color=contender.colour, label=name)[0]
        for name, contender in CONTENDERS.items()
        if contender.few and name != FUSED and any(outcome.of(name) for outcome in outcomes.values())
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def curve(axes: Axes, colour: str, points: Iterable[tuple[int, Sequence[float]]]) -> None:
    """The medians, and the spread as a band."""
    there = [(x, *quantiles(ratios)) for x, ratios in points if ratios]
    if there:
        x, low, middle, high = zip(*there, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, middle, "o-", color=colour, linewidth=1.5, markersize=5)


def plain(axis: Any, limits: tuple[float, float]) -> None:
    """Ticks of a logarithmic axis as numbers that one reads: 0.5, 1, 2, 5, 10."""
    low, high = limits
    ticks = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter("")


def short(number: int) -> str:
    """A number as a tick has room for."""
    return f"{number / 1e6:.0f} M" if number > 5e5 else f"{number:,}"


# ------------------------------------------------------------------------------------------- main


def as_json(outcomes: Mapping[str, Outcome], machines: Sequence[str], rounds: int) -> str:
    """All raw figures."""
    kept = [asdict(outcome) for outcome in outcomes.values()]
    return json.dumps({"machines": machines, "rounds": rounds, "outcomes": kept}, indent=1)


def from_json(text: str) -> tuple[dict[str, Outcome], list[str], int]:
    """What was written."""
    found = json.loads(text)
    outcomes = {}
    for kept in found["outcomes"]:
        batches = [
            {
                name: Measured(figures["seconds"], figures["warm_up"], Costs(**figures["costs"]))
                for name, figures in batch.items()
            }
            for batch in kept["batches"]
        ]
        outcomes[kept["case"]] = Outcome(kept["case"], batches, kept["missing"])
    return outcomes, found["machines"], found["rounds"]


def chosen(named: Iterable[str]) -> list[str]:
    """Cases, of names that may be series': small ones first, which tell what memory large ones take."""
    cases = {case for name in named for case in SERIES.get(name, (name,))}
    return sorted(cases, key=lambda case: (CASES[case].parameters, list(CASES).index(case)))


def run(args: argparse.Namespace) -> tuple[dict[str, Outcome], list[str], int]:
    """Install, and measure the cases that are asked for."""
    args.peers.mkdir(parents=True, exist_ok=True)
    absent: dict[str, str] = {}
    for name in args.optimizers:
        if (peer := CONTENDERS[name].peer) is not None:
            try:
                install(peer, args.peers)
            except ContenderError as failure:
                absent[name] = str(failure)
    outcomes: dict[str, Outcome] = {}
    machines, needs = [machine()], Needs()
    if (load := os.getloadavg()[0]) > BUSY:
        print(f"the load is {load:.1f}: times beside other work say nothing", file=sys.stderr)
    for case in chosen(args.cases):
        wanted = [name for name in args.optimizers if case in TABLE or CONTENDERS[name].few]
        there = [name for name in wanted if name not in absent]
        print(f"{time.strftime('%X')} {case}", file=sys.stderr, flush=True)
        outcome = measure(case, there, needs, args.peers.resolve(), args.rounds)
        outcome.missing.update({name: absent[name] for name in wanted if name in absent})
        outcomes[case] = outcome
        needs.learn(outcome)
        if args.json is not None:  # now, so that what ends a later case does not take this one along
            args.json.write_text(as_json(outcomes, machines, args.rounds))
    return outcomes, machines, args.rounds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or read, print, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CASES, *SERIES]
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="see above")
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all figures")
    parser.add_argument(
        "--from", type=Path, nargs="+", metavar="FILE", dest="kept", help="read, do not measure"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for performance_peers.png and performance_scaling.png"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    if args.kept is None and args.peers is None:
        parser.error("--peers or --from is needed.")
    outcomes: dict[str, Outcome] = {}
    machines: dict[str, None] = {}
    rounds: dict[int, None] = {}
    for its, on, count in [from_json(file.read_text()) for file in args.kept] if args.kept else [run(args)]:
        outcomes |= its
        machines |= dict.fromkeys(on)
        rounds[count] = None
    # The folder and files, which are the reader's own, are told by their names in the docstring.
    own = {str(args.peers): "FOLDER", **{str(file): "FILE" for file in (args.json, *(args.kept or ()))}}
    shown = [own.get(word, word) for word in arguments]
    print(f"    {shlex.join(['python', 'benchmarks/step_time.py', *shown])}\n")
    for line in report(outcomes, machines, " or ".join(map(str, rounds))):
        print(line)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        if any(case in outcomes for case in TABLE):
            draw_peers(outcomes, args.out / "performance_peers.png")
        draw_scaling(outcomes, args.out / "performance_scaling.png")


if __name__ == "__main__":
    main()
