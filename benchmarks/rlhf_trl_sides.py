"""The processes that benchmarks/rlhf_trl.py compares: ours and TRL's, and the two that make ready what both start from.

    python benchmarks/rlhf_trl_sides.py '{"side": ..., ...}'

Not to be started by hand: a side reports on standard output and goes on when it is told to on standard input.

Axes: B row, T position, V vocabulary, D width.
"""

import argparse
import contextlib
import importlib
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # jaxllm, where it is not installed


class Gate:
    """What a side passes after each optimizer step: it reports and waits here once it has done what it was asked for."""

    def __init__(self):
        self.left, self.found = 1, []
        self._go()

    def passed(self, **told) -> None:
        took = {"iteration_s": time.perf_counter() - self.began, "cpu_s": time.process_time() - self.busy}
        self.found.append(told | took)
        self.left -= 1
        if not self.left:
            report(iterations=self.found)
            asked = sys.stdin.readline()
            if not asked:
                sys.exit()
            self.left, self.found = int(asked), []
        self._go()

    def _go(self) -> None:
        self.began, self.busy = time.perf_counter(), time.process_time()


def report(**told) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    told |= {"at": time.time(), "cpu_s": used.ru_utime + used.ru_stime,
             "peak_gb": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9}
    print("report", json.dumps(told), flush=True)


@contextlib.contextmanager
def timed(times: dict, name: str):
    began = time.perf_counter()
    yield
    times[name] = time.perf_counter() - began


def task_of(args):
    sys.path.insert(0, str(pathlib.Path(args.task).parent))
    return importlib.import_module(pathlib.Path(args.task).stem)


# ---------------------------------------------------------------- ours


def teach(args) -> None:
    """Saves the weights of a model taught by demonstrations, and its log-probabilities of some more of them."""
    import jax
    import nac
    from flax import nnx

    task, mesh, nac.SFT_STEPS = task_of(args), nac.make_mesh(nac.MeshConfig(data=1), jax.devices()[:1]), args.sft_steps
    graph, params, loss, took = nac.sft(task, mesh, args.seed)
    rows = nac.rows_of(task, task.sft_batch(2 * 10**6, args.seed))
    with jax.set_mesh(mesh):
        model = nnx.merge(graph, params)
        logits_BTV = model.hidden(rows["token_BT"], rows["pos_BT"], rows["doc_BT"]) @ model.head_DV()
        logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    logp_BT = np.take_along_axis(logp_BTV, rows["target_BT"][..., None], -1)[..., 0]
    flat = {name_of(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    np.savez(f"{args.folder}/weights.npz", **flat)
    np.savez(f"{args.folder}/rows.npz", logp_BT=logp_BT, **rows)
    floor = task.entropy_floor()
    report(sft_over_floor=loss / (floor[0] / floor[1]), sft_s=took, parameters=sum(x.size for x in flat.values()))


def name_of(path) -> str:
    """Returns the name of a parameter in the file of weights: trunk.blocks_L.mlp.up_DF."""
    import jax

    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def ours(args) -> None:
    """Runs the loop of benchmarks/nac.py, with the gate where the loop writes an iteration's metrics."""
    from jaxllm.platform import start_jax, use_huge_pages

    use_huge_pages()
    start_jax(pathlib.Path(args.cache))
    import jax
    import nac

    from jaxllm.model.heads import LanguageModel
    from jaxllm.train.state import structure

    task, mesh = task_of(args), nac.make_mesh(nac.MeshConfig(data=1), jax.devices()[:1])
    chosen = argparse.Namespace(algorithm="grpo", iterations=args.iterations, beta=None, lam=0.95, lr=None, schedule="linear")
    folder = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
    cfg = nac.settings(task, chosen, args.seed, str(folder))
    graph, abstract = structure(LanguageModel, nac.model_of(task), mesh)
    weights = np.load(f"{args.folder}/weights.npz")
    reference = jax.tree_util.tree_map_with_path(lambda path, a: jax.device_put(weights[name_of(path)], a.sharding), abstract)
    reading = nac.Reading(np.dtype(np.float32), task.PROMPT_LEN, task.VOCAB, 1.0, 128)
    optimizers = {"policy": nac.make_optimizer(cfg.optim, cfg.train.iterations)}
    program = nac.build_rl(cfg, nac.Models(graph, None), {"policy": reference}, reading, nac.algorithm(cfg), optimizers, mesh)
    sampler = nac.Sampler(graph, nac.model_of(task), mesh, eos_id=task.EOS, pad_id=task.PAD, vocab_size=task.VOCAB)
    stream = [nac.Prompt(f"{a}+{b}=", task.prompt_ids(a, b), {"a": a, "b": b}) for a, b in task.rl_prompts(args.seed)]
    n, gate, now = cfg.rollout.prompts, Gate(), {}

    def score(samples):
        with timed(now, "reward_s"):
            score_B = [task.reward(s.row["a"], s.row["b"], s.tokens) for s in samples]
        now["tokens"], now["ended"] = sum(len(s.tokens) for s in samples), statistics.mean(s.ended for s in samples)
        return nac.Scored(np.array(score_B, np.float32), {}, [])

    class Log(nac.RunLog):
        def metrics(self, line):
            super().metrics(line)
            gate.passed(**now, score=line["score"], rollout_s=line["rollout_s"] - now["reward_s"],
                        reference_s=line["read_s"], update_s=line["update_s"])

    with jax.set_mesh(mesh), nac.Checkpoints(str(folder), cfg.checkpoint) as checkpoints, \
            Log(folder, steps=cfg.train.iterations, start=0, tensorboard=False) as log:
        nac.train(nac.Loop(cfg=cfg, program=program, sampler=sampler, reference=reference, held_out=[], shown=[],
                           prompts=lambda i: stream[i * n : i * n + n], decode=task.decode, score=score, made_of={},
                           checkpoints=checkpoints, log=log), program.init(), 0)


# ---------------------------------------------------------------- TRL


def export(args) -> None:
    """Saves the taught model and a tokenizer of the task's characters as Hugging Face has them; ends where either differs."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    task = task_of(args)
    size = task.MODEL
    cfg = LlamaConfig(vocab_size=task.VOCAB, hidden_size=size["d_model"], intermediate_size=size["d_ff"],
                      num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
                      max_position_embeddings=size["max_len"], rms_norm_eps=size["norm_eps"], tie_word_embeddings=size["tied"],
                      rope_parameters={"rope_type": "default", "rope_theta": size["rope_theta"]}, hidden_act=size["act"],
                      eos_token_id=task.EOS, bos_token_id=task.BOS, pad_token_id=task.PAD)
    model = LlamaForCausalLM(cfg).eval()
    w = {k: torch.from_numpy(v) for k, v in np.load(f"{args.folder}/weights.npz").items()}
    assert model.num_parameters() == sum(x.numel() for x in w.values())
    model.load_state_dict({k: v.contiguous() for k, v in hf_names(w, size).items()})
    rows = {k: torch.from_numpy(v) for k, v in np.load(f"{args.folder}/rows.npz").items()}
    with torch.inference_mode():
        logits_BTV = model(rows["token_BT"].long(), attention_mask=(rows["doc_BT"] > 0).long()).logits
    logp_BT = logits_BTV.log_softmax(-1).gather(-1, rows["target_BT"].long()[..., None])[..., 0]
    gap = float(((logp_BT - rows["logp_BT"]).abs() * rows["weight_BT"]).max())
    if not gap < 1e-4:
        sys.exit(f"log-probabilities of the exported model differ from ours by {gap:.3g} nats a token")

    ids = {f"<{i}>": i for i in range(task.VOCAB) if i not in task.I2C} | task.C2I  # an id without a character is itself
    characters = Tokenizer(models.WordLevel(ids))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    bos = f"<{task.BOS}>"
    characters.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, task.BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, bos_token=bos, eos_token=f"<{task.EOS}>",
                                        pad_token=f"<{task.PAD}>", padding_side="left")
    for a, b in task.pairs()[0]:
        assert tokenizer(f"{a}+{b}=")["input_ids"] == task.prompt_ids(a, b), (a, b)
    for _, response in task.sft_batch(0, args.seed):
        text = tokenizer.decode(response, skip_special_tokens=True)
        assert text == task.decode(response[:-1]) and tokenizer(text)["input_ids"] == [task.BOS, *response[:-1]], text
    model.save_pretrained(f"{args.folder}/hf")
    tokenizer.save_pretrained(f"{args.folder}/hf")
    report(logp_gap=gap)


def hf_names(w, size) -> dict:
    """Returns the weights by Hugging Face's names, where a matrix maps columns."""
    D, block = size["d_model"], "trunk.blocks_L."
    named = {"model.embed_tokens.weight": w["trunk.embed_VD"], "lm_head.weight": w["out_DV"].T,
             "model.norm.weight": w["trunk.norm.scale_D"]}
    for i in range(size["layers"]):
        at = f"model.layers.{i}."
        for j, name in enumerate("qkv"):
            named[f"{at}self_attn.{name}_proj.weight"] = w[f"{block}attn.qkv_DKGH"][i, :, :, j].reshape(D, D).T
        named[f"{at}self_attn.o_proj.weight"] = w[f"{block}attn.out_NHD"][i].reshape(D, D).T
        for name, own in (("gate", "gate_DF"), ("up", "up_DF"), ("down", "down_FD")):
            named[f"{at}mlp.{name}_proj.weight"] = w[f"{block}mlp.{own}"][i].T
        named[f"{at}input_layernorm.weight"] = w[f"{block}attn_norm.scale_D"][i]
        named[f"{at}post_attention_layernorm.weight"] = w[f"{block}mlp_norm.scale_D"][i]
    return named


def theirs(args) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    task, n, samples = task_of(args), 32, 8
    cfg = GRPOConfig(
        output_dir=f"{args.folder}/trl", max_steps=args.iterations, per_device_train_batch_size=n * samples,
        num_generations=samples, max_completion_length=task.MAX_NEW, temperature=1.0, top_k=0, top_p=1.0, loss_type="grpo",
        epsilon=0.2, beta=0.05, use_bias_correction_kl=False, scale_rewards="group", num_iterations=1, shuffle_dataset=False,
        learning_rate=1e-3, lr_scheduler_type="linear", adam_epsilon=1e-5, weight_decay=0.0, max_grad_norm=1.0, seed=args.seed,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True)
    prompts = task.rl_prompts(args.seed)[: n * args.iterations]
    rows = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in prompts], "a": [a for a, _ in prompts],
                              "b": [b for _, b in prompts]})
    gate, now = Gate(), {}
    due = iter([prompts[i : i + n] for i in range(0, len(prompts), n)])

    def right(completion_ids, a, b, **_):
        assert list(zip(a, b, strict=True))[::samples] == next(due)  # ours has the same in this iteration
        for ids in completion_ids:  # the end token is in the completion, and nothing is after it
            assert ids.count(task.EOS) == (ids[-1] == task.EOS) and (ids[-1] == task.EOS or len(ids) == task.MAX_NEW), ids
        now["tokens"] = sum(map(len, completion_ids))
        now["ended"] = statistics.mean(ids[-1] == task.EOS for ids in completion_ids)
        found = [task.reward(x, y, ids) for x, y, ids in zip(a, b, completion_ids, strict=True)]
        now["score"] = statistics.mean(found)
        return found

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            with timed(now, "rollout_s"):
                return super()._generate(prompts)

        def _calculate_rewards(self, *given):
            with timed(now, "reward_s"):
                return super()._calculate_rewards(*given)

        def _prepare_inputs(self, batch):
            with timed(now, "prepared_s"):
                batch = super()._prepare_inputs(batch)
            now["began"] = time.perf_counter()
            return batch

    class Passing(TrainerCallback):
        def on_step_end(self, *_, **__):
            update_s, prepared_s = time.perf_counter() - now.pop("began"), now.pop("prepared_s")
            gate.passed(**now, reference_s=prepared_s - now["rollout_s"] - now["reward_s"], update_s=update_s)

    Timed(model=f"{args.folder}/hf", reward_funcs=right, args=cfg, train_dataset=rows, callbacks=[Passing()],
          processing_class=AutoTokenizer.from_pretrained(f"{args.folder}/hf")).train()


if __name__ == "__main__":
    given = argparse.Namespace(**json.loads(sys.argv[1]))
    {"teach": teach, "export": export, "ours": ours, "trl": theirs}[given.side](given)
