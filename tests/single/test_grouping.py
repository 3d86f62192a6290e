"""muon_groups puts every parameter into the group that practice puts it in, whatever the model."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from prodigyplus import ProdigyPlusScheduleFree
from prodigyplus.muon_groups import describe_groups, muon_groups
from prodigyplus_dist import ShardedProdigyPlusScheduleFree

MUON = {"use_muon_pp": True}
BATCHED = {"use_muon_pp": True, "muon_batched": True}
ELEMENTWISE = {"use_muon_pp": False}


def model_of(*parts, **named):
    """A module with these submodules and parameters, in this order."""
    model = nn.Module()
    for name, part in [*((str(i), part) for i, part in enumerate(parts)), *named.items()]:
        setattr(model, name, nn.Parameter(part) if type(part) is torch.Tensor else part)
    return model


def matrix(rows=6, columns=5):
    return nn.Linear(columns, rows, bias=False)


def split(model, **declared):
    """The names in each of the three groups, [] for an absent one; checks what every split must satisfy."""
    groups = muon_groups(model, **declared)
    names = {"Muon": [], "batched": [], "elementwise": []}
    order = []
    for group in groups:
        options = {key: value for key, value in group.items() if key != "params"}
        kind = {str(MUON): "Muon", str(BATCHED): "batched", str(ELEMENTWISE): "elementwise"}[str(options)]
        assert group["params"]
        assert not names[kind]
        order.append(kind)
        names[kind] = [name for name, _ in group["params"]]

    everything = dict(model.named_parameters())
    found = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in found) == sorted(everything)
    assert all(everything[name] is p for name, p in found)
    place = list(everything).index
    assert all(its == sorted(its, key=place) for its in names.values())
    assert order == [kind for kind in names if kind in order]
    return SimpleNamespace(muon=names["Muon"], batched=names["batched"], elementwise=names["elementwise"])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.up = nn.Linear(width, 3 * width)
        self.output = nn.Linear(3 * width, width)  # part of a layer, so not a head


HIDDEN = [
    f"blocks.{i}.{name}.weight"
    for i in range(2)
    for name in ("attention.in_proj", "attention.out_proj", "up", "output")
]
HIDDEN = [name.replace("in_proj.weight", "in_proj_weight") for name in HIDDEN]


def gpt(**head):
    width = 4
    return model_of(
        tokens=nn.Embedding(11, width),
        positions=nn.Embedding(7, width),
        blocks=nn.ModuleList(Block(width) for _ in range(2)),
        norm=nn.RMSNorm(width),
        **head,
    )


def test_gpt():
    groups = split(gpt(lm_head=matrix(11, 4)))
    assert groups.muon == HIDDEN
    assert groups.elementwise[:3] == ["tokens.weight", "positions.weight", "blocks.0.norm.weight"]
    assert groups.elementwise[-2:] == ["norm.weight", "lm_head.weight"]
    assert groups.batched == []


def test_the_same_in_other_orders():
    """A matrix named as a head is the head even if it is registered first; then the last one is not."""
    model = model_of(lm_head=matrix(11, 4), blocks=gpt().blocks)
    assert split(model).muon == HIDDEN


@pytest.mark.parametrize("name", ["lm_head", "projection"])
def test_tied_head(name):
    model = gpt(**{name: matrix(11, 4)})
    getattr(model, name).weight = model.tokens.weight
    groups = split(model)
    # The head is tied to the embedding. The matrix before it is not taken for a head.
    assert groups.muon == HIDDEN
    assert groups.elementwise[0] == "tokens.weight"


def test_a_weight_is_an_embedding_under_any_of_its_names():
    table = matrix(11, 4)
    model = model_of(a=table, b=matrix(), c=nn.Embedding(11, 4), head=matrix())
    model.c.weight = table.weight
    assert split(model).muon == ["b.weight"]

    model = model_of(a=nn.Embedding(11, 4), b=matrix(), c=table, head=matrix())
    table.weight = model.a.weight
    assert split(model).muon == ["b.weight"]

    model = model_of(first=table, b=matrix(), wte=table, head=matrix())
    assert split(model).elementwise == ["first.weight", "head.weight"]
    model = model_of(wte=table, b=matrix(), last=table, head=matrix())
    assert split(model).elementwise == ["wte.weight", "head.weight"]
    model = model_of(hidden=table.weight, wte=table.weight, b=matrix(), head=matrix())  # both of one module
    assert split(model).elementwise == ["hidden", "head.weight"]

    model = model_of(hidden=table, b=matrix(), head=matrix())
    model.head.weight = table.weight
    assert split(model).muon == ["b.weight"]

    norm, shared = nn.LayerNorm((3, 4)), matrix(3, 4)
    shared.weight = norm.weight
    assert split(model_of(shared=shared, norm=norm, head=matrix())).muon == []

    convolution = nn.Conv2d(3, 6, 2, bias=False)
    model = model_of(store=nn.Module(), convolution=convolution, head=matrix())
    model.store.weight = convolution.weight
    assert split(model).muon == ["store.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "lm_head", "lm_heads", "to_logits", "head", "heads", "classifier", "aux_classifier", "score",
        "logits", "output", "out_head", "output_head", "output_layer", "output_projection",
    ],
)  # fmt: skip
def test_names_of_heads_at_the_top(name):
    groups = split(model_of(a=matrix(), **{name: matrix()}, z=matrix()))
    assert groups.muon == ["a.weight", "z.weight"]
    assert groups.elementwise == [f"{name}.weight"]


@pytest.mark.parametrize("name", ["lm_head", "to_logits"])
def test_names_of_heads_at_any_depth(name):
    model = model_of(a=model_of(b=matrix(), **{name: matrix()}), z=matrix())
    assert split(model).elementwise == [f"a.{name}.weight"]


@pytest.mark.parametrize("name", ["head", "heads", "output", "classifier", "score", "my_head", "lm_head2"])
def test_names_of_heads_within_a_model_are_none(name):
    model = model_of(a=model_of(b=matrix(), **{name: matrix()}), z=matrix())
    assert split(model).elementwise == ["z.weight"]


def test_a_head_that_is_not_called_so():
    sequential = nn.Sequential(nn.Embedding(9, 6), matrix(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 9))
    groups = split(sequential)
    assert groups.muon == ["1.weight", "2.weight"]
    assert groups.elementwise == ["0.weight", "2.bias", "4.weight", "4.bias"]
    # A head with one output: its weight is a row, and the matrix before it is hidden.
    assert split(nn.Sequential(matrix(), matrix(), nn.Linear(5, 1))).muon == ["0.weight", "1.weight"]
    named = OrderedDict(head=matrix(), a=matrix(), b=matrix())
    assert split(nn.Sequential(named)).muon == ["a.weight", "b.weight"]


@pytest.mark.parametrize(
    "last",
    [
        nn.Embedding(5, 4), nn.LayerNorm((3, 4)), nn.GroupNorm(2, 4), model_of(pos_embed=torch.ones(5, 4)),
        model_of(position_bias=torch.ones(3, 4)), model_of(token=torch.ones(1, 1, 4)),
    ],
    ids=lambda last: type(last).__name__ + "".join(last._parameters),
)  # fmt: skip
def test_what_is_registered_last_and_is_no_head(last):
    assert split(model_of(a=matrix(), b=matrix(), z=last)).muon == ["a.weight"]


def test_of_a_head_of_several_layers_the_last_matrix_is_the_head():
    classifier = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    groups = split(model_of(features=nn.Conv2d(1, 8, 3), classifier=classifier))
    assert groups.muon == ["features.weight", "classifier.0.weight", "classifier.2.weight"]


@pytest.mark.parametrize(
    "several", [nn.ModuleList, lambda its: nn.ModuleDict(dict(zip("ab", its, strict=True)))]
)
def test_several_heads(several):
    heads = several([matrix(), nn.Sequential(matrix(5, 5), matrix())])
    model = model_of(heads=heads, out_head=matrix(), z=matrix())
    assert [name.rpartition("heads.")[2] for name in split(model).muon] in (
        ["1.0.weight", "z.weight"],
        ["b.0.weight", "z.weight"],
    )


class HuggingFace(nn.Module):
    def __init__(self, tell):
        super().__init__()
        self.decoder = matrix()  # neither named as a head nor placed as one
        self.head = matrix()
        self.encoder = matrix()
        self.tell = tell

    def get_output_embeddings(self):
        return self.tell(self)


def test_a_model_that_tells_its_head():
    assert split(HuggingFace(lambda self: self.decoder)).muon == ["head.weight", "encoder.weight"]
    assert split(HuggingFace(lambda self: None)).muon == ["decoder.weight", "encoder.weight"]
    both = HuggingFace(lambda self: nn.ModuleList([self.decoder, self.encoder]))
    assert split(both).muon == ["head.weight"]
    wrapped = model_of(inner=HuggingFace(lambda self: self.decoder))
    assert split(wrapped).muon == ["inner.head.weight", "inner.encoder.weight"]
    wrapped = model_of(inner=model_of(a=matrix(), head=matrix()))
    wrapped.get_output_embeddings = lambda: wrapped.inner.a
    assert split(wrapped).muon == ["inner.head.weight"]


def test_mnist_net():
    model = model_of(
        conv1=nn.Conv2d(1, 8, 3),
        bn=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 16, 3),
        up=nn.ConvTranspose2d(16, 8, 2),
        fc1=nn.Linear(100, 32),
        fc2=nn.Linear(32, 10),
    )
    groups = split(model)
    assert groups.muon == ["conv1.weight", "conv2.weight", "up.weight", "fc1.weight"]
    assert groups.elementwise[-2:] == ["fc2.weight", "fc2.bias"]


def test_convolutions():
    model = nn.Sequential(
        nn.Conv1d(4, 6, 1), nn.Conv1d(4, 6, 3), nn.Conv3d(2, 3, 2), nn.ConvTranspose1d(4, 6, 3),
        nn.Conv2d(8, 8, 3, groups=8),  # depthwise: 8 × 9
        nn.Conv2d(8, 1, 3), nn.Conv2d(8, 8, 1, groups=8),  # 1 × 72, 8 × 1: vectors
        nn.Conv2d(8, 4, 1),  # the last matrix
    )  # fmt: skip
    groups = split(model)
    assert groups.muon == [f"{i}.weight" for i in range(4)]
    assert [name for name in groups.elementwise if "weight" in name] == [f"{i}.weight" for i in range(4, 8)]


def test_a_convolution_of_ones_own():
    class Scaled(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)
            self.gain = nn.Parameter(torch.ones(()))

    assert split(nn.Sequential(Scaled(), matrix())).muon == ["0.weight"]
    assert split(nn.Sequential(matrix(), Scaled())).muon == ["0.weight"]


def moe():
    experts = [
        model_of(
            router=matrix(4, 6),
            experts=model_of(
                w1=torch.ones(4, 6, 5),
                w2=torch.ones(4, 5, 6),
                w1_bias=torch.ones(4, 5),
                row=torch.ones(4, 1, 6),
            ),
        )
        for _ in range(2)
    ]
    return model_of(embed=nn.Embedding(9, 6), layers=nn.ModuleList(experts), head=matrix(9, 6))


def test_experts():
    groups = split(moe(), batched=["*.experts.*"], exclude=["*.router.*"])
    assert groups.muon == []
    assert groups.batched == [f"layers.{i}.experts.{w}" for i in range(2) for w in ("w1", "w2")]
    layer = ["router.weight", "experts.w1_bias", "experts.row"]
    its = [f"layers.{i}.{name}" for i in range(2) for name in layer]
    assert sorted(groups.elementwise) == sorted(["embed.weight", "head.weight", *its])

    groups = split(moe(), batched=["layers.0.experts.*", "layers.1.experts.w[12]", "layers.1.experts.row"])
    assert groups.muon == ["layers.0.router.weight", "layers.1.router.weight"]
    assert len(groups.batched) == 4


def test_excluded_before_batched():
    groups = split(moe(), batched=["*experts*"], exclude=["layers.0.*", "*.w2"])
    assert groups.muon == ["layers.1.router.weight"]
    assert groups.batched == ["layers.1.experts.w1"]


def test_four_dimensions_and_a_convolution_may_be_declared_batched():
    model = model_of(w=torch.ones(2, 3, 4, 5), convolution=nn.Conv2d(3, 4, 2, bias=False), head=matrix())
    groups = split(model, batched=["w", "convolution.*"])
    assert groups.batched == ["w", "convolution.weight"]


def test_what_is_declared_batched_and_is_no_matrix_all_the_same():
    model = model_of(
        tokens=nn.Embedding(3, 4),
        norm=nn.LayerNorm((2, 3, 4)),
        pos_embed=torch.ones(2, 3, 4),
        w=torch.ones(2, 3, 4),
        head=nn.Conv1d(2, 3, 4),
    )
    assert split(model, batched="*").batched == ["w"]


def test_a_matrix_declared_batched():
    with pytest.raises(ValueError, match=r"^batched: parameter 'layers.0.router.weight' of shape \(4, 6\)"):
        muon_groups(moe(), batched=["layers.*"])


def test_three_dimensions_undeclared():
    message = (
        r"parameter 'layers.0.experts.w1' of shape \(4, 6, 5\).*batched=\['layers.0.experts.w1'\].*"
        r"exclude=\['layers.0.experts.w1'\]"
    )
    with pytest.raises(ValueError, match=message):
        muon_groups(moe())
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(2, 3, 4\)"):
        muon_groups(nn.Sequential(nn.Bilinear(3, 4, 2), matrix()))
    groups = split(nn.Sequential(nn.Bilinear(3, 4, 2), matrix(), matrix()), exclude=["0.weight"])
    assert groups.muon == ["1.weight"]


def test_three_dimensions_undeclared_are_not_the_head():
    model = model_of(a=matrix(), b=matrix(), w=model_of(w=torch.ones(2, 3, 4)))
    assert split(model, batched=["w.w"]).muon == ["a.weight"]


@pytest.mark.parametrize("argument", ["batched", "exclude"])
@pytest.mark.parametrize("pattern", ["*.expert.*", "ROUTER", "router", "layers.0.router", ""])
def test_patterns_that_match_nothing(argument, pattern):
    good = {"batched": ["*.experts.*"], "exclude": ["*.router.*"]}
    good[argument] = [*good[argument], pattern]
    with pytest.raises(ValueError, match=argument) as error:
        muon_groups(moe(), **good)
    assert repr(pattern) in str(error.value)
    with pytest.raises(ValueError, match=rf"{argument}='\*\.ROUTER\.weight' matches none"):
        muon_groups(moe(), **{argument: ["*.ROUTER.weight"]})  # case matters, on Windows too


def test_a_pattern_by_itself_and_patterns_that_can_be_read_once():
    groups = split(moe(), batched="*.experts.*", exclude=iter(["*.router.*"]))
    assert len(groups.batched) == 4
    assert groups.muon == []


def test_exclude():
    model = nn.Sequential(*(matrix() for _ in range(4)))
    assert split(model, exclude=["1.*"]).muon == ["0.weight", "2.weight"]
    # Excluding a parameter does not change which one is the head.
    assert split(model, exclude=["3.*"]).muon == ["0.weight", "1.weight", "2.weight"]


def test_patterns_match_any_name_of_a_tied_weight():
    model = model_of(a=matrix(), b=matrix(), head=matrix())
    model.b.weight = model.a.weight
    assert split(model, exclude=["b.weight"]).muon == []


@pytest.mark.parametrize(
    "name",
    [
        "embed", "pos_embed", "position_embeddings", "tokEmbedding", "Embed_0", "wte", "wpe", "emb",
        "tok_emb", "emb_out", "embd",
    ],
)  # fmt: skip
def test_names_of_embeddings(name):
    rest = {"a": matrix(), "head": matrix()}
    assert split(model_of(**{name: torch.ones(5, 4)}, **rest)).muon == ["a.weight"]
    assert split(model_of(**{name: matrix()}, **rest)).muon == ["a.weight"]
    assert split(model_of(deep=model_of(**{name: nn.Sequential(matrix())}), **rest)).muon == ["a.weight"]
    # With any number of dimensions; a patch embedding is a convolution.
    assert split(model_of(**{name: torch.ones(5, 4, 3)}, **rest)).muon == ["a.weight"]
    assert split(model_of(**{name: nn.Conv2d(3, 4, 2)}, **rest)).muon == ["a.weight"]


@pytest.mark.parametrize("name", ["member", "remb", "september", "swte", "embers", "temb"])
def test_names_that_are_none_of_embeddings(name):
    assert split(model_of(**{name: matrix()}, head=matrix())).muon == [f"{name}.weight"]


def test_embedding_modules():
    class Mine(nn.Embedding):
        pass

    model = model_of(a=Mine(5, 4), b=nn.EmbeddingBag(5, 4), c=matrix(), head=matrix())
    assert split(model).muon == ["c.weight"]


@pytest.mark.parametrize("name", ["bias", "bias_k", "gate_up_proj_bias", "relative_position_bias_table"])
def test_names_of_biases(name):
    model = model_of(a=model_of(**{name: torch.ones(5, 4)}), head=matrix())
    assert split(model).muon == []
    model = model_of(**{name: matrix()}, head=matrix())  # a module's name does not make a bias
    assert split(model).muon == [f"{name}.weight"]


def test_norms_of_any_shape():
    class Mine(nn.LayerNorm):
        pass

    norms = [
        nn.LayerNorm((3, 4)), nn.RMSNorm((2, 3, 4)), Mine((3, 4)), nn.GroupNorm(2, 4), nn.BatchNorm1d(3),
        nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3, affine=True),
    ]  # fmt: skip
    for norm in norms[3:]:
        norm.weight = nn.Parameter(torch.ones(3, 4))
    model = nn.Sequential(*norms, matrix(), matrix())
    assert split(model).muon == [f"{len(norms)}.weight"]


def test_vectors():
    model = model_of(
        cls=torch.ones(1, 1, 6), scalar=torch.ones(()), vector=torch.ones(6), column=torch.ones(6, 1),
        row=torch.ones(1, 6), one=torch.ones(1, 1), depthwise=torch.ones(6, 1, 1, 1),
        none=torch.ones(0, 6), nothing=torch.ones(0), no_experts=torch.ones(0, 5, 4),
        matrix=torch.ones(2, 2), head=matrix(),
    )  # fmt: skip
    assert split(model).muon == ["matrix"]
    with pytest.raises(ValueError, match=r"'0' of shape \(1, 6, 5\)"):
        muon_groups(model_of(torch.ones(1, 6, 5)))


def test_models_without_matrices_and_without_parameters():
    assert muon_groups(nn.ReLU()) == []
    assert split(nn.LayerNorm(3)).elementwise == ["weight", "bias"]
    assert split(nn.Linear(3, 4)).elementwise == ["weight", "bias"]
    (group,) = muon_groups(model_of(a=matrix(), b=matrix(), head=nn.Identity()))  # a head taken off
    assert group == {"params": group["params"], "use_muon_pp": True}


def test_frozen_parameters_are_there():
    model = gpt(head=matrix(11, 4)).requires_grad_(False)
    assert split(model).muon == HIDDEN


def test_other_dtypes_and_meta():
    with torch.device("meta"):
        model = gpt(head=matrix(11, 4)).bfloat16()
    assert split(model).muon == HIDDEN


def test_parametrized_weights():
    """Weight normalisation splits a weight into a column of norms and a matrix of directions."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), matrix())
    assert split(model).muon == ["0.parametrizations.weight.original1"]


def test_parameters_not_yet_there():
    with pytest.raises(RuntimeError, match="forward"):
        muon_groups(nn.Sequential(nn.LazyLinear(3), matrix()))


class Ddp(nn.Module):
    """Names the model as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Lightning(nn.Module):
    """A training class of the user's, around the model."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.loss = nn.CrossEntropyLoss()


def compiled(module):
    return torch.compile(module, backend="eager")  # importing the default backend warns and is slow


@pytest.mark.parametrize(
    "wrappers",
    [
        [Ddp], [nn.DataParallel], [compiled], [Ddp, compiled], [compiled, Ddp], [Lightning],
        [Lightning, Ddp],
    ],
    ids=lambda wrappers: "-".join(wrapper.__name__ for wrapper in wrappers),
)  # fmt: skip
def test_wrapped(wrappers):
    # "output" names a head only at the top of a model. It is not the last matrix either.
    plain = moe()
    model = model_of(output=plain.head, embed=plain.embed, layers=plain.layers)
    declared = {"batched": ["layers.*.experts.*"], "exclude": ["layers.0.router.*"]}
    expected = split(model, **declared)
    assert "output.weight" in expected.elementwise
    for wrapper in wrappers:
        model = wrapper(model)
    prefix = next(iter(dict(model.named_parameters()))).removesuffix("output.weight")
    assert prefix

    def prefixed(names):
        return [prefix + name for name in names]

    for patterns in (declared, {argument: prefixed(its) for argument, its in declared.items()}):
        groups = split(model, **patterns)
        assert groups.muon == prefixed(expected.muon) == [f"{prefix}layers.1.router.weight"]
        assert groups.batched == prefixed(expected.batched)
        assert groups.elementwise == prefixed(expected.elementwise)


def test_blocks_compiled_by_themselves():
    model = gpt(head=compiled(matrix(11, 4)))
    model.blocks[0] = compiled(model.blocks[0])
    model.tokens = compiled(model.tokens)
    model.other = matrix()
    groups = split(model)
    assert [name.replace("_orig_mod.", "") for name in groups.muon] == [*HIDDEN, "other.weight"]


@pytest.fixture
def two_ranks():
    """A mesh of two ranks, of which the other does not exist: nothing is sent."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    destroy_process_group()


def test_fully_shard(two_ranks):
    from torch.distributed.fsdp import fully_shard

    def build():
        model = gpt(
            cut=model_of(a=matrix(2, 8), w=torch.ones(2, 3, 4)),  # this rank has one row of the first
            convolution=nn.Conv2d(2, 2, 3),
            table=nn.LayerNorm((2, 4)),
            head=matrix(11, 4),
            z=matrix(),
        )
        model.head.weight = model.tokens.weight
        return model

    model = build()
    for module in [*model.blocks, model.cut, model.convolution, model.table, model]:
        fully_shard(module, mesh=two_ranks)
    assert model.cut.a.weight.to_local().shape == (1, 8)
    groups = split(model, batched=["cut.w"])
    assert groups.__dict__ == split(build(), batched=["cut.w"]).__dict__
    assert groups.muon == [*HIDDEN, "cut.a.weight", "convolution.weight", "z.weight"]
    table = describe_groups(muon_groups(model, batched=["cut.w"]))
    assert table == describe_groups(muon_groups(build(), batched=["cut.w"]))


def test_what_torch_optimisers_make_of_it():
    model = moe()
    groups = muon_groups(model, batched=["*.experts.*"])
    optimizer = torch.optim.AdamW(groups)
    assert len(optimizer.param_groups) == 3
    assert [group["use_muon_pp"] for group in optimizer.param_groups] == [True, True, False]
    assert [group.get("muon_batched") for group in optimizer.param_groups] == [None, True, None]
    named = [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    assert dict(named) == dict(model.named_parameters())


def test_describe_groups():
    groups = muon_groups(moe(), batched=["*.experts.*"])
    table = describe_groups(groups)
    lines = table.splitlines()
    assert lines[:9] == [
        "parameter                 shape      trained by",
        "layers.0.router.weight    (4, 6)     Muon",
        "layers.1.router.weight    (4, 6)     Muon",
        "layers.0.experts.w1       (4, 6, 5)  Muon, batched",
        "layers.0.experts.w2       (4, 5, 6)  Muon, batched",
        "layers.1.experts.w1       (4, 6, 5)  Muon, batched",
        "layers.1.experts.w2       (4, 5, 6)  Muon, batched",
        "embed.weight              (9, 6)     elementwise",
        "layers.0.experts.w1_bias  (4, 5)     elementwise",
    ]
    assert lines[-5:] == [
        "",
        "trained by     tensors  parameters  share",
        "Muon                 2          48   6.6%",
        "Muon, batched        4         480  66.3%",
        "elementwise          6         196  27.1%",
    ]
    assert len(lines) == 1 + 12 + 5

    optimizer = torch.optim.AdamW(groups)
    assert describe_groups(optimizer.param_groups) == table
    assert describe_groups(groups) == table  # although AdamW has taken the names out of them


def test_describe_other_groups():
    lines = describe_groups(
        torch.optim.AdamW([torch.ones(2000, 3), torch.ones(())]).param_groups
    ).splitlines()
    assert lines[1:3] == [
        "parameter 0 of param_groups[0]  (2000, 3)  elementwise",
        "parameter 1 of param_groups[0]  ()         elementwise",
    ]
    assert lines[-1].split() == ["elementwise", "2", "6,001", "100.0%"]
    assert "nan" not in describe_groups(muon_groups(model_of(a=torch.ones(0))))
    assert describe_groups([]).splitlines()[-1].startswith("trained by")


def test_a_stage_of_a_pipeline():
    """Without a head, none is guessed; with ``keep_empty``, all stages have the same three groups."""
    stage = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    muon, batched, others = muon_groups(stage, has_head=False, keep_empty=True)
    assert [name for name, _ in muon["params"]] == ["0.weight", "1.weight"]
    assert batched["params"] == []
    assert [name for name, _ in others["params"]] == ["0.bias", "1.bias"]
    assert [name for name, _ in muon_groups(stage)[0]["params"]] == ["0.weight"]


@pytest.mark.parametrize("stage", [nn.Linear(4, 5), nn.LayerNorm(4)], ids=["matrix", "no matrix"])
def test_empty_groups_train_and_are_saved(stage):
    def build():
        groups = muon_groups(stage, has_head=False, keep_empty=True)
        return ShardedProdigyPlusScheduleFree(groups, step_size="balance")

    optimizer = build()
    stage(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert len(optimizer.metrics()) == 3
    other = build()
    other.load_state_dict(optimizer.state_dict())
    assert {*other.state} == {*stage.parameters()}


def test_parameters_are_not_a_model():
    with pytest.raises(TypeError, match="pass the model itself, not generator"):
        muon_groups(nn.Linear(4, 5).parameters())


def test_convolutions_with_a_filter_for_each_channel():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 3, groups=4), nn.Linear(8, 2))
    assert [name for name, _ in muon_groups(model)[0]["params"]] == ["1.weight"]


def test_words_of_embeddings():
    model = nn.ModuleDict(
        {"conv_proj": nn.Conv2d(3, 8, 4), "position": nn.Linear(8, 8), "head": nn.Linear(8, 2)}
    )
    model.register_parameter("pos", nn.Parameter(torch.zeros(9, 8)))
    assert [name for name, _ in muon_groups(model)[0]["params"]] == ["position.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.float32])
def test_what_is_frozen_need_not_be_clear(dtype):
    """A frozen base model, as with LoRA, may be quantised and of any shape."""
    model = nn.Module()
    model.base = nn.Parameter(torch.zeros(4, 8, 16, dtype=dtype), requires_grad=False)
    model.a, model.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
    groups = muon_groups(model)
    assert [name for group in groups if not group["use_muon_pp"] for name, _ in group["params"]] == [
        "base",
        "b.weight",
    ]
    ProdigyPlusScheduleFree(groups)
