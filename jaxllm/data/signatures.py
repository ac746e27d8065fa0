"""A run's signatures on disk, and those of earlier runs: `signatures.npy`, `ids.txt`, `signatures.json` in a folder."""

import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxllm.data.minhash import DedupConfig, width
from jaxllm.errors import UserError, writing

ROWS = 1 << 14  # copied at once
MADE_BY = ("unit", "n", "bands", "rows", "seed", "near")  # settings that two runs' signatures must share


class Earlier(NamedTuple):
    tables: tuple[np.ndarray, ...]  # memory maps of signatures, one a folder
    ids: tuple[str, ...]  # of all their documents, in order


def save(folder: pathlib.Path, signature_NK: np.ndarray, ids: Iterable[str], cfg: DedupConfig,
         kept: np.ndarray | None = None) -> None:
    """Writes what a later run needs in order to count these documents, or of them those in `kept`, as kept."""
    kept = np.arange(len(signature_NK)) if kept is None else kept
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "signatures.json").unlink(missing_ok=True)
        with (folder / "signatures.npy").open("wb") as file:
            shape = (len(kept), signature_NK.shape[1])
            np.lib.format.write_array_header_1_0(file, {"descr": "<u4", "fortran_order": False, "shape": shape})
            for at in range(0, len(kept), ROWS):
                file.write(np.ascontiguousarray(signature_NK[kept[at : at + ROWS]], "<u4").tobytes())
        with (folder / "ids.txt").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in ids)
        made_by = {name: getattr(cfg, name) for name in MADE_BY}
        (folder / "signatures.json").write_text(json.dumps(made_by), encoding="utf-8")  # last: the folder is whole


def load_earlier(cfg: DedupConfig) -> Earlier | None:
    """Returns the documents of `cfg.earlier`; None where it names no folder."""
    tables, ids = [], []
    for given in cfg.earlier:
        where, folder = f"dedup.earlier={given}", pathlib.Path(given).expanduser()
        folder = folder / "dedup" if (folder / "dedup").is_dir() else folder
        try:
            made_by = json.loads((folder / "signatures.json").read_text(encoding="utf-8"))
            table = np.load(folder / "signatures.npy", mmap_mode="r")
            with (folder / "ids.txt").open(encoding="utf-8") as file:
                found = [json.loads(line) for line in file]
        except FileNotFoundError as e:
            missing = pathlib.Path(e.filename).name
            raise UserError(f"{where}: has no {missing}; should be the folder of a finished run") from None
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
