"""A second implementation of docs/algorithm.md, in numpy and float64.

It is slow, plain and independent: it shares no line with the package, and stores x where that stores y.
"""

import math

import numpy as np

# A Newton–Schulz iteration maps each singular value s to a s + b s³ + c s⁵; there are five.
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


class Reference:
    def __init__(self, weights, **options):
        self.o = {
            "lr": 1.0, "betas": (0.9, 0.99), "beta3": None, "warmup_steps": 0, "weight_decay": 0.0,
            "weight_decay_by_lr": True, "d0": 1e-6,
            "d_coef": 1.0, "eps": 1e-8, "beta4": 0.0, "d_limiter": True, "schedulefree_c": 0.0, "slice_p": 11,
            "factored": True, "use_stableadamw": True, "use_schedulefree": True, "use_speed": False,
            "use_bias_correction": False, "use_cautious": False, "use_grams": False, "use_adopt": False,
            "use_orthograd": False, "use_focus": False, "use_muon_pp": False, "muon_quintic": False,
            "muon_batched": False, "step_size": "prodigy",
        } | options  # fmt: skip
        beta3 = self.o["beta3"]
        self.beta3 = math.sqrt(self.o["betas"][1]) if beta3 is None else beta3
        self.x = [np.array(w, dtype=np.float64) for w in weights]  # the weights, without Schedule-Free
        self.z = [x.copy() for x in self.x]
        self.p0 = [self.sample(x).copy() for x in self.x]
        self.s = [np.zeros_like(p0) for p0 in self.p0]
        self.moment = [{} for _ in self.x]
        self.far = [{} for _ in self.x]
        self.d, self.numerator, self.largest, self.weight_sum, self.k = self.o["d0"], 0.0, 0.0, 0.0, 0
        self.denominator_of_rho = 0.0

    def sample(self, values):
        return values.ravel()[:: self.o["slice_p"]]

    def y(self, i):
        beta1 = self.o["betas"][0]
        return (1 - beta1) * self.z[i] + beta1 * self.x[i] if self.o["use_schedulefree"] else self.x[i]

    def average(self, i, key, value, beta):
        self.moment[i][key] = beta * self.moment[i].get(key, 0.0) + (1 - beta) * value

    def advance_second(self, i, g, base, beta2):
        """Update the second moment of d·g, or with FOCUS the average of the weights."""
        if self.o["use_focus"]:
            self.average(i, "W", self.d**2 * base, beta2)
        elif self.is_factored(g):
            _, rows, columns = self.order(g)
            self.average(i, "R", self.d**2 * (g**2).mean(columns, keepdims=True), beta2)
            self.average(i, "C", self.d**2 * (g**2).mean(rows, keepdims=True), beta2)
        else:
            self.average(i, "V", self.d**2 * g**2, beta2)

    def is_factored(self, g):
        return self.o["factored"] and g.ndim >= 2 and max(g.shape) >= 32

    def order(self, g):
        *rest, rows, columns = sorted(range(g.ndim), key=lambda dim: (g.shape[dim], dim))
        return rest, rows, columns

    def denominator(self, i, g):
        moment = {key: np.array(value) for key, value in self.moment[i].items()}
        if self.o["use_focus"]:
            return moment.get("W", np.zeros_like(g))
        if self.is_factored(g):
            if "R" not in moment:
                return np.zeros_like(g)
            return np.sqrt(moment["R"] / moment["R"].mean(self.order(g)[1], keepdims=True) * moment["C"])
        return np.sqrt(moment.get("V", np.zeros_like(g)))

    def normalised(self, numerator, denominator, base):
        if self.o["use_focus"]:
            return np.sign(numerator) + 0.1 * np.sign(base - denominator)
        if self.o["eps"] is None:
            return 4 / math.pi * np.arctan2(numerator, denominator)
        return numerator / (denominator + self.d * self.o["eps"])

    def changed(self, move, g):
        """Cautious and Grams."""
        if self.o["use_cautious"]:
            agrees = move * g > 0
            return move * agrees / max(agrees.mean(), 1e-3)
        return np.abs(move) * np.sign(g) if self.o["use_grams"] else move

    def orthogonalised(self, g):
        """A matrix orthogonalised through its singular values, scaled to the rms of Adam's direction."""
        left, s, right = np.linalg.svd(g, full_matrices=False)
        s = s / (np.linalg.norm(s) or 1) / 1.02
        for a, b, c in QUINTIC if self.o["muon_quintic"] else POLAR_EXPRESS:
            s = a * s + b * s**3 + c * s**5
        u = left * s @ right * math.sqrt(max(g.shape))
        return self.stable(u)

    def stable(self, u):
        """StableAdamW."""
        if self.o["use_stableadamw"] and self.o["eps"] is not None:
            u = u / math.sqrt(max(1.0, math.sqrt((u**2).mean())))
        return u

    def direction_of_matrices(self, i, g):
        move = g
        if not self.o["use_schedulefree"]:
            self.average(i, "M", self.d * g, self.o["betas"][0])
            move = self.moment[i]["M"]
        shape = (-1, *g.shape[-2:]) if self.o["muon_batched"] else (1, len(g), -1)
        u = np.stack([self.orthogonalised(matrix) for matrix in move.reshape(shape)]).reshape(g.shape)
        return u if self.o["use_schedulefree"] else self.changed(u, g)

    def direction(self, i, g, base, beta2):
        o, d = self.o, self.d
        if o["use_muon_pp"]:
            return self.direction_of_matrices(i, g)
        before = self.denominator(i, g)
        self.advance_second(i, g, base, beta2)
        denominator = before if o["use_adopt"] else self.denominator(i, g)
        if o["use_schedulefree"]:
            u = self.normalised(d * g, denominator, base)
        else:
            if o["use_adopt"]:
                bound = self.k**0.25
                g = np.clip(self.normalised(d * g, denominator, base), -bound, bound)
            self.average(i, "M", d * g, o["betas"][0])
            m = self.changed(self.moment[i]["M"], g)
            u = m / d if o["use_adopt"] else self.normalised(m, denominator, base)
        if o["use_orthograd"] and u.size > 1:
            left = u - (base * u).sum() / (base**2).sum() * base
            u = left * np.linalg.norm(u) / np.linalg.norm(left)
        return self.stable(u)

    def evidence(self, i, g, base):
        """The weighted product and the norm that d is estimated from."""
        o, d = self.o, self.d
        w = o["d0"] * math.sqrt(d) if o["use_speed"] is True else d**2 / math.sqrt(o["d0"])
        g, distance = self.sample(g), self.p0[i] - self.sample(base)
        product = float(g @ distance)
        if o["use_speed"] == "relative":
            far, recent = self.far[i], self.k**-0.75
            far["product"] = (1 - recent) * far.get("product", product) + recent * product
            far["l1"] = max(float(np.abs(distance).sum()), far.get("l1", 1e-8))
            far["l2"] = max(float(np.linalg.norm(distance)), far.get("l2", 1e-8))
            return w * far["product"] / far["l1"] / (1 + far["l2"]) ** 2, far["l2"]
        if o["use_speed"]:
            g, product = np.sign(g), float(np.sign(product))
        self.s[i] = self.beta3 * self.s[i] + w * g
        return w * product, float(np.abs(self.s[i]).sum())

    def step(self, gradients):
        o, d = self.o, self.d
        beta1, beta2 = o["betas"]
        self.k += 1
        gradients = [np.asarray(g, dtype=np.float64) for g in gradients]
        base = self.z if o["use_schedulefree"] else self.x
        if o["use_adopt"] and self.k == 1:
            for i, g in enumerate(gradients):
                self.advance_second(i, g, base[i], 0.0)
            return
        dlr, beta2_now = d * o["lr"], beta2
        if o["use_bias_correction"]:
            # RAdam, algorithm 2.
            longest = 2 / (1 - beta2) - 1
            length = longest - 2 * self.k * beta2**self.k / (1 - beta2**self.k)
            r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            dlr *= math.sqrt(r) if length > 4 else 0.0
            beta2_now = 1 - (1 - beta2) / (1 - beta2**self.k)
        dlr *= min(1.0, self.k / max(1, o["warmup_steps"]))
        self.weight_sum += dlr**2
        c = dlr**2 / self.weight_sum if self.weight_sum else 0.0
        if o["schedulefree_c"] > 0:
            c = min(1.0, c * (1 - beta1) * o["schedulefree_c"])
        evidence = []
        for i, g in enumerate(gradients):
            u = self.direction(i, g, base[i], beta2_now)
            if o["step_size"] == "balance":
                evidence.append(self.balance_evidence(g, u, self.x[i] - self.z[i], dlr))
            else:
                evidence.append(self.evidence(i, g, base[i]))
            y = self.y(i)
            decay = o["weight_decay"] * y * (dlr if o["weight_decay_by_lr"] else 1.0)
            if not o["use_schedulefree"]:
                self.x[i] = y - decay - dlr * u
            elif o["use_cautious"] or o["use_grams"]:
                apart = 0.0
                if o["weight_decay_by_lr"]:
                    u = u + o["weight_decay"] * y
                else:
                    apart = decay
                xy = 1 - beta1 * (1 - c)
                y = y - self.changed(c * (y - self.z[i]) + dlr * xy * u, u) - xy * apart
                self.z[i] = self.z[i] - dlr * u - apart
                self.x[i] = (y - (1 - beta1) * self.z[i]) / beta1
            else:
                self.z[i] = self.z[i] - dlr * u - decay
                self.x[i] = (1 - c) * self.x[i] + c * self.z[i]
        adapt = self.balance if o["step_size"] == "balance" else self.adapt
        adapt(*map(sum, zip(*evidence, strict=True)))

    def balance_evidence(self, g, u, lag, dlr):
        """The tensor's own ratio times its weight; and its weight times the step size."""
        norm, weight = float((g * u).sum()), float((u**2).sum()) / g.size**0.75
        if norm <= 0:
            return 0.0, 0.0
        return weight * float((g * lag).sum()) / norm, weight * dlr

    def balance(self, product, norm):
        recent = min(1.0, 4 / self.k)
        self.numerator += recent * (product - self.numerator)
        self.denominator_of_rho += recent * (norm - self.denominator_of_rho)
        if norm <= 0:
            return
        rho = self.numerator / self.denominator_of_rho
        power = min(3.0, 6 * (rho + 0.25)) if rho > -0.25 else max(-0.5, 2 * (rho + 0.25))
        self.d *= min(2.0, math.exp(power / self.k))

    def adapt(self, product, norm):
        o, d, before = self.o, self.d, self.numerator
        beta2 = o["betas"][1]
        self.numerator *= self.beta3
        if d > o["d0"] or product > 0:
            self.numerator += product
        self.largest = max(self.largest, self.numerator)
        if o["use_speed"] == "relative":
            grows = self.numerator >= self.largest and self.numerator > 0 and before > 0
            growth = min(2**0.25, math.sqrt(self.numerator / before)) * o["d_coef"] ** 0.125 if grows else 1.0
            estimate = d * growth
        elif o["use_speed"]:
            estimate = min(o["d_coef"] * self.numerator / norm, d**0.975)
        else:
            estimate = self.numerator / norm
            most = max(1.0, o["d_coef"]) * 2**0.25 * d
            estimate = min(o["d_coef"] * estimate, most) if o["d_limiter"] else o["d_coef"] * estimate
        beta4 = beta2 if o["beta4"] is None else o["beta4"]
        self.d = beta4 * d + (1 - beta4) * max(estimate, o["d0"]) if beta4 else max(d, estimate)
