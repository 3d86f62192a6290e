"""The blocks of Python in the documentation, and the names that the first block of a page may use."""

import gzip
import itertools
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import prodigyplus
from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "launch/README.md",
        *ROOT.glob("docs/**/*.md"),
    )
)

# Pages whose blocks several processes run at once, and how many. One process runs all others.
RANKS = {"docs/guides/sharding.md": 4}

# Pages whose blocks another test runs, with a scene of its own.
ELSEWHERE = {
    "docs/guides/huggingface.md": "tests/integrations/test_huggingface_guide.py",
    "docs/guides/lightning.md": "tests/integrations/test_lightning.py",
}

# Pages that need a package which may not be installed: then their test is skipped, and pytest says so.
NEEDS = {"docs/guides/torchtitan.md": "torchtitan"}

# The languages that a fence may name; it must name one. Only "python" is run.
LANGUAGES = {"python", "text", "sh", "toml", "yaml", "diff", "json"}

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of the fence, from 1
    language: str
    text: str

    def run(self, namespace):
        # Empty lines in front, so that a traceback gives the line number in the page.
        source = "\n" * self.line + self.text
        exec(compile(source, str(ROOT / self.page), "exec"), namespace)


def blocks_of(page):
    text = (ROOT / page).read_text()
    return [
        Block(page, text.count("\n", 0, its.start()) + 1, its["language"], textwrap.dedent(its["code"]))
        for its in _FENCE.finditer(text)
    ]


def python_of(page):
    return [block for block in blocks_of(page) if block.language == "python"]


WORDS, WIDTH, EXPERTS = 32, 16, 4


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) * 0.2)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bti,eio->bteo", x, self.up))
        return torch.einsum("bteo,eoi,bte->bti", hidden, self.down, shares)


class TransformerBlock(nn.Module):
    def __init__(self, experts: bool):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.router, self.experts = (nn.Linear(WIDTH, EXPERTS), Experts()) if experts else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.down(F.gelu(self.up(normed)))
        return x if self.router is None else x + self.experts(normed, self.router(normed).softmax(-1))


class Model(nn.Module):
    """Predicts each word of a sentence from the one before."""

    def __init__(self, experts: bool = False):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(TransformerBlock(experts) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) * self.logit_scale.exp()


def build_model(experts: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Model(experts)


def sentences(count, seed):
    draws = torch.Generator().manual_seed(seed)
    starts = torch.randint(WORDS, (count, 8, 1), generator=draws)
    return list((starts + 3 * torch.arange(9)) % WORDS)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return torch.stack([loss_of(model, batch) for batch in sentences(2, seed=2)]).mean().item()


def scene(page):
    """The namespace that the first block of a page runs in."""
    model = build_model(experts=page == "docs/muon.md")
    batches = sentences(12, seed=1)
    optimizer = ShardedProdigyPlusScheduleFree(model.parameters(), step_size="balance")
    for batch in batches[:3]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    modules = {"torch": torch, "nn": nn, "F": F, "dist": dist, "math": math, "itertools": itertools}
    packages = {"prodigyplus": prodigyplus, "safetensors": safetensors}
    classes = (ProdigyPlusScheduleFree, ShardedProdigyPlusScheduleFree)
    own = {"model": model, "optimizer": optimizer, "batches": batches, "device": "cpu"}
    functions = {its.__name__: its for its in (*classes, build_model, loss_of, evaluate)}
    return modules | packages | own | functions | _of(page)


def _of(page):
    if page == "docs/constraints.md":
        return _constrained()
    if page in ("docs/published.md", "docs/guides/migrating.md"):
        return _published()
    return {}


def _constrained():
    """A model with a logit scale, an embedding and a critic, all trained by one optimiser."""
    model, words, critic = build_model(), nn.Embedding(8, 4, max_norm=1.0), nn.Linear(4, 1)
    parameters = [*model.parameters(), *words.parameters(), *critic.parameters()]
    optimizer = ProdigyPlusScheduleFree(parameters)
    return {"model": model, "words": words, "critic": critic, "optimizer": optimizer}


class Scores(nn.Module):
    """Parameters of given shapes, named by number; every element affects the output."""

    def __init__(self, shapes):
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(str(number), nn.Parameter(torch.zeros(shape)))

    def forward(self, words: Tensor) -> Tensor:
        return F.one_hot(words, WORDS) * sum(p.sum() for p in self.parameters())


def _published():
    """Write a checkpoint of the published package to the current folder; return a model that it fits."""
    from tests.golden import GOLDEN
    from tests.golden.published_cases import SHAPES

    with gzip.open(GOLDEN / "published_2.0_default.pt.gz") as file:
        saved = torch.load(file, weights_only=True)
    model = Scores(SHAPES)
    weights = {str(number): weight for number, weight in enumerate(saved["weights"])}
    torch.save({"model": weights, "optimizer": saved["optimizer"]}, "checkpoint.pt")
    return {"model": model}


def run(page):
    """Run all blocks of a page in order, in one namespace; return how many there were."""
    namespace = scene(page)
    done = 0
    for block in python_of(page):
        block.run(namespace)
        done += 1
    return done
