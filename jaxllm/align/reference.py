"""What the reference model says of all answers, computed once before training and kept in the run folder.

So the reference is not in memory while the policy is trained, and a run that goes on does not need it. The file names the data
and the weights that it was made of; with others it is made anew.

N pair of a split, K answer of a sequence's group, T position.
"""

import hashlib
import pathlib
import sys
import time
import zipfile

import jax
import numpy as np

from jaxllm.align.config import BaseConfig
from jaxllm.align.dpo_loss import Reading, logps
from jaxllm.align.start import load_weights, weights_digest
from jaxllm.data.preference import Groups, PreferenceRows, Preferences
from jaxllm.errors import UserError, writing
from jaxllm.partition import replicated, row_sharding

FILE = "ref_logps.npz"


def with_references(found: Preferences, folder: pathlib.Path, reference: BaseConfig, mesh, *, dtype, chunk: int, rows: int,
                    begun: bool) -> None:
    """Puts the reference's log-probabilities beside the pairs of both splits; reads `rows` sequences at once.

    Raises UserError where a run that has `begun` would go on with a reference of other weights.
    """
    splits = {"train": found.train, "validation": found.validation}
    wanted: dict[str, Groups] = {name: pairs.answers for name, pairs in splits.items()}
    wanted |= {f"{name}_other": pairs.others for name, pairs in splits.items() if pairs.others is not None}
    told = {"data": data_digest(found, wanted), "type": np.dtype(dtype).name}
    if pathlib.Path(reference.run).exists():  # once it is gone, a run that goes on trusts what it has
        told["weights"] = weights_digest(reference)
    known = read(folder / FILE, told, begun)
    if known is None:
        known = measured(wanted, reference, mesh, dtype=dtype, chunk=chunk, rows=rows)
        write(folder / FILE, known, told)
    for name, pairs in splits.items():
        pairs.ref_logp_N2 = known[name][pairs.answer_N2]
        if pairs.others is not None:
            pairs.ref_other_N2 = known[f"{name}_other"].reshape(-1, 2)


def data_digest(found: Preferences, wanted: dict[str, Groups]) -> str:
    """Returns a digest of all sequences whose log-probabilities are wanted."""
    said = hashlib.blake2b(repr((found.train.digests, found.validation.digests)).encode(), digest_size=12)
    for name, groups in wanted.items():
        said.update(name.encode())
        for group in groups.of:
            for answer in group.answers:
                said.update(f"{len(group.prompt)} {len(answer)}".encode() + group.prompt.tobytes() + answer.tobytes())
    return said.hexdigest()


def measured(wanted: dict[str, Groups], reference: BaseConfig, mesh, *, dtype, chunk: int, rows: int) -> dict[str, np.ndarray]:
    """Returns, by name, the reference's log-probability of every answer, those of a group side by side."""
    graph, params = load_weights(reference, mesh)
    one = jax.jit(lambda params, *arrays: logps(Reading(graph, dtype, chunk), params, None, *arrays)[0],
                  out_shardings=replicated(mesh))
    total = sum(len(groups) * groups.n_answers for groups in wanted.values())
    known, done, said = {}, 0, time.monotonic()
    with jax.set_mesh(mesh):
        for name, groups in wanted.items():
            K = max(groups.n_answers, 1)
            found = [np.zeros(0, np.float32)]
            for batch in PreferenceRows(groups, rows // K).batches():
                arrays = (batch["token_BKT"].reshape(rows, 1, -1), batch["length_BK"].reshape(rows, 1),
                          batch["prompt_BK"].reshape(rows, 1))
                found.append(np.asarray(one(params, *jax.device_put(arrays, row_sharding(mesh)))).reshape(-1))
                done += rows
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    print(f"reference: {min(done, total):,} of {total:,} answers read", file=sys.stderr, flush=True)
            known[name] = np.concatenate(found)[: len(groups) * K]  # the rest is padding
    return known


def read(path: pathlib.Path, told: dict[str, str], begun: bool) -> dict[str, np.ndarray] | None:
    """Returns the log-probabilities of a file that was made of this; None where there is none, or one of something else."""
    try:
        with path.open("rb") as f, np.load(f) as kept:  # a damaged file is closed too
            found = dict(kept)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        print(f"! {path} cannot be read ({type(e).__name__}); it is made anew", file=sys.stderr)
        return None
    other = [name for name, value in told.items() if str(found.pop(f"of_{name}", "")) != value]
    if begun and "weights" in other:
        raise UserError(f"{path}: the weights of the reference are not those that this run began with; put them back, or "
                        "--run.overwrite=true starts anew")
    if other:
        print(f"! {path} is of other {' and '.join(other)}; it is made anew", file=sys.stderr)
        return None
    return {name: x for name, x in found.items() if not name.startswith("of_")}


def write(path: pathlib.Path, known: dict[str, np.ndarray], told: dict[str, str]) -> None:
    """Writes the file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        with part.open("wb") as f:
            np.savez(f, **known, **{f"of_{name}": np.array(value) for name, value in told.items()})
        part.replace(path)
