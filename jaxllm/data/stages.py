"""Which stages a document goes through, in which order."""

from jaxllm.data.clean import Clean
from jaxllm.data.decontaminate import Decontaminate
from jaxllm.data.extract import Extract
from jaxllm.data.filters import Filters
from jaxllm.data.harm import Harm
from jaxllm.data.homographs import Homographs
from jaxllm.data.language import Language
from jaxllm.data.privacy import Privacy


def per_document(cfg) -> list:
    """Returns the stages that look at one document, built for this process."""
    stages = [Extract(cfg.extract), Clean(cfg.clean)]
    if cfg.language.use:
        stages.append(Language(cfg.language))
    stages.append(Filters(cfg.filter))
    if cfg.harm.use:
        stages.append(Harm(cfg.harm))
    stages.append(Privacy(cfg.privacy))
    if cfg.decontaminate.folder:
        stages.append(Decontaminate(cfg.decontaminate))
    if cfg.homographs.treatment != "none":
        stages.append(Homographs(cfg.homographs))
    return stages
