"""How long a step takes compared with other optimisers, and what it holds, calls and waits for: on the CPU.

    python benchmarks/step_time.py --peers FOLDER [--rounds N] [--cases NAME ...] [--json FILE] [--out docs]
    python benchmarks/step_time.py --from FILE ... [--out docs]

The other packages are installed into folders of their own below FOLDER, if they are not there yet. Each
optimiser runs in a process of its own, since one of them shares our import name; all have the same weights.
They take steps one at a time; a round is a step of each, in random order, and times are compared within
rounds, so that other load on the machine affects all alike. `--json` keeps all figures; `--from` reads them,
and prints and draws again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, charts, machine
from harness.peers import HEAVYBALL, OURS, PRODIGY, PUBLISHED, SCHEDULEFREE, Peer, PeerError, install, load
from harness.shapes import Shape, gpt, numel
from harness.tables import HIGH, LOW, Page, digits, milliseconds, parser, quantiles, spread
from harness.tables import ratios as ratios_of
from harness.tensors import leaves, storages
from harness.watching import Watch
from harness.workers import Worker, WorkerError
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

WARM_UP = 5  # steps, in which state is made and compilation is done
START_LIMIT, STEP_LIMIT, COSTS_LIMIT = 1200, 180, 900  # seconds
NOISE = 1 << 20  # elements from which gradients are made
PROCESS = 600 << 20  # bytes of a worker without parameters
UNKNOWN = 48  # bytes per parameter of a worker, if nothing has been measured yet
SHARE = 0.9  # of the available memory may be used

# ------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True, slots=True)
class Contender:
    """An optimiser, with options that are not its defaults."""

    place: str  # module:class
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: Peer | None = None
    colour: str = charts.GREY
    few: bool = False  # whether it is among the few for which curves are drawn


FOREACH, FUSED = "AdamW, foreach", "AdamW, fused"
ADAMW, SCHEDULED, PRODIGIES = "torch.optim:AdamW", "schedulefree:AdamWScheduleFree", "prodigyopt:Prodigy"
# One colour for each package, two for ours.
CONTENDERS: dict[str, Contender] = {
    FOREACH: Contender(ADAMW, {"foreach": True}, colour=charts.BLACK, few=True),
    FUSED: Contender(ADAMW, {"fused": True}, colour=charts.BLACK, few=True),
    "ours": Contender(OURS, colour=charts.BLUE, few=True),
    "ours, compiled": Contender(OURS, {"compile": True}, colour=charts.RED, few=True),
    "prodigy-plus 2.0.1": Contender(OURS, {}, PUBLISHED, charts.GREEN, few=True),
    "schedulefree 1.4.1, foreach": Contender(SCHEDULED, {"foreach": True}, SCHEDULEFREE, charts.PINK),
    "schedulefree 1.4.1, for loop": Contender(SCHEDULED, {"foreach": False}, SCHEDULEFREE, charts.PINK),
    "prodigyopt 1.1.2": Contender(PRODIGIES, {"slice_p": 1}, PRODIGY, charts.ORANGE),
    "prodigyopt 1.1.2, slice_p=11": Contender(PRODIGIES, {"slice_p": 11}, PRODIGY, charts.ORANGE),
    "heavyball 3.2.1 SFAdamW, compiled": Contender("heavyball:SFAdamW", {}, HEAVYBALL, charts.SKY),
}
FEW = [name for name, contender in CONTENDERS.items() if contender.few and name != FUSED]

# ------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True, slots=True)
class Case:
    """Parameters to step."""

    shapes: list[Shape]
    said: str = ""
    groups: int = 1

    @property
    def parameters(self) -> int:
        """How many elements there are."""
        return numel(self.shapes)

    @property
    def tensors(self) -> int:
        """How many tensors they are in."""
        return len(self.shapes)

    @property
    def told(self) -> str:
        """Its size."""
        return f"{self.parameters / 1e6:.1f} · 10⁶ parameters in {self.tensors:,} tensors"


def squares(count: int, side: int, groups: int = 1) -> Case:
    """Equal square matrices."""
    return Case([(side, side)] * count, f"{count:,} matrices of {side} × {side}", groups)


CASES: dict[str, Case] = {
    "gpt": Case(gpt(), "a GPT-2 of width 512, its head tied"),
    "small": Case([(64,), (64, 64)] * 500, "500 vectors of 64 and 500 matrices of 64 × 64"),
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
TABLE = ("gpt", "small", "many")  # all contenders take part in these, a few in the others
SERIES = {  # the axis of each chart; a series may be named instead of its cases
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
    """What a step costs besides time; bytes are per parameter."""

    held: float  # of weights and gradients
    state: float  # in ``optimizer.state``
    beside: float  # of tensors that are kept elsewhere between steps
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


class Subject:
    """An optimiser, with parameters and gradients."""

    def __init__(self, contender: Contender, case: Case, home: Path | None, folder: Path) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # so that nothing has been compiled before
        torch.set_num_threads(machine.THREADS)
        torch.manual_seed(0)
        self._parameters = [nn.Parameter(torch.randn(shape).mul_(0.02)) for shape in case.shapes]
        machine.keep_freed_memory()
        self._noise = torch.randn(2 * NOISE).mul_(1e-2)
        self._awake = torch.zeros(1 << 18)
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        given: Any = self._parameters
        if case.groups > 1:
            given = [{"params": self._parameters[first :: case.groups]} for first in range(case.groups)]
        self._optimizer = load(contender.place, home)(given, **contender.options)
        if hasattr(self._optimizer, "train"):
            self._optimizer.train()

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
        """What a step costs besides time."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.step()  # what was allocated before is freed with unknown sizes; from now on, sizes are known
            self._give()
            with record_function(MEASURED):
                self._optimizer.step()
        seen = within(profiled)
        calls = seen.calls
        if not seen.graphs:
            self._give()
            with Watch(note=lambda call: call.func.namespace != "profiler") as watch:
                self._optimizer.step()
            calls = sum(watch.calls)
        count = sum(p.numel() for p in self._parameters)
        given = [*self._parameters, *self._gradients]
        in_state = storages(leaves([*self._optimizer.state.values()]))
        everything = storages(living())
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
        """Write every gradient, as a backward pass does: optimisers may change or release them."""
        for number, (p, gradient) in enumerate(zip(self._parameters, self._gradients, strict=True)):
            start = 4099 * number % NOISE
            for piece in torch.split(gradient.view(-1), NOISE):
                piece.copy_(self._noise[start : start + len(piece)])
            p.grad = gradient
        self._awake.zero_()  # with all threads, which a backward pass leaves awake


@dataclass(frozen=True, slots=True)
class Profiled:
    """What a profile shows of a step."""

    calls: int  # of operators and compiled graphs, without nested calls
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


def living() -> Iterator[Tensor]:
    """Every plain tensor in Python; a compiler's fake tensors have other classes."""
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type != "meta":
            yield thing


# -------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Measured:
    """An optimiser in a case."""

    seconds: list[float]  # by round
    warm_up: list[float]
    costs: Costs

    @property
    def start(self) -> float:
        """By how many seconds the first steps take longer than as many later ones."""
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
                return ratios_of(batch[name].seconds, batch[base].seconds)
        return []


def together(
    case: str, names: Sequence[str], homes: Mapping[str, Path | None], rounds: int
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Measure optimisers in turn; also says which failed, and why."""
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    warm_ups: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as stack:

        def ask(name: str, method: str, limit: float) -> Any:
            try:
                return workers[name].ask(limit, method)
            except WorkerError as failure:
                failed[name] = str(failure)
                workers.pop(name).close()
                return None

        for number, name in enumerate(names):
            own, home = Path(folder, str(number)), homes[name]
            own.mkdir()
            given = CONTENDERS[name], CASES[case], home, own
            workers[name] = Worker(Subject, *given, path=[home] if home else [], said=own / "said")
            stack.callback(workers[name].close)
            warm_ups[name] = ask(name, "warm_up", START_LIMIT)
        order = random.Random(0)
        for _ in range(rounds):
            turn = list(workers)
            order.shuffle(turn)
            for name in turn:
                time.sleep(machine.PAUSE)
                seconds[name].append(ask(name, "step", STEP_LIMIT))
        for name in list(workers):
            costs = ask(name, "costs", COSTS_LIMIT)
            if costs is not None:
                measured[name] = Measured(seconds[name], warm_ups[name], costs)
    return measured, failed


class Needs:
    """How much memory workers need, judging by those of smaller cases."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}  # bytes per parameter

    def learn(self, outcome: Outcome) -> None:
        """Record a case; larger ones come last, since fixed costs count for less in them."""
        for batch in outcome.batches:
            self._known.update({name: measured.costs.worker for name, measured in batch.items()})

    def missing(self, case: str, names: Iterable[str]) -> str:
        """What is short for optimisers at once; nothing, if they fit."""
        count, room = CASES[case].parameters, SHARE * machine.available()
        need = sum(PROCESS + self._known.get(name, UNKNOWN) * count for name in names)
        return "" if need <= room else f"{need / 1e9:.1f} GB of memory, where {room / 1e9:.1f} are free"


def measure(
    case: str, names: Sequence[str], needs: Needs, homes: Mapping[str, Path | None], rounds: int
) -> Outcome:
    """Measure a case: all optimisers together, or each with the fused AdamW, as memory allows."""
    batches, missing = [list(names)], {}
    if needs.missing(case, names):
        pairs = {name: [FUSED, name] for name in names if name != FUSED}
        short = {name: needs.missing(case, pair) for name, pair in pairs.items()}
        missing = {name: f"beside {FUSED} it takes {said}" for name, said in short.items() if said}
        batches = [pair for name, pair in pairs.items() if name not in missing]
    measured = []
    for batch in batches:
        figures, failed = together(case, batch, homes, rounds)
        measured.append(figures)
        missing.update(failed)
    return Outcome(case, measured, missing)


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

COLUMNS = f"""\
case | optimiser | ms: | ÷ {FOREACH}: | ÷ {FUSED}: | state, B: | extra, B: | calls: | reads: | start, s:"""


def rows(outcome: Outcome) -> Iterator[list[str]]:
    """The lines of a case in the table."""
    for name in CONTENDERS:
        if (measured := outcome.of(name)) is None:
            continue
        costs = measured.costs
        ratios = ("1" if name == base else spread(outcome.ratios(name, base)) for base in (FOREACH, FUSED))
        bytes_ = f"{costs.state:.2f}", f"{costs.beside + costs.peak:.2f}"
        calls = digits(costs.calls / CASES[outcome.case].tensors), f"{costs.reads:,}"
        times = milliseconds(measured.seconds), *ratios
        yield [outcome.case, name, *times, *bytes_, *calls, f"{measured.start:.1f}"]


def scaling(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> Iterator[list[str]]:
    """The lines of the table of what is drawn over sizes, tensors and groups."""
    for case in dict.fromkeys(case for cases in SERIES.values() for case in cases):
        if case in outcomes:
            it = CASES[case]
            ratios = (spread(outcomes[case].ratios(name, FUSED)) for name in names)
            yield [case, f"{it.parameters / 1e6:.1f}", f"{it.tensors:,}", f"{it.groups}", *ratios]


def tell(page: Page, outcomes: Mapping[str, Outcome], machines: Iterable[str], rounds: str) -> None:
    """Print all that was measured."""
    page.tell(*(f"{described}; {rounds} rounds.\n" for described in machines), SAID)
    shown = [case for case in TABLE if case in outcomes]
    page.tell(*(f"- {case}: {CASES[case].said}; {CASES[case].told}" for case in shown))
    if shown:
        page.tell("")
        page.table(COLUMNS, (cells for case in shown for cells in rows(outcomes[case])))
    missing: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes.values():
        for name, why in outcome.missing.items():
            missing.setdefault((name, why), []).append(outcome.case)
    if missing:
        page.tell("\nNot measured:\n")
    for (name, why), cases in missing.items():
        page.tell(f"- {name} ({', '.join(cases)}): `{why.replace('`', chr(39))}`")
    names = [name for name in FEW if any(outcome.of(name) for outcome in outcomes.values())]
    if names and set(outcomes) - set(TABLE):
        page.tell("")
        columns = ["parameters, 10⁶", "tensors", "groups", *names]
        page.table(f"÷ {FUSED} | {': | '.join(columns)}:", scaling(outcomes, names))


# ----------------------------------------------------------------------------------------- charts


def draw_peers(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """A bar for each optimiser in each case of the table."""
    cases = [case for case in TABLE if case in outcomes]
    others = [name for name in CONTENDERS if name != FUSED]
    names = [name for name in others if any(outcomes[case].ratios(name, FUSED) for case in cases)]
    figure, [panels] = charts.panels(1, len(cases), (11, 1.6 + 0.34 * len(names)), sharey=True)
    for axes, case in zip(panels, cases, strict=True):
        for place, name in enumerate(names):
            if not (ratios := outcomes[case].ratios(name, FUSED)):
                axes.text(1.05, place, "not measured", va="center", fontsize=8, color="0.4")
                continue
            low, middle, high = quantiles(ratios)
            axes.barh(place, middle - 1, left=1, height=0.68, color=CONTENDERS[name].colour)
            whisker = [[middle - low], [high - middle]]
            axes.errorbar(middle, place, xerr=whisker, color="0.45", capsize=3, linewidth=1.2)
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{digits(middle)} ×", (max(high, 1.0), place), **beside)
        it = CASES[case]
        axes.set(xlabel=f"step time ÷ {FUSED}", xscale="log")
        title = f"{case}\n{it.parameters / 1e6:.1f} M parameters, {it.tensors:,} tensors"
        axes.set_title(title, fontsize=10)
        axes.axvline(1, color="black", linewidth=1)
        axes.margins(x=0.25)
        charts.plain(axes.xaxis, axes.get_xlim())
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    charts.save(figure, path)


def draw_scaling(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Three panels: over parameters, tensors and groups."""
    figure, [panels] = charts.panels(1, len(SERIES), (12, 4.4), sharey=True)
    for axes, (series, cases) in zip(panels, SERIES.items(), strict=True):
        label, over = OVER[series]
        present = [case for case in cases if case in outcomes]
        axes.axhline(1, color="black", linewidth=1, linestyle=":")
        for name in FEW:
            spreads = [(case, outcomes[case].ratios(name, FUSED)) for case in present]
            points = [(over(CASES[case]), *quantiles(ratios)) for case, ratios in spreads if ratios]
            if points:
                x, low, middle, high = zip(*points, strict=True)
                colour = CONTENDERS[name].colour
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(x, middle, "o-", color=colour, linewidth=1.5, markersize=5)
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.set_xticks([over(CASES[c]) for c in cases], [short(over(CASES[c])) for c in cases])
        axes.minorticks_off()
    panels[0].set_ylabel(f"step time ÷ {FUSED}")
    charts.plain(panels[0].yaxis, panels[0].get_ylim())
    handles = [
        panels[0].plot([], [], "o-", color=CONTENDERS[name].colour, label=name)[0]
        for name in FEW
        if any(outcome.of(name) for outcome in outcomes.values())
    ]
    charts.save(figure, path, below=handles)


def short(number: int) -> str:
    """A number short enough for a tick."""
    return f"{number / 1e6:.0f} M" if number > 5e5 else f"{number:,}"


# ------------------------------------------------------------------------------------------- main


def as_json(outcomes: Mapping[str, Outcome], machines: Sequence[str], rounds: int) -> str:
    """All raw figures."""
    kept = [asdict(outcome) for outcome in outcomes.values()]
    return json.dumps({"machines": machines, "rounds": rounds, "outcomes": kept}, indent=1)


def from_json(text: str) -> tuple[dict[str, Outcome], list[str], int]:
    """The figures that :func:`as_json` wrote."""
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
    """Cases by name or series; small ones first, which show how much memory large ones need."""
    cases = {case for name in named for case in SERIES.get(name, (name,))}
    return sorted(cases, key=lambda case: (CASES[case].parameters, list(CASES).index(case)))


def run(args: argparse.Namespace) -> tuple[dict[str, Outcome], list[str], int]:
    """Install, and measure the cases that are asked for."""
    peers = args.peers.resolve()
    peers.mkdir(parents=True, exist_ok=True)
    homes: dict[str, Path | None] = {}
    absent: dict[str, str] = {}
    for name in args.optimizers:
        contender = CONTENDERS[name]
        try:
            own = None if contender.place == ADAMW else ROOT
            homes[name] = install(contender.peer, peers) if contender.peer else own
        except PeerError as failure:
            absent[name] = str(failure)
    outcomes: dict[str, Outcome] = {}
    machines, needs = [machine.described()], Needs()
    machine.warn_if_busy()
    for case in chosen(args.cases):
        wanted = [name for name in args.optimizers if case in TABLE or CONTENDERS[name].few]
        print(f"{time.strftime('%X')} {case}", file=sys.stderr, flush=True)
        outcome = measure(case, [name for name in wanted if name in homes], needs, homes, args.rounds)
        outcome.missing.update({name: absent[name] for name in wanted if name in absent})
        outcomes[case] = outcome
        needs.learn(outcome)
        if args.json is not None:  # now, so that a failure in a later case does not lose this one
            args.json.write_text(as_json(outcomes, machines, args.rounds))
    return outcomes, machines, args.rounds


def main() -> None:
    """Measure or read, print, and draw."""
    cli, names = parser(__doc__), [*CASES, *SERIES]
    add = cli.add_argument
    add("--peers", type=Path, metavar="FOLDER", help="see above")
    add("--cases", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--optimizers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    add("--rounds", type=int, default=30)
    add("--json", type=Path, metavar="FILE", help="for all figures")
    add("--from", type=Path, nargs="+", metavar="FILE", dest="kept", help="read, do not measure")
    add("--out", type=Path, metavar="FOLDER", help="for performance_peers.png and performance_scaling.png")
    args = cli.parse_args()
    if args.kept is None and args.peers is None:
        cli.error("--peers or --from is needed.")
    outcomes: dict[str, Outcome] = {}
    machines: dict[str, None] = {}
    rounds: dict[int, None] = {}
    for its, on, count in [from_json(file.read_text()) for file in args.kept] if args.kept else [run(args)]:
        outcomes |= its
        machines |= dict.fromkeys(on)
        rounds[count] = None
    own = {args.peers: "FOLDER", **dict.fromkeys((args.json, *(args.kept or ())), "FILE")}
    tell(Page("", named=own), outcomes, machines, " or ".join(map(str, rounds)))
    if args.out is not None:
        if any(case in outcomes for case in TABLE):
            draw_peers(outcomes, args.out / "performance_peers.png")
        draw_scaling(outcomes, args.out / "performance_scaling.png")


if __name__ == "__main__":
    main()
