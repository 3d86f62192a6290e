"""How much memory gradients take with and without `fused_back_pass`: one process, DDP and FSDP2.

    python benchmarks/fused_memory.py [--out docs]

Counts the bytes of tensors in training steps of a small transformer on the CPU, not the memory of processes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from harness.tables import Page, parser
from harness.tensors import leaves, local
from harness.watching import Call, Watch
from harness.workers import on_ranks
from torch import Tensor, UntypedStorage, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

LAYERS, WIDTH, HEADS, VOCABULARY = 12, 192, 4, 512
TOKENS = 4  # few, so that activations take next to nothing
WARM_UP = 3  # steps; DDP rebuilds its buckets after the first
STEPS = 3  # the least of which counts, since gloo's threads may be late to release what they have sent
SMALL, DEFAULT = 1 << 20, 64 << 20  # bucket_bytes
LEAST = 512  # elements; smaller tensors do not count, except gradients
LIMIT = 120  # seconds for the processes of a setting


@dataclass(frozen=True, slots=True)
class Setting:
    """A line of the table."""

    name: str
    wrap: Literal["none", "ddp", "fsdp2"] = "none"
    fused: bool = False
    bucket_bytes: int = SMALL
    ddp: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many processes it takes."""
        return 1 if self.wrap == "none" else 2


VIEW = {"gradient_as_bucket_view": True}
SETTINGS = (
    Setting("one process"),
    Setting("one process, fused", fused=True),
    Setting("DDP", "ddp"),
    Setting("DDP, `gradient_as_bucket_view=True`", "ddp", ddp=VIEW),
    Setting("the same, fused", "ddp", ddp=VIEW, fused=True),
    Setting("FSDP2", "fsdp2"),
    Setting("the same, fused", "fsdp2", fused=True),
    Setting("FSDP2, `bucket_bytes` of 64 MiB", "fsdp2", bucket_bytes=DEFAULT),
    Setting("the same, fused", "fsdp2", bucket_bytes=DEFAULT, fused=True),
)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes per parameter that a process holds."""

    parameters: int
    after_backward: float  # of gradients
    gradients: float  # at most
    everything: float  # at most, beyond the weights and the optimiser's state


class Transformer(nn.Module):
    """A decoder, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean cross entropy of the tokens that follow."""
        x = self.embedding(tokens[:, :-1])
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


# ------------------------------------------------------------------------------------- measuring


class Memory:
    """Follows the memory of what operations make, until it is freed; adds it up after each.

    Memory that has once been that of a ``.grad``, or of a bucket of DDP, counts as a gradient's for as long
    as anything refers to it. What an operation frees before it ends is not seen.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._followed: dict[int, StorageWeakRef] = {}  # by address, which a weak reference keeps from reuse
        self._gradients: set[int] = set()
        for p in self._parameters:
            p.register_post_accumulate_grad_hook(self._take_note)  # type: ignore[no-untyped-call]
        self.restart()

    def restart(self) -> None:
        """Start a new maximum."""
        self.most_gradients, self.most = self.held()

    def note(self, call: Call) -> None:
        """Follow what an operation has made."""
        for tensor in leaves(call.result):
            self.follow(tensor)
        gradients, everything = self.held()
        self.most_gradients = max(self.most_gradients, gradients)
        self.most = max(self.most, everything)

    def follow(self, tensor: Tensor, *, gradient: bool = False) -> None:
        """Count the memory of a tensor."""
        storage = local(tensor).untyped_storage()
        address: int = storage._cdata
        if address not in self._followed and (tensor.numel() >= LEAST or gradient):
            self._followed[address] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if gradient:
            self._gradients.add(address)

    def held(self) -> tuple[int, int]:
        """The bytes held now: by gradients, and by all that is followed."""
        gradients = everything = 0
        for address, reference in list(self._followed.items()):
            # The size is read each time: FSDP2 empties the storage that it gathers weights into.
            storage: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._followed[address]
                self._gradients.discard(address)
                continue
            everything += storage.nbytes()
            gradients += storage.nbytes() * (address in self._gradients)
        return gradients, everything

    def follow_gradients(self) -> None:
        """Count the gradients that parameters have now."""
        for p in self._parameters:
            self._take_note(p)

    def _take_note(self, p: Tensor) -> None:
        if p.grad is not None:
            self.follow(p.grad, gradient=True)


def measure(setting: Setting) -> Held:
    """What this process holds in a step, after a few warm-up steps."""
    torch.manual_seed(0)
    model: nn.Module = Transformer()
    if setting.wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (setting.ranks,))
        for module in (*(m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)), model):
            fully_shard(module, mesh=mesh)
    memory = Memory(model.parameters())
    if setting.wrap == "ddp":
        model = ddp(model, setting, memory)
    optimizer: ProdigyPlusScheduleFree
    if setting.wrap == "none":
        optimizer = ProdigyPlusScheduleFree(model.parameters(), fused_back_pass=setting.fused)
    else:
        optimizer = ShardedProdigyPlusScheduleFree(
            model.parameters(), fused_back_pass=setting.fused, bucket_bytes=setting.bucket_bytes
        )
    if setting.fused:
        optimizer.fuse_backward(model)
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1))

    def step() -> tuple[int, int, int]:
        memory.restart()
        buckets, before = memory.held()  # the only gradients left are DDP's buckets
        model(tokens).backward()
        memory.follow_gradients()  # DDP replaces them after the hooks
        after_backward, _ = memory.held()
        optimizer.step()
        optimizer.zero_grad()
        return after_backward, memory.most_gradients, memory.most - before + buckets

    with Watch(note=memory.note):
        for _ in range(WARM_UP):
            step()
        least = map(min, zip(*(step() for _ in range(STEPS)), strict=True))
    count = sum(local(p).numel() for p in model.parameters())
    return Held(count, *(nbytes / count for nbytes in least))


def ddp(model: nn.Module, setting: Setting, memory: Memory) -> DistributedDataParallel:
    """The model under DDP, whose buckets count as gradients."""
    wrapped = DistributedDataParallel(model, **setting.ddp)
    if not setting.fused:  # fused has a hook of its own, and needs the buckets to be the gradients

        def look(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
            memory.follow(bucket.buffer(), gradient=True)
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]

        wrapped.register_comm_hook(None, look)
    return wrapped


# ---------------------------------------------------------------------------------------- report

USE = """\
Set `fused_back_pass=True` where gradients do not fit into memory beside everything else. The numbers are
those of an ordinary step, to the bit. In one process `ProdigyPlusScheduleFree` takes it too; only
`ShardedProdigyPlusScheduleFree` has the argument `bucket_bytes`, 64 MiB by default.

```python
optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), fused_back_pass=True, bucket_bytes=1 << 20)
optimizer.fuse_backward(model)  # once, when the model is wrapped; else step() raises

for batch in batches:
    loss_of(model, batch).backward()  # moves the weights
    optimizer.step()  # ends the step, after every backward pass
```
"""

EXPLAINED = f"""\
The memory of a training step, in bytes per float32 parameter that the process holds: under FSDP2, here on
two processes, each holds half of the model's. The model is a transformer of {LAYERS} layers; batches have
{TOKENS} tokens, so that activations take next to nothing. `bucket_bytes` is {SMALL >> 20} MiB, and in the
last two lines the default.

- Gradients: the memory of every `.grad`, for as long as anything refers to it, and DDP's buckets. A gradient
  that FSDP2 holds whole, before cutting it, is not counted.
- Everything: all that a step holds beyond the weights and the optimiser's state: gradients, activations,
  updates, and the layers that FSDP2 holds whole at the time, each a {LAYERS}th of this model.
"""

COLUMNS = " | parameters, 10⁶: | gradients, after backward: | gradients, at most: | everything, at most:"

SAID = """
On one process a gradient is freed as soon as its weight has moved, so at any time there is memory in use
for about the largest one. DDP keeps its buckets between steps, so fusing saves nothing beyond
`gradient_as_bucket_view=True`. Under FSDP2 gradients wait until their updates fill `bucket_bytes`, and
those of a layer share one piece of memory, which is freed with the last of them. Set `bucket_bytes` well
below the gradients of a rank; each bucket costs two all-reduces.

- A step uses the gradients of one backward pass. To accumulate several, let FSDP2 or DDP hold them back until
  the last (`set_requires_gradient_sync(False)`, `no_sync()`). A second gradient before `step()` is an error.
  Checkpointing of a layer that is used several times makes several, unless `use_reentrant=False`.
- Code that reads or changes gradients after the backward pass comes too late: `clip_grad_norm_` finds none
  and returns 0, a GradScaler raises "No inf checks were recorded".
- Under DDP with `find_unused_parameters` or `static_graph`, only the end of the backward pass shows what was
  not used, so `step()` moves everything.
- Tensor parallelism needs FSDP2 around it. Otherwise ranks may get gradients in different orders, and wait
  for each other forever. `fuse_backward` raises an error there."""


def row(setting: Setting) -> list[str]:
    """A line of the table, of the process that holds most."""
    every = on_ranks(setting.ranks, measure, setting, limit=LIMIT)
    held = max(every, key=lambda held: held.gradients)
    columns = held.parameters / 1e6, held.after_backward, held.gradients, held.everything
    return [setting.name, *(f"{number:.2f}" for number in columns)]


def main() -> None:
    """Measure, print, and write what was asked for."""
    cli = parser(__doc__)
    cli.add_argument("--out", type=Path, metavar="FOLDER", help="for fused.md")
    page = Page("The fused backward pass", cli.parse_args().out)
    page.tell(USE, EXPLAINED)
    page.table(COLUMNS, map(row, SETTINGS))
    page.tell(SAID)
    page.save("fused.md")


if __name__ == "__main__":
    main()
