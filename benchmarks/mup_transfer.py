r"""Does the best learning rate stay where it is when the model grows? With muP and in the standard parametrisation.

    python benchmarks/mup_transfer.py --text=shared/data/tinyshakespeare/input.txt.gz --results=runs/mup-transfer.jsonl \
        --picture=docs/pictures/mup-transfer.svg
    python benchmarks/mup_transfer.py --text=... --results=... --over=depth      # the same over 2 to 16 layers

Models of two layers on the bytes of a text, widths 64 to 512 with heads of 32 (or of width 64, 2 to 16 layers), each trained
for a few hundred steps at rates a factor of 2 apart. A size begins around the best rate of the one before it, and goes on to
both sides until two worse rates stand on either side of its best. A rate counts by the mean held-out loss over the seeds. Every
result is written at once; the same command goes on from there. What differs between the two ways is `model.mup` alone, whose
base is the smallest size.
"""

import argparse
import dataclasses
import gzip
import json
import math
import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxllm.model.config import ModelConfig, MuPConfig
from jaxllm.model.formulation import for_platform
from jaxllm.model.heads import LanguageModel
from jaxllm.plan.curves import Curve, Plot, save
from jaxllm.plan.widths import at_width
from jaxllm.platform import start_jax, use_huge_pages
from jaxllm.train.config import OptimConfig
from jaxllm.train.optim import make_optimizer
from jaxllm.train.step import Objective, loss_sum

HEAD, LAYERS, WIDTH, HELD_OUT_ROWS = 32, 2, 64, 256
SIZES = {"width": "64,128,256,512", "depth": "2,4,8,16"}
BEYOND = 2  # worse rates that have to stand on either side of the best
FIRST = -7  # log2 of the rate that the smallest width begins at
WAYS = ("muP", "standard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a UTF-8 file, or one with .gz; its last tenth is held out")
    parser.add_argument("--results", required=True, help="JSON lines that results are added to")
    parser.add_argument("--picture", help=".svg, .png or .pdf")
    parser.add_argument("--over", choices=("width", "depth"), default="width")
    parser.add_argument("--sizes", help="widths, or numbers of layers; the smallest is the base")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=64, help="bytes of a row")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    start_jax()
    sizes = [int(size) for size in (args.sizes or SIZES[args.over]).split(",")]
    settings = {name: getattr(args, name) for name in ("over", "steps", "rows", "length")} | {"base": sizes[0]}
    results = Results(pathlib.Path(args.results), settings)
    raw = pathlib.Path(args.text).read_bytes()
    text_N = np.frombuffer(gzip.decompress(raw) if args.text.endswith(".gz") else raw, np.uint8).astype(np.int32)
    for way in WAYS:
        at = FIRST
        for size in sizes:
            at = best_rate(way, size, at, Trainer(model_of(way, args, size, sizes[0]), text_N, args), results, args)
    moved = told(results, sizes, args)
    if args.picture:
        save(plots_of(results, sizes, moved, args), args.picture)


def model_of(way: str, args, size: int, base: int) -> ModelConfig:
    """Returns the model of one width, or of one number of layers."""
    width, layers = (base, LAYERS) if args.over == "width" else (WIDTH, size)
    model = ModelConfig(d_model=width, n_heads=width // HEAD, n_layers=layers, vocab_size=256, max_seq_len=args.length)
    if args.over == "width":
        return at_width(model, size, base=base if way == "muP" else None)
    return dataclasses.replace(model, mup=MuPConfig(base_width=WIDTH, base_depth=base)) if way == "muP" else model


class Results:
    """Held-out losses by way, size, log2 of the rate and seed, kept in a file; a run that diverged has an infinite one."""

    def __init__(self, path: pathlib.Path, settings: dict):
        self.path, self.settings, self.loss = path, settings, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            row = json.loads(line)
            if row["settings"] == settings:
                key = row["way"], row["size"], row["log2_lr"], row["seed"]
                self.loss[key] = math.inf if row["loss"] is None else row["loss"]

    def add(self, key, loss: float, seconds: float) -> None:
        self.loss[key] = loss if math.isfinite(loss) else math.inf
        row = dict(zip(("way", "size", "log2_lr", "seed"), key, strict=True))
        row |= {"loss": loss if math.isfinite(loss) else None, "seconds": round(seconds, 1), "settings": self.settings}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def means(self, way: str, size: int, seeds: int) -> dict[int, float]:
        """Returns the mean loss of each rate that all seeds were trained at."""
        rates = {k[2] for k in self.loss if k[:2] == (way, size)}
        full = {r: [self.loss.get((way, size, r, s)) for s in range(seeds)] for r in rates}
        return {r: float(np.mean(found)) for r, found in sorted(full.items()) if None not in found}


def best_rate(way: str, size: int, at: int, trainer, results: Results, args) -> int:
    """Trains at rates around 2^at until the best has worse ones on either side; returns its log2."""
    while True:
        found = results.means(way, size, args.seeds)
        best = min(found, key=found.get, default=at)
        missing = [r for r in (best, *(best + side * i for i in range(1, BEYOND + 1) for side in (1, -1))) if r not in found]
        if not missing:
            return best
        for seed in range(args.seeds):
            if (key := (way, size, missing[0], seed)) not in results.loss:
                began = time.perf_counter()
                loss = trainer.loss(2.0 ** missing[0], seed)
                results.add(key, loss, time.perf_counter() - began)
                print(f"{way:<9} {args.over} {size:<5} lr 2^{missing[0]:<4} seed {seed}  loss {loss:.4f}  "
                      f"{time.perf_counter() - began:.0f} s", flush=True)


class Trainer:
    """Trains one model at any rate and seed with programs that are compiled once.

    S step, B row, T position. An update is the rate times something that does not depend on it, weight decay included.
    """

    def __init__(self, model: ModelConfig, text_N, args):
        self.model, self.text_N, self.args, self.form = model, text_N, args, for_platform(jax.default_backend())
        self.programs = None

    def compiled(self):
        graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(self.model, self.form, rngs=nnx.Rngs(0))))
        cfg = OptimConfig(lr=1.0, schedule="cosine", warmup=max(self.args.steps // 10, 1), final=0.0)
        tx = make_optimizer(cfg, self.args.steps, self.model).tx
        objective = Objective(graph, jnp.float32, self.args.length, z_loss=0.0, label_smoothing=0.0, dropout=0.0)

        @jax.jit
        def begin(seed):
            params = nnx.state(LanguageModel(self.model, self.form, rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)
            return params, tx.init(params)

        @partial(jax.jit, donate_argnums=0)
        def step(state, lr, batch):
            params, opt_state = state
            (loss, n), grads = jax.value_and_grad(partial(loss_sum, objective), has_aux=True)(params, batch)
            updates, opt_state = tx.update(jax.tree.map(lambda g: g / n, grads), opt_state, params, value=loss / n)
            return (optax.apply_updates(params, jax.tree.map(lambda u: lr * u, updates)), opt_state), loss / n

        return begin, step, jax.jit(lambda params, batch: jnp.divide(*loss_sum(objective, params, batch)))

    def loss(self, lr: float, seed: int) -> float:
        """Returns the held-out loss in nats a byte of a model that was trained at a peak rate; NaN if it diverged."""
        self.programs = self.programs or self.compiled()
        begin, step, evaluate = self.programs
        train_N, held_N = np.split(self.text_N, [len(self.text_N) * 9 // 10])
        rng, state = np.random.default_rng(seed), begin(seed)
        for _ in range(self.args.steps):
            state, _ = step(state, lr, self.rows(train_N, rng.integers(0, len(train_N) - self.args.length - 1, self.args.rows)))
        starts = np.linspace(0, len(held_N) - self.args.length - 2, HELD_OUT_ROWS).astype(int).reshape(-1, self.args.rows)
        return float(np.mean([evaluate(state[0], self.rows(held_N, start_B)) for start_B in starts]))

    def rows(self, text_N, start_B) -> dict[str, np.ndarray]:
        T = self.args.length
        byte_BS = text_N[start_B[:, None] + np.arange(T + 1)[None]]
        shape = byte_BS[:, 1:].shape
        return {"token_BT": byte_BS[:, :-1], "target_BT": byte_BS[:, 1:], "doc_BT": np.ones(shape, np.int32),
                "pos_BT": np.broadcast_to(np.arange(T, dtype=np.int32), shape), "weight_BT": np.ones(shape, np.float32)}


def told(results: Results, sizes: list[int], args) -> dict[str, int]:
    """Prints the best rates; returns the factor-2 steps between the lowest and the highest of them, by way."""
    moved = {}
    for way in WAYS:
        means = [results.means(way, size, args.seeds) for size in sizes]
        best = [min(found, key=found.get) for found in means]
        moved[way] = max(best) - min(best)
        for size, found, at in zip(sizes, means, best, strict=True):
            kept = found.get(best[0])  # what it costs to keep the small model's rate
            cost = "not run" if kept is None else "diverged" if not math.isfinite(kept) else f"{kept - found[at]:+.4f}"
            print(f"{way:<9} {args.over} {size:<5} best lr 2^{at}  loss {found[at]:.4f}  at 2^{best[0]}: {cost}")
        print(f"{way:<9} the best rate moves by {moved[way]} factor-2 steps from {args.over} {sizes[0]} to {sizes[-1]}")
    return moved


def plots_of(results: Results, sizes: list[int], moved: dict[str, int], args) -> list[Plot]:
    plots = []
    for way, title in zip(WAYS, ("muP", "Standard"), strict=True):
        curves = []
        for i, size in enumerate(sizes):
            found = {r: loss for r, loss in results.means(way, size, args.seeds).items() if math.isfinite(loss)}
            best = min(found, key=found.get)
            near = {r: loss for r, loss in found.items() if loss < found[best] + 0.6}  # what diverged would hide the rest
            curves += [Curve(f"{args.over} {size}", [2.0**r for r in near], list(near.values()), i),
                       Curve("", [2.0**best], [found[best]], i, points=True)]
        plots.append(Plot(f"{title}: the best rate moves {moved[way]} factor-2 steps", "peak learning rate",
                          f"held-out loss after {args.steps} steps, nats a byte", curves))
    return plots


if __name__ == "__main__":
    use_huge_pages()
    main()
