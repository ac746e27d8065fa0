"""How an outside engine writes rollouts in place of our sampler, and how it is checked against it.

B sample, P prompt slot, R response slot, S = P + R.
"""

from typing import Protocol

import numpy as np
from flax import nnx

from jaxllm.generate.config import SampleConfig
from jaxllm.generate.continuous import Sampler
from jaxllm.generate.rollout_arrays import Rollout


class RolloutEngine(Protocol):
    """What the loop of RLHF asks of whatever writes its rollouts; `Sampler` is one."""

    def load(self, params: nnx.State) -> None:
        """Takes in the trainer's parameters; what is sampled afterwards is theirs alone."""

    def sample(self, prompts: list[list[int]], *, n: int, cfg: SampleConfig, seeds, rows: int | None = None,
               prompt_slots: int, response_slots: int, stop_ids: tuple[int, ...] = ()) -> Rollout:
        """Returns n responses to each prompt, in the order of the prompts, as `Sampler.sample` does; its seeds may give
        other tokens than the sampler's."""


def check_against(engine: RolloutEngine, own: Sampler, prompts: list[list[int]], *, n: int, cfg: SampleConfig, seeds,
                  prompt_slots: int, response_slots: int, stop_ids: tuple[int, ...] = (), atol: float = 1e-4) -> str | None:
    """Returns the first difference between an engine and our sampler, both with the same weights, in one line; None: there
    is none.

    Compares their greedy responses token by token, a token that is as likely as ours within `atol` being as good; then, of
    greedy responses and of those that the engine draws with `cfg`, each log-probability with what the full forward of
    training gives the same tokens, and where each response ends.
    """
    how = dict(prompt_slots=prompt_slots, response_slots=response_slots, stop_ids=stop_ids)
    greedy = SampleConfig(max_tokens=cfg.max_tokens, temperature=0.0)
    theirs, ours = (one.sample(prompts, n=1, cfg=greedy, seeds=seeds[: len(prompts)], **how) for one in (engine, own))
    found = _scores(theirs, own, 0.0, atol, prompts, 1, "greedy") or _ends(theirs, own, cfg.max_tokens, stop_ids, "greedy")
    found = found or _greedy_tokens(theirs, ours, own, atol)
    if found:
        return found
    drawn, kind = engine.sample(prompts, n=n, cfg=cfg, seeds=seeds, **how), f"temperature {cfg.temperature:g}"
    return _scores(drawn, own, cfg.temperature, atol, prompts, n, kind) or _ends(drawn, own, cfg.max_tokens, stop_ids, kind)


def _scores(theirs: Rollout, own: Sampler, temperature: float, atol: float, prompts, n: int, kind: str) -> str | None:
    """Compares prompts and log-probabilities of the tokens that the engine wrote."""
    for i in range(len(theirs.token_BS)):
        if i // n >= len(prompts) or theirs.prompt(i) != list(prompts[i // n]):
            return f"{kind}, sample {i + 1}: its prompt is {theirs.prompt(i)}, should be {list(prompts[i // n])}"
    if len(theirs.token_BS) != n * len(prompts):
        return f"{kind}: {len(theirs.token_BS)} samples, should be {n * len(prompts)}"
    want_BR = own.score(theirs, temperature)
    wrong_BR = ~(np.abs(theirs.logp_BR - want_BR) <= atol) & (theirs.action_BR > 0)  # so written, NaN is wrong
    for i, t in np.argwhere(wrong_BR)[:1]:
        return (f"{kind}, sample {i + 1}, token {t + 1} (id {theirs.response(i)[t]}): log-probability "
                f"{theirs.logp_BR[i, t]:.6f}, should be {want_BR[i, t]:.6f} within {atol:g}")
    return None


def _ends(theirs: Rollout, own: Sampler, max_tokens: int, stop_ids, kind: str) -> str | None:
    """Looks for responses that go on after an end token, or stop before one."""
    ends = {own.eos_id, *stop_ids}
    for i in range(len(theirs.token_BS)):
        response = theirs.response(i)
        at = next((t for t, token in enumerate(response) if token in ends), None)
        if at is not None and at < len(response) - 1:
            return f"{kind}, sample {i + 1}: token {at + 1} is an end token, and {len(response) - 1 - at} more follow it"
        if theirs.ended_B[i] != (at is not None):
            return f"{kind}, sample {i + 1}: ended is {bool(theirs.ended_B[i])}, its last token is {response[-1:]}"
        most = min(max_tokens, own.cfg.max_seq_len - len(theirs.prompt(i)))
        if at is None and len(response) != most:
            return f"{kind}, sample {i + 1}: stops after {len(response)} tokens without an end token, should go on to {most}"
    return None


def _greedy_tokens(theirs: Rollout, ours: Rollout, own: Sampler, atol: float) -> str | None:
    """Compares greedy responses up to their first tie."""
    for i in range(len(ours.token_BS)):
        for t, (a, b) in enumerate(zip(theirs.response(i), ours.response(i), strict=False)):
            if a == b:
                continue
            if theirs.logp_BR[i, t] < ours.logp_BR[i, t] - atol:
                return (f"greedy, sample {i + 1}, token {t + 1}: id {a} at log-probability {theirs.logp_BR[i, t]:.6f}, "
                        f"should be id {b} at {ours.logp_BR[i, t]:.6f}")
            break  # a tie, after which the two go on differently
    return None
