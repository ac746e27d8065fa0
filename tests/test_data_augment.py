"""Augmented versions: the same from every process, nothing lost, code and tables untouched."""

import random
import re

import pytest

from jaxllm.data.augment import OTHER, AugmentConfig, masked, sentences, versions
from jaxllm.data.document import Document

TEXT = """Dr. Smith began at noon. However, the harbour is large, for example at the pier! Is it often full? Perhaps it is not.

```python
x = 1

However = 2. Often so. Begin it!

y = 3
```

| large | often |
| --- | --- |

- often a list

Second paragraph is short."""


def made(text=TEXT, id="a", **settings):
    return list(versions(Document(id, "s", text, {"url": "u"}), AugmentConfig(use=True, **settings)))


def test_off_by_default():
    assert list(versions(Document("a", "s", TEXT), AugmentConfig())) == []


def test_a_version_is_a_function_of_id_and_seed():
    settings = {"versions": 3, "shuffle": 1.0, "rephrase": 0.5, "mask": 0.1}
    assert made(**settings) == made(**settings)
    assert [d.text for d in made(**settings)] != [d.text for d in made(id="b", **settings)] != [d.text for d in made(seed=1, **settings)]
    assert [d.id for d in made(**settings)] == ["a#augmented1", "a#augmented2", "a#augmented3"] and made(**settings)[0].meta == {"url": "u", "augmented": "a"}
    # fixed once and for all: another process, another version of Python
    assert made(shuffle=1.0, rephrase=0)[0].text.split("\n")[0] == FIRST


def test_sentences_change_places_and_none_is_lost():
    [doc] = made(shuffle=1.0, rephrase=0)
    first, before = doc.text.split("\n\n")[0], TEXT.split("\n\n")[0]
    assert sentences(before)[0].strip() == "Dr. Smith began at noon."
    assert first != before and sorted(s.strip() for s in sentences(first)) == sorted(s.strip() for s in sentences(before))
    assert doc.text.split("\n\n")[1:] == TEXT.split("\n\n")[1:]


def test_phrases_are_said_the_other_way_in_prose_only():
    [doc] = made(rephrase=1.0)
    first = "Dr. Smith started at noon. Nevertheless, the harbour is big, for instance at the pier! Is it frequently full? Maybe it's not."
    assert doc.text.split("\n\n")[0] == first and doc.text.split("\n\n")[1:] == TEXT.split("\n\n")[1:]
    assert all(OTHER[OTHER[a]] == a for a in OTHER)


def test_masked_spans_can_be_put_back():
    text = " ".join(f"w{i}" for i in range(2000)) + "\n\nend of it."
    found = masked(text, random.Random(0), 0.15, 3)
    body, _, targets = found.rpartition("\n\n<extra_0> ")
    spans = dict(line.split(" ", 1) for line in ("<extra_0> " + targets).split("\n"))
    assert re.sub(r"<extra_\d+>", lambda m: spans[m[0]], body) == text
    assert 0.1 < sum(len(s.split()) for s in spans.values()) / 2003 < 0.2


def test_settings_that_make_nothing_are_refused():
    for settings in ({"rephrase": 0}, {"mask": 0.6}, {"versions": 0}, {"shuffle": 2.0}):
        with pytest.raises(ValueError, match=r"augment\."):
            made(**settings)


FIRST = "Is it often full? However, the harbour is large, for example at the pier! Dr. Smith began at noon. Perhaps it is not."
