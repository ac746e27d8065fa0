"""Plants one fault at a time in a copy of the source and runs the tests that should see it.

    python tests/mutate.py            # every fault; exits 1 when one goes unseen
    python tests/mutate.py rope       # those whose name holds "rope"

A fault is a piece of source text and what it becomes; the text must occur exactly once in its file, so that a change of
the code cannot turn a fault into no fault without this script saying so.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    file: str
    text: str
    becomes: str
    tests: str  # what pytest is given


FAULTS = [
    Fault("a micro-batch is dropped", "jaxllm/train/step.py", "xs = jnp.arange(micro_batches), jax.tree.map(partial(split, micro_batches), batch)",
          "xs = jnp.arange(micro_batches - 1), jax.tree.map(lambda x: split(micro_batches, x)[1:], batch)", "tests/test_step.py -k micro_batches"),
    Fault("mean of micro-batch means", "jaxllm/train/step.py", "return jax.tree.map(jnp.add, total, (loss, n, grads)), None",
          "return jax.tree.map(jnp.add, total, (loss / n * 100, 100.0, jax.tree.map(lambda g: g / n * 100, grads))), None",
          "tests/test_step.py -k micro_batches"),
    Fault("the next document's first token is predicted", "jaxllm/data/packing.py", "weight_BT = ~target_starts_BT",
          "weight_BT = np.ones_like(target_starts_BT)", "tests/test_data.py -k pack"),
    Fault("document ids are off by one position", "jaxllm/data/packing.py", "starts_BT, target_starts_BT = starts_BS[:, :-1], starts_BS[:, 1:]",
          "starts_BT, target_starts_BT = np.roll(starts_BS, 1, 1)[:, :-1], starts_BS[:, 1:]", "tests/test_data.py -k pack"),
    Fault("document ids are ignored", "jaxllm/model/heads.py", "v_BTKH, doc_BT, window=self.window)", "v_BTKH, None, window=self.window)",
          "tests/test_step.py -k packed"),
    Fault("the window is one too wide", "jaxllm/model/heads.py", "window=self.window)", "window=self.window and self.window + 1)",
          "tests/test_model.py -k llama"),
    Fault("rotary positions turn half as fast", "jaxllm/model/layers.py", "(jnp.arange(half, dtype=jnp.float32) / half)",
          "(jnp.arange(half, dtype=jnp.float32) / (2 * half))", "tests/test_model.py -k llama"),
    Fault("keys are not rotated", "jaxllm/model/layers.py", "rope(k_BTKH, *angles)", "k_BTKH", "tests/test_model.py -k 'position or llama'"),
    Fault("query heads use the wrong kv head", "jaxllm/model/layers.py", "q_BTKGH.reshape(B, T, K * (G - 2), H)",
          "q_BTKGH.swapaxes(2, 3).reshape(B, T, K * (G - 2), H)", "tests/test_model.py -k llama"),
    Fault("gate and up are swapped", "jaxllm/model/layers.py", "gated(ACTIVATIONS[self.activation], gate_BTF, up_BTF)",
          "gated(ACTIVATIONS[self.activation], up_BTF, gate_BTF)", "tests/test_model.py -k llama"),
    Fault("the rotation's derivative turns the same way", "jaxllm/model/layers.py", "rope(d, saved[0], -saved[1])",
          "rope(d, saved[0], saved[1])", "tests/test_model.py -k derivatives"),
    Fault("changed text goes unnoticed", "jaxllm/train/pretrain.py", 'if position["made_of"] != made_of:', "if False:",
          "tests/test_resume.py -k text_that_changed"),
    Fault("a signal before the first step kills", "jaxllm/train/pretrain.py", "    with stopping_at_once():", "    with contextlib.nullcontext():",
          "tests/test_resume.py -k before_the_first"),
    Fault("context chunks are not balanced", "jaxllm/parallel/context.py", "chunks[[i, 2 * n - 1 - i]]", "chunks[[2 * i, 2 * i + 1]]",
          "tests/test_context.py -k triangle"),
    Fault("the ring's keys are taken for another device's", "jaxllm/parallel/context.py", "j = (i - s) % n", "j = (i + s) % n",
          "tests/test_context.py -k 'parts and ring'"),
    Fault("all processes feed the first rows", "jaxllm/partition.py", "return first // (last - first), mesh.size",
          "return 0, mesh.size", "tests/test_processes.py -k 'train_as_one and mesh0'"),
    Fault("one process stops alone", "jaxllm/train/loop.py", "if jax.process_count() == 1 or step % every:", "if True or step % every:",
          "tests/test_processes.py -k signal"),
    Fault("a slice's devices are mixed with another's", "jaxllm/partition.py", "np.array(devices).reshape(n, -1)",
          "np.array(devices).reshape(-1, n).T",
          "tests/test_processes.py -k between_slices"),
    Fault("groups meet a step late", "jaxllm/parallel/local_sgd.py", "due = (state.step + 1) % inner_steps == 0",
          "due = state.step % inner_steps == 0", "tests/test_local_sgd.py -k 'between or run_resumes'"),
    Fault("the outer step goes from the mean of one group", "jaxllm/parallel/local_sgd.py", "jnp.mean(x_G, axis=0)", "x_G[0]",
          "tests/test_local_sgd.py -k 'synchronous and mesh0'"),
    Fault("ZeRO-1 splits nothing", "jaxllm/train/state.py", "return split_over_data(sharding, shape) if zero1 else sharding",
          "return sharding", "tests/test_step.py -k zero1"),
    Fault("a missing process is not named", "jaxllm/parallel/processes.py", "if i not in visitors]", "if i in visitors]",
          "tests/test_processes.py -k missing_process"),
    Fault("a step is skipped on resume", "jaxllm/train/loop.py", "batches, clock, pending = run.batches(start), Clock(), None",
          "batches, clock, pending = run.batches(start + (start > 0)), Clock(), None", "tests/test_resume.py -k 'stopped_on or damaged'"),
    Fault("the optimizer's state is lost on resume", "jaxllm/train/checkpoint.py", "state = TrainState(params=read.params, **read.train)",
          "state = TrainState(params=read.params, **read.train | {'opt_state': jax.tree.map(jnp.zeros_like, read.train['opt_state'])})",
          "tests/test_pretrain.py -k restores"),
    Fault("checksums are not looked at", "jaxllm/train/checkpoint.py",
          "return [name for name, total in zip(named, sums, strict=True) if int(total) != arrays[name][2]]", "return []",
          "tests/test_resume.py -k damage_mix"),
    Fault("a signal during a save is lost", "jaxllm/train/loop.py", "finished or stopping is not None or step % checkpoint_every == 0",
          "finished or step % checkpoint_every == 0", "tests/test_resume.py -k stopped_on"),
    Fault("lines of a killed run are kept", "jaxllm/train/run_folder.py", "if json.loads(line).get(\"step\", 0) <= step:", "if json.loads(line):",
          "tests/test_resume.py -k damaged"),
    Fault("the z-loss has half its gradient", "jaxllm/train/loss.py", "(1 + 2 * z_loss * log_z_BC)", "(1 + z_loss * log_z_BC)",
          "tests/test_loss.py"),
    Fault("the last positions of a row have no loss", "jaxllm/train/loss.py", "if C * n == T:", "if True:", "tests/test_loss.py"),
    Fault("norms decay", "jaxllm/train/optim.py", 'return var.replace("norm" not in var.axes and', 'return var.replace(True and',
          "tests/test_optim.py -k decay"),
    Fault("cosine ends at zero", "jaxllm/train/schedules.py", "peak * (final + (1 - final) * 0.5 *", "peak * (0.5 *", "tests/test_optim.py -k cosine"),
    Fault("warm-up starts at zero", "jaxllm/train/schedules.py", "peak * (step + 1) / max(warmup, 1)", "peak * step / max(warmup, 1)",
          "tests/test_optim.py -k closed_form"),
    Fault("the plateau's floor is ignored", "jaxllm/train/optim.py", ", min_scale=cfg.final)", ")", "tests/test_optim.py -k plateau"),
    Fault("dropout's key is the same in evaluation", "jaxllm/model/layers.py", "if key is None or rate == 0:", "if rate == 0:",
          "tests/test_step.py -k dropout"),
    Fault("a weight is replicated", "jaxllm/partition.py", '"embed": "fsdp",  # width, in weights', '"embed": None,', "tests/test_step.py -k really_split"),
    Fault("a mesh that does not divide is let through", "jaxllm/train/state.py", "    check_divides(abstract.params, mesh)\n", "",
          "tests/test_step.py -k said_before"),
    Fault("an infinite loss is not noticed", "jaxllm/train/loop.py", "if why := not_finite(names, metrics):", "if False and (why := ''):",
          "tests/test_pretrain.py -k not_finite"),
    Fault("padding is attended to in decoding", "jaxllm/generate/cache.py",
          "seen_BS = (slot_S[None] <= slot) & (slot_S[None] >= first_B[:, None])", "seen_BS = (slot_S[None] <= slot) & (first_B[:, None] >= 0)",
          "tests/test_generate.py -k logprobs"),
    Fault("padding counts as positions in decoding", "jaxllm/generate/cache.py", "pos_B1 = jnp.maximum(slot - first_B, 0)[:, None]",
          "pos_B1 = jnp.maximum(slot - 0 * first_B, 0)[:, None]", "tests/test_generate.py -k logprobs"),
    Fault("one random key for every token", "jaxllm/generate/sample.py", "jax.random.fold_in(jax.random.key(seed), n)", "jax.random.key(seed)",
          "tests/test_generate.py -k real_tokens"),
    Fault("the nucleus leaves out the token that crosses p", "jaxllm/generate/sample.py", "ok_B1 = sum_B1 >= need",
          "ok_B1 = sum_B1 + jnp.max(weight_BV) >= need", "tests/test_generate.py -k filters"),
    Fault("an unknown key is dropped", "jaxllm/config.py", "raise UserError(f\"{where}: unknown key {key!r}{_nearest(cls, key)}\") from None",
          "return base", "tests/test_config.py -k mistake"),
    Fault("activations go to the stage before", "jaxllm/parallel/pipeline.py",
          "[(i, (i + 1) % p) for i in range(p)], [(i, (i - 1) % p) for i in range(p)]",
          "[(i, (i - 1) % p) for i in range(p)], [(i, (i + 1) % p) for i in range(p)]", "tests/test_pipeline.py -m 'not slow' -k 'add_to_the_loss'"),
    Fault("each stage clips by its own norm", "jaxllm/parallel/pipeline.py", "    return loss, d_shared, jax.tree.map(lambda a: a[:, None], d_blocks)\n",
          "    norm = jnp.sqrt(sum(jnp.sum(a * a) for a in jax.tree.leaves(d_blocks)))\n"
          "    return loss, d_shared, jax.tree.map(lambda a: a[:, None] / jnp.maximum(norm / 30, 1), d_blocks)\n",
          "tests/test_pipeline.py -m 'not slow' -k 'clipping and stage8'"),
    Fault("a pipeline drops the last micro-batch", "jaxllm/parallel/table.py", "    return Table(columns, x_slots, g_slots)\n",
          "    columns['op'][columns['micro'] == schedule.micro_batches - 1] = 0\n    return Table(columns, x_slots, g_slots)\n",
          "tests/test_pipeline.py -m 'not slow' -k 'add_to_the_loss'"),
    Fault("a slot is given away while it is read", "jaxllm/parallel/table.py", "if until <= start)", "if until <= start + 1)",
          "tests/test_schedule.py -k still_waits"),
    Fault("what layers add to the loss has no gradient", "jaxllm/parallel/pipeline.py", "dx_BTD = pull((g_BTD, jnp.ones_like(extra)))",
          "dx_BTD = pull((g_BTD, jnp.zeros_like(extra)))", "tests/test_pipeline.py -k 'add_to_the_loss and not zero_bubble'"),
    Fault("every micro-batch of a pipeline has one dropout key", "jaxllm/train/stages.py", "micro_key(key, i, m)", "micro_key(key, 0, m)",
          "tests/test_pipeline.py -m 'not slow' -k dropout"),
    Fault("weight parts are all left for the end", "jaxllm/parallel/schedule.py", "            if i >= s:\n                order.append(Op(WEIGHT, i - s, 0))\n",
          "", "tests/test_schedule.py"),
    Fault("1F1B runs one forward too far ahead", "jaxllm/parallel/schedule.py", "ahead = p - 1 - s if v == 1", "ahead = p - s if v == 1",
          "tests/test_schedule.py -k formulas"),
    Fault("two processes may share a folder", "jaxllm/train/run_folder.py", "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
          "tests/test_resume.py -k in_use"),
    Fault("a loop's body is counted once", "jaxllm/plan/hlo.py", "1 if trips is None else trips)]", "1)]", "tests/test_plan_compile.py -k cycles"),
    Fault("the cheap branch is counted", "jaxllm/plan/hlo.py", "max(i.branches, key=cost)", "min(i.branches, key=cost)",
          "tests/test_plan_compile.py -k cycles"),
    Fault("a collective spread over fusions is counted in each", "jaxllm/plan/collectives.py", "if (channel[1], times) in seen:", "if False:",
          "tests/test_plan_compile.py -k by_axis"),
    Fault("a ring of chips is taken for a line", "jaxllm/plan/topology.py", "n % topology.generation.wraps == 0", "n == 0",
          "tests/test_plan_compile.py -k by_hand"),
    Fault("the front keeps what is beaten", "jaxllm/plan/fit.py", 'r["fits"] and not beaten(r)', 'r["fits"]',
          "tests/test_plan_compile.py -k front"),
    Fault("a full group's part is lost", "jaxllm/data/mixture.py", "left = max(total - amount[~is_open].sum(), 0.0)",
          "left = total * share[is_open].sum() / share.sum()", "tests/test_data_mixture.py -k unimax"),
    Fault("a copy hangs on the document's place", "jaxllm/data/mixture.py", "chance(ids[i], cfg.seed)", "chance(str(i), cfg.seed)",
          "tests/test_data_mixture.py -k place"),
    Fault("the cap is forgotten inside a group", "jaxllm/data/mixture.py", "fill(wanted_N[inside], most_N[inside], amount)",
          "fill(wanted_N[inside], np.inf * most_N[inside], amount)", "tests/test_data_mixture.py -k cap"),
    Fault("a first pass counts as a repeat", "jaxllm/data/mixture.py", "math.expm1(-(epochs - 1) / R_D_STAR)",
          "math.expm1(-epochs / R_D_STAR)", "tests/test_data_mixture.py -k law"),
    Fault("strata weigh as their samples", "jaxllm/data/review/estimate.py", "share = sum(s.population / total * s.bad / s.judged for s in judged)",
          "share = sum(s.bad for s in judged) / sum(s.judged for s in judged)", "tests/test_data_review.py -k 'weighs or truth'"),
    Fault("labels of one expert count as agreement", "jaxllm/data/review/agreement.py", "pairable_U = m_U >= 2", "pairable_U = m_U >= 1",
          "tests/test_data_review.py -k krippendorff"),
    Fault("a sample without bad documents proves there are none", "jaxllm/data/review/estimate.py", "rng.beta(p * n + 0.5, (1 - p) * n + 0.5, DRAWS)",
          "rng.beta(p * n + 1e-9, (1 - p) * n + 1e-9, DRAWS)", "tests/test_data_review.py -k 'proof or truth'"),
    Fault("letters of a note are labels", "jaxllm/data/review/page.html", "document.activeElement.tagName) || !expert) return;",
          "'') || !expert) return;", "tests/test_data_review.py -k browser"),
    Fault("a page's markup is taken for ours", "jaxllm/data/review/page.html", "node.textContent = text;", "node.innerHTML = text;",
          "tests/test_data_review.py -k 'browser or elsewhere'"),
    Fault("labels are written in place", "jaxllm/data/review/labels.py", 'part = self.path.with_name(self.path.name + ".part")\n        with writing(self.path)',
          "part = self.path\n        with writing(self.path)", "tests/test_data_review.py -k full_disk"),
    Fault("any site may send labels", "jaxllm/data/review/serve.py", 'origin.removeprefix("http://") in hosts', "True",
          "tests/test_data_review.py -k machines"),
    Fault("the near ones are not drawn apart", "jaxllm/data/review/sample.py", "bool(abs(value - threshold) <= reach)",
          "bool(abs(value - threshold) > reach)", "tests/test_data_review.py -k near"),
    Fault("a page's footer is text", "jaxllm/data/extract.py", "text = self.plain_text(tree, main_content=True, skip_elements=FURNITURE, **settings)",
          "text = self.plain_text(tree, main_content=False, **settings)", "tests/test_data_extract.py -k page_goes"),
    Fault("code loses its fence", "jaxllm/data/extract.py", "n_code = code_blocks(tree) if markdown else", "n_code =",
          "tests/test_data_extract.py -k readable"),
    Fault("a table's row loses a cell", "jaxllm/data/extract.py", "for cell in CELL.split(row)[1:]]", "for cell in CELL.split(row)[2:]]",
          "tests/test_data_extract.py -k readable"),
    Fault("short lists are taken for navigation", "jaxllm/data/extract.py", "    keep_shallow_lists(tree)\n    n_code", "    n_code",
          "tests/test_data_extract.py -k 'readable or page_goes'"),
    Fault("nodes are looked up one by one", "jaxllm/data/extract.py", 'for block in body.query_selector_all("pre").values():',
          'for block in body.query_selector_all("pre"):', "tests/test_data_extract.py -k linear"),
    Fault("deeply nested pages are parsed", "jaxllm/data/extract.py", "DEEPEST, MOST_ATTRIBUTES = 2000, 5000", "DEEPEST, MOST_ATTRIBUTES = 10**9, 5000",
          "tests/test_data_extract.py -k 'in_time and html2'"),
    Fault("a page's declared encoding is believed before its bytes", "jaxllm/data/charset.py", "    try:\n        return raw.decode(), ", "    try:\n        return raw.decode(_codec(declared) or 'utf-8'), ",
          "tests/test_data_extract.py -k encoding"),
    Fault("encodings are not repaired", "jaxllm/data/clean.py", "(repaired := self.fix_encoding(line)) != line", "(repaired := line) != line",
          "tests/test_data_clean.py -k mended"),
    Fault("Greek units become Latin", "jaxllm/data/clean.py", "            return word\n        tally(", "            pass\n        tally(", "tests/test_data_clean.py -k meant"),
    Fault("joiners of other scripts are dropped", "jaxllm/data/clean.py", "\\U000f0000-\\U0010ffff]|(?<=[ -~])", "\\U000f0000-\\U0010ffff\\u200c\\u200d]|(?<=[ -~])",
          "tests/test_data_clean.py -k meant"),
    Fault("a row of emoji is said as often as it is there", "jaxllm/data/symbols.py", "w != words[i - 1]", "True", "tests/test_data_clean.py -k mended"),
    Fault("spaces before a line's end are tried from each", "jaxllm/data/clean.py", 'r"(?<![ \\t])[ \\t]+', 'r"[ \\t]+', "tests/test_data_clean.py -k takes_long"),
    Fault("spelling is put right in a text that means it", "jaxllm/data/spelling.py", "if found[0] in meant:", "if False:", "tests/test_data_clean.py -k spelling"),
    Fault("spelling is put right in code", "jaxllm/data/spelling.py", "by_paragraph(text, lambda paragraph: WRONG.sub(put_right, paragraph))", "WRONG.sub(put_right, text)",
          "tests/test_data_clean.py -k spelling"),
    Fault("cards need no check digit", "jaxllm/data/privacy.py", "for d in doubled) % 10 == 0", "for d in doubled) >= 0", "tests/test_data_privacy.py -k 'ordinary or check'"),
    Fault("any numbers are telephones", "jaxllm/data/privacy.py", 'r"(?<![\\w.,+/-])(?<!\\d )(?:"', 'r"(?:"', "tests/test_data_privacy.py -k ordinary"),
    Fault("versions are addresses", "jaxllm/data/privacy.py", "all(int(part) < 32 for part in parts)", "False", "tests/test_data_privacy.py -k ordinary"),
    Fault("French numbers are not known", "jaxllm/data/privacy.py", 'r"|0[1-9](?:([ .-])\\d{2})(?:\\2\\d{2}){3}"', 'r"|0[1-9](?:([ .-])\\d{2})(?:\\2\\d{2}){8}"',
          "tests/test_data_privacy.py -k 'planted and phone'"),
    Fault("keys are searched to the end of the text", "jaxllm/data/privacy.py", "(?=[ A-Z0-9]{11})", "(?=[ A-Z0-9]{11,})", "tests/test_data_privacy.py -k takes_long"),
    Fault("augmentation differs between processes", "jaxllm/data/augment.py", "pick = random.Random(hashlib", "pick = random.Random(id(seen)) if n else random.Random(hashlib", "tests/test_data_augment.py -k function"),
    Fault("code is shuffled", "jaxllm/data/prose.py", "[*FENCED.finditer(text), None]", "[None]", "tests/test_data_augment.py -k other_way"),
    Fault("a language is told by a text's start alone", "jaxllm/data/language.py", "piece = \" \".join(pieces(text, self.cfg.sample).split())",
          "piece = \" \".join(text[:self.cfg.sample].split())", "tests/test_data_language.py -k start"),
    Fault("a score at the threshold is dropped", "jaxllm/data/language.py", "if score < self.cfg.min_score:", "if score <= self.cfg.min_score:",
          "tests/test_data_language.py -k reason"),
    Fault("Gopher's shortest document is dropped", "jaxllm/data/quality.py", "n_words < cfg.min_words:", "n_words <= cfg.min_words:",
          "tests/test_data_quality.py -k 'gopher and min_words'"),
    Fault("a repeated n-gram's characters count once an n-gram", "jaxllm/data/repetition.py", "covered_W = edge_W[:-1].cumsum() > 0\n    return int(length_W[covered_W].sum())",
          "covered_W = edge_W[:-1].cumsum()\n    return int((length_W * covered_W).sum())", "tests/test_data_quality.py -k one_by_one"),
    Fault("the longest of equally frequent n-grams is missed", "jaxllm/data/repetition.py", "& _LENGTH).max())", "& _LENGTH).min())",
          "tests/test_data_quality.py -k one_by_one"),
    Fault("FineWeb keeps what is at its threshold", "jaxllm/data/quality.py", "ended <= cfg.min_ended_lines:", "ended < cfg.min_ended_lines:",
          "tests/test_data_quality.py -k 'fineweb and ended'"),
    Fault("C4 counts the sentences of lines it drops", "jaxllm/data/quality.py", "            elif rule := self._drops(stripped, phrases):\n",
          "            elif (sentences := sentences + 1) and (rule := self._drops(stripped, phrases)):\n", "tests/test_data_quality.py -k c4_documents"),
    Fault("a word's hash depends on where it stands", "jaxllm/data/words.py", "* inverse[start_W]", "* inverse[:len(start_W)]",
          "tests/test_data_quality.py -k hashes"),
    Fault("a host's name may be the end of another's", "jaxllm/data/lists.py", '(tail := ".".join(parts[i:])) in hosts', "any((tail := h) and host.endswith(h) for h in hosts)",
          "tests/test_data_harm.py -k hosts"),
    Fault("a passage counts the pair before it", "jaxllm/data/classifier.py", "total_P[start_P > 0] -= ", "total_P[start_P > 0] -= 0 * ",
          "tests/test_data_harm.py -k alone"),
    Fault("a listed word far from a group counts as near", "jaxllm/data/harm.py", "<= self.cfg.near", "<= 100 * self.cfg.near",
          "tests/test_data_harm.py -k one_listed"),
    Fault("redaction leaves what is only together harmful", "jaxllm/data/harm.py", "        if found:  # e.g. a redaction that is itself listed\n            return Removal",
          "        if False:\n            return Removal", "tests/test_data_harm.py -k stays_harmful"),
    Fault("her is always his", "jaxllm/data/counterfactual.py", 'return "his" if belongs else "him"', 'return "his"', "tests/test_data_harm.py -k capitals"),
    Fault("a source's halves are not compared", "jaxllm/data/homographs.py", "excess = divergence - baseline", "excess = divergence",
          "tests/test_data_homographs.py -k 'chance or planted'"),
    Fault("documents are each other's context", "jaxllm/data/homographs.py", "held += [(word_N, context_N), (nothing, nothing)]", "held += [(word_N, context_N)]",
          "tests/test_data_homographs.py -k order"),
    Fault("pairs are not verified", "jaxllm/data/dedup.py",
          "return jaccard(self._shingles(a), self._shingles(b)) >= self.cfg.threshold", "return True", "tests/test_data_dedup.py -k 'planted or crowd'"),
    Fault("the worst copy is kept", "jaxllm/data/dedup.py", "order_M, -quality_M, group_M))", "order_M, quality_M, group_M))",
          "tests/test_data_dedup.py -k best"),
    Fault("a document of an earlier run may go", "jaxllm/data/dedup.py", "np.full(m, np.inf)", "np.full(m, -np.inf)",
          "tests/test_data_dedup.py -k earlier"),
    Fault("documents far apart in a group are never compared", "jaxllm/data/dedup.py", "range(1, self.cfg.window + 1)", "range(1, 1)",
          "tests/test_data_dedup.py -k planted"),
    Fault("only the first band is looked at", "jaxllm/data/dedup.py", "range(self.cfg.bands)", "range(1)",
          "tests/test_data_dedup.py -k planted"),
    Fault("all values are of one hash function", "jaxllm/data/minhash.py",
          "units.mix(start + np.arange(1, k + 1, dtype=np.uint64) * np.uint64(units.ROOT))", "units.mix(start + np.zeros(k, np.uint64))",
          "tests/test_data_dedup.py -k bias"),
    Fault("shingles run on into the next document", "jaxllm/data/minhash.py", "np.maximum(end_N - begin_N - cfg.n + 1, 0)",
          "np.maximum(end_N - begin_N, 0)", "tests/test_data_dedup.py -k together"),
    Fault("white space makes another document", "jaxllm/data/minhash.py", '.translate(None, b" \\t\\n\\r\\v\\f")', "",
          "tests/test_data_dedup.py -k best"),
    Fault("capitals make another word", "jaxllm/data/units.py", "ord(lower) if len(lower) == 1 else code", "code",
          "tests/test_data_dedup.py -k plain_python"),
    Fault("Han text is one word", "jaxllm/data/units.py", "(0x4E00, 0xA000), ", "", "tests/test_data_dedup.py -k planted"),
    Fault("a word at the end of a piece is cut", "jaxllm/data/units.py", "last_W[-1] == cut:", "last_W[-1] < 0:",
          "tests/test_data_dedup.py -k trace"),
    Fault("signatures of other settings are taken", "jaxllm/data/signatures.py", "if made_by.get(name) != getattr(cfg, name):", "if False:",
          "tests/test_data_dedup.py -k mistakes"),
    Fault("counters of lines wrap around", "jaxllm/data/repeats.py", "np.minimum(row[place] + count.astype(np.uint64), MOST)",
          "row[place] + count.astype(np.uint64)", "tests/test_data_dedup.py -k too_low"),
    Fault("the first occurrence of a passage goes", "jaxllm/data/substrings.py", "again_W[place_W[order[1:]]", "again_W[place_W[order[:-1]]",
          "tests/test_data_dedup.py -k passages"),
    Fault("a seed counts alone", "jaxllm/data/decontaminate.py", "if similarity >= (self", "if similarity > 0 * (self",
          "tests/test_data_decontaminate.py -k part_of"),
    Fault("an edited item is no item", "jaxllm/data/decontaminate.py", "if similarity >= (self", "if similarity >= 1 + 0 * (self",
          "tests/test_data_decontaminate.py -k planted"),
    Fault("templates are part of items", "jaxllm/data/decontaminate.py", "_shared_by(grams) > max(", "_shared_by(grams) < 0 * max(",
          "tests/test_data_decontaminate.py -k cut"),
    Fault("items without rare seeds are not looked for", "jaxllm/data/decontaminate.py", "(rank < FEW) | (", "(",
          "tests/test_data_decontaminate.py -k variants"),
]


def main(argv: list[str]) -> int:
    unseen = []
    chosen = [f for f in FAULTS if not argv or any(word in f.name for word in argv)]
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__"))
        for fault in chosen:
            if not seen(fault, copy):
                unseen.append(fault.name)
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} faults seen" + "".join(f"\n  unseen: {name}" for name in unseen))
    return 1 if unseen else 0


def seen(fault: Fault, copy: pathlib.Path) -> bool:
    """Plants a fault, runs its tests, takes it out again; returns whether a test failed, and says which."""
    path = copy / fault.file
    source = path.read_text(encoding="utf-8")
    if source.count(fault.text) != 1:
        print(f"?  {fault.name}: its text occurs {source.count(fault.text)} times in {fault.file}")
        return False
    path.write_text(source.replace(fault.text, fault.becomes), encoding="utf-8")
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider --durations=0 {fault.tests}"
    done = subprocess.run(["sh", "-c", command], cwd=copy, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")]),
                                            "PYTHONDONTWRITEBYTECODE": "1"})
    path.write_text(source, encoding="utf-8")
    red = [line.split(" - ")[0].removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    caught = done.returncode == 1 and bool(red)
    print(f"{'ok' if caught else 'NO'} {fault.name}: {red[0] if red else (done.stdout + done.stderr).splitlines()[-1]}", flush=True)
    return caught


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
