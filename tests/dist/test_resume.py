"""A run that is saved on one layout and loaded on another, by any of torch's helpers, goes on as before.

On the same layout, weights, ``d`` and all state are equal to the bit on every rank. On another layout sums
are rounded differently: there the run may be off by at most twice as much as AdamW that moves there too. With
options that amplify last bits more than AdamW does, the bound is twice the distance between uninterrupted
runs on the two layouts. What is loaded always has every bit that was saved.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree
from tests import option_table as table
from tests.dist.meshes import pieces_of, whole
from tests.dist.resuming import WAYS, Way, assert_loaded, in_memory, load, save
from tests.dist.sharding import place, ranks
from tests.models import Tiny, Walks, distance, fit, loss_of
from tests.single.problems import assert_same

BEFORE, AFTER = 30, 50

# By the layout where runs go on, the layouts where they were saved. Layouts are in tests/dist/sharding.py;
# their names end in the number of ranks, except hsdp and fsdp_tp (2 × 2) and tp (2).
PAIRS = {
    "one": ("one", "ddp4", "fsdp3"),
    "ddp2": ("ddp2", "fsdp1", "hsdp9"),
    "ddp3": ("ddp3", "one", "fsdp_tp"),
    "fsdp_tp": ("fsdp_tp", "ddp4", "one"),
    "ddp4": ("ddp4", "fsdp2", "tp"),
    "fsdp1": ("fsdp1", "hsdp9", "hsdp"),
    "fsdp2": ("fsdp2", "fsdp4", "hsdp9"),
    "fsdp3": ("fsdp3", "one", "fsdp2"),
    "fsdp4": ("fsdp4", "fsdp3", "ddp2"),
    "hsdp": ("hsdp", "fsdp_tp", "ddp3"),
    "hsdp9": ("hsdp9", "fsdp1"),
    "tp": ("tp", "hsdp", "fsdp3"),
}
# Nine ranks are slow on two cores.
SLOW_PAIRS = {
    "ddp9": ("ddp9", "ddp2", "fsdp4"),
    "fsdp9": ("fsdp9", "one", "fsdp_tp9"),
    "fsdp_tp9": ("fsdp_tp9", "fsdp9", "tp"),
    "hsdp9": ("tp", "ddp9"),
    "one": ("ddp9", "fsdp_tp9"),
    "ddp4": ("fsdp9",),
    "fsdp_tp": ("fsdp_tp9", "fsdp9"),
}

LAYOUTS = tuple({**PAIRS, **SLOW_PAIRS})

F32, BF16 = torch.float32, torch.bfloat16

# Options that have state of their own, the model's dtype, where the run is saved, and where else it goes on.
OPTIONS = {
    "default": ({}, F32),
    "speed": ({"use_speed": True}, F32, "fsdp2", "tp"),
    "relative": ({"use_speed": "relative"}, F32, "tp", "fsdp2"),
    "muon": ({"use_muon_pp": True, "muon_fp32": True}, F32, "fsdp_tp", "ddp2"),
    "adopt": ({"use_adopt": True}, F32, "ddp2", "fsdp3"),
    # With another d0, a last bit decides an element's sign: a matter of FOCUS, not of checkpoints.
    "focus": ({"use_focus": True, "factored": False, "d0": 1e-4}, F32, "fsdp3", "ddp2"),
    "frozen_d": ({"prodigy_steps": 25}, F32, "fsdp2", "one"),
    "frozen_d_relative": ({"prodigy_steps": 25, "use_speed": "relative"}, F32, "tp", "fsdp2"),
    "adam": ({"use_schedulefree": False}, F32, "ddp2", "fsdp_tp"),
    "bfloat16": ({}, BF16, "fsdp2", "ddp3"),
    "bfloat16_factors": ({"factored_fp32": False}, BF16, "tp", "fsdp2"),
}
# Every option goes on where it was saved. Elsewhere, some amplify last bits beyond the bounds here.
OPTIONS |= {
    table.text_of(options): (options, F32, source)
    for options, source in zip(
        table.packed(table.alone(), most=8), itertools.cycle(("fsdp2", "tp", "ddp2", "fsdp3")), strict=False
    )
}


# Ways that torch refuses if FSDP unevenly cuts what tensor parallelism has cut: see the last test.
REFUSED_BY_TORCH = ("full", "converted")


def _ways():
    """For each case (source, target, options), one of WAYS, in turn."""
    cases = [
        (source, target, "default")
        for pairs in (PAIRS, SLOW_PAIRS)
        for target, sources in pairs.items()
        for source in sources
    ]
    cases += [(where[0], target, options) for options, (_, _, *where) in OPTIONS.items() for target in where]
    ways, found = itertools.cycle(WAYS), {}
    for case in cases:
        way = next(ways)
        while case[1].startswith("fsdp_tp") and way.load in REFUSED_BY_TORCH:
            way = next(ways)
        found[case] = way
    return found


WAY_OF = _ways()

# What every loaded state is compared with.
PLAIN = [Way("plain", mode, "plain", "train") for mode in ("train", "eval")]

SHARDS = Way("shards", "train", "shards", "train")


@dataclass(frozen=True)
class Job:
    """A saved run that is to be resumed."""

    options: str
    folder: Path  # where it was saved
    way: Way
    adamw: bool = False  # whether an AdamW run is resumed from there, too
    trains: bool = True  # False: it is only loaded and examined


class Data(Walks):
    """Batches that 1, 2, 3, 4 or 9 ranks can share evenly."""

    def __init__(self, after=0, seed=None):
        super().__init__(batch=36, length=8, seed=seed)
        for _ in range(after):
            self.next()


class Trained:
    """A model on a layout, and its optimiser."""

    def __init__(self, layout, options):
        torch.manual_seed(0)
        self.layout, self.options = layout, options
        self.model, self.called, *self._part = place(layout, Tiny().to(OPTIONS[options][1]), units=False)
        # DDP rearranges its buckets after the first backward pass, which changes the order of sums.
        loss_of(self.called, Data().next().chunk(self._part[1])[self._part[0]]).backward()
        self.model.zero_grad()

    def _groups(self, empty=True, **options):
        """Groups: matrices; the rest, partly frozen; a frozen group; and one without parameters."""
        (block,) = self.model.blocks
        matrices, frozen = [block.up.weight, block.down.weight], list(self.model.lens.parameters())
        rest = [p for p in self.model.parameters() if all(p is not q for q in (*matrices, *frozen))]
        of_rest = {key: value for key, value in options.items() if "muon" not in key}
        groups = [{"params": matrices, **options}, {"params": rest, **of_rest}, {"params": frozen, **of_rest}]
        return [*groups, {"params": [], **of_rest}] if empty else groups

    def ours(self, empty=True):
        plain = self.layout == "one" or self.layout.startswith("ddp")
        make = ProdigyPlusScheduleFree if plain else ShardedProdigyPlusScheduleFree
        # So large that after a few steps d follows its estimate, no longer the limiter.
        self.optimizer = make(self._groups(empty, **{"d0": 3e-4, **OPTIONS[self.options][0]}))

    def adamw(self, lr=None):
        groups = self._groups()
        lr = lr or [1.0] * len(groups)
        self.optimizer = torch.optim.AdamW(
            [{**group, "lr": its} for group, its in zip(groups, lr, strict=True)]
        )

    def fit(self, data, steps):
        return fit(self.called, self.optimizer, data, steps, *self._part)

    def save(self, way, folder):
        return save(way, folder, self.model, self.called, self.optimizer)

    def load(self, way, folder):
        load(way, folder, self.model, self.called, self.optimizer)

    def forget(self):
        """Drop gradients and randomise the weights, differently on each rank."""
        self.model.zero_grad()
        torch.manual_seed(1 + dist.get_rank())
        with torch.no_grad():
            for p in self.model.parameters():
                pieces_of(p).normal_()

    @property
    def weights(self):
        return [whole(p) for p in self.model.parameters()]

    def go_on(self, data):
        """Make the last steps; return the state before and after them, d at every step, and the weights."""
        saved = in_memory(self.optimizer)
        d = self.fit(data, AFTER)
        d += [float(group["d"]) for group in self.optimizer.metrics()]
        return {"saved": saved, "d": d, "end": in_memory(self.optimizer), "weights": self.weights}


def uninterrupted(layout, options, ways, folder):
    """Train, save in several ways, and train on; then the same with AdamW at the step sizes found."""
    run, data = Trained(layout, options), Data()
    run.ours()
    run.fit(data, BEFORE)
    later = []
    for mode in ("eval", "train"):
        getattr(run.optimizer, mode)()
        later += [run.save(way, folder) for way in ways if way.mode == mode]
    found = run.go_on(data)
    for write in later:
        write()

    steps = [float(group["d"]) for group in run.optimizer.metrics()]
    run, data = Trained(layout, options), Data()
    run.adamw(steps)
    run.fit(data, BEFORE)
    run.save(SHARDS, folder / "adamw")
    run.fit(data, AFTER)
    return {**found, "adamw": run.weights}


def trained(layout, options):
    """The weights of a run without interruption."""
    run, data = Trained(layout, options), Data()
    run.ours()
    run.fit(data, BEFORE)
    run.optimizer.eval()
    run.optimizer.train()
    run.fit(data, AFTER)
    return run.weights


def resumed(layout, jobs):
    """Resume runs from nothing but what was saved."""
    runs = {options: Trained(layout, options) for options in {job.options for job in jobs}}
    return [resume(runs[job.options], job) for job in jobs]


def resume(run, job):
    run.forget()
    run.ours(empty=not job.way.flat)  # flattened, torch cannot load it: see test_checkpoint_helpers.py
    if job.way.into == "used":
        run.fit(Data(seed=2), 3)
        run.optimizer.eval()
    else:
        getattr(run.optimizer, job.way.into)()
    run.load(job.way, job.folder)
    saved = torch.load(job.folder / f"plain.{job.way.mode}", weights_only=True)
    assert_loaded(run.model, run.optimizer, saved)
    if not job.trains:
        return None
    run.optimizer.train()
    found = run.go_on(Data(BEFORE))
    if job.adamw:
        run.forget()
        run.adamw()
        run.load(SHARDS, job.folder / "adamw")
        run.fit(Data(BEFORE), AFTER)
        found["adamw"] = run.weights
    return found


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """A function that gives the uninterrupted run of a layout and options, and the folder of its files."""
    runs = {}

    def get(layout, options):
        if (layout, options) not in runs:
            folder = tmp_path_factory.mktemp("saved")
            ways = [way for (source, _, its), way in WAY_OF.items() if (source, its) == (layout, options)]
            files = {way.file: way for way in (*PLAIN, SHARDS, *ways)}
            args = layout, options, tuple(files.values()), folder
            runs[layout, options] = folder, pool.run(ranks(layout), uninterrupted, *args)
        return runs[layout, options]

    return get


def assert_goes_on(pool, saved, target, sources, options="default"):
    """Assert that runs saved on each source go on on ``target``, as the module's docstring says."""
    runs = [saved(source, options) for source in sources]
    ways = [WAY_OF[source, target, options] for source in sources]
    jobs = [
        Job(options, folder, way, adamw=source != target)
        for source, (folder, _), way in zip(sources, runs, ways, strict=True)
    ]
    results = zip(*pool.run(ranks(target), resumed, target, jobs), strict=True)
    for source, (_, expected), way, found in zip(sources, runs, ways, results, strict=True):
        case = f"{options}, {source} to {target}: {way}"
        for other in found:
            assert_same((other["d"], other["weights"]), (found[0]["d"], found[0]["weights"]), case)
        if source == target:
            assert_same_run(found, expected, case)
        else:
            floor = distance(found[0]["adamw"], expected[0]["adamw"])
            assert floor <= 10 * torch.finfo(OPTIONS[options][1]).eps, case
            if options != "default":
                alone = pool.run(ranks(target), trained, target, options)
                floor = max(floor, distance(alone[0], expected[0]["weights"]))
            assert distance(found[0]["weights"], expected[0]["weights"]) <= 2 * floor, case
            off = max(abs(a / b - 1) for a, b in zip(found[0]["d"], expected[0]["d"], strict=False))
            assert off <= max(1e-5, 2 * floor), case


def assert_same_run(found, expected, case):
    """Assert that every rank has the bits of the uninterrupted run."""
    for ours, theirs in zip(found, expected, strict=True):
        groups = len(ours["end"][0])  # one without parameters may have been left out
        for key in ("saved", "end"):
            assert_same(ours[key], (theirs[key][0][:groups], theirs[key][1]), f"{case}, {key}")
        assert_same(ours["d"], theirs["d"][: len(ours["d"])], case)
        assert_same(ours["weights"], theirs["weights"], case)


@pytest.mark.parametrize("target", PAIRS)
def test_from_one_layout_to_another(pool, saved, target):
    assert_goes_on(pool, saved, target, PAIRS[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", SLOW_PAIRS)
def test_with_nine_ranks(pool, saved, target):
    assert_goes_on(pool, saved, target, SLOW_PAIRS[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_bit_between_any_two(pool, saved, target):
    folders = [saved(source, "default")[0] for source in LAYOUTS]
    jobs = [Job("default", folder, SHARDS, trains=False) for folder in folders]
    pool.run(ranks(target), resumed, target, jobs)


@pytest.mark.parametrize("options", [options for options in OPTIONS if options != "default"])
def test_options(pool, saved, options):
    _, _, source, *others = OPTIONS[options]
    for target in (source, *others):
        assert_goes_on(pool, saved, target, [source], options)


def whole_to_uneven():
    model, *_ = place("fsdp_tp", Tiny(), units=False)
    for broadcast in (True, False):
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        whole_state = Tiny().state_dict() if not broadcast or dist.get_rank() == 0 else {}
        try:
            set_model_state_dict(model, whole_state, options=how)
        except AssertionError:
            return broadcast
    return None


def test_what_torch_refuses(pool):
    """Loading whole tensors on every rank, also a model's, if FSDP unevenly cuts what is cut already.

    With ``broadcast_from_rank0=True`` it works.
    """
    assert pool.run(4, whole_to_uneven) == [False] * 4
