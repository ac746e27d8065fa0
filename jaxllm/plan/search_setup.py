"""A study's settings made ready: the base of its trials, its space and points checked, and its folder's own settings."""

import dataclasses
import difflib
import json
import math
import pathlib
from typing import Any

from jaxllm import config
from jaxllm.errors import UserError
from jaxllm.plan.search_config import SearchVerb
from jaxllm.plan.search_folder import Folder, write_whole
from jaxllm.plan.search_next import Rules
from jaxllm.plan.search_space import Space, flat_values, read_space
from jaxllm.train.config import PretrainConfig
from jaxllm.train.run_folder import NOT_SETTINGS

MAY_CHANGE = ("run.dir", "run.overwrite", "trials", "workers", "seeds", "top", "heartbeat_s")
OURS_TO_SET = ("run.", "train.stop_at", "checkpoint.", "log.", "processes.")  # what a space may not hold
NOT_OF_THE_MODEL = ("run.dir", "run.overwrite", "checkpoint.", "log.", "processes.", "data.cache", "data.workers",
                    "train.sample")  # what an earlier study's trials may differ in


@dataclasses.dataclass(frozen=True)
class Study:
    """All that a study's workers need to know."""

    rules: Rules
    settings: dict  # as they are written and compared
    base: dict  # every trial's settings, as nested groups, before its own are put over them
    metric: str
    workers: int

    def seed_of(self, job: dict) -> int | None:
        """Returns a repeat's run.seed; None for the base's own."""
        return self.base["run"]["seed"] + job["seed_offset"] if "seed_offset" in job else None

    def steps_of(self, job: dict) -> dict:
        """Returns the step a job ends at and the trial's last one: a rung is a share of the trial's own length."""
        steps = n_steps(nested(self.base, job["params"]))
        return {"step": max(1, round(self.rules.shares[job["rung"]] * steps)), "of": steps}


def read_study(cfg: SearchVerb) -> Study:
    """Returns the study that the settings describe, all of it checked; raises UserError."""
    base = base_of(cfg)
    space = read_space(cfg.space)
    for dim in space.dimensions:
        check_setting(dim.key, "space")
        check_values(base, dim)
    points = tuple(read_point(i, point, space, base) for i, point in enumerate(cfg.points))
    train = base["train"]
    if cfg.metric.startswith("eval_") and not (train["eval_every"] and base["data"]["validation"]):
        raise UserError(f"metric={cfg.metric}: needs held-out text: base has train.eval_every={train['eval_every']}, "
                        f"data.validation={base['data']['validation']}; set both above 0, or metric=loss")
    parallel = cfg.parallel or stored_parallel(cfg) or cfg.workers
    rules = Rules(space=space, sampler=cfg.sampler, seed=cfg.run.seed, points=points, trials=cfg.trials,
                  parallel=parallel, minimise=cfg.goal == "min", shares=rungs(cfg, n_steps(base)),
                  factor=cfg.asha.factor, seeds=cfg.seeds, top=cfg.top, known=earlier(cfg, space, base))
    settings = {**config.to_dict(cfg), "base": base, "fixed": {}, "parallel": parallel,
                "space": {d.key: described(d) for d in space.dimensions}, "points": [dict(p) for p in points]}
    return Study(rules=rules, settings=settings, base=base, metric=cfg.metric, workers=cfg.workers)


def stored_parallel(cfg: SearchVerb) -> int | None:
    """Returns what the study began with, as a start with another number of workers must decide as the first one did."""
    held = None if cfg.run.overwrite else Folder(pathlib.Path(cfg.run.dir).expanduser()).settings()
    return held and held["parallel"]


def base_of(cfg: SearchVerb) -> dict:
    """Returns the resolved settings that every trial begins from: the base with `fixed` over it."""
    if cfg.base is None:
        raise UserError("base: is missing: give the config of `jaxllm pretrain` that trials begin from")
    if not isinstance(cfg.base, (str, dict)):
        raise UserError(f"base={cfg.base!r}: should be a config file of `jaxllm pretrain`, or its groups themselves")
    if isinstance(cfg.base, dict):
        tree = {key: value for key, value in cfg.base.items() if key not in NOT_SETTINGS}
        base = config.of_tree(PretrainConfig, tree, "base")
    else:
        base = config.load(PretrainConfig, cfg.base, ignore=NOT_SETTINGS)
    for key in flat_values(cfg.fixed):
        check_setting(key, "fixed", may=("run.seed", "checkpoint.", "log."))
    whole = config.to_dict(config.of_tree(PretrainConfig, nested(config.to_dict(base), flat_values(cfg.fixed)), "fixed"))
    whole["train"]["stop_at"] = None  # each job's own
    if not whole["data"]["sources"]:
        raise UserError("base: data.sources is empty: give at least one, e.g. fixed: {data.sources.books.path: books/}")
    return whole


def nested(tree: dict, params: dict) -> dict:
    """Returns a copy of nested groups with dotted settings put over them."""
    out = {key: nested(value, {}) if isinstance(value, dict) else value for key, value in tree.items()}
    for dotted, value in params.items():
        *groups, last = dotted.split(".")
        at: Any = out
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    return out


def n_steps(tree: dict) -> int:
    train = tree["train"]
    return train["steps"] or math.ceil(train["tokens"] / (train["batch_size"] * tree["data"]["seq_len"]))


def check_setting(key: str, where: str, may: tuple[str, ...] = ()) -> None:
    if key.startswith(OURS_TO_SET) and not key.startswith(may or ("\0",)):
        raise UserError(f"{where}.{key}: is set by the search itself, or changes nothing of what is learnt: take it out")


def check_values(base: dict, dim) -> None:
    """Raises UserError when a setting of the space is none of a run's, or no value in its range would be taken.

    A value that is refused beside the others' base may fit in a trial: only what never fits is a mistake here.
    """
    refused = []
    for value in dim.probes():
        try:
            config.of_tree(PretrainConfig, nested(base, {dim.key: value}), "space")
        except UserError as e:
            refused.append(str(e))
            if "unknown key" in refused[-1]:
                raise
    if len(refused) == len(dim.probes()) and any("should be" in said and dim.key in said for said in refused):
        said = refused[0]
        raise UserError(said if said.startswith("space") else f"space.{dim.key}: {said}")


def read_point(i: int, point, space: Space, base: dict) -> dict:
    """Returns a trial of the user's own: settings of the space, the others as base has them."""
    if not isinstance(point, dict):
        raise UserError(f"points[{i}]={point!r}: should be {{setting: value}}, or {{}} for base as it is")
    given, keys, own = flat_values(point), [d.key for d in space.dimensions], config.flatten(base)
    if odd := [key for key in given if key not in keys]:
        near = difflib.get_close_matches(odd[0], keys, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"settings of the space: {', '.join(keys)}"
        raise UserError(f"points[{i}]: {odd[0]!r} is not a setting of the space; {hint}")
    params: dict = {}
    for dim in space.dimensions:
        if space.counts(dim, {**params}):
            params[dim.key] = given.get(dim.key, own.get(dim.key))
        elif dim.key in given:
            raise UserError(f"points[{i}]: {dim.key} counts only when {', '.join(f'{k}={v}' for k, v in dim.when)}")
    try:
        config.of_tree(PretrainConfig, nested(base, params), "the config")
    except UserError as e:
        raise UserError(f"points[{i}]: {e}") from None
    return params


def rungs(cfg: SearchVerb, steps: int) -> tuple[float, ...]:
    """Returns the shares of a training at which trials are compared, the last one 1."""
    if cfg.asha.min_steps is None:
        return (1.0,)
    if cfg.asha.min_steps >= steps:
        raise UserError(f"asha.min_steps={cfg.asha.min_steps}: should be below the {steps} steps of a whole training")
    out, at = [], cfg.asha.min_steps
    while at < steps:
        out.append(at / steps)
        at *= cfg.asha.factor
    return (*out, 1.0)


def described(dim) -> dict:
    """Returns a setting of the space as the config has it."""
    out: dict = {dim.kind: list(dim.options) if dim.kind == "choice" else [dim.low, dim.high]}
    return out | ({"when": dict(dim.when)} if dim.when else {})


def earlier(cfg: SearchVerb, space: Space, base: dict) -> tuple[tuple[dict, float | None], ...]:
    """Returns settings and loss of an earlier study's trials that are points of this space, trained as this one trains."""
    if cfg.follows is None:
        return ()
    folder = Folder(pathlib.Path(cfg.follows).expanduser())
    own = pathlib.Path(cfg.run.dir).expanduser() / "known.json"
    if own.exists() and not cfg.run.overwrite:  # as it was at the start, whatever the other study did since
        try:
            return tuple((params, loss) for params, loss in json.loads(own.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{own}: cannot be read: {e}; delete it to read the trials of {cfg.follows} again") from None
    old = folder.settings()
    if old is None:
        raise UserError(f"follows={cfg.follows}: not a study's folder (no study.yaml)")
    old = of_today(old, folder.path / "study.yaml")
    if (old["metric"], old["goal"]) != (cfg.metric, cfg.goal):
        raise UserError(f"follows={cfg.follows}: has metric={old['metric']} ({old['goal']}); needed is {cfg.metric}")
    keys, now, steps = {d.key for d in space.dimensions}, config.flatten(base), n_steps(base)
    first = steps if cfg.asha.min_steps is None else cfg.asha.min_steps
    out = []
    for job in folder.jobs():
        whole = config.flatten(nested(old["base"], job["params"]))
        params = {d.key: whole.get(d.key) for d in space.dimensions if space.counts(d, whole)}
        differ = [k for k in whole.keys() | now.keys() if whole.get(k) != now.get(k) and k not in keys]
        same = all(k.startswith(NOT_OF_THE_MODEL) for k in differ) and space.holds(params) and job["step"] == first
        if same and job["state"] != "running" and "repeat_of" not in job:
            metric = job.get("metric")
            out.append((params, metric if metric is None or cfg.goal == "min" else -metric))
    return tuple(out)


def same_study(study: Study, folder: Folder) -> Study:
    """Writes a new study's settings, or compares them with those of the study that the folder holds; raises UserError."""
    path, settings = folder.path / "study.yaml", {"verb": "plan search", **study.settings}
    if not path.exists() and any(p.suffix == ".json" for p in folder.trials.glob("*")):
        raise UserError(f"{folder.path}: has trials and no study.yaml; give another run.dir")
    if path.exists():
        before = of_today(folder.settings(), path)
        differ = [f"{key}: {a.get(key)} -> {b.get(key)}" for a, b in [compared(before, settings)]
                  for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        if differ:
            raise UserError(f"{folder.path} holds a study with other settings ({'; '.join(differ[:6])}): set them back, give "
                            "another run.dir (with follows=, to know its trials), or --run.overwrite=true to delete that study")
    folder.create()
    if study.rules.known or study.settings["follows"]:
        write_whole(folder.path / "known.json", json.dumps(study.rules.known))
        print(f"{len(study.rules.known)} trials of {study.settings['follows']} lie in this space and are known")
    write_whole(folder.path / "base.yaml", config.to_yaml(without_place(study.base)))
    write_whole(path, config.to_yaml(settings))
    return study


def of_today(settings: dict, path: pathlib.Path) -> dict:
    """Returns a study's written settings with the defaults of those that came with later versions, which is what it had."""
    own = {key: value for key, value in config.to_dict(SearchVerb()).items() if key not in settings}
    return own | settings | {"base": config.to_dict(config.of_tree(PretrainConfig, settings["base"], f"{path}: base"))}


def compared(before: dict, now: dict) -> tuple[dict, dict]:
    """Returns both settings as {dotted key: value}, without those that may change between two starts."""
    def flattened(tree: dict) -> dict:
        return {k: v for k, v in config.flatten(json.loads(json.dumps(tree))).items() if not k.startswith(MAY_CHANGE)
                and not k.startswith(("base.run.", "base.processes."))}

    return flattened(before), flattened(now)


def without_place(base: dict) -> dict:
    """Returns the base without what is of one run only: its folder is each trial's own."""
    return {**base, "run": {"seed": base["run"]["seed"]}}
