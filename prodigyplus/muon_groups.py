"""Sort a model's parameters into groups, by whether Muon trains them; describe groups in a table.

Muon is for hidden matrices. Shapes alone do not identify them, so the types and names of modules decide too;
a parameter that stays ambiguous is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from prodigyplus.torch_private import BATCH_OR_INSTANCE_NORM, CONVOLUTION

# The kinds of group, and their options.
_GROUPS = {
    "Muon": {"use_muon_pp": True},
    "Muon, batched": {"use_muon_pp": True, "muon_batched": True},
    "elementwise": {"use_muon_pp": False},
}

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, BATCH_OR_INSTANCE_NORM)

# "embed" anywhere in a name: embed_tokens, patch_embed.proj. The others only as words: tok_emb, pos.
_EMBEDDING_NAME = re.compile(r"embed|(?<![^._])(emb|embd|wte|wpe|pos|conv_proj)(?![^._])", re.IGNORECASE)
# In the last part of a name: bias_hh_l0, gate_up_proj_bias of experts, relative_position_bias_table.
_BIAS_NAME = re.compile(r"bias[^.]*$")
# Whole names. All but the first two count only at the top of a model: deeper down they are often parts of a
# layer, such as BERT's output.
_HEAD_NAME = re.compile(
    r"(.*\.)?(lm_heads?|to_logits)"
    r"|heads?|(aux_)?classifier|score|logits|output|out_head|output_head|output_layer|output_projection"
)


@dataclass
class _Candidate:
    """A parameter with what the rules look at; a tied weight has several names and owners."""

    p: Tensor
    names: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)
    is_head: bool = False
    is_batched: bool = False
    is_excluded: bool = False

    def is_of(self, *kinds: type[nn.Module]) -> bool:
        return any(isinstance(owner, kinds) for owner in self.owners)

    def is_named(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(name) for name in self.names)

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a depthwise convolution's: a filter for each channel, not a matrix."""
        convolutions = [owner for owner in self.owners if isinstance(owner, CONVOLUTION)]
        return any(conv.groups == conv.in_channels > 1 for conv in convolutions)

    @property
    def is_vector(self) -> bool:
        """Whether, as a matrix (or a batch of them), it has at most one row or column, or no elements."""
        shape: tuple[int, ...] = self.p.shape
        if self.is_batched:
            shape = shape[-2:]
        elif self.is_of(CONVOLUTION):
            shape = self.p.shape[:1].numel(), self.p.shape[1:].numel()
        return self.p.numel() == 0 or sum(size > 1 for size in shape) < 2


# The first rule that holds decides the kind.
_RULES: tuple[tuple[str, Callable[[_Candidate], bool]], ...] = (
    ("elementwise", lambda c: c.is_vector),
    ("elementwise", lambda c: c.is_excluded),
    ("elementwise", lambda c: c.is_named(_BIAS_NAME)),
    ("elementwise", lambda c: c.is_of(*_NORMS)),
    ("elementwise", lambda c: c.is_depthwise),
    ("elementwise", lambda c: c.is_of(*_EMBEDDINGS)),
    ("elementwise", lambda c: c.is_named(_EMBEDDING_NAME)),
    ("elementwise", lambda c: c.is_head),
    ("Muon, batched", lambda c: c.is_batched and c.p.ndim > 2),
    ("Muon", lambda c: c.p.ndim == 2 and not c.is_batched),
    ("Muon", lambda c: c.is_of(CONVOLUTION)),
)


def muon_groups(
    model: nn.Module,
    *,
    batched: Iterable[str] = (),
    exclude: Iterable[str] = (),
    has_head: bool = True,
    keep_empty: bool = False,
) -> list[dict[str, Any]]:
    """Group a model's parameters: hidden matrices to be trained by Muon, all others elementwise.

    >>> groups = muon_groups(model, batched=["*.experts.w?"], exclude=["*.router.*"])
    >>> optimizer = ProdigyPlusScheduleFree(groups, step_size="balance", split_groups_mean=False)

    Muon trains two-dimensional weights, and the weights of convolutions as matrices of their first dimension
    by all others, except

    - embeddings: of ``nn.Embedding`` and ``nn.EmbeddingBag``, or with "embed", or the word emb, embd, wte,
      wpe, pos or conv_proj, in their name;
    - the head: the last matrix of the module that ``model.get_output_embeddings()`` returns; or else of every
      module called ``lm_head(s)`` or ``to_logits`` and, at the top of the model, ``head(s)``,
      ``(aux_)classifier``, ``score``, ``logits``, ``output``, ``out_head``, ``output_head``, ``output_layer``
      or ``output_projection``; or else of the model, in the order of registration. A list or dict of modules
      with such a name is several heads;
    - depthwise convolutions (other grouped ones count as one matrix, which may not be what you want);
    - the parameters of torch's norms, and those with "bias" in the last part of their name;
    - vectors, including those with further dimensions of size 1.

    A tied weight is one parameter, and counts as an embedding or a head if any of its uses does. The model
    may be wrapped by DDP, ``fully_shard`` or ``torch.compile``. Print :func:`describe_groups` once for a
    new model.

    Args:
        model: Each of its parameters, frozen or not, is in one group, in the order of ``named_parameters()``.
        batched: fnmatch patterns of names, with or without the prefix of what wraps the model: parameters of
            three or more dimensions that are stacks of matrices, (…, rows, columns), such as experts.
        exclude: Patterns of parameters that Muon must not train, whatever ``batched`` says: routers, and
            parameters with the shape of a matrix that are not one, such as Mamba's ``A_log``.
        has_head: False for a model whose head is elsewhere, such as a pipeline stage: no head is looked for.
        keep_empty: Always return three groups, since all stages of a pipeline need the same number.

    Returns:
        Up to three groups, none empty unless ``keep_empty``: one with ``use_muon_pp=True``, one that also has
        ``muon_batched=True``, one with ``use_muon_pp=False``. "params" are lists of (name, parameter).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A pattern matches no parameter; ``batched`` matches a single matrix; or a trained
            parameter has three or more dimensions, and nothing says which dimensions make a matrix.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"muon_groups: pass the model itself, not {type(model).__name__}: the types and names of its "
            "modules say which matrices are hidden."
        )
    candidates = _candidates(model)
    for p in _heads(model) if has_head else ():
        candidates[p].is_head = True
    for p in _matching(model, "batched", batched):
        candidates[p].is_batched = True
    for p in _matching(model, "exclude", exclude):
        candidates[p].is_excluded = True
    groups: dict[str, list[tuple[str, Tensor]]] = {kind: [] for kind in _GROUPS}
    for name, p in model.named_parameters():
        groups[_kind(name, candidates[p])].append((name, p))
    return [
        # torch would take an empty group for an unnamed one, which it refuses beside named ones.
        {"params": params, **({} if params else {"param_names": []}), **_GROUPS[kind]}
        for kind, params in groups.items()
        if params or keep_empty
    ]


def _kind(name: str, candidate: _Candidate) -> str:
    """The kind of group, a key of ``_GROUPS``, that a parameter belongs to."""
    for kind, holds in _RULES:
        if holds(candidate):
            return kind
    what = f"parameter {name!r} of shape {tuple(candidate.p.shape)}"
    if candidate.is_batched:
        raise ValueError(
            f"batched: {what} matches, but is not a stack of matrices. Narrow the pattern, or exclude it."
        )
    if not candidate.p.requires_grad:  # frozen: either kind will do
        return "elementwise"
    raise ValueError(
        f"{what} belongs to no convolution, so it is unclear which dimensions make a matrix. If it is a "
        f"stack of matrices in its last two dimensions, pass batched=[{name!r}]; if not, exclude=[{name!r}]."
    )


def _registrations(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield (name, owner, parameter) of every registration, in order; a tied parameter has several."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, p in owner.named_parameters(prefix, recurse=False, remove_duplicate=False):
            yield name, owner, p


def _wrapped(model: nn.Module) -> list[nn.Module]:
    """The model and the modules that it wraps, outermost first; the last is the unwrapped model.

    A wrapper has no parameters of its own and one child that has, whatever its name: DDP, ``torch.compile``
    and users' own training classes are treated alike.
    """
    if next(model.parameters(recurse=False), None) is None:
        children = [child for child in model.children() if next(child.parameters(), None) is not None]
        if len(children) == 1:
            return [model, *_wrapped(children[0])]
    return [model]


def _candidates(model: nn.Module) -> dict[Tensor, _Candidate]:
    candidates: dict[Tensor, _Candidate] = {}
    for name, owner, p in _registrations(_wrapped(model)[-1]):
        candidate = candidates.setdefault(p, _Candidate(p))
        candidate.names.append(name)
        candidate.owners.append(owner)
    return candidates


def _heads(model: nn.Module) -> list[Tensor]:
    """The weights of the output heads: declared by the model, found by name, or else its last matrix."""
    *_, inner = modules = _wrapped(model)
    declared = [getattr(module, "get_output_embeddings", lambda: None)() for module in modules]
    heads = [module for module in declared if isinstance(module, nn.Module)] or [
        module for name, module in inner.named_modules(remove_duplicate=False) if _HEAD_NAME.fullmatch(name)
    ]
    if not heads:
        return _matrices(inner)[-1:]
    parts = (
        head.children() if isinstance(head, (nn.ModuleList, nn.ModuleDict)) else [head] for head in heads
    )
    return [p for modules in parts for module in modules for p in _matrices(module)[-1:]]


def _matrices(module: nn.Module) -> list[Tensor]:
    """The weights of a module that could be a head's; they may have a single row."""
    return [
        p
        for name, owner, p in _registrations(module)
        if (p.ndim == 2 or (isinstance(owner, CONVOLUTION) and p.ndim > 2))
        and not isinstance(owner, (*_EMBEDDINGS, *_NORMS))
        and not _EMBEDDING_NAME.search(name)
        and not _BIAS_NAME.search(name)
    ]


def _matching(model: nn.Module, argument: str, patterns: Iterable[str]) -> Iterator[Tensor]:
    """The parameters whose names, with or without the prefix of wrappers, match one of the patterns."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = [
            p
            for module in (model, _wrapped(model)[-1])
            for name, _, p in _registrations(module)
            if fnmatchcase(name, pattern)
        ]
        if not matching:
            raise ValueError(f"{argument}={pattern!r} matches none of the names of model.named_parameters().")
        yield from matching


def describe_groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """A table of which parameters Muon trains, and how many parameters each kind of group has.

    Args:
        groups: The result of :func:`muon_groups`, or ``optimizer.param_groups``.

    Returns:
        A line for each parameter: its name, its shape, and "Muon", "Muon, batched" or "elementwise". Then a
        line for each of these: how many tensors and parameters, and what share of all parameters.
    """
    rows = [("parameter", "shape", "trained by")]
    sizes: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        muon = "Muon, batched" if group.get("muon_batched") else "Muon"
        kind = muon if group.get("use_muon_pp") else "elementwise"
        for in_group, entry in enumerate(group["params"]):
            # An optimiser keeps the names apart from the parameters.
            names = group.get("param_names")
            name = names[in_group] if names else f"parameter {in_group} of param_groups[{index}]"
            name, p = entry if isinstance(entry, tuple) else (name, entry)
            rows.append((name, str(tuple(p.shape)), kind))
            sizes.setdefault(kind, []).append(p.numel())
    total = max(1, sum(map(sum, sizes.values())))
    totals = [("trained by", "tensors", "parameters", "share")] + [
        (kind, f"{len(counts)}", f"{sum(counts):,}", f"{sum(counts) / total:.1%}")
        for kind in _GROUPS
        if (counts := sizes.get(kind))
    ]
    return "\n".join([*_aligned(rows, "<<<"), "", *_aligned(totals, "<>>>")])


def _aligned(rows: Iterable[tuple[str, ...]], sides: str) -> list[str]:
    """Lines of aligned columns; ``sides`` has each column's alignment, "<" or ">"."""
    columns = [
        [f"{cell:{side}{max(map(len, column))}}" for cell in column]
        for side, column in zip(sides, zip(*rows, strict=True), strict=True)
    ]
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
