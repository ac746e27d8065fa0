"""The demo's last step: base, SFT and RLHF beside each other on sums that none of them was trained on.

    python launch/demo_table.py

Accuracy is that of greedy answers, directly and with a chain of thought; the score is the reward model's mean of sampled
answers, the KL theirs to the SFT model, the text loss that of the language model's held-out text.
"""

import json
import pathlib

import numpy as np

from jaxllm.align.arithmetic import Arithmetic, ArithmeticConfig

RUNS = {"base": "runs/demo", "SFT": "runs/demo-sft", "RLHF": "runs/demo-rlhf"}
N, SHOTS = 200, 4


def main() -> dict:
    from jaxllm.align.reward_model import RewardModel
    from jaxllm.data.chat import load_chat
    from jaxllm.generate.config import SampleConfig
    from jaxllm.generate.continuous import Sampler
    from jaxllm.mesh import MeshConfig
    from jaxllm.partition import make_mesh
    from jaxllm.platform import start_jax
    from jaxllm.train.checkpoint import load_model
    from jaxllm.train.run_folder import tokenizer_of

    start_jax()
    import jax

    mesh, task, table = make_mesh(MeshConfig(data=1), jax.devices()[:1]), Arithmetic(ArithmeticConfig()), {}
    tokenizer = tokenizer_of(pathlib.Path(RUNS["SFT"]))
    reward, reference = RewardModel("runs/demo-reward", mesh, tokenizer), None
    for name, run in RUNS.items():
        cfg, graph, params, _ = load_model(run, mesh=mesh)
        chat = load_chat(cfg.template or "plain", tokenizer)
        sampler = Sampler(graph, cfg.model, mesh, eos_id=chat.end_id, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)
        sampler.load(params)
        found = table[name] = {}
        for how in ("direct", "chain"):
            rows = [task.prompt(i, "evaluation", direct=how == "direct") for i in range(N)]
            prompts = [prompt_of(task, row["prompt"], how, chat, tokenizer, shots=0 if cfg.template else SHOTS) for row in rows]

            def write(temperature, prompts=prompts, sampler=sampler):
                how = SampleConfig(max_tokens=48, temperature=temperature)
                return sampler.sample(prompts, n=1, cfg=how, seeds=np.arange(len(prompts)), response_slots=48,
                                      prompt_slots=max(map(len, prompts)))

            found[how] = accuracy(task, rows, write(0.0), tokenizer)
            if how == "chain" and cfg.template:
                sampled = write(1.0)
                found["sampled"] = accuracy(task, rows, sampled, tokenizer)
                found["score"] = float(np.mean(reward([sampled.prompt(i) + sampled.response(i) for i in range(N)])))
                reference = reference or params
                sampler.load(reference)
                gap_BR = (sampled.logp_BR - sampler.score(sampled)) * sampled.action_BR
                found["kl"] = float(np.mean(gap_BR.sum(axis=1)))
                sampler.load(params)
    lines = [json.loads(line) for line in pathlib.Path("runs/demo-rlhf/metrics.jsonl").read_text().splitlines()]
    texts = [line["eval_text_loss"] for line in lines if "eval_text_loss" in line]
    table["base"]["text"] = last_of("runs/demo", "eval_loss")
    table["SFT"]["text"], table["RLHF"]["text"] = texts[0], texts[-1]
    show(table)
    return table


def prompt_of(task: Arithmetic, prompt: str, how: str, chat, tokenizer, shots: int) -> list[int]:
    """Returns a prompt as a tuned model reads it, or as text behind solved examples, which is how a base model is asked."""
    if not shots:
        return chat.prompt_ids([{"role": "user", "content": prompt}])
    solved = [task.demonstration(i, direct=how == "direct") for i in range(shots)]
    text = "".join(f"{one['prompt']}{one['response']}\n" for one in solved) + prompt
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def accuracy(task: Arithmetic, rows: list[dict], rollout, tokenizer) -> float:
    """Returns the share of responses whose answer, behind the last ";", is the sum."""
    right = 0
    for i, row in enumerate(rows):
        text = tokenizer.decode(rollout.response(i)).split("\n")[0].strip()
        a, b = (int(x) for x in row["prompt"].rstrip("=;").split("+"))
        right += task.is_right(a, b, text if row["prompt"].endswith("=") else f";{text}")
    return right / len(rows)


def last_of(run: str, key: str) -> float:
    lines = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line][-1]


def show(table: dict) -> None:
    columns = {"direct": "direct", "chain": "chain of thought", "sampled": "the same, sampled", "score": "reward score",
               "kl": "KL to SFT", "text": "text loss"}
    print("\n" + " " * 8 + "".join(f"{title:>19}" for title in columns.values()))
    for name, found in table.items():
        print(f"{name:<8}" + "".join(f"{cell(found, key):>19}" for key in columns))
    print(f"accuracy of {N} sums; base: behind {SHOTS} solved examples")


def cell(found: dict, key: str) -> str:
    if key not in found:
        return "-"
    return f"{found[key]:.1%}" if key in ("direct", "chain", "sampled") else f"{found[key]:.3f}"


if __name__ == "__main__":
    main()
