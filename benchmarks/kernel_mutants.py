"""Which mistakes in the kernels the tests do not catch: each is a small edit, tried in a copy of the tree.

    python benchmarks/kernel_mutants.py --sample 60
    python benchmarks/kernel_mutants.py --only _atan2
    python benchmarks/kernel_mutants.py --source group_kernels --per-line

An edit that no test catches survives. Either a test is missing for it, or it changes nothing: edits of the
second kind are listed in ``UNSEEN``, with the reason, and are not tried. The tests run on the CPU in Triton's
interpreter, a quarter of a minute for most edits, minutes for one that survives.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DEVICE = Path("prodigyplus/device")
IMPORTED = ("torch", "torch.distributed.tensor", "torch._dynamo", "triton", "pytest")  # before the first test
COPIED = ("benchmarks", "prodigyplus", "prodigyplus_dist", "tests")
# The tests of each source, the one that catches most first.
_OF_PASSES = "tests/single/test_kernels.py", "tests/dist/test_kernels.py"
TESTS = {
    "kernels": _OF_PASSES,
    "square_kernels": _OF_PASSES,
    "tiles": _OF_PASSES,
    "group_kernels": ("tests/single/test_group_kernels.py",),
    "symmetric": ("tests/single/test_symmetric.py",),
}

# The tests that catch most mistakes of a function soonest; the others run where these catch none.
FIRST = {
    "_atan2": "angles or eps",
    "_evidence": "plain_passes",
    "_hash": "bfloat16",
    "_moved": "plain_passes",
    "_rounded": "bfloat16",
    "factors": "sixteen or bfloat16",
}
OTHERS_FIRST = "sixteen or empty or eps"

_OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.RShift: (">>", "<<"),
    ast.BitXor: ("^", "|"),
    ast.BitAnd: ("&", "|"),
    ast.Lt: ("<", "<="),
    ast.Gt: (">", ">="),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
_SWAPPED = (
    ("row", "column"),
    ("down", "across"),
    ("height", "width"),
    ("row_stride", "column_stride"),
    ("outer_stride", "inner_stride"),
    ("outer", "inner"),
    ("y", "z"),
    ("phase", "first_index"),
)
_PARTNERS = {one: other for pair in _SWAPPED for one, other in (pair, pair[::-1])}
_CALLS = {"tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum", "tl.sqrt": "", "tl.abs": ""}

# Mistakes that change nothing observable: the function, and the line with the mistake.
_FIRST_COLUMN = "that column is the first, 0"
_NO_ELEMENT = "of lanes that hold no element, and whose results are masked"
_ONLY_IF_IT_MOVES = "what it sets is used only by a launch that moves, or that rounds with noise"
_NOTHING = "it divides 0"
_NOT_USED = "the quotient is not used there"
_HAS_STEPS = "a group that has moved has made a step"
_EACH_LANE = "that only gives each lane the number"
_HINT = "what the interpreter ignores"
_NEAREST = "a root that is rounded to the nearest, as the interpreter's, needs no correction"
UNSEEN: dict[tuple[str, str], str] = {
    (
        "_rectified",
        "return tl.sqrt(tl.where(length >= 4.0, variance, 0.0)), 1.0 - (1.0 - beta2) / (1.0 - decayed)",
    ): "the variance is 0 at 4",
    ("begin", "total = tl.load(square - group * 0)"): _EACH_LANE,
    ("begin", "tl.store(counts - C_K * count + group, k + moves.to(tl.int64), mask=exists)"): _FIRST_COLUMN,
    (
        "_averaging",
        "c = weight / tl.where(weight_sum > 0, weight_sum, 1.01)  # the sum includes the weight",
    ): _NOTHING,
    ("_harmonic_mean", "return tl.sum(where.to(tl.float64), 0) / tl.where(total > 0, total, 1.01)"): _NOTHING,
    (
        "_next_d",
        "numerator = tl.where((d > d0) | (product >= 0), numerator + product, numerator)",
    ): "it adds 0",
    (
        "_next_d",
        "grows = (numerator >= largest) & (numerator >= 0) & (before > 0)",
    ): "a numerator that was above 0 stays there",
    ("_moments", "return (u)"): "0 divided by eps is 0 there, too",
    ("_next_d", "d_hat = numerator / tl.where(observed, norm, 1.01)"): _NOT_USED,
    (
        "_next_balanced",
        "rho = tl.where(known, numerator / tl.where(known, denominator, 1.01), 0.0)",
    ): _NOT_USED,
    (
        "_next_balanced",
        "keep = tl.maximum(1.0 - WINDOW / tl.maximum(count, 1.01), 0.0)",
    ): "in the first step, nothing is kept",
    ("_next_balanced", "power = tl.where(above >= 0, rise * GROWTH, fall * 0.5)"): "both are 0 at 0",
    (
        "_share",
        "counting = moved & ((in_mean > 0) | ((d >= LEAST_GROWTH * d0) & (is_early | is_near)))",
    ): "d is never exactly that",
    (
        "_harmonic_mean",
        "return tl.sum(where.to(tl.float64), 0) / tl.where(total > 1, total, 1.0)",
    ): "step sizes are below 1, and the sum is of their inverses",
    ("_share", "is_early = (k == tl.max(tl.where(shares, k, 1), 0)) & (k <= EARLY)"): _HAS_STEPS,
    ("end", "k = tl.where(leads, tl.max(tl.where(pooled, k, 1), 0), k)"): _HAS_STEPS,
    ("_share", "over = tl.where(tl.max(over.to(tl.int32), 0) - group * 0 > 0, over, moved)"): _EACH_LANE,
    ("end", "happens = tl.max(learning.to(tl.int32), 0) - group * 0 > 0"): _EACH_LANE,
    ("end", "for number in tl.static_range(1, LAST_POOL + 2):"): "no group is in that pool",
    ("end", "tl.store(floats - F_D * count + group, d, mask=exists)"): _FIRST_COLUMN,
    ("_block_of", "across = ((tl.sqrt((8 * pair + 2).to(tl.float32)) - 1.0) / 2.0).to(tl.int32)"): _NEAREST,
    ("_block_of", "across = tl.where(across * (across + 1) // 2 > pair, across - 2, across)"): _NEAREST,
    (
        "_block_of",
        "across = tl.where((across + 1) * (across + 3) // 2 <= pair, across + 1, across)",
    ): _NEAREST,
    ("_block_of", "across = (across)"): _NEAREST,
    (
        "factors",
        "tensor, column, first = tl.load(row - B_TENSOR), tl.load(row + B_POINTER), tl.load(row + B_FIRST)",
    ): _FIRST_COLUMN,
    ("add_parts", "is_inner, first = tl.load(row - A_IS_INNER), tl.load(row + A_FIRST)"): _FIRST_COLUMN,
    ("add_up", "first, stride = tl.load(entry - U_FIRST), tl.load(entry + U_STRIDE)"): _FIRST_COLUMN,
    ("factors", "total = tl.load(sums + first + index, mask=exists, other=1.0)"): _NO_ELEMENT,
    ("tile_of", "tensor = tl.load(matrix - M_TENSOR)"): _FIRST_COLUMN,
    ("tile_of", "local = tl.multiple_of(tl.load(size - S_LOCAL).to(tl.int32), MULTIPLE)"): _FIRST_COLUMN,
    (
        "elements_of",
        "index = tl.max_contiguous(tl.multiple_of(index, (1, VECTOR)), (2, VECTOR))",
    ): _HINT,
    ("_atan2", "far = t > 0.4183556979968259"): "either series holds around the point where they meet",
    ("_atan2", "return tl.where(y <= 0, -angle, angle)"): "the sign of a zero",
    (
        "add_parts",
        "exists = (part[:, None] < count) & (column[None, :] <= length)",
    ): "what is added up there is not stored",
    ("squares", "MULTIPLE: tl.constexpr = 16 if FAST else 2"): _HINT,
    ("sweep", "MULTIPLE: tl.constexpr = 16 if FAST else 2"): _HINT,
    (
        "sweep",
        "outer = pointer(tile.pointers, P_OUTER, FACTOR_DTYPE, 2) + tl.load(matrix + M_OUTER_OFFSET)",
    ): _HINT,
    (
        "_momentum",
        "old = tl.load(exp_avg + index, mask=exists, other=1.0).to(tl.float32)",
    ): _NO_ELEMENT,
    (
        "_moments",
        "old = tl.load(exp_avg_sq + index, mask=exists, other=1.0).to(tl.float32)",
    ): _NO_ELEMENT,
    (
        "_whole_indices",
        "first = tl.load(run + R_FIRST_INDEX, mask=exists, other=1).to(tl.uint32, bitcast=True)",
    ): _NO_ELEMENT,
    ("_samples", "phase = tl.load(run + R_FIRST_PHASE, mask=exists, other=1)"): _NO_ELEMENT,
    (
        "sweep",
        "g = tl.where(opens, tl.load(grad + index, mask=exists, other=1.0).to(tl.float32), 0.0)",
    ): "it is multiplied by a direction, which is 0 there",
    (
        "_evidence",
        "g = tl.where(opens, tl.load(grad + at, mask=sampled, other=0.0).to(tl.float32), 1.0)",
    ): "in a no-op, the evidence has the weight 0",
    (
        "sweep",
        "is_row_outer = tl.load(tile.size + S_IS_ROW_OUTER) != 1",
    ): "the product of both roots is the same but for its rounding",
    ("sweep", "if MOVES or STABLE:"): _ONLY_IF_IT_MOVES,
    ("sweep", "seed = tl.full((), 1, tl.uint32)"): _ONLY_IF_IT_MOVES,
    ("sweep", "if MOVES or STOCHASTIC:"): _ONLY_IF_IT_MOVES,
    (
        "symmetric_product",
        "x, out, size, terms, pairs, *x.stride(), *(coefficients or (0.0, 1.0, 1.0)),",
    ): "a plain product has no coefficients",
    ("product", "other=1.0,"): "the other factor is 0 there, or the product is not stored",
    (
        "product",
        "mirrored = (column[:, None] < size) & (row[None, :] <= size)",
    ): "above the diagonal, all rows of a block exist",
}


class Mutant(NamedTuple):
    """An edit of the kernels."""

    function: str
    number: int  # of the line
    line: str  # with the mistake
    source: bytes  # all of it

    def __str__(self) -> str:
        return f"{self.number:4} {self.function}: {self.line}"


class Finder:
    """All mutants of a source."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._next_index: dict[str, str] = {}  # of an index in a table, the next one in the same table

    def mutants(self) -> Iterator[Mutant]:
        """Those of each function, in the order of the source."""
        tree = ast.parse(self._source)
        names: dict[str, list[str]] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and (table := _table(node.value)):
                names.setdefault(table, []).append(ast.unparse(node.targets[0]))
        for of_table in names.values():
            self._next_index |= dict(zip(of_table, (*of_table[1:], of_table[0]), strict=True))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                for statement in node.body:
                    yield from self._of(node.name, statement)

    def _of(self, function: str, statement: ast.stmt) -> Iterator[Mutant]:
        for node in ast.walk(statement):
            for start, end, after in self._edits(node):
                source = self._source[:start] + after.encode() + self._source[end:]
                number = source[:start].count(b"\n") + 1
                yield Mutant(function, number, source.splitlines()[number - 1].decode().strip(), source)

    def _edits(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        if isinstance(node, ast.BinOp):
            yield from self._operator(type(node.op), node.left, node.right)
        elif isinstance(node, ast.Compare):
            yield from self._operator(type(node.ops[0]), node.left, node.comparators[0])
        elif isinstance(node, ast.BoolOp):
            yield from self._operator(type(node.op), node.values[0], node.values[1])
        elif isinstance(node, ast.AugAssign):
            start, end = self._span(node)
            target, value = (self._source[slice(*self._span(part))] for part in (node.target, node.value))
            yield start, end, f"{target.decode()} = {value.decode()}"
        elif isinstance(node, ast.UnaryOp):
            yield (*self._span(node), self._text(node.operand))
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, float):
            yield (*self._span(node), repr(node.value * 1.01 or 1.0))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield (*self._span(node), repr(node.value + 1))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            others = self._next_index.get(node.id), _PARTNERS.get(node.id)
            yield from ((*self._span(node), other) for other in others if other and other != node.id)
        elif isinstance(node, ast.Attribute) and node.attr in _PARTNERS:
            end = self._span(node)[1]
            yield end - len(node.attr), end, _PARTNERS[node.attr]

    def _call(self, node: ast.Call) -> Iterator[tuple[int, int, str]]:
        name = ast.unparse(node.func)
        if name == "tl.where":
            yield (*self._span(node), f"({self._text(node.args[1])})")
            yield (*self._span(node), f"({self._text(node.args[2])})")
        elif name in _CALLS:
            yield (*self._span(node.func), _CALLS[name])
        elif name == "tl.store":
            yield (*self._span(node), "pass")

    def _operator(
        self, kind: type[ast.AST], left: ast.expr, right: ast.expr
    ) -> Iterator[tuple[int, int, str]]:
        if kind in _OPERATORS:
            before, after = _OPERATORS[kind]
            between = self._span(left)[1], self._span(right)[0]
            at = between[0] + self._source[slice(*between)].index(before.encode())
            yield at, at + len(before), after

    def _span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._lines[node.lineno - 1] + node.col_offset
        return start, self._lines[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr) -> str:
        return self._source[slice(*self._span(node))].decode()


def _table(value: ast.expr) -> str | None:
    """The table that a constant is an index in, as ``tl.constexpr(table.index("name"))``; None for others."""
    if isinstance(value, ast.Subscript):
        return ast.unparse(value.value)
    if not isinstance(value, ast.Call):
        return None
    if isinstance(value.func, ast.Attribute) and value.func.attr == "index":
        return ast.unparse(value.func.value)
    return _table(value.args[0]) if ast.unparse(value.func) in ("tl.constexpr", "float") else None


class Tests:
    """Runs tests in a copy of the tree, each time in a process that has imported what is not ours.

    Args:
        tree: The copy.
        limit: How many seconds a run may take.
    """

    def __init__(self, tree: Path, limit: float) -> None:
        self._tree = tree
        self._limit = limit
        # Triton reads it when it is imported; where there is a GPU, the tests would not set it.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(list(IMPORTED))

    def outcome(self, arguments: Sequence[str]) -> str:
        """How they end: "seen", "unseen", or "hangs"."""
        log = self._tree / "log"
        process = self._processes.Process(target=_run_tests, args=(self._tree, log, arguments))
        process.start()
        process.join(self._limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            return "hangs"
        if process.exitcode in (4, 5):  # no tests were run
            sys.exit(log.read_text())
        return "unseen" if process.exitcode == 0 else "seen"

    def of(self, mutant: Mutant, source: str) -> str:
        """The outcome for an edit of a source."""
        (self._tree / DEVICE / f"{source}.py").write_bytes(mutant.source)
        found = "unseen"
        if TESTS[source] == _OF_PASSES:
            found = self.outcome([TESTS[source][0], "-k", FIRST.get(mutant.function, OTHERS_FIRST)])
        return self.outcome(TESTS[source]) if found == "unseen" else found


def _run_tests(tree: Path, log: Path, arguments: Sequence[str]) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)  # of the ranks that tests start
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True  # of an edit, which the next may follow within the same second
        sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])))


def chosen(mutants: Sequence[Mutant], seed: int, sample: int | None, *, per_line: bool) -> list[Mutant]:
    """Those to try, in the order of their lines: all; or some that are drawn, or one for each line."""
    draw = random.Random(seed)
    if per_line:
        by_line: dict[int, list[Mutant]] = {}
        for mutant in mutants:
            by_line.setdefault(mutant.number, []).append(mutant)
        mutants = [draw.choice(on_line) for on_line in by_line.values()]
    if sample is not None and sample < len(mutants):
        mutants = draw.sample(mutants, sample)
    return sorted(mutants, key=lambda mutant: mutant.number)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="so many, drawn; default: all, for hours")
    parser.add_argument("--per-line", action="store_true", help="one for each line, drawn")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn; default: %(default)s")
    parser.add_argument("--source", choices=TESTS, default="kernels", help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="only those that print with this in them")
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="default: %(default)s")
    args = parser.parse_args()
    source = (ROOT / DEVICE / f"{args.source}.py").read_bytes()
    mutants = [mutant for mutant in Finder(source).mutants() if args.only in str(mutant)]
    mutants = chosen(mutants, args.seed, args.sample, per_line=args.per_line)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for name in COPIED:
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        tests = Tests(tree, args.limit)
        if tests.outcome(TESTS[args.source]) != "unseen":
            sys.exit("benchmarks/kernel_mutants.py: the tests fail as it is.")
        for mutant in mutants:
            began = time.perf_counter()
            reason = UNSEEN.get((mutant.function, mutant.line))
            found = f"the same: {reason}" if reason else tests.of(mutant, args.source)
            survivors += [mutant] if found == "unseen" else []
            print(f"{found:6} {time.perf_counter() - began:4.0f} s {mutant}", flush=True)
    print(f"\n{len(survivors)} of {len(mutants)} survive:", *survivors, sep="\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
