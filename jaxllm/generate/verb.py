"""`jaxllm generate RUN`: prompts in, continuations out, as text, as a stream, or as JSON lines."""

import json
import pathlib
import sys

from jaxllm.errors import UserError
from jaxllm.generate.config import GenerateVerb


def main(cfg: GenerateVerb) -> dict:
    """Continues the prompts; returns them with their continuations and the rate."""
    prompts = read_prompts(cfg)
    tasks = [(prompt, cfg.sample.seed + k) for prompt in prompts for k in range(cfg.n)]
    stream = sys.stdout.isatty() and len(tasks) == 1 and not cfg.output if cfg.stream is None else cfg.stream
    if stream and (len(tasks) > 1 or cfg.output):
        raise UserError(f"stream=true shows one continuation as it comes, found {len(tasks)}; leave it out")
    engine, step = load_engine(cfg.run, cfg.step)
    chat = chat_of(cfg.run, engine.tokenizer, wanted=cfg.chat)
    ids = {p: chat.prompt_ids([{"role": "user", "content": p}], "prompt") if chat else p for p in prompts}
    made = []
    for at in range(0, len(tasks), cfg.batch_size):
        batch = tasks[at : at + cfg.batch_size]
        if stream:
            print(batch[0][0], end="\n" if chat else "", flush=True)
        found = engine.generate([ids[p] for p, _ in batch], cfg.sample, [s for _, s in batch], logprobs=cfg.logprobs,
                                on_text=(lambda row, piece: print(piece, end="", flush=True)) if stream else None)
        made += [describe(prompt, seed, one) for (prompt, seed), one in zip(batch, found, strict=True)]
        if len(tasks) > cfg.batch_size:
            print(f"{len(made)} of {len(tasks)} continuations", file=sys.stderr)
    if stream:
        print()
    else:
        show(made, cfg.output, "\n" if chat else "")
    rate = engine.tokens / max(engine.seconds, 1e-9)
    print(f"step {step}: {engine.tokens} tokens in {engine.seconds:.2f} s, {rate:,.0f} tok/s", file=sys.stderr)
    return {"run": cfg.run, "step": step, "continuations": made, "tokens_per_s": round(rate, 1)}


def read_prompts(cfg: GenerateVerb) -> list[str]:
    """Returns the prompts of --prompt or of the file --prompts; raises UserError for neither, both, or a bad file."""
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise UserError("give one of --prompt=TEXT and --prompts=FILE" + (", not both" if cfg.prompt is not None else ""))
    for name in ("n", "batch_size"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)}: should be at least 1")
    if cfg.prompt is not None:
        return [cfg.prompt]
    path = pathlib.Path(cfg.prompts)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if path.suffix == ".jsonl":
        lines = [prompt_of(path, number, line) for number, line in enumerate(lines, 1)]
    if not lines:
        raise UserError(f"{path}: holds no prompt")
    return lines


def prompt_of(path: pathlib.Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["prompt"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f'{path}, line {number}: should be {{"prompt": "..."}}, found {line[:60]!r}') from None


def load_engine(run: str, step: int | None):
    """Returns (an engine with a run's newest good checkpoint, or that of `step`; its step)."""
    from jaxllm.platform import start_jax

    start_jax()
    from jaxllm.generate.engine import Engine
    from jaxllm.train.checkpoint import load_model, run_mesh
    from jaxllm.train.run_folder import read_model, tokenizer_of

    folder = pathlib.Path(run)
    mesh = run_mesh(read_model(folder))
    cfg, graph, params, step = load_model(folder, step, mesh)
    tokenizer = tokenizer_of(folder)
    chat = chat_of(run, tokenizer)
    end_id = chat.end_id if chat else None
    return Engine(graph, params, cfg.model, tokenizer, mesh, precision=cfg.precision, end_id=end_id), step


def chat_of(run: str, tokenizer, *, wanted: bool | None = None):
    """Returns the chat of the template that a run was tuned with; None where it was not, or is not wanted."""
    from jaxllm.data.chat import load_chat, template_file
    from jaxllm.train.run_folder import read_model

    template = read_model(pathlib.Path(run)).template
    if wanted and not template:
        raise UserError(f"chat=true: {run} holds a base model, which was taught no template; leave it out")
    if not template or wanted is False:
        return None
    return load_chat(template_file(template, pathlib.Path(run)), tokenizer)


def describe(prompt: str, seed: int, one) -> dict:
    found = {"prompt": prompt, "seed": seed, "text": one.text, "finish": one.finish, "tokens": one.tokens}
    return found | ({"logprobs": one.logprobs} if one.logprobs is not None else {})


def show(made: list[dict], output: str | None, between: str = "") -> None:
    """Writes JSON lines to `output`, or prints prompts and texts; several are set apart by a line with number and ending."""
    if output:
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made)
        pathlib.Path(output).write_text(text, encoding="utf-8")
        print(f"{len(made)} continuations: {output}", file=sys.stderr)
        return
    for number, one in enumerate(made, 1):
        if len(made) > 1:
            print(f"--- {number}, seed {one['seed']}, {one['finish']}")
        print(one["prompt"] + between + one["text"])
        if "logprobs" in one:
            mean = sum(one["logprobs"]) / max(len(one["logprobs"]), 1)
            print(f"    log-probabilities, mean {mean:.3f}: {' '.join(f'{x:.2f}' for x in one['logprobs'])}")
