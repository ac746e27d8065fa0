"""A run's signatures on disk, and those of earlier runs: `signatures.npy`, `ids.txt`, `signatures.json` in a folder."""

import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxllm.data.minhash import DedupConfig, width
from jaxllm.errors import UserError, writing

MADE_BY = ("unit", "n", "bands", "rows", "seed", "near")  # settings that two runs' signatures must share


class Earlier(NamedTuple):
    tables: tuple[np.ndarray, ...]  # memory maps of signatures, one a folder
    ids: tuple[str, ...]  # of all their documents, in order


def save(folder: pathlib.Path, signature_NK: np.ndarray, ids: Iterable[str], cfg: DedupConfig) -> None:
    """Writes what a later run needs in order to count these documents as kept: give it the kept ones only."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "signatures.npy", signature_NK)
        with (folder / "ids.txt").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in ids)
        made_by = {name: getattr(cfg, name) for name in MADE_BY}
        (folder / "signatures.json").write_text(json.dumps(made_by), encoding="utf-8")  # last: the folder is whole


def load_earlier(cfg: DedupConfig) -> Earlier | None:
    """Returns the documents of `cfg.earlier`; None where it names no folder."""
    tables, ids = [], []
    for folder in map(pathlib.Path, cfg.earlier):
        where = f"dedup.earlier={folder}"
        try:
            made_by = json.loads((folder / "signatures.json").read_text(encoding="utf-8"))
            table = np.load(folder / "signatures.npy", mmap_mode="r")
            with (folder / "ids.txt").open(encoding="utf-8") as file:
                found = [json.loads(line) for line in file]
        except FileNotFoundError as e:
            missing = pathlib.Path(e.filename).name
            raise UserError(f"{where}: has no {missing}; should be the dedup folder of a finished run") from None
        except (OSError, ValueError) as e:
            raise UserError(f"{where}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
        for name in MADE_BY:
            if made_by.get(name) != getattr(cfg, name):
                raise UserError(f"{where}: was made with dedup.{name}={made_by.get(name)}, this run has {getattr(cfg, name)}; "
                                "should be the same")
        if table.shape != (len(found), width(cfg)):
            raise UserError(f"{where}: has {len(found)} ids and signatures of shape {table.shape}; one of its files is damaged")
        tables.append(table)
        ids += found
    return Earlier(tuple(tables), tuple(ids)) if tables else None
