"""`jaxllm rlhf collect RUN`: samples answers or reads them, serves the page, tells what the comparisons say."""

import dataclasses
import pathlib
import sys

from jaxllm.align.collect.config import CollectVerb
from jaxllm.align.collect.items import ReadyItems, read_prompts
from jaxllm.align.collect.labels import Labels
from jaxllm.align.collect.results import results, told
from jaxllm.align.collect.sampling import SampledItems, Writer
from jaxllm.align.collect.serve import Collect
from jaxllm.data.review.local import alone, serve
from jaxllm.errors import UserError, stopping_at_once


def main(cfg: CollectVerb) -> dict:
    """Returns the output and what it says."""
    check(cfg)
    output = pathlib.Path(cfg.output)
    # read before anything is written
    ready = ReadyItems(cfg.answers, cfg.items, cfg.seed) if cfg.answers is not None else None
    if ready is None:
        cfg = dataclasses.replace(cfg, template=cfg.template or template_of(cfg.run))
        prompts = read_prompts(cfg.prompts, cfg.items, cfg.seed)
    with alone(output.with_suffix(".lock"), f"{output}: another `jaxllm rlhf collect` serves it; stop that one first"):
        labels = Labels(output)
        items = ready or sampled(prompts, cfg, output.with_suffix(".answers.jsonl"))
        if items.n_same:
            print(f"{items.n_same} left out: they have no two answers that are different and not empty", file=sys.stderr)
        app = Collect(items, labels, cfg)
        if cfg.serve:
            serve(app, cfg.port, f"{len(items.keys)} items to compare at ADDRESS "
                  "(Ctrl-C ends; every comparison is saved as it is given)")
        found = results(items, labels, cfg.confidence, cfg.seed)
        print(told(found))
        print(output)
        return {"output": str(output), **found}


def check(cfg: CollectVerb) -> None:
    """Raises UserError where it is not clear what is compared."""
    if (cfg.prompts is None) == (cfg.answers is None):
        raise UserError("give one of --prompts=FILE, which the run's model answers, and --answers=FILE, of ready answers"
                        + (", not both" if cfg.prompts is not None else ""))
    if cfg.prompts is not None and not cfg.run:
        raise UserError("--prompts=FILE needs a run whose model answers: jaxllm rlhf collect RUN --prompts=FILE")
    if cfg.answers is not None and cfg.run:
        raise UserError(f"--answers=FILE needs no run, found {cfg.run!r}; give --prompts=FILE to sample from it")
    if not cfg.output.endswith(".jsonl"):
        raise UserError(f"output={cfg.output}: should end in .jsonl")
    if cfg.output.endswith(".answers.jsonl") or cfg.output in (cfg.prompts, cfg.answers):
        raise UserError(f"output={cfg.output}: is where answers come from; should be a file of its own")


def sampled(prompts: list, cfg: CollectVerb, path: pathlib.Path) -> SampledItems:
    """Returns the prompts with their answers, sampled now where these are not asked for on demand."""
    items = SampledItems(prompts, cfg, path, write := Writer(cfg))
    if cfg.serve and items.missing():
        with stopping_at_once(cfg.output):
            write.load()  # what is wrong with the run is told now, not to who comes first
            if not cfg.on_demand:
                items.sample_all()
    return items


def template_of(run: str) -> str | None:
    """Returns the template that a run was trained with, None for plain text; raises UserError for a model without words."""
    from jaxllm.train.run_folder import read_model

    found = read_model(pathlib.Path(run))
    if found.verb == "reward":
        raise UserError(f"{run}: holds a reward model; should be the run of a language model")
    return found.template
