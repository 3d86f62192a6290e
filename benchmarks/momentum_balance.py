"""What ρ tends to where z steps by a first moment, and which ⟨g, u⟩ it has to be divided by.

    python benchmarks/momentum_balance.py [--steps 4000]

Schedule-Free at a fixed step size on a quadratic with noisy gradients, of curvature 0 (noise alone) and 1 (at
rest), with P = 1. It prints ρ over the second half of the run: with ⟨g, u⟩ of the step made, with ⟨g, P⁻¹g⟩
of a step without momentum, and with ⟨g, u⟩ over the weight that g has in the first moment.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

SIZE, STEP_SIZE, BETA1 = 20_000, 0.05, 0.9


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000)
    steps = parser.parse_args(arguments).steps
    torch.set_num_threads(1)
    print("| first moment | curvature | weights | ⟨g, u⟩ | ⟨g, P⁻¹g⟩ | ⟨g, u⟩ / weight |")
    print("|--:|--:|--:|--:|--:|--:|")
    for momentum, power in ((0.0, 0), (0.9, 0), (0.0, 2)):
        for curvature in (0.0, 1.0):
            ratios = " | ".join(f"{ratio:+.3f}" for ratio in rho(momentum, curvature, power, steps))
            print(f"| {momentum} | {curvature} | k^{power} | {ratios} |", flush=True)


def rho(momentum: float, curvature: float, power: int, steps: int) -> tuple[float, float, float]:
    """ρ with each of the three sums, for a run whose averaging weights are k^power."""
    generator = torch.Generator().manual_seed(1)
    z, x, first = torch.zeros(SIZE), torch.zeros(SIZE), torch.zeros(SIZE)
    product, made, plain, weighted, weight_sum = (0.0,) * 5
    for k in range(1, steps + 1):
        g = curvature * torch.lerp(x, z, 1 - BETA1) + torch.randn(SIZE, generator=generator)
        correction = 1 - momentum**k
        u = first.lerp_(g, 1 - momentum) / correction
        if k > steps // 2:
            product += float(g @ (x - z))
            made += float(g @ u) * STEP_SIZE
            plain += float(g @ g) * STEP_SIZE
            weighted += float(g @ u) * STEP_SIZE * correction / (1 - momentum)
        weight_sum += k**power
        z -= STEP_SIZE * u
        x.lerp_(z, k**power / weight_sum)
    return product / made, product / plain, product / weighted


if __name__ == "__main__":
    main()
