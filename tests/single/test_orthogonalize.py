"""Muon's matrices on simulated ranks: the same bits as one process, who owns what, and what is sent."""

import itertools
import math
from collections import Counter
from unittest import mock

import pytest
import torch

from prodigyplus import exchange
from prodigyplus.formulas import muon
from prodigyplus.terms.requests import Matrices, Method
from prodigyplus_dist import transport
from prodigyplus_dist.exchange import MeshExchange
from prodigyplus_dist.ownership import MatrixSharding, assign_owners
from tests.single.simulated import Placement, Ranks, indices_of

F32, BF16 = torch.float32, torch.bfloat16

SHAPES = (
    (6, 10),
    (10, 6),
    (6, 4, 5),
    (4, 3, 2, 6),
    (2, 7, 3),
    (1, 5),
    (0, 6),
    (5, 5),
    (5, 5, 0),
    (5, 5),
    (13, 6, 4),
)

BIG = Method(BF16, quintic=False, stable=True)

WAYS = ("even", "uneven", "strided", "scattered", "last")

# Meshes, and for each axis whether it cuts tensors; otherwise it copies them.
MESHES = [((1,), (True,)), ((2,), (False,)), ((3,), (True,)), ((4,), (True,))]
MESHES += [((2, 2), axes) for axes in itertools.product((True, False), repeat=2)]
MESHES += [((2, 3), (False, True)), ((3, 2), (False, True)), ((2, 1, 2), (True, True, True))]


def placements(mesh, axes, ways):
    """A placement for each shape; the dimensions that are cut, and the ways to cut, take turns."""
    turn, of_way = itertools.count(), itertools.cycle(ways)
    return [
        Placement(
            mesh,
            tuple((next(turn) % len(shape), next(of_way)) if cuts else None for cuts in axes),
            backwards=number % 3 == 2,
        )
        for number, shape in enumerate(SHAPES)
    ]


def requests(batched):
    """Whole tensors, and the method for each: one of two, the first for two thirds of them."""
    methods = [Method(BF16, quintic=False, stable=True), Method(F32, quintic=True, stable=False)]
    random = torch.Generator().manual_seed(0)
    return [
        Matrices(torch.randn(shape, generator=random), batched, methods[number % 3 == 2])
        for number, shape in enumerate(SHAPES)
    ]


class Sharded:
    """Tensors cut up for simulated ranks, and an exchange on each rank that orthogonalises them."""

    def __init__(self, ranks, placements, whole, limit, *, all_to_all=True):
        self.ranks, self.whole = ranks, whole
        by_tensor = [
            ranks.layouts(tuple(its.local.shape), where) for its, where in zip(whole, placements, strict=True)
        ]
        self.layouts = list(zip(*by_tensor, strict=True))
        self.exchanges = [MeshExchange(None, limit, all_to_all=all_to_all) for _ in self.layouts]
        self.asked = [
            [
                (layout, its._replace(local=its.local[indices_of(layout, layout.shape)].clone()))
                for layout, its in zip(layouts, whole, strict=True)
            ]
            for layouts in self.layouts
        ]

    def orthogonalize(self):
        def of(rank):
            found = []
            for numbers, pieces in self.exchanges[rank].orthogonalize(self.asked[rank]):
                most = [
                    self.layouts[rank][n].max_local_numel * self.whole[n].method.dtype.itemsize
                    for n in numbers
                ]
                assert len(numbers) == 1 or sum(most) <= self.exchanges[rank].bucket_bytes
                found += [(number, piece.clone()) for number, piece in zip(numbers, pieces, strict=True)]
            return found

        return self.ranks.each(of)


def expected(whole):
    asked = [(tuple(its.local.shape), its) for its in whole]
    return [result for _, results in exchange.in_one_process(asked, 1) for result in results]


def assert_the_bits_of_one_process(sharded, whole, results):
    for _ in range(2):  # as in two successive steps
        for layouts, found in zip(sharded.layouts, sharded.orthogonalize(), strict=True):
            assert [number for number, _ in found] == list(range(len(whole)))
            for number, piece in found:
                layout = layouts[number]
                assert piece.dtype == whole[number].method.dtype
                assert piece.shape == layout.local_shape
                assert torch.equal(piece, results[number][indices_of(layout, layout.shape)]), number


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("all_to_all", [False, True])
@pytest.mark.parametrize("ways", [("even",), WAYS], ids=["even", "all"])
@pytest.mark.parametrize(("mesh", "axes"), MESHES, ids=str)
def test_the_bits_of_one_process(mesh, axes, ways, all_to_all, batched):
    whole = requests(batched)
    before = [its.local.clone() for its in whole]
    results = expected(whole)
    with Ranks(math.prod(mesh)) as ranks:
        for limit in (1, 300, 1 << 20):
            sharded = Sharded(ranks, placements(mesh, axes, ways), whole, limit, all_to_all=all_to_all)
            assert_the_bits_of_one_process(sharded, whole, results)
    for its, old in zip(whole, before, strict=True):
        assert torch.equal(its.local, old)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("ways", list(itertools.product(("even", "scattered"), repeat=2)), ids=str)
def test_cut_twice(ways, batched):
    """In any two dimensions, or twice in the same one; some pieces have a single index along a dimension."""
    whole = [Matrices(torch.randn(2, 2, 4, 6), batched, BIG) for _ in range(16)]
    where = [
        Placement((2, 2), tuple(zip(dims, ways, strict=True)))
        for dims in itertools.product(range(4), repeat=2)
    ]
    with Ranks(4) as ranks:
        assert_the_bits_of_one_process(Sharded(ranks, where, whole, 1 << 20), whole, expected(whole))


def test_a_batch_and_a_matrix_of_one_layout():
    whole = [Matrices(torch.randn(4, 6, 8), batched, BIG) for batched in (False, True)]
    with Ranks(2) as ranks:
        sharded = Sharded(ranks, [Placement((2,), ((1, "even"),))] * 2, whole, 1 << 20)
        for layouts, asked in zip(sharded.layouts, sharded.asked, strict=True):
            asked[1] = layouts[0], asked[1][1]
        assert_the_bits_of_one_process(sharded, whole, expected(whole))


def test_ranks_whose_copies_are_others():
    """One tensor is copied along the mesh's first axis, another along its second: the teams differ."""
    whole = [Matrices(torch.randn(8, 6), batched=False, method=BIG) for _ in range(9)]
    cut, copied = (0, "even"), None
    where = [Placement((2, 2), cuts) for cuts in ((cut, copied), (copied, cut), (cut, cut))] * 3
    with Ranks(4) as ranks:
        for limit in (1, 1 << 20):
            assert_the_bits_of_one_process(Sharded(ranks, where, whole, limit), whole, expected(whole))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("mesh", "axes"), MESHES, ids=str)
def test_owners(mesh, axes, batched):
    """All ranks find the same owners, and each matrix has exactly one, which holds a piece of it."""
    with Ranks(math.prod(mesh)) as ranks:
        sharded = Sharded(ranks, placements(mesh, axes, WAYS), requests(batched), 1)
    plans = [[MatrixSharding(layout, batched=batched) for layout in layouts] for layouts in sharded.layouts]
    blocks, *others = [assign_owners(shardings) for shardings in plans]
    assert all(other == blocks for other in others)
    assert blocks == sorted(blocks)

    shardings = plans[0]
    seen = Counter((block.request, matrix) for block in blocks for matrix in range(block.first, block.end))
    assert set(seen.values()) <= {1}
    has_elements = [
        number for number, sharding in enumerate(shardings) if sharding.rows * sharding.columns > 0
    ]
    assert set(seen) == {
        (number, matrix) for number in has_elements for matrix in range(shardings[number].count)
    }
    for block in blocks:
        sharding = shardings[block.request]
        assert 0 <= block.copy < len(sharding.layout.ranks)
        for matrix in range(block.first, block.end):
            holders = sharding.holders(matrix)
            assert block.piece in holders
            assert block.travels == (len(holders) > 1)
            assert holders == tuple(
                number
                for number, (matrices, rows, columns) in enumerate(sharding.pieces)
                if matrix in matrices and len(rows) * len(columns)
            )


def loads(shardings):
    found = Counter()
    for block in assign_owners(shardings):
        sharding = shardings[block.request]
        rank = sharding.layout.ranks[block.copy][block.piece]
        found[rank] += block.size * muon.cost(sharding.rows, sharding.columns)
    return found


@pytest.mark.parametrize(("mesh", "axes"), [its for its in MESHES if math.prod(its[0]) > 1], ids=str)
def test_owners_share_the_work(mesh, axes):
    """With many matrices of a few shapes, ranks' loads differ by at most one of the smallest matrices."""
    shapes = ((8, 12), (12, 8), (8, 8), (16, 8)) * 12
    where = Placement(mesh, tuple((0, "even") if cuts else None for cuts in axes))
    with Ranks(math.prod(mesh)) as ranks:
        layouts = [ranks.layouts(shape, where)[0] for shape in shapes]
    found = loads([MatrixSharding(layout, batched=False) for layout in layouts])
    assert len(found) == math.prod(mesh)
    assert max(found.values()) - min(found.values()) <= muon.cost(8, 8)


@pytest.mark.parametrize(("mesh", "axes"), [its for its in MESHES if math.prod(its[0]) > 1], ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_batch_is_shared_among_its_holders(mesh, axes, dim):
    """Each rank owns one block of equal size. Where ranks hold whole matrices, none travels to its owner."""
    count = 2 * math.prod(mesh)
    where = Placement(mesh, tuple((dim, "even") if cuts else None for cuts in axes))
    with Ranks(math.prod(mesh)) as ranks:
        sharding = MatrixSharding(ranks.layouts((count, 24, 24), where)[0], batched=True)
    blocks = assign_owners([sharding])
    assert {(block.copy, block.piece) for block in blocks} == {
        (row, column) for row, of_row in enumerate(sharding.layout.ranks) for column, _ in enumerate(of_row)
    }
    assert {block.size for block in blocks} == {2}
    assert len(blocks) == math.prod(mesh)
    assert any(block.travels for block in blocks) == (dim > 0 and any(axes))


def test_work_is_counted_for_ranks_that_all_know_of_it():
    """Only the ranks that hold a tensor know of it, so it must not change how others share their tensors."""
    with Ranks(4) as ranks:
        four = ranks.layouts((8, 8), Placement((2, 2), (None, (0, "even"))))[0]
    assert four.ranks == ((0, 1), (2, 3))
    with Ranks(2) as ranks:
        pair = ranks.layouts((8, 8), Placement((2,), ((0, "even"),)))[0]
    assert pair.ranks == ((0, 1),)
    alone = assign_owners([MatrixSharding(four, batched=False) for _ in range(3)])
    beside = assign_owners(
        [MatrixSharding(layout, batched=False) for layout in (four, pair, four, pair, pair, four)]
    )
    assert [block[3:] for block in alone] == [block[3:] for block in beside if block.request in (0, 2, 5)]


def test_the_expensive_are_dealt_first():
    where = Placement((2,), ((0, "even"),))
    with Ranks(2) as ranks:
        shapes = ((8, 8), (8, 8), (16, 16))
        shardings = [MatrixSharding(ranks.layouts(shape, where)[0], batched=False) for shape in shapes]
    assert loads(shardings) == {0: muon.cost(16, 16), 1: 2 * muon.cost(8, 8)}


def test_a_block_is_as_expensive_as_all_of_its_matrices():
    """The batch of three is split: one rank owns two; the other owns the third and the other matrix."""
    with Ranks(2) as ranks:
        batch = ranks.layouts((3, 8, 8), Placement((2,), ((1, "even"),)))[0]
        other = ranks.layouts((1, 8, 14), Placement((2,), ((1, "even"),)))[0]
    shardings = [MatrixSharding(layout, batched=True) for layout in (batch, other)]
    one, more = muon.cost(8, 8), muon.cost(8, 14)
    assert one < more < 2 * one
    assert sorted(loads(shardings).values()) == [2 * one, one + more]


# ------------------------------------------------------------------------------------------- what is sent


class Sent:
    """Records, as a context, what each rank sends: (name, bytes sent, bytes received), in order."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.calls = [[] for _ in range(ranks.count)]

    def __enter__(self):
        swap, broadcast = transport.swap, transport.broadcast

        def counted_swap(outgoing, incoming, group, place, *, like, all_to_all):
            if group is not None:
                others = [number for number in range(len(outgoing)) if number != place]
                out = sum(tensor.numel() for number in others for tensor in outgoing[number])
                into = sum(math.prod(shape) for number in others for shape in incoming[number])
                self._of_here().append(("swap", out * like.dtype.itemsize, into * like.dtype.itemsize))
            return swap(outgoing, incoming, group, place, like=like, all_to_all=all_to_all)

        def counted_broadcast(tensors, shapes, source, group, like):
            size = sum(math.prod(shape) for shape in shapes) * like.dtype.itemsize
            self._of_here().append(("broadcast", size * bool(tensors), size * (not tensors)))
            return broadcast(tensors, shapes, source, group, like)

        self._patched = mock.patch.multiple(transport, swap=counted_swap, broadcast=counted_broadcast)
        self._patched.start()
        return self

    def __exit__(self, *_):
        self._patched.stop()

    def _of_here(self):
        return self.calls[self.ranks.here]


def sent(mesh, cuts, shapes, limit, *, batched=False, methods=(BIG,)):
    whole = [
        Matrices(torch.randn(shape), batched, methods[number % len(methods)])
        for number, shape in enumerate(shapes)
    ]
    with Ranks(math.prod(mesh)) as ranks:
        sharded = Sharded(ranks, [Placement(mesh, cuts)] * len(shapes), whole, limit)
        with Sent(ranks) as found:
            sharded.orthogonalize()
    return found.calls


def test_a_piece_travels_to_its_owner_and_back():
    """Two ranks hold halves of 4 matrices of 96 bytes, and own 2 each: each sends and receives 2 halves."""
    for calls in sent((2,), ((0, "even"),), ((8, 6),) * 4, 1 << 20):
        assert calls == [("swap", 2 * 48, 2 * 48)] * 2


def test_what_one_rank_holds_whole_does_not_travel():
    for cuts in (((0, "even"),), ((0, "scattered"),)):
        for calls in sent((3,), cuts, ((6, 4, 5),) * 2, 1 << 20, batched=True):
            assert calls == []


def test_copies_share_their_work():
    """4 matrices of 96 bytes: each of two copies owns two of them, and sends the results to the other."""
    for rank, calls in enumerate(sent((2,), (None,), ((8, 6),) * 4, 1 << 20)):
        # One broadcast from each owner, with all that it owns.
        assert sorted(calls) == [("broadcast", 0, 192), ("broadcast", 192, 0)], rank


def test_copies_of_pieces():
    for calls in sent((2, 2), (None, (0, "even")), ((8, 6),) * 4, 1 << 20):
        assert [name for name, *_ in calls] == ["swap", "swap", "broadcast", "broadcast"]
        # A row of the mesh owns two matrices, each rank one, of which the other rank holds a half. Then
        # each rank sends its halves of the row's two matrices to the other row, and receives as much.
        assert sorted(calls)[2:] == [("swap", 48, 48)] * 2
        assert sorted(calls)[:2] == [("broadcast", 0, 96), ("broadcast", 96, 0)]


@pytest.mark.parametrize("batched", [False, True])
def test_one_swap_for_each_dtype(batched):
    methods = (BIG, BIG._replace(quintic=True), BIG._replace(dtype=F32))
    for calls in sent(
        (2,), ((1, "even"),), ((4, 6), (6, 4), (4, 4, 4)) * 2, 1 << 20, batched=batched, methods=methods
    ):
        assert [name for name, *_ in calls] == ["swap"] * 4


@pytest.mark.parametrize("limit", [1, 96, 200, 500])
def test_no_more_is_sent_at_once_than_the_limit(limit):
    """The limit, or one matrix if that is larger: 96 bytes here, of which each of 2 ranks has half."""
    for calls in sent((2,), ((0, "even"),), ((8, 6),) * 12, limit):
        assert len(calls) == 2 * -(-12 // (max(limit, 96) // 48))
        assert all(max(out, into) <= max(limit, 96) for _, out, into in calls)
    for calls in sent((2,), (None,), ((8, 6),) * 12, limit):
        assert all(max(out, into) <= max(limit, 96) for _, out, into in calls)


def test_each_copy_owns_its_share_of_a_wave():
    """12 matrices of 96 bytes are computed two at a time, one by each copy."""
    orthogonalize_, counts = muon.orthogonalize_, [[], []]
    whole = [Matrices(torch.randn(8, 6), batched=False, method=BIG) for _ in range(12)]
    with Ranks(2) as ranks:

        def counted(batches, limit):
            counts[ranks.here].append(sum(len(batch) for batch, _ in batches))
            orthogonalize_(batches, limit)

        sharded = Sharded(ranks, [Placement((2,), (None,))] * 12, whole, 96)
        with mock.patch.object(muon, "orthogonalize_", counted):
            sharded.orthogonalize()
    assert counts == [[1] * 6] * 2


@pytest.mark.parametrize(
    ("mesh", "cuts", "groups"),
    [
        ((1,), (None,), set()),
        ((2,), (None,), {(0, 1)}),
        ((2,), ((0, "even"),), {(0, 1)}),
        ((2, 2), (None, (0, "even")), {(0, 1), (2, 3), (0, 2), (1, 3)}),
        ((2, 2), ((1, "even"), (0, "even")), {(0, 1, 2, 3)}),
    ],
)
def test_process_groups(mesh, cuts, groups):
    """One for each set of ranks that exchange something; a second step makes no group and no plan."""
    whole = [Matrices(torch.randn(8, 6), batched=False, method=BIG) for _ in range(4)]
    with Ranks(math.prod(mesh)) as ranks:
        sharded = Sharded(ranks, [Placement(mesh, cuts)] * 4, whole, 1)
        asked = []

        def noted(axes, its, device, callers):
            if len(its) > 1:
                asked.append(its)
                return ranks.group(its)

        with mock.patch.object(transport, "group_across", noted):
            sharded.orthogonalize()
            with mock.patch("prodigyplus_dist.orthogonalize.assign_owners") as planned:
                sharded.orthogonalize()
        assert not planned.called  # owners are not assigned again
        assert ranks.groups == groups
    assert len(asked) == sum(map(len, groups))


def test_one_wave_travels_while_another_is_computed():
    """A wave's pieces travel while the wave before is computed, its results while the next one is."""
    events = []
    orthogonalize_, swap = muon.orthogonalize_, transport.swap
    whole = [Matrices(torch.randn(8, 6), batched=False, method=BIG) for _ in range(6)]
    with Ranks(2) as ranks:

        def note(event):
            if ranks.here == 0:
                events.append(event)

        def computed(*args):
            note("compute")
            orthogonalize_(*args)

        def swapped(*args, **options):
            note("begin")
            number = events.count("begin")
            wait = swap(*args, **options)

            def waited():
                note(f"end {number}")
                return wait()

            return waited

        sharded = Sharded(ranks, [Placement((2,), ((0, "even"),))] * 6, whole, 1)
        with (
            mock.patch.object(transport, "swap", swapped),
            mock.patch.object(muon, "orthogonalize_", computed),
        ):
            sharded.orthogonalize()
    # Three waves of two: messages 1, 2 and 4 bring pieces to owners; 3, 5 and 6 bring results back.
    assert events == [
        *("begin", "begin"),
        *("end 1", "compute", "begin"),
        *("begin", "end 2", "compute", "begin", "end 3"),
        *("end 4", "compute", "begin", "end 5", "end 6"),
    ]


# ---------------------------------------------------------------------------------------------- transport


@pytest.mark.parametrize("all_to_all", [False, True])
def test_a_swap_of_uneven_sizes(all_to_all):
    """Some messages are empty; tensors are not contiguous, and of another dtype than they are sent in."""

    def given(sender, receiver):
        sizes = [(2, 3), (0, 4), (1, 1), (3, 2)][: (sender + 2 * receiver) % 4]
        return [torch.full(size, 10.0 * sender + receiver).mT for size in sizes]

    with Ranks(3) as ranks:

        def of(rank):
            group = ranks.group((0, 1, 2))
            outgoing = [given(rank, peer) for peer in range(3)]
            incoming = [[tuple(tensor.shape) for tensor in given(peer, rank)] for peer in range(3)]
            like = torch.empty(0, dtype=BF16)
            wait = transport.swap(outgoing, incoming, group, rank, like=like, all_to_all=all_to_all)
            for tensors in outgoing:
                for tensor in tensors:
                    tensor.fill_(-1)  # swap() has copied it already
            for peer, tensors in enumerate(wait()):
                assert [tuple(tensor.shape) for tensor in tensors] == incoming[peer]
                for tensor, expected in zip(tensors, given(peer, rank), strict=True):
                    assert tensor.dtype == BF16
                    assert torch.equal(tensor.float(), expected)

        ranks.each(of)


def test_a_swap_with_oneself():
    outgoing = [[torch.arange(6.0).view(2, 3).mT, torch.empty(0, 3)]]
    wait = transport.swap(
        outgoing, [[(3, 2), (0, 3)]], None, 0, like=torch.empty(0, dtype=BF16), all_to_all=True
    )
    ((found, empty),) = wait()
    assert torch.equal(found.float(), outgoing[0][0])
    assert (found.dtype, empty.shape) == (BF16, (0, 3))


def test_what_is_packed():
    tensors = [torch.arange(6.0).view(2, 3).mT, torch.empty(0, 4), torch.ones(1, 2)]
    buffer = transport.packed(tensors, torch.empty(0, dtype=BF16))
    assert (buffer.dtype, buffer.shape) == (BF16, (8,))
    for found, tensor in zip(transport.unpacked(buffer, [t.shape for t in tensors]), tensors, strict=True):
        assert torch.equal(found.float(), tensor)
    assert transport.packed([], torch.empty(0, dtype=BF16)).shape == (0,)
