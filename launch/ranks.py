"""The processes of a run: how a script starts in each, its rank and device, and how all fail together."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Imported here, before there is a process group: some of its functions have the current one as a default
# argument, and would keep it alive. A gloo thread that outlives main() can abort the process as Python ends.
import torch.distributed.nn
import torch_private
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks and sizes that ``torchrun`` gives this process; without it, those of a single one."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    meshes: list[DeviceMesh] = field(default_factory=list)
    """The meshes that the run has made; :func:`start` releases their process groups at its end."""

    @property
    def device(self) -> torch.device:
        """A GPU for each process of the node, or the CPU for all of them."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor``, in place, summed over all processes."""
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    def about(self) -> dict[str, Any]:
        """What the log of a run says of its processes."""
        return {"torch": torch.__version__, "processes": self.size, "device": self.device}

    def agree(self, value: object) -> bool:
        """Whether ``value`` is the same in all processes."""
        if not dist.is_initialized():
            return True
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return all(other == value for other in values)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """If the body raises OSError or ValueError on any rank, print the reason once and end all.

        Every process must enter the block; none leaves it before all have reached its end.
        """
        error: str | None = None
        try:
            yield
        except (OSError, ValueError) as caught:
            error = str(caught)
        errors = [error]
        if dist.is_initialized():
            errors *= self.size
            dist.all_gather_object(errors, error)
        first = next((error for error in errors if error is not None), None)
        if first is not None:
            if self.rank == 0:
                tqdm.write(f"error: {first}", file=sys.stderr)  # not into the line of a progress bar
                sys.stderr.flush()
            if dist.is_initialized():
                dist.barrier()  # torchrun ends the others once one has exited, even while one prints
            raise SystemExit(1)


def run_script(
    parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace, Ranks], None]
) -> None:
    """Run a script in this process, which is one of those that ``torchrun`` has started, or the only one.

    Args:
        parse: Parses the command line.
        run: The script itself.
    """
    with start() as ranks:
        with ranks.fail_together():
            args = parse()
        wait_at_most(args.timeout)
        run(args, ranks)


def _cores() -> int:
    """The number of cores that this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def start() -> Iterator[Ranks]:
    """Join the processes of the run: NCCL on GPUs, gloo on the CPU.

    From here on Ctrl-C ends a process silently; Python would have each print a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    launched = "RANK" in os.environ
    ranks = Ranks(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // ranks.local_size))
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        gpus = torch.cuda.device_count()
        if ranks.local_size > gpus:
            error = (
                f"error: {ranks.local_size} processes for {gpus} GPUs: start at most one a GPU, or set "
                "CUDA_VISIBLE_DEVICES= to train on the CPU."
            )
            raise SystemExit(error if ranks.rank == 0 else 1)
        torch.cuda.set_device(ranks.device)
    if launched:
        # gloo beside NCCL carries the error messages, which are not on the GPU.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend,
            store=_store(),
            rank=ranks.rank,
            world_size=ranks.size,
            device_id=ranks.device if on_gpu else None,
        )
    try:
        yield ranks
    finally:
        if launched:
            gc.collect()  # sharded models hold process groups in reference cycles
            for mesh in ranks.meshes:
                torch_private.release_groups(mesh)
            dist.destroy_process_group()


def _store() -> Store:
    """The store through which the processes exchange their addresses."""
    store: Store
    store, _, _ = next(rendezvous("env://"))
    environment = os.environ.get
    if environment("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    # torchrun keeps its store across restarts, and in it the addresses of processes that no longer exist:
    # https://github.com/pytorch/pytorch/issues/135712. The prefix keeps restarts apart, but not always on
    # several nodes, which may count them differently.
    if environment("GROUP_WORLD_SIZE", "1") != "1" and environment("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        warnings.warn(
            "--max-restarts on several nodes: torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment, or a restart may not succeed.",
            stacklevel=2,
        )
    return PrefixStore(environment("TORCHELASTIC_RESTART_COUNT", "0"), store)


def wait_at_most(timeout: timedelta, groups: Iterable[dist.ProcessGroup] = ()) -> None:
    """Let collectives fail when a process is silent for this long; torch would wait for half an hour.

    Args:
        timeout: How long.
        groups: The process groups to set it for, besides that of all processes.
    """
    for group in (dist.group.WORLD, *groups):
        if group is not None:
            torch_private.set_timeout(group, timeout)
