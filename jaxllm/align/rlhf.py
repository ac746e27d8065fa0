"""The loop of RLHF: sample, score, read, update; then log, evaluate, show and save what is due. Separate from pretraining's.

An iteration is a function of the state, the settings and its number alone: prompts, sampling seeds and the order of minibatches
come from the run's seed and that number. So a run that is killed goes on from its last checkpoint as if it had not been.

Axes: B response, S slot.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.align.best_of import best_rows
from jaxllm.align.rewards import Scored
from jaxllm.align.rl_program import RLProgram
from jaxllm.align.rlhf_config import RLHFConfig
from jaxllm.align.rules import Sample
from jaxllm.align.self_consistency import answer_rule, shares_right
from jaxllm.data.prompts import Prompt
from jaxllm.errors import RunError, Stopped
from jaxllm.generate.config import SampleConfig
from jaxllm.generate.engine import power_of_two
from jaxllm.partition import row_sharding
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.log import RunLog, clock, memory
from jaxllm.train.loop import StopRequest
from jaxllm.train.state import TrainState

PENDING = ("token_BS", "first_B", "length_B", "action_BR", "logp_BR", "ended_B", "score_B")  # what waits with rollout.stale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything one RLHF run is made of."""

    cfg: RLHFConfig
    program: RLProgram
    sampler: Any  # generate/continuous.Sampler, or another engine with its interface
    reference: Any  # parameters of the model that the KL is measured to
    prompts: Callable[[int], list[Prompt]]  # iteration -> its prompts
    held_out: list[Prompt]  # for evaluation; empty: none is made
    shown: list[Prompt]  # whose responses people see, before, during and after
    decode: Callable[[list[int]], str]
    score: Callable[[list[Sample]], Scored]
    made_of: dict  # what the prompts are made of, which with the iteration is the data position
    checkpoints: Checkpoints
    log: RunLog
    text: Callable[[int], Iterator[dict]] | None = None  # optimizer steps done -> batches of pretraining text
    text_loss: Callable[[Any], dict] | None = None  # params -> the language model's held-out loss
    tasks: tuple = ()  # few_shot.Task, asked of the policy as of a base model
    player: Any = None  # turns.Player, where an environment answers the policy
    tokens: int = 0  # generated before this start
    errors: dict | None = None  # the rewards' count of samples that could not be scored, part of the data position


def train(loop: Loop, state: TrainState, start: int) -> TrainState:
    """Takes a run from iteration `start` to its end; returns the last state. Raises Stopped or RunError."""
    cfg, steps = loop.cfg, loop.cfg.train.iterations
    text = None if loop.text is None else loop.text(int(state.opt_state["updates"]))
    tokens, began, aside = loop.tokens, time.perf_counter(), 0.0
    if start == 0:
        _aside(loop, state, 0, tokens, first=True)
        began = time.perf_counter()
    waiting = _pending(loop, state, start) if cfg.rollout.stale else None
    with StopRequest() as stop:
        for step in range(start + 1, steps + 1):
            state, line, waiting = _iteration(loop, state, step, text, waiting)
            tokens += line.pop("new_tokens")
            line = {"step": step, "tokens": tokens, "episodes": step * _n_responses(cfg), "time": round(time.time(), 3)} | line
            seconds = (time.perf_counter() - began - aside) / (step - start)
            if step % cfg.log.every == 0 or step == steps:
                loop.log.metrics(line | memory())
                loop.log.show(_progress(line, steps, seconds * (steps - step)))
            stopping, finished = stop.agreed(step, cfg.log.every), step == steps
            before = time.perf_counter()
            _aside(loop, state, step, tokens, stopping=stopping is not None)
            aside += time.perf_counter() - before
            if stopping is not None and not finished:
                loop.checkpoints.wait()
                told = f"after iteration {step}; run the same command to go on"
                loop.log.incident(step, "stopped", f"stopped by {stopping} {told}")
                raise Stopped(f"stopped, saved {told}")
    loop.checkpoints.wait()
    return state


def _iteration(loop: Loop, state: TrainState, step: int, text, waiting):
    """Returns (the next state, what is logged, what the next iteration has waiting)."""
    cfg, times = loop.cfg, {}
    with _timed(times, "rollout_s"):
        arrays, told = waiting or _collected(loop, state.params, step)
    if cfg.rollout.stale and step < cfg.train.iterations:
        with _timed(times, "rollout_s"):  # with the weights that this iteration is about to change
            waiting = _collected(loop, state.params, step + 1)
    with _timed(times, "read_s"):
        batch = jax.device_put(trimmed(arrays), row_sharding(loop.program.mesh))
        batch, moments, read = loop.program.read(state, loop.reference, batch)
        read = {k: float(v) for k, v in jax.device_get(read).items()}
    with _timed(times, "update_s"):
        state, updated = _updates(loop, state, step, batch, text)
        state = loop.program.finish(state, jnp.float32(read["kl"]), moments)
        jax.block_until_ready(state.step)
    if cfg.rollout.stale:
        state = _with_pending(loop, state, waiting)
    n_new = int(arrays["action_BR"].sum())
    line = read | updated | told | {"loss": updated["policy_loss"], "new_tokens": n_new} | times
    seconds = sum(times.values())
    line |= {"tokens_per_s": round(n_new / max(seconds, 1e-9), 1), "step_s": round(seconds, 4),
             "rollout_tokens_per_s": round(n_new / max(times["rollout_s"], 1e-9), 1)}
    return state, line, waiting


def trimmed(arrays: dict) -> dict:
    """Returns the arrays without response slots that no response fills, but for a sixteenth: each size is a program."""
    R, P = arrays["action_BR"].shape[1], arrays["token_BS"].shape[1] - arrays["action_BR"].shape[1]
    step = max(power_of_two(R) // 16, 1)
    kept = min(R, -(-max(int(arrays["length_B"].max()), 1) // step) * step)
    cut = {"token_BS": P + kept, "action_BR": kept, "logp_BR": kept}
    return {k: x[:, : cut[k]] if k in cut else x for k, x in arrays.items()}


def _collected(loop: Loop, params, step: int):
    """Returns (arrays of an iteration's responses with their scores, metrics of the rewards)."""
    cfg = loop.cfg
    loop.sampler.load(params)
    arrays, _, scored = _sampled(loop, loop.prompts(step - 1), step, 0)
    if cfg.algorithm == "dapo":
        arrays, scored = _informative(loop, step, arrays, scored)
    for incident in scored.incidents:
        loop.log.incident(step, "reward", str(incident))
    told = {f"reward_{name}": float(np.mean(part_B)) for name, part_B in scored.part_B.items()}
    return arrays | {"score_B": scored.score_B}, told


def _sampled(loop: Loop, prompts: list[Prompt], step: int, refill: int):
    cfg = loop.cfg
    n = cfg.rollout.samples
    how = SampleConfig(max_tokens=cfg.rollout.response_len, temperature=cfg.rollout.temperature, top_k=cfg.rollout.top_k,
                       top_p=cfg.rollout.top_p)
    return _written(loop, prompts, n, how, [cfg.run.seed, step, refill])


def _written(loop: Loop, prompts: list[Prompt], n: int, how: SampleConfig, seed: list[int]):
    """Returns (arrays, samples, scores) of n responses to each prompt, in one turn or as episodes."""
    cfg, slots = loop.cfg, dict(prompt_slots=loop.cfg.prompts.prompt_len, response_slots=loop.cfg.rollout.response_len)
    if loop.player is not None:
        return _played(loop, [p.row for p in prompts for _ in range(n)], how, seed, slots)
    # by place in the whole batch, wherever that is computed
    seeds_B = np.random.SeedSequence(seed).generate_state(len(prompts) * n)
    rollout = loop.sampler.sample([p.tokens for p in prompts], n=n, cfg=how, seeds=seeds_B, rows=cfg.rollout.rows, **slots)
    arrays = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    samples = [samples_of(loop, prompts[i // n], arrays, i, cfg.prompts.prompt_len) for i in range(len(prompts) * n)]
    return arrays, samples, loop.score(samples)


def _played(loop: Loop, rows: list[dict], how: SampleConfig, seed: list[int], slots: dict):
    """Returns (arrays, samples, scores) of an episode of each row: the environment's score and the rewards'."""
    cfg, turns = loop.cfg, itertools.count()

    def generate(prompts):
        seeds_X = np.random.SeedSequence([*seed, 1 + next(turns)]).generate_state(len(prompts))
        longest = slots["prompt_slots"] + slots["response_slots"]
        rollout = loop.sampler.sample(prompts, n=1, cfg=how, seeds=seeds_X, rows=cfg.rollout.rows, prompt_slots=longest,
                                      response_slots=slots["response_slots"])
        return [(rollout.response(i), rollout.logp_BR[i, : rollout.length_B[i]], bool(rollout.ended_B[i]))
                for i in range(len(prompts))]

    played = loop.player.play(rows, generate, **slots)
    scored = loop.score(played.samples)
    arrays = {name: getattr(played, name) for name in PENDING if name != "score_B"}
    parts = scored.part_B | {"environment": played.score_B, "turns": played.turns_B.astype(np.float32)}
    return arrays, played.samples, Scored(scored.score_B + played.score_B, parts, scored.incidents + played.incidents)


def samples_of(loop: Loop, prompt: Prompt, arrays: dict, i: int, prompt_slots: int) -> Sample:
    """Returns response i as rewards see it: cut at its end token, which is not part of the text."""
    tokens = arrays["token_BS"][i, prompt_slots : prompt_slots + int(arrays["length_B"][i])].tolist()
    ended = bool(arrays["ended_B"][i])
    return Sample(prompt=prompt.text, response=loop.decode(tokens[:-1] if ended else tokens), tokens=tokens, ended=ended,
                  row=prompt.row, prompt_tokens=prompt.tokens)


def _informative(loop: Loop, step: int, arrays, scored: Scored):
    """Returns the batch with groups of equal scores replaced by groups of further prompts (DAPO's dynamic sampling); where
    these do not suffice, such groups fill up what is missing."""
    cfg, n = loop.cfg, loop.cfg.rollout.samples
    found, dull = [], []
    for refill in range(cfg.group.refills + 1):
        if refill:
            # prompts of iterations that the run itself never comes to
            prompts = loop.prompts(cfg.train.iterations * refill + step - 1)
            arrays, _, scored = _sampled(loop, prompts, step, refill)
        for at in range(0, len(scored.score_B), n):
            rows = slice(at, at + n)
            group = ({k: v[rows] for k, v in arrays.items()}, scored.score_B[rows],
                     {k: v[rows] for k, v in scored.part_B.items()}, scored.incidents if at == 0 else [])
            (found if np.ptp(group[1]) > 0 else dull).append(group)
        if len(found) >= cfg.rollout.prompts:
            break
    kept = (found + dull)[: cfg.rollout.prompts]
    arrays = {k: np.concatenate([g[0][k] for g in kept]) for k in kept[0][0]}
    part_B = {k: np.concatenate([g[2][k] for g in kept]) for k in kept[0][2]}
    incidents = [one for g in found + dull for one in g[3]]
    return arrays, Scored(np.concatenate([g[1] for g in kept]), part_B, incidents)


def _updates(loop: Loop, state: TrainState, step: int, batch, text):
    """Returns (state, metrics) after the iteration's epochs, each in a fresh order of rows."""
    cfg, found = loop.cfg, []
    n, rng = _n_responses(cfg), np.random.default_rng([cfg.run.seed, step, 1])
    for _ in range(cfg.train.epochs):
        for row_B in rng.permutation(n).astype(np.int32).reshape(cfg.train.minibatches, -1):
            given = None if text is None else jax.device_put(next(text), row_sharding(loop.program.mesh))
            state, metrics = loop.program.update(state, batch, row_B, given)
            found.append(metrics)
            if len(found) == 1:
                _check_gap(loop, step, metrics)
            if cfg.ppo.target_kl is not None and float(metrics["approx_kl"]) > cfg.ppo.target_kl:
                left = cfg.train.epochs * cfg.train.minibatches - len(found)
                return state, _means(loop, step, found) | {"early_stop": left}
    return state, _means(loop, step, found)


def _check_gap(loop: Loop, step: int, metrics) -> None:
    """Stops the run where sampler and trainer disagree on what the sampler has just written: before the first update of an
    iteration, their probabilities are of the same weights."""
    gap = math.sqrt(max(2 * float(metrics["approx_kl"]), 0.0))
    if gap > loop.cfg.rollout.gap:
        message = (f"iteration {step}: log-probabilities of sampler and trainer differ by {gap:.3g} nats a token (root mean "
                   f"square), more than rollout.gap={loop.cfg.rollout.gap}")
        loop.log.incident(step, "gap", message)
        raise RunError(message)


def _means(loop: Loop, step: int, found: list[dict]) -> dict:
    """Returns the iteration's metrics: means over its optimizer steps; raises RunError for what is no number."""
    read = jax.device_get(found)
    if not all(bool(m["finite"]) and bool(m.get("critic_finite", True)) for m in read):
        good = loop.checkpoints.steps()
        message = f"iteration {step}: a gradient or weight is not finite; checkpoints: {', '.join(map(str, good)) or 'none'}"
        loop.log.incident(step, "not_finite", message)
        raise RunError(message)
    first, names = read[0], [k for k in read[0] if "finite" not in k]
    gap = math.sqrt(max(2 * float(first["approx_kl"]), 0.0))
    return {k: float(np.mean([m[k] for m in read])) for k in names} | {"sampler_gap": gap, "lr": float(read[-1]["lr"])}


# ---------------------------------------------------------------- what is due besides


def _aside(loop: Loop, state: TrainState, step: int, tokens: int, *, stopping: bool = False, first: bool = False):
    """Evaluates, shows samples and saves, as is due."""
    cfg, finished = loop.cfg, step == loop.cfg.train.iterations
    if cfg.train.eval_every and (first or finished or step % cfg.train.eval_every == 0):
        line = evaluate(loop, state)
        if line:
            loop.log.metrics({"step": step, "tokens": tokens, "time": round(time.time(), 3), **line})
            told = ", ".join(f"{k.removeprefix('eval_')} {v:.4g}" for k, v in line.items())
            loop.log.say(f"  held-out at iteration {step}: {told}")
    if cfg.train.sample_every and loop.shown and (first or finished or step % cfg.train.sample_every == 0):
        loop.sampler.load(state.params)
        how = SampleConfig(max_tokens=cfg.rollout.response_len, temperature=cfg.rollout.temperature)
        for one in _written(loop, loop.shown, 1, how, [cfg.run.seed, 3])[1]:
            loop.log.sample(step, one.prompt, one.response)
    if not first and (finished or stopping or step % cfg.checkpoint.every == 0):
        position = {"step": step, "made_of": loop.made_of, "tokens": tokens, "errors": loop.errors or {},
                    "episode_errors": loop.player.errors if loop.player else 0}
        loop.checkpoints.save(step, state, position)


def evaluate(loop: Loop, state: TrainState) -> dict:
    """Returns the held-out prompts' mean score, greedy and sampled, of the policy and of its running mean where one is kept;
    with several samples of each, the shares of right answers (self_consistency.py) and the best sample's score;
    and what alignment costs: the language model's held-out loss and few-shot tasks, beside the ptx coefficient."""
    cfg, found = loop.cfg, {}
    prompts, several = loop.held_out[: cfg.train.eval_prompts], cfg.train.eval_samples
    rule = answer_rule(cfg.rewards, cfg.environment.answer if cfg.environment.kind == "answer" else None)
    kept = {"": state.params} | ({"ema_": state.opt_state["ema"]} if "ema" in state.opt_state else {})
    for name, params in kept.items() if prompts else ():
        loop.sampler.load(params)
        for kind, temperature, n in (("greedy", 0.0, 1), ("score", cfg.rollout.temperature, several)):
            how = SampleConfig(max_tokens=cfg.rollout.response_len, temperature=temperature)
            arrays, samples, scored = _written(loop, prompts, n, how, [cfg.run.seed, 2])
            found[f"eval_{name}{kind}"] = float(np.mean(scored.score_B))
            found[f"eval_{name}{kind}_ended"] = float(np.mean(arrays["ended_B"]))
            if several > 1 and rule is not None:
                shares = shares_right(rule, samples, n, scored.score_B)
                found |= {f"eval_{name}{'greedy_' if kind == 'greedy' else ''}{what}": x for what, x in shares.items()}
            if n > 1:
                found[f"eval_{name}best_score"] = float(np.mean(scored.score_B[best_rows(scored.score_B, group_size=n)]))
    tax = loop.text_loss(state.params) if loop.text_loss else {}
    if loop.tasks:
        loop.sampler.load(state.params)
        for task in loop.tasks:
            tax |= task.scores(loop.sampler)
    return found | tax | ({"ptx_coef": cfg.ptx.coef} if tax else {})


# ---------------------------------------------------------------- responses that wait (rollout.stale)


def _with_pending(loop: Loop, state: TrainState, waiting) -> TrainState:
    """Returns the state with the responses that the next iteration will use, so that a checkpoint holds them."""
    if waiting is None:
        return state
    arrays = {k: waiting[0][k] for k in PENDING}
    arrays["ended_B"] = arrays["ended_B"].astype(np.float32)  # a checkpoint's sums are of numbers
    arrays = jax.device_put(arrays, row_sharding(loop.program.mesh))
    return dataclasses.replace(state, opt_state=state.opt_state | {"pending": arrays})


def _pending(loop: Loop, state: TrainState, start: int):
    """Returns what a run that goes on had waiting; None at its start."""
    if start == 0:
        return None
    return {k: np.asarray(v) for k, v in jax.device_get(state.opt_state["pending"]).items()}, {}


def _n_responses(cfg: RLHFConfig) -> int:
    return cfg.rollout.prompts * cfg.rollout.samples


def _progress(line: dict, steps: int, seconds_left: float) -> str:
    return "  ".join([f"iteration {line['step']}/{steps}", f"score {line['score']:.3f}", f"KL {line['kl']:.3f}",
                      f"loss {line['loss']:.4f}", f"{line['tokens_per_s']:,.0f} tok/s", f"ETA {clock(seconds_left)}"])


class _timed:
    """Adds the seconds of a block to times[name]."""

    def __init__(self, times: dict, name: str):
        self.times, self.name = times, name

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *exception):
        self.times[self.name] = round(self.times.get(self.name, 0.0) + time.perf_counter() - self.began, 5)
