"""How far a reward model can be trusted: accuracy, calibration and length bias on held-out comparisons, and the scale of its
scores.

Axes: B prompt, K answer, T position, O objective.
"""

import json
import pathlib
import sys
from functools import partial

import jax
import numpy as np

from jaxllm.align.reward import scores
from jaxllm.align.reward_config import RewardVerb
from jaxllm.align.reward_model import write_scale
from jaxllm.data.preference import Groups, PreferenceRows, Preferences
from jaxllm.partition import replicated, row_sharding
from jaxllm.train.run_folder import write_atomically

BINS = 10  # of the predicted probability that the better answer is the better one


def report(cfg: RewardVerb, folder: pathlib.Path, graph, dtype, params, data: Preferences, mesh) -> dict:
    """Writes reward.json and the scores' scale into the run's folder, and prints what they say; returns it."""
    score = jax.jit(partial(scores, graph, dtype), out_shardings=replicated(mesh))

    def scored(groups: Groups):
        for batch in PreferenceRows(groups, cfg.train.batch_size).batches():
            yield batch, np.asarray(score(params, jax.device_put(batch, row_sharding(mesh))))

    given = data.demonstrations if len(data.demonstrations) else data.train
    of_answers = np.concatenate([s_BKO[batch["present_BK"]] for batch, s_BKO in scored(given)])
    scale = write_scale(folder, of_answers, unit_variance=cfg.unit_variance)
    held_out, what = (data.validation, "held out") if len(data.validation) else (data.train, "trained on")
    pairs = [pairs_of(batch, s_BKO) for batch, s_BKO in scored(held_out)]
    pairs = {name: np.concatenate([p[name] for p in pairs]) for name in pairs[0]}
    found = {"measured_on": what, "zero_is_the_mean_of": "demonstrations" if len(data.demonstrations) else "training answers",
             "scale": scale, "objectives": {name: measures({k: v[pairs["objective"] == i] for k, v in pairs.items()})
                                            for i, name in enumerate(cfg.data.objectives)}}
    write_atomically(folder / "reward.json", json.dumps(found, indent=1) + "\n")
    for name, one in found["objectives"].items():
        print(f"{name}: {one.get('pairs', 0):,} pairs {what}" + (
            f", accuracy {one['accuracy']:.3f} ± {one['accuracy_error']:.3f}, calibration error "
            f"{one['calibration_error']:.3f}, right where the better is longer {one['accuracy_longer_better']:.3f}, shorter "
            f"{one['accuracy_shorter_better']:.3f}, correlation of score and length {one['length_correlation']:.2f}"
            if one.get("pairs") else ""), file=sys.stderr)
    return {"reward": found}


def pairs_of(batch: dict, score_BKO: np.ndarray) -> dict[str, np.ndarray]:
    """Returns, of every pair of differently ranked answers, the difference of their scores (better - worse) and of their
    lengths."""
    out: dict[str, list] = {"difference": [], "longer": [], "objective": [], "score": [], "length": []}
    answer_BK = batch["length_BK"] - batch["prompt_BK"]
    for b, o in enumerate(batch["objective_B"]):
        present = np.flatnonzero(batch["present_BK"][b])
        for k in present:
            for j in present:
                if batch["rank_BK"][b, k] < batch["rank_BK"][b, j]:
                    s = score_BKO[b, :, o]
                    out["difference"].append(s[k] - s[j])
                    out["longer"].append(int(answer_BK[b, k]) - int(answer_BK[b, j]))
                    out["objective"].append(o)
                    out["score"].append(s[k] - s[present].mean())
                    out["length"].append(answer_BK[b, k] - answer_BK[b, present].mean())
    return {name: np.asarray(values, np.float64) for name, values in out.items()}


def measures(pairs: dict[str, np.ndarray]) -> dict:
    """Returns what the differences of scores say: accuracy with its standard error, calibration, and what length does to both.

    Calibration: of pairs whose better answer is given the probability σ(difference), in bins, folded so that it is at least ½,
    how often it is right; the error is the mean distance of both, weighted by pairs.
    """
    d, n = pairs["difference"], len(pairs["difference"])
    if not n:
        return {"pairs": 0}
    right = (d > 0) + 0.5 * (d == 0)
    sure = 1 / (1 + np.exp(-np.abs(d)))
    at = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [{"predicted": float(sure[at == i].mean()), "right": float(right[at == i].mean()), "pairs": int((at == i).sum())}
            for i in range(BINS) if (at == i).any()]
    longer, shorter = pairs["longer"] > 0, pairs["longer"] < 0
    varied = np.std(pairs["score"]) > 0 and np.std(pairs["length"]) > 0
    return {
        "pairs": n, "accuracy": float(right.mean()), "accuracy_error": float((right.mean() * (1 - right.mean()) / n) ** 0.5),
        "calibration": bins, "calibration_error": float(sum(b["pairs"] * abs(b["predicted"] - b["right"]) for b in bins) / n),
        "accuracy_longer_better": float(right[longer].mean()) if longer.any() else float("nan"),
        "accuracy_shorter_better": float(right[shorter].mean()) if shorter.any() else float("nan"),
        "longer_better_share": float(longer.mean()),
        "length_correlation": float(np.corrcoef(pairs["score"], pairs["length"])[0, 1]) if varied else 0.0,
    }
