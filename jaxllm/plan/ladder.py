"""`jaxllm plan ladder CONFIG`: a family of small runs, the law through them, and the largest run foretold and then made.

Each run is one of `jaxllm pretrain`, in a folder of its own, so a ladder that is stopped or killed goes on where it was.
"""

import dataclasses
import json
import pathlib
import sys
import time

from jaxllm import config
from jaxllm.errors import RunError, UserError, stopping_at_once, writing
from jaxllm.plan import ladder_judge, ladder_text
from jaxllm.plan.ladder_config import LadderVerb
from jaxllm.plan.ladder_runs import Rung, rungs, state
from jaxllm.plan.law_file import contents
from jaxllm.plan.picture import check_picture
from jaxllm.report.read import is_run
from jaxllm.report.summary import duration
from jaxllm.train.run_folder import claimed, write_atomically

REPEATED = 4  # epochs up to which repeated text is worth nearly what fresh text is (Muennighoff et al. 2023)
LEAST_HELD_OUT = 20_000  # tokens: fewer leave the held-out loss uncertain by a percent or so


def main(cfg: LadderVerb) -> dict:
    """Makes the runs that are not there yet, fits, predicts the largest run, makes it and compares; returns what was found."""
    if not cfg.data.sources:
        raise UserError("data.sources is empty: give at least one, e.g. --data.sources.books.path=books/")
    if cfg.picture is not None:
        check_picture(cfg.picture)
    folder = pathlib.Path(cfg.dir).expanduser()
    with stopping_at_once(f"ladder {cfg.dir}"), claimed(folder):
        tokenizer = tokenizer_of(cfg, folder)
        plan = rungs(cfg, tokenizer.name, tokenizer.vocab_size)
        states = {rung.name: state(rung) for rung in plan}  # raises where a folder holds another ladder's run
        clock = begin(cfg, folder, plan, states, tokenizer)
        *others, largest = plan
        for rung in others:
            make(rung, plan, states, clock)
        found, drawn = ladder_judge.judge(cfg, plan)
        found["farther"] = ladder_judge.from_farther(cfg, plan, drawn["points"])
        law = folder / "law.json"
        with writing(law):
            write_atomically(law, json.dumps(contents(found), indent=1) + "\n")
        p = found["prediction"]
        say(f"ladder: the largest run is told to end at {ladder_text.interval(p, cfg.level)}; the law: {law}")
        write_result(folder, found)  # what was told, before it is known
        make(watched(largest, law), plan, states, clock)
        return finish(cfg, folder, plan, found, drawn)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tokenizer_of(cfg: LadderVerb, folder: pathlib.Path):
    """Returns the tokenizer of all runs, which is trained first where `vocab_size` asks for one."""
    from jaxllm.data.config import TokenizerConfig
    from jaxllm.data.tokenizer import load_tokenizer
    from jaxllm.data.tokenizer_training import train

    if cfg.vocab_size is None:
        return load_tokenizer(cfg.data.tokenizer)
    model = folder / "tokenizer.model"
    if not model.exists():
        train(cfg.data.sources, TokenizerConfig(vocab_size=cfg.vocab_size, output=str(model)), seed=cfg.seed, overwrite=False)
    return load_tokenizer(str(model))


def begin(cfg: LadderVerb, folder: pathlib.Path, plan: list[Rung], states: dict[str, str], tokenizer):
    """Says what is to be done and for how long; returns the clock. Raises UserError for text that is not the ladder's."""
    from jaxllm.platform import start_jax

    start_jax()
    from jaxllm.data.loader import TrainingInput, ValidationInput, prepare
    from jaxllm.plan.ladder_time import Clock, machine_flops

    data = plan[0].cfg.data
    stores = prepare(data, tokenizer, log=lambda text: say(f"data: {text}"))
    rows = TrainingInput(stores, data, cfg.train.batch_size, cfg.seed)
    check_text(folder, {"tokenizer": tokenizer.hash, "sources": rows.made_of})
    held_out = len(ValidationInput(stores, data, cfg.train.batch_size, cfg.train.eval_rows).chosen) * data.seq_len
    if not held_out:
        raise UserError(f"data.validation={data.validation:g}: no document was held out, and the law is fitted to held-out "
                        "losses; give more, or shorter documents")
    clock = Clock(plan, machine_flops(cfg.train.precision))
    for rung in plan:
        if states[rung.name] == "finished":
            clock.measure(rung)
    left = sum(clock.seconds(rung) for rung in plan if states[rung.name] not in ("finished", "diverged"))
    for line in ladder_text.plan(cfg, plan, states, left):
        say(line)
    epochs = plan[-1].tokens / rows.tokens_per_epoch
    say(f"  text: {rows.tokens_per_epoch:,} tokens to train on, {epochs:.2f} epochs of them in the longest runs; "
        f"{held_out:,} tokens held out")
    if epochs > REPEATED:
        say(f"  ! {plan[-1].tokens:,} tokens repeat the text {epochs:.1f} times: beyond {REPEATED} epochs repeated text is "
            "worth less and less than fresh text (Muennighoff et al. 2023), and the law of fresh text does not hold")
    if held_out < LEAST_HELD_OUT:
        say(f"  ! {held_out:,} held-out tokens leave the loss uncertain: {LEAST_HELD_OUT:,} or more would do (data.validation)")
    return clock


def check_text(folder: pathlib.Path, made_of: dict) -> None:
    """Notes what text the ladder's runs are of; raises UserError when it is another than the earlier ones'."""
    note = folder / "text.json"
    if not note.exists():
        with writing(note):
            write_atomically(note, json.dumps(made_of) + "\n")
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{note}: cannot be read: {e}") from None
    if before != json.loads(json.dumps(made_of)):
        raise UserError(f"{folder}: its runs are of another text or tokenizer than data.sources and the tokenizer now give: "
                        "runs of different text do not compare; give another dir")


def make(rung: Rung, plan: list[Rung], states: dict[str, str], clock) -> None:
    """Makes one run, unless it is done; a run whose loss is not finite is told and passed over."""
    from jaxllm.train.pretrain import main as pretrain

    known = states[rung.name]
    if known in ("finished", "diverged"):
        return
    at, done = [r.name for r in plan].index(rung.name) + 1, ("finished", "diverged")
    left = sum(clock.seconds(r) for r in plan if states[r.name] not in done)
    say(f"ladder: run {at} of {len(plan)}: {rung.name}, {rung.parameters:,} parameters, {rung.tokens:,} tokens; about "
        f"{duration(clock.seconds(rung))}, then {duration(max(left - clock.seconds(rung), 0))} for the rest")
    cfg, began = rung.cfg, time.perf_counter()
    if known == "new" and is_run(rung.folder):  # an earlier try with other settings that diverged goes first
        cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, overwrite=True))
    try:
        pretrain(cfg)
    except RunError:
        if state(rung) != "diverged":
            raise
        say(f"ladder: {rung.name} diverged and is left out")
    states[rung.name] = state(rung)
    if states[rung.name] == "finished":
        clock.measure(rung, time.perf_counter() - began)


def watched(rung: Rung, law: pathlib.Path) -> Rung:
    """Returns the run with its losses compared with the law while it goes."""
    return dataclasses.replace(rung, cfg=dataclasses.replace(rung.cfg, log=dataclasses.replace(rung.cfg.log, law=str(law))))


def finish(cfg: LadderVerb, folder: pathlib.Path, plan: list[Rung], found: dict, drawn: dict) -> dict:
    """Compares, prints and writes the page and the JSON; returns it."""
    from jaxllm.plan import ladder_page
    from jaxllm.plan.curves import save
    from jaxllm.report.page import write

    largest = plan[-1]
    found["losses"] = ladder_judge.losses(plan)
    found["largest"] = ladder_judge.compared(cfg, found, largest) or f"{largest.name}: {ladder_judge.why_not(largest)}"
    found["alarms"] = ladder_judge.alarms(plan, folder / "law.json")
    found["ladder"] = [{"run": r.name, "parameters": r.parameters, "tokens": r.tokens, "flops": r.flops,
                        "loss": found["losses"].get(r.name)} for r in plan]
    found["settings"] = config.to_dict(cfg)
    print(ladder_text.whole(cfg, plan, found))
    write_result(folder, found)
    write(ladder_page.page(cfg, plan, found, drawn), folder / "ladder.html")
    if cfg.picture is not None:
        with writing(cfg.picture):
            save(ladder_page.plots_of(cfg, plan, found, drawn), cfg.picture)
    print(f"\npage: {folder / 'ladder.html'}\nlaw: {folder / 'law.json'}\nnumbers: {folder / 'ladder.json'}")
    if isinstance(found["largest"], str):
        raise RunError(f"the largest run says nothing of the law: {found['largest']}", found)
    return found


def write_result(folder: pathlib.Path, found: dict) -> None:
    with writing(folder / "ladder.json"):
        write_atomically(folder / "ladder.json", json.dumps(found, indent=1) + "\n")
