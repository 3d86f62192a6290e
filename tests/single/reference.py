"""SPEC's "One step with the defaults" again, straight from its formulas, in numpy and float64.

Slow, plain and independent: it shares no line with the package, and keeps x where the package keeps y.
"""

import math

import numpy as np


class Reference:
    def __init__(self, weights, **options):
        self.o = {
            "lr": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.0, "weight_decay_by_lr": True, "d0": 1e-6,
            "d_coef": 1.0, "eps": 1e-8, "beta4": 0.0, "d_limiter": True, "schedulefree_c": 0.0, "slice_p": 11,
            "factored": True, "use_stableadamw": True,
        } | options  # fmt: skip
        self.x = [np.array(w, dtype=np.float64) for w in weights]
        self.z = [x.copy() for x in self.x]
        self.p0 = [x.ravel()[:: self.o["slice_p"]].copy() for x in self.x]
        self.s = [np.zeros_like(p0) for p0 in self.p0]
        self.moment = [{} for _ in self.x]
        self.d, self.numerator, self.weight_sum = self.o["d0"], 0.0, 0.0

    def y(self, i):
        beta1 = self.o["betas"][0]
        return (1 - beta1) * self.z[i] + beta1 * self.x[i]

    def denominator(self, i, g):
        (_, beta2), d, moment = self.o["betas"], self.d, self.moment[i]

        def average(key, value):
            moment[key] = beta2 * moment.get(key, 0.0) + (1 - beta2) * d**2 * value
            return moment[key]

        if self.o["factored"] and g.ndim >= 2 and max(g.shape) >= 32:
            order = sorted(range(g.ndim), key=lambda dim: (g.shape[dim], dim))
            rows, columns = order[-2], order[-1]
            r = average("R", (g**2).mean(columns, keepdims=True))
            c = average("C", (g**2).mean(rows, keepdims=True))
            return np.sqrt(r / r.mean(rows, keepdims=True) * c)
        return np.sqrt(average("V", g**2))

    def step(self, gradients):
        o, d = self.o, self.d
        beta1, beta2 = o["betas"]
        beta3 = math.sqrt(beta2)
        dlr = d * o["lr"]
        self.weight_sum += dlr**2
        c = dlr**2 / self.weight_sum
        if o["schedulefree_c"] > 0:
            c = min(1.0, c * (1 - beta1) * o["schedulefree_c"])
        w = d**2 / math.sqrt(o["d0"])
        product, norm = 0.0, 0.0
        for i, g in enumerate(gradients):
            g = np.asarray(g, dtype=np.float64)
            denominator = self.denominator(i, g)
            if o["eps"] is None:
                u = 4 / math.pi * np.arctan2(d * g, denominator)
            else:
                u = d * g / (denominator + d * o["eps"])
            if o["use_stableadamw"] and o["eps"] is not None:
                u = u / math.sqrt(max(1.0, math.sqrt((u**2).mean())))
            sample = g.ravel()[:: o["slice_p"]]
            product += w * float(sample @ (self.p0[i] - self.z[i].ravel()[:: o["slice_p"]]))
            self.s[i] = beta3 * self.s[i] + w * sample
            norm += float(np.abs(self.s[i]).sum())
            decay = o["weight_decay"] * self.y(i)
            step = dlr * (u + decay) if o["weight_decay_by_lr"] else dlr * u + decay
            self.z[i] = self.z[i] - step
            self.x[i] = (1 - c) * self.x[i] + c * self.z[i]
        self.numerator *= beta3
        if d > o["d0"] or product > 0:
            self.numerator += product
        estimate = self.numerator / norm
        if o["d_limiter"]:
            estimate = min(estimate, 2**0.25 * d)
        estimate *= o["d_coef"]
        beta4 = beta2 if o["beta4"] is None else o["beta4"]
        self.d = beta4 * d + (1 - beta4) * max(estimate, o["d0"]) if beta4 else max(d, estimate)
