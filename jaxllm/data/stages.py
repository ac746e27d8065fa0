"""Which stages a document goes through, in which order."""

import functools
import importlib.util
import pathlib
import pickle

from jaxllm.data.clean import Clean
from jaxllm.data.decontaminate import Decontaminate, build_index
from jaxllm.data.document import Document
from jaxllm.data.extract import Extract
from jaxllm.data.filters import Filters
from jaxllm.data.harm import Harm
from jaxllm.data.homographs import Homographs
from jaxllm.data.language import Language
from jaxllm.data.privacy import Privacy
from jaxllm.errors import UserError, writing

INDEX = "evaluation-items.pickle"


def checked(cfg, folder: str):
    """Raises UserError where the stages cannot work as they are set; returns the index of evaluation items, if there is any.

    Writes nothing. `folder`: where an earlier start of the same plan has left its index; "": nowhere.
    """
    if cfg.output.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError("output.format=parquet needs pyarrow: pip install 'jaxllm[parquet]'")
    index = None
    if cfg.decontaminate.folder:
        held = bool(folder) and (pathlib.Path(folder) / INDEX).is_file()
        index = _index(folder) if held else build_index(cfg.decontaminate, functools.partial(_cleaned, Clean(cfg.clean)))
    per_document(cfg, folder, index)
    return index


def prepared(folder: str, index) -> dict[str, list]:
    """Writes what is made once for all workers; returns tables for the report."""
    if index is None:
        return {}
    path = pathlib.Path(folder) / INDEX
    if not path.is_file():
        with writing(path):
            part = path.with_suffix(".part")
            part.write_bytes(pickle.dumps(index))
            part.replace(path)
    return {"evaluation items": [{"task": task, "looked for": n, "too short to look for": index.too_short.get(task, 0)}
                                 for task, n in index.looked_for.items()]}


def _cleaned(clean: Clean, text: str) -> str:
    doc = Document("", "", text, {}, {})
    clean(doc)
    return doc.text


@functools.lru_cache(1)
def _index(folder: str):
    return pickle.loads((pathlib.Path(folder) / INDEX).read_bytes())  # of the work folder, which this run wrote


def per_document(cfg, folder: str, index=None) -> list:
    """Returns the stages that look at one document, built for this process."""
    stages = [Extract(cfg.extract), Clean(cfg.clean)]
    if cfg.decontaminate.folder:  # before anything cuts lines or masks words of an item
        stages.append(Decontaminate(cfg.decontaminate, index or _index(folder)))
    if cfg.language.use:
        stages.append(Language(cfg.language))
    stages.append(Filters(cfg.filter))
    if cfg.harm.use:
        stages.append(Harm(cfg.harm))
    stages.append(Privacy(cfg.privacy))
    if cfg.homographs.treatment != "none":
        stages.append(Homographs(cfg.homographs))
    return stages
