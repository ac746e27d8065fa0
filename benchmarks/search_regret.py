"""How far from the best the searches end, on made surfaces that look like the loss of a training over its settings.

    python benchmarks/search_regret.py                          # every surface; needs optuna for the column tpe
    python benchmarks/search_regret.py --surfaces=learning_rate --seeds=20

Regret: the noiseless loss of the trial that looked best, less the lowest the surface has. Printed: the median over the seeds
after 16, 32 and 64 trials. A surface is moved and turned by the seed, so that no search can know where its best lies.
TPE is Optuna's with its defaults, asked and told as its documentation shows; diverged trials are told as pruned.
"""

import argparse
import math
import time

import numpy as np

from jaxllm.plan.search_samplers import ask
from jaxllm.plan.search_space import read_space

BUDGETS = (16, 32, 64)


class Surface:
    """A loss over a space: `truth(params)`, None where it diverges; `noise`: of one run, as a standard deviation."""

    def __init__(self, space: dict, noise: float, seed: int):
        self.space, self.noise, self.seed = read_space(space), noise, seed
        self.rng = np.random.default_rng([7, seed])
        self.lowest = min((v for v in map(self.truth_of, self.probes()) if v is not None), default=0.0)

    def probes(self):
        """Yields the places where the lowest loss may be: where the formula says, and many more to be sure."""
        rng = np.random.default_rng([8, self.seed])
        yield self.best()
        yield from rng.random((4000, len(self.space.dimensions)))

    def truth_of(self, u) -> float | None:
        return self.truth(self.space.decode(u))

    def observed(self, params: dict, number: int) -> float | None:
        value = self.truth(params)
        noise = np.random.default_rng([9, self.seed, number]).standard_normal()
        return None if value is None else value + self.noise * self.louder(params) * noise

    def louder(self, params: dict) -> float:
        """Returns what the noise of a run is multiplied with."""
        return 1.0


class LearningRate(Surface):
    """lr, warm-up, decay, b2: a bowl in the logarithms whose best rate rises with warm-up, steeper above, then a cliff."""

    SPACE = {"lr": {"log": [1e-5, 1e-1]}, "warmup": {"int": [0, 400]}, "decay": {"log": [1e-3, 1]},
             "b2": {"one_minus_log": [0.8, 0.9995]}}

    def __init__(self, seed: int):
        rng = np.random.default_rng([1, seed])
        self.lr, self.decay, self.b2 = rng.uniform(-3.3, -2.3), rng.uniform(-2, -0.5), rng.uniform(-2.5, -1.2)
        super().__init__(self.SPACE, 0.01, seed)

    def truth(self, p: dict) -> float | None:
        lr, warm = math.log10(p["lr"]), p["warmup"] / 400
        decay, b2 = math.log10(p["decay"]), math.log10(1 - p["b2"])
        best = self.lr + 0.5 * warm - 0.2 * (decay - self.decay)
        if lr > best + 0.9 + 0.3 * (b2 - self.b2) * (b2 < self.b2):
            return None
        off = lr - best
        return (3 + 0.25 * off**2 + 0.4 * max(off, 0) ** 3 + 0.06 * (decay - self.decay) ** 2 + 0.08 * (b2 - self.b2) ** 2
                + 0.15 * math.exp(-4 * warm) + 0.05 * warm**2)

    def best(self):
        warm = np.linspace(0, 1, 401)
        w = float(warm[np.argmin(0.15 * np.exp(-4 * warm) + 0.05 * warm**2)])
        values = {"lr": 10 ** (self.lr + 0.5 * w), "warmup": round(400 * w), "decay": 10**self.decay, "b2": 1 - 10**self.b2}
        return self.space.encode(values)


class Ridge(Surface):
    """lr and batch size along a line (the square-root rule), momentum, and clipping that matters only when it is tight."""

    SPACE = {"lr": {"log": [1e-4, 1]}, "batch": {"log_int": [4, 512]}, "b1": {"one_minus_log": [0.5, 0.99]},
             "clip": {"log": [0.05, 10]}}

    def __init__(self, seed: int):
        rng = np.random.default_rng([2, seed])
        self.lr, self.batch, self.b1 = rng.uniform(-3, -1.5), rng.uniform(1.2, 2.2), rng.uniform(-1.6, -0.6)
        super().__init__(self.SPACE, 0.02, seed)

    def truth(self, p: dict) -> float | None:
        lr, batch, b1 = math.log10(p["lr"]), math.log10(p["batch"]), math.log10(1 - p["b1"])
        off = lr - (self.lr + 0.5 * (batch - self.batch) + 0.7 * (b1 - self.b1))
        if off > 1.2:
            return None
        tight = max(-math.log10(p["clip"]), 0)
        return 2.5 + 0.6 * off**2 + 0.1 * (batch - self.batch) ** 2 + 0.1 * (b1 - self.b1) ** 2 + 0.1 * tight**2

    def best(self):
        return self.space.encode({"lr": 10**self.lr, "batch": round(10**self.batch), "b1": 1 - 10**self.b1, "clip": 3.0})


class Choices(Surface):
    """A schedule and an optimizer to choose, a decay share that only one schedule has, and rates that differ by optimizer."""

    SPACE = {"name": {"choice": ["adamw", "lion", "sgd"]}, "schedule": {"choice": ["cosine", "wsd"]}, "lr": {"log": [1e-5, 1]},
             "share": {"uniform": [0.05, 0.6], "when": {"schedule": "wsd"}}, "dropout": {"uniform": [0, 0.5]}}

    def __init__(self, seed: int):
        rng = np.random.default_rng([3, seed])
        self.lr = dict(zip(("adamw", "lion", "sgd"), rng.uniform(-4, -1, 3), strict=True))
        self.cost = dict(zip(rng.permutation(["adamw", "lion", "sgd"]), (0.0, 0.05, 0.2), strict=True))
        self.wsd, self.share, self.dropout = rng.uniform(-0.05, 0.05), rng.uniform(0.15, 0.5), rng.uniform(0, 0.3)
        super().__init__(self.SPACE, 0.01, seed)

    def truth(self, p: dict) -> float | None:
        off = math.log10(p["lr"]) - self.lr[p["name"]]
        if off > 1:
            return None
        tail = self.wsd + 2 * (p["share"] - self.share) ** 2 if p["schedule"] == "wsd" else 0.0
        return 3 + self.cost[p["name"]] + 0.3 * off**2 + tail + 1.5 * (p["dropout"] - self.dropout) ** 2

    def best(self):
        name = min(self.cost, key=self.cost.get)
        schedule = {"schedule": "wsd", "share": self.share} if self.wsd < 0 else {"schedule": "cosine"}
        return self.space.encode({"name": name, "lr": 10 ** self.lr[name], "dropout": self.dropout, **schedule})


class Eight(Surface):
    """Eight settings, of which two matter much, one a little and five hardly: most of a space usually is so."""

    SPACE = {f"x{i}": {"log": [1e-3, 1]} for i in range(8)}

    def __init__(self, seed: int):
        rng = np.random.default_rng([4, seed])
        self.at, self.order = rng.uniform(-2.5, -0.5, 8), rng.permutation(8)
        super().__init__(self.SPACE, 0.01, seed)

    def truth(self, p: dict) -> float | None:
        off = np.array([math.log10(p[f"x{i}"]) for i in range(8)]) - self.at
        off = off[self.order]
        if off[0] > 1.4:
            return None
        much = 0.4 * (off[0] + 0.3 * off[1]) ** 2 + 0.25 * off[1] ** 2
        return float(3 + much + 0.08 * abs(off[2]) + 0.004 * np.sum(off[3:] ** 2))

    def best(self):
        return self.space.encode({f"x{i}": 10 ** self.at[i] for i in range(8)})


class TwoValleys(Surface):
    """Two valleys of different depth: the nearer and wider one is not the better, against searches that only go downhill."""

    SPACE = {"lr": {"log": [1e-5, 1e-1]}, "scale": {"log": [1e-2, 1e2]}, "decay": {"uniform": [0, 1]}}

    def __init__(self, seed: int):
        rng = np.random.default_rng([5, seed])
        self.deep, self.wide = rng.uniform([0.1, 0.1], [0.4, 0.9]), rng.uniform([0.6, 0.1], [0.9, 0.9])
        self.decay = rng.uniform(0.2, 0.8)
        super().__init__(self.SPACE, 0.01, seed)

    def truth(self, p: dict) -> float | None:
        u = self.space.encode(p)
        deep = 0.7 * math.exp(-np.sum((u[:2] - self.deep) ** 2) / (2 * 0.13**2))
        wide = 0.5 * math.exp(-np.sum((u[:2] - self.wide) ** 2) / (2 * 0.22**2))
        return float(3.5 - max(deep, wide) + 0.3 * (u[2] - self.decay) ** 2)

    def best(self):
        return np.array([*self.deep, self.decay])


class Loud(Surface):
    """Five settings; runs near the cliff, which is near the best, are up to six times as noisy. Made when `own` was fixed."""

    SPACE = {"lr": {"log": [1e-5, 1e-1]}, "warmup": {"log_int": [1, 1000]}, "decay": {"log": [1e-3, 1]},
             "dropout": {"uniform": [0, 0.5]}, "clip": {"log": [0.1, 10]}}

    def __init__(self, seed: int):
        rng = np.random.default_rng([6, seed])
        self.lr, self.warm, self.decay = rng.uniform(-3.5, -2), rng.uniform(1, 2.5), rng.uniform(-2.5, -0.5)
        self.dropout = rng.uniform(0, 0.2)
        super().__init__(self.SPACE, 0.01, seed)

    def off(self, p: dict) -> float:
        """Returns how far, in powers of ten, a rate is above the best for its warm-up and clipping."""
        warm, clip = math.log10(p["warmup"]) - self.warm, max(math.log10(p["clip"]), 0)
        return math.log10(p["lr"]) - self.lr - 0.25 * warm + 0.2 * clip

    def truth(self, p: dict) -> float | None:
        off, decay = self.off(p), math.log10(p["decay"]) - self.decay
        if off > 0.6:
            return None
        return (3 + 0.35 * abs(off) ** 1.5 + 0.05 * decay**2 + 0.05 * (math.log10(p["warmup"]) - self.warm) ** 2
                + 1.5 * max(p["dropout"] - self.dropout, 0) ** 2 + 0.4 * max(self.dropout - p["dropout"], 0) ** 2)

    def louder(self, p: dict) -> float:
        return 1 + 5 * min(max(self.off(p) / 0.6, 0.0), 1.0)

    def best(self):
        return self.space.encode({"lr": 10**self.lr, "warmup": round(10**self.warm), "decay": 10**self.decay,
                                  "dropout": self.dropout, "clip": 1.0})


SURFACES = {"learning_rate": LearningRate, "ridge": Ridge, "choices": Choices, "eight": Eight, "two_valleys": TwoValleys,
            "loud": Loud}


def regrets(surface: Surface, sampler: str, seed: int, budgets: tuple[int, ...] = BUDGETS) -> list[float]:
    """Returns the regret after each budget; a study without a feasible trial counts as 1."""
    known, truths = [], []
    tpe = native_tpe(seed) if sampler == "tpe" else None
    for number in range(budgets[-1]):
        if tpe is not None:
            trial, params = tpe.ask(), {}
            for dim in surface.space.dimensions:
                if surface.space.counts(dim, params):
                    params[dim.key] = suggested(trial, dim)
        else:
            params = ask(sampler, surface.space, known, [], number, seed)
        value = surface.observed(params, number)
        if tpe is not None:
            import optuna

            tpe.tell(trial, value, state=optuna.trial.TrialState.PRUNED if value is None else None)
        known.append((params, value))
        truths.append(surface.truth(params))
    out = []
    for budget in budgets:
        feasible = [i for i in range(budget) if known[i][1] is not None]
        worst = 1.0 if not feasible else truths[min(feasible, key=lambda i: known[i][1])] - surface.lowest
        out.append(worst)
    return out


def native_tpe(seed: int):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))


def suggested(trial, dim):
    if dim.kind == "choice":
        return trial.suggest_categorical(dim.key, list(dim.options))
    if dim.kind in ("int", "log_int"):
        return trial.suggest_int(dim.key, int(dim.low), int(dim.high), log=dim.is_log)
    if dim.kind == "one_minus_log":
        return 1 - trial.suggest_float(dim.key, 1 - dim.high, 1 - dim.low, log=True)
    return trial.suggest_float(dim.key, dim.low, dim.high, log=dim.is_log)


def table(names: list[str], samplers: list[str], seeds: int) -> dict:
    """Returns {surface: {sampler: median regret after each budget}}, printing each line as it is known."""
    out: dict = {}
    for name in names:
        for sampler in samplers:
            began = time.perf_counter()
            found = np.median([regrets(SURFACES[name](seed), sampler, seed) for seed in range(seeds)], axis=0)
            out.setdefault(name, {})[sampler] = [float(x) for x in found]
            each = (time.perf_counter() - began) / seeds / BUDGETS[-1]
            figures = "".join(f"{x:>10.4f}" for x in found)
            print(f"{name:<14}{sampler:<14}{figures}{1000 * each:>12.1f} ms a choice", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--surfaces", default=",".join(SURFACES))
    parser.add_argument("--samplers", default="random,quasi_random,tpe,own")
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    print(f"{'surface':<14}{'sampler':<14}{''.join(f'{n:>10}' for n in BUDGETS)}   (median regret of {args.seeds} seeds)")
    table(args.surfaces.split(","), args.samplers.split(","), args.seeds)


if __name__ == "__main__":
    main()
