"""Who chooses a trial's settings: random, quasi-random, our own (search_gp.py), or Optuna's TPE and Gaussian process.

A choice is a pure function of the seed, the number of the choice and the results it may know, so that a study that was killed
chooses as one that was not. Optuna is asked and told behind the same function, a new study of its own for each choice.
"""

import numpy as np

from jaxllm.errors import UserError
from jaxllm.plan.search_space import Dimension, Space

ADAPTIVE = ("own", "tpe", "gp")  # those whose choices depend on results


def check(sampler: str) -> None:
    """Raises UserError when the package of a sampler is missing."""
    if sampler in ("tpe", "gp"):
        try:
            import optuna  # noqa: F401
        except ModuleNotFoundError:
            raise UserError(f"sampler={sampler} needs optuna: pip install 'jaxllm[optuna]'; own needs nothing") from None
    if sampler == "gp":
        try:
            import torch  # noqa: F401
        except ModuleNotFoundError:
            raise UserError("sampler=gp needs torch besides optuna: pip install torch; own is a Gaussian process too") from None


Known = list[tuple[dict, float | None]]


def ask(sampler: str, space: Space, known: Known, pending: list[dict], number: int, seed: int) -> dict:
    """Returns the settings of choice `number`, which counts from 0.

    `known`: (settings, loss to be minimised; None where infeasible) of finished trials; `pending`: settings of those under way.
    """
    if sampler == "random":
        return space.decode(np.random.default_rng([seed, number]).random(len(space.dimensions)))
    if sampler in ("quasi_random", "halton"):
        return space.decode(quasi_random(sampler, len(space.dimensions), number, seed))
    if sampler in ("tpe", "gp"):
        return optuna_ask(sampler, space, known, pending, number, seed)
    from jaxllm.plan import search_gp

    if len(known) + len(pending) < search_gp.start_trials(space) or not any(value is not None for _, value in known):
        return space.decode(quasi_random("quasi_random", len(space.dimensions), number, seed))
    return search_gp.ask(space, known, pending, number, seed)


def quasi_random(kind: str, d: int, number: int, seed: int) -> np.ndarray:
    """Returns point `number` [D] of a scrambled Sobol or Halton sequence."""
    from scipy.stats import qmc

    from jaxllm.plan.search_gp import random_state

    engine = (qmc.Halton if kind == "halton" else qmc.Sobol)(d, scramble=True, **random_state(np.random.default_rng(seed)))
    if number:
        engine.fast_forward(number)
    return engine.random(1)[0]


def optuna_ask(sampler: str, space: Space, known, pending, number: int, seed: int) -> dict:
    """Returns what Optuna's sampler chooses after these results; infeasible trials are told as far worse than the worst."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    values = [value for _, value in known if value is not None]
    worst = max(values) + max(max(values) - min(values), 1e-12) if values else 0.0
    own_seed = int(np.random.default_rng([seed, number]).integers(2**31))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experimental arguments
        chooser = (optuna.samplers.TPESampler(seed=own_seed, constant_liar=True) if sampler == "tpe"
                   else optuna.samplers.GPSampler(seed=own_seed))
        study = optuna.create_study(sampler=chooser)
        for params, value in known:
            study.add_trial(optuna.trial.create_trial(params=told(space, params), distributions=distributions(space, params),
                                                      value=worst if value is None else value))
        for params in pending:
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params=told(space, params),
                                                      distributions=distributions(space, params)))
        trial, params = study.ask(), {}
        for dim in space.dimensions:
            if space.counts(dim, params):
                params[dim.key] = dim.value(trial.suggest_float(dim.key, 0.0, 1.0)) if dim.kind != "choice" else \
                    dim.options[trial.suggest_categorical(dim.key, list(range(len(dim.options))))]
    return params


def told(space: Space, params: dict) -> dict:
    """Returns settings as Optuna is told of them: the place in [0, 1], of a choice the option's number."""
    return {d.key: d.options.index(params[d.key]) if d.kind == "choice" else min(max(d.place(params[d.key]), 0.0), 1.0)
            for d in space.dimensions if d.key in params}


def distributions(space: Space, params: dict) -> dict:
    import optuna

    def of(dim: Dimension):
        if dim.kind == "choice":
            return optuna.distributions.CategoricalDistribution(list(range(len(dim.options))))
        return optuna.distributions.FloatDistribution(0.0, 1.0)

    return {d.key: of(d) for d in space.dimensions if d.key in params}
