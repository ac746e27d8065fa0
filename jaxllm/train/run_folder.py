"""The run folder: who may write in it, what was run in it, and whether this command goes on with it."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess

import yaml

from jaxllm import config
from jaxllm.errors import UserError, writing
from jaxllm.train.config import ModelOfRun, PretrainConfig
from jaxllm.train.flops import parameter_count

PACKAGES = ("jaxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
NOT_SETTINGS = ("verb", "versions", "commit", "parameters")  # what config.yaml tells besides
NOT_COMPARED = (*NOT_SETTINGS, "processes.")
OURS = ("config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "incidents.jsonl", "samples.jsonl", "report.html",
        "tokenizer.model", "damaged-checkpoints")
# What may change between two starts of one run: the rest decides what the weights, the moments or the data order mean.
MAY_CHANGE = ("run.dir", "run.overwrite", "train.steps", "train.tokens", "train.stop_at", "train.micro_batches", "train.remat",
              "train.context_attention", "train.xla", "train.offload",
              "train.loss_chunk", "train.eval_every", "train.eval_rows", "train.sample_every", "train.sample_prompts",
              "train.sample.", "train.pipeline", "train.virtual_stages", "optim.lr", "optim.final", "optim.weight_decay",
              "train.split_embedding", "train.inner_steps",
              "train.outer_lr", "train.outer_momentum", "train.mixing", "optim.clip", "optim.zero1", "checkpoint.", "log.",
              "mesh.", "data.cache", "data.workers", "data.sources.")


@contextlib.contextmanager
def claimed(folder: pathlib.Path):
    """Holds the folder for this process; raises UserError when a live process has it. A kill frees it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "run.lock").open("a+", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise UserError(f"{folder}: in use by a live run (process {owner}); stop it, or give another run.dir") from None
        with writing(lock.name):
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {platform.node()}")
            lock.flush()
        yield


def changes_of(cfg, resolved: dict, *, verb: str = "pretrain", may_change: tuple[str, ...] = ()) -> list[str]:
    """Returns what differs from the settings that the folder's run was started with, as text; touches nothing.

    `cfg`: a verb's settings, with run, model and data.tokenizer. Raises UserError that names the keys when one that may not
    change has changed, the tokenizer's content has, or the folder is another verb's.
    """
    folder = pathlib.Path(cfg.run.dir)
    if cfg.run.overwrite:
        _check_ours(folder)
    if cfg.run.overwrite or not (folder / "config.yaml").exists():
        return []
    # with today's defaults for keys that a folder written earlier does not have
    if (found := read_yaml(folder).get("verb", "pretrain")) != verb:
        raise UserError(f"{folder} holds a run of jaxllm {found}: give another run.dir, or --run.overwrite=true to delete it")
    before, now = config.flatten(config.to_dict(_settings(folder, type(cfg)))), config.flatten(resolved)
    differ = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and not k.startswith(NOT_COMPARED)]
    changes = {k: f"{k}: {before.get(k)} -> {now.get(k)}" for k in differ}
    blocking = [c for k, c in changes.items() if not k.startswith(MAY_CHANGE + may_change)]
    own, given = folder / "tokenizer.model", pathlib.Path(cfg.data.tokenizer)
    if own.exists() and given.is_file():  # a tokenizer is its content, wherever it lies
        blocking = [c for c in blocking if not c.startswith("data.tokenizer:")]
        if own.read_bytes() != given.read_bytes():
            blocking.append(f"the content of {given} is not that of {own}")
    if blocking and last_checkpoint(folder):
        raise UserError(f"{folder} holds a run with other settings ({'; '.join(blocking)}): set them back, give another "
                        "run.dir, or --run.overwrite=true to delete that run")
    return [c for k, c in changes.items() if k not in ("run.dir", "run.overwrite")]


def begin(cfg, resolved: dict, *, verb: str = "pretrain") -> None:
    """Writes the settings and the tokenizer into the folder, whose earlier run goes first if that was asked for.

    Called when all that can be checked has been: a mistake in the settings must not cost the earlier run.
    """
    folder, own = pathlib.Path(cfg.run.dir), pathlib.Path(cfg.run.dir) / "tokenizer.model"
    if cfg.data.tokenizer != "bytes":
        tokenizer = pathlib.Path(cfg.data.tokenizer).read_bytes()  # now: it may be the one that is about to go
    with writing(folder):
        if cfg.run.overwrite:
            for name in OURS:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        # A run's config.yaml serves as a config: it must not delete the run.
        saved = {**resolved, "run": {**resolved["run"], "overwrite": False}}
        saved.pop("processes", None)  # of this start and this host only
        write_atomically(folder / "config.yaml", config.to_yaml({"verb": verb, **saved, **facts(cfg)}))
        if cfg.data.tokenizer != "bytes":  # the run folder is whole without the original
            own.write_bytes(tokenizer)


def _check_ours(folder: pathlib.Path) -> None:
    """Raises UserError when run.overwrite would delete what no run of jaxllm has written."""
    there = [name for name in OURS if (folder / name).exists()]
    if there and "versions" not in (read_yaml(folder) if "config.yaml" in there else {}):
        raise UserError(f"{folder}: run.overwrite=true would delete {', '.join(there)}, which no run of jaxllm has written; "
                        "give another run.dir")


def last_checkpoint(folder: pathlib.Path) -> int:
    """Returns the step of the newest complete checkpoint, 0 without one. An unfinished one has no plain number for a name."""
    return max((int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()), default=0)


def read_yaml(folder: pathlib.Path) -> dict:
    try:
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"{folder}: not a run folder (no config.yaml){near_folder(folder)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{folder / 'config.yaml'}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{folder / 'config.yaml'}: not valid YAML: {' '.join(str(e).split())}") from None


def read_config(folder: pathlib.Path) -> PretrainConfig:
    """Returns the resolved settings that a pretraining run was started with."""
    if (verb := read_yaml(folder).get("verb", "pretrain")) != "pretrain":
        raise UserError(f"{folder}: holds a run of jaxllm {verb}; should be one of jaxllm pretrain")
    return _settings(folder, PretrainConfig)


def _settings(folder: pathlib.Path, cls):
    return config.load(cls, str(folder / "config.yaml"), ignore=NOT_SETTINGS)


def read_model(folder: pathlib.Path) -> ModelOfRun:
    """Returns what any verb's run folder says of the model that it trained."""
    tree = read_yaml(folder)
    try:
        data = tree["data"]
        told = {"verb": tree.get("verb", "pretrain"), "model": tree["model"], "mesh": tree["mesh"],
                "tokenizer": data["tokenizer"], "template": data.get("template"), "precision": tree["train"]["precision"]}
    except (KeyError, TypeError) as e:
        raise UserError(f"{folder / 'config.yaml'}: holds no {e}; should be what a run wrote") from None
    if tree.get("lora", {}).get("rank"):
        told |= {"lora": tree["lora"], "base": tree["base"]["run"], "base_step": tree["base"].get("step")}
    return config.of_tree(ModelOfRun, told, str(folder / "config.yaml"))


def tokenizer_of(folder: pathlib.Path):
    """Returns the tokenizer that a run was trained with, out of its own folder."""
    from jaxllm.data.tokenizer import load_tokenizer

    own = folder / "tokenizer.model"
    return load_tokenizer(str(own) if own.exists() else read_model(folder).tokenizer)


def near_folder(folder: pathlib.Path) -> str:
    """Returns "; runs there: …" with the run folders beside a missing one."""
    beside = folder.parent if not folder.exists() else folder
    found = sorted(str(p.parent) for p in beside.glob("*/config.yaml"))[:5] if beside.is_dir() else []
    return f"; run folders there: {', '.join(found)}" if found else ""


def facts(cfg) -> dict:
    """Returns what config.yaml tells besides the settings."""
    return {"versions": versions(), "commit": commit(), "parameters": sum(parameter_count(cfg.model).values())}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """Returns the commit of the code that runs, with "+changes" where its tree differs from it; None outside git."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words):
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    return None


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Removes what a killed run wrote after the checkpoint that it goes on from, and a last line cut short."""
    if not path.exists():
        return
    kept = []
    # by "\n" alone: a sample may hold U+2028, which splitlines() would cut at
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept))
