"""More versions of the same text, for training only: off by default, and no substitute for more text.

shuffle     sentences of a paragraph in another order: keeps a classifier or an encoder from reading order as content; for
            a language model it breaks coherence, so keep its share small
mask        spans become sentinels, their text moves to the end (span corruption; Raffel et al. 2020): teaches infilling
            where little text is seen many times
rephrase    words and phrases become others that mean the same in every context, by a list; rules that find nothing leave the
            sentence, so nothing is made up: for many epochs over little text

Every version is a function of the document's id and the seed. Code, tables and lists are never touched.
"""

import functools
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxllm.data.document import Document
from jaxllm.data.prose import by_paragraph

SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[^\W\d_a-z])|(?<=[。！？])")
ABBREVIATED = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No|Fig|Sec|cf|al|approx|[A-Z])\.)$")
# Swaps that keep the meaning wherever they stand; both directions. None is a name, a number, a negation or a quantity.
SAME = (
    ("for example", "for instance"), ("in order to", "so as to"), ("a lot of", "plenty of"), ("because of", "owing to"),
    ("in addition", "moreover"), ("however", "nevertheless"), ("therefore", "consequently"), ("begin", "start"),
    ("begins", "starts"), ("began", "started"), ("large", "big"), ("quickly", "rapidly"),
    ("often", "frequently"), ("usually", "normally"), ("nearly", "almost"), ("perhaps", "maybe"),
    ("whole", "entire"), ("important", "significant"), ("to obtain", "to get"), ("purchase", "buy"),
    ("as well as", "and also"), ("such as", "like"), ("is able to", "can"), ("do not", "don't"),
    ("does not", "doesn't"), ("cannot", "can't"), ("it is", "it's"), ("at the moment", "right now"),
    ("due to the fact that", "because"),
)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    use: bool = False  # write augmented versions beside each document
    versions: int = 1  # of each document; those that came out like the document or each other are left out
    shuffle: float = 0.0  # share of paragraphs whose sentences change places
    mask: float = 0.0  # share of words taken out in spans and moved to the end
    mask_length: int = 3  # mean words of a span
    rephrase: float = 0.1  # chance of each phrase on the list to be said the other way (English)
    seed: int = 0  # another one makes other versions

    def __post_init__(self):
        for name in ("shuffle", "mask", "rephrase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}={getattr(self, name)}: should be in [0, 1]")
        if self.mask > 0.5:
            raise ValueError(f"augment.mask={self.mask}: should be at most 0.5, or too little is left to fill in from")
        if self.versions < 1 or self.mask_length < 1:
            raise ValueError(f"augment.versions={self.versions}, augment.mask_length={self.mask_length}: should be at least 1")
        if self.use and not self.shuffle + self.mask + self.rephrase:
            raise ValueError("augment.use=true with shuffle, mask and rephrase all 0: nothing would be made")


def versions(doc: Document, cfg: AugmentConfig) -> Iterator[Document]:
    """Yields further versions of a document, each with an id of its own and meta["augmented"] naming the document it is of."""
    seen = {doc.text}
    for n in range(1, cfg.versions + 1) if cfg.use else ():
        # not Python's hash, which differs from process to process
        pick = random.Random(hashlib.blake2b(f"{cfg.seed}\0{doc.source}\0{doc.id}\0{n}".encode("utf-8", "replace")).digest())
        text = doc.text
        if cfg.rephrase:
            text = by_paragraph(text, functools.partial(rephrased, pick=pick, chance=cfg.rephrase))
        if cfg.shuffle:
            text = by_paragraph(text, functools.partial(shuffled, pick=pick, chance=cfg.shuffle))
        if cfg.mask:
            text = masked(text, pick, cfg.mask, cfg.mask_length)
        if text not in seen:
            seen.add(text)
            yield Document(f"{doc.id}#augmented{n}", doc.source, text, doc.meta | {"augmented": doc.id})


def sentences(paragraph: str) -> list[str]:
    out, at = [], 0
    for found in SENTENCE_END.finditer(paragraph):
        if not ABBREVIATED.search(paragraph[:found.start()][-12:]):
            out.append(paragraph[at:found.end()])
            at = found.end()
    return [*out, paragraph[at:]] if paragraph[at:].strip() else out


def shuffled(paragraph: str, *, pick: random.Random, chance: float) -> str:
    """Returns the paragraph, by chance with the same sentences in another order."""
    parts = sentences(paragraph)
    if len(parts) < 3 or pick.random() >= chance:
        return paragraph
    gap = "" if parts[0].rstrip()[-1:] in "。！？" else " "
    order = [part.strip() for part in parts]
    pick.shuffle(order)
    return gap.join(order) + paragraph[len(paragraph.rstrip()):]


def rephrased(paragraph: str, *, pick: random.Random, chance: float) -> str:
    """Returns the paragraph with some phrases of the list said the other way, their capitals kept."""
    def other(found: re.Match) -> str:
        if pick.random() >= chance:
            return found[0]
        said = OTHER[found[0].lower()]
        return said[0].upper() + said[1:] if found[0][0].isupper() else said

    return PHRASE.sub(other, paragraph)


OTHER = {a: b for pair in SAME for a, b in (pair, pair[::-1])}
# not in capitals throughout, which are names or shouting
_PHRASES = "|".join(f"[{p[0]}{p[0].upper()}]{re.escape(p[1:])}" for p in sorted(OTHER, key=len, reverse=True))
PHRASE = re.compile(rf"(?<![\w'’-])(?:{_PHRASES})(?![\w'’-])")


def masked(text: str, pick: random.Random, share: float, mean: int) -> str:
    """Returns the text with spans of words replaced by <extra_0>, <extra_1>, …, then each mark with what it stood for."""
    words = re.findall(r"\S+\s*", text)
    out, targets, i = [], [], 0
    while i < len(words):
        if words[i].strip() and pick.random() < share / mean and len(targets) < 100 and i + 1 < len(words):
            n = min(1 + int(pick.expovariate(1 / max(mean - 0.5, 0.5))), len(words) - i, 4 * mean)
            span = "".join(words[i:i + n])
            mark = f"<extra_{len(targets)}>"
            out.append(mark + span[len(span.rstrip()):])
            targets.append(f"{mark} {span.rstrip()}")
            i += n
        else:
            out.append(words[i])
            i += 1
    lead = text[:len(text) - len(text.lstrip())]
    return lead + "".join(out) + ("\n\n" + "\n".join(targets) if targets else "")
