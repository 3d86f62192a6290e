"""The loss of one run of gpt_fsdp2.py on several numbers of ranks: the curves should coincide.

python benchmarks/gpt_ranks.py --out docs
"""

from __future__ import annotations

from pathlib import Path

from harness import charts
from harness.tables import head, parser, row
from harness.workers import log_of


def losses(ranks: int, *options: str) -> list[float]:
    """The training loss of every step, in bits per byte, on some number of ranks."""
    log = log_of("gpt_fsdp2.py", ranks, "--log-every", "1", *options)
    return [line["bits_per_byte"] for line in log if line["kind"] == "train"]


def main() -> None:
    """Run, print how far the curves are apart, and draw them."""
    cli = parser(__doc__)
    cli.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    cli.add_argument("--steps", type=int, default=100)
    cli.add_argument("--optimizers", nargs="+", default=["prodigyplus", "adamw"])
    cli.add_argument("--out", type=Path, help="folder for gpt_ranks.png")
    args = cli.parse_args()

    figure, [(curves, apart)] = charts.panels(1, 2, (8, 3.4))
    print(head("optimizer | ranks | last loss, bits/byte | furthest from one rank"))
    for optimizer in args.optimizers:
        first: list[float] = []
        for number, ranks in enumerate(args.ranks):
            run = losses(ranks, "--steps", str(args.steps), "--optimizer", optimizer)
            first = first or run
            off = [abs(a / b - 1) for a, b in zip(run, first, strict=True)]
            print(row(optimizer, ranks, f"{run[-1]:.4f}", f"{max(off):.1e}"), flush=True)
            if optimizer == args.optimizers[0]:
                style = ("-", "--", ":")[number % 3]
                curves.plot(run, style, label=f"{ranks} ranks", linewidth=3.5 - number)
            if number:
                apart.plot(off, label=f"{optimizer}, {ranks} ranks", linewidth=1)
    curves.set(title=f"training loss, {args.optimizers[0]}", xlabel="step", ylabel="bits per byte")
    apart.set(
        title=f"relative distance from {args.ranks[0]} rank", xlabel="step", yscale="log", ylim=(1e-8, 1e-4)
    )
    if args.out is not None:
        charts.save(figure, args.out / "gpt_ranks.png")


if __name__ == "__main__":
    main()
