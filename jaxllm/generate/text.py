"""One row's text as its tokens come: where it stops, and which of its characters are final. No jax here."""

from collections.abc import Callable


class Text:
    """The continuation of a prompt so far. `finish` is None while it goes on."""

    def __init__(self, tokenizer, prompt: list[int], limit: int, stop: list[str], on_text: Callable[[str], None] | None = None,
                 *, end_id: int | None = None):
        self.end_id = tokenizer.eos_id if end_id is None else end_id
        self.tokenizer, self.prompt, self.limit, self.stop, self.on_text = tokenizer, prompt, limit, stop, on_text
        self.tokens: list[int] = []
        self.text, self.finish = "", None
        self.shown = 0  # characters given to `on_text`
        # What the prompt alone reads as; its last character may still be waiting for bytes.
        self.offset = len(tokenizer.decode(prompt, final=False))

    def add(self, tokens: list[int]) -> None:
        """Takes more tokens: up to <eos>, the limit or a stop string; what comes after these is not looked at."""
        if self.finish:
            return
        before = len(self.tokens)
        tokens = tokens[: self.limit - before]
        if self.end_id in tokens:
            tokens = tokens[: tokens.index(self.end_id) + 1]
            self.finish = "eos"
        self.tokens += tokens
        if self.finish is None and len(self.tokens) == self.limit:
            self.finish = "length"
        self.text = self._decode(len(self.tokens), final=self.finish is not None)
        self._cut_at_stop(before)
        self._show()

    def _decode(self, n: int, *, final: bool) -> str:
        return self.tokenizer.decode(self.prompt + self.tokens[:n], final=final)[self.offset :]

    def _cut_at_stop(self, before: int) -> None:
        found = [at for at in (self.text.find(s) for s in self.stop if s) if at >= 0]
        if not found:
            return
        # The text of fewer tokens is a prefix, so the first count of tokens that holds a stop string is found by halving.
        low, high = before + 1, len(self.tokens)
        while low < high:
            middle = (low + high) // 2
            text = self._decode(middle, final=False)
            low, high = (low, middle) if any(s in text for s in self.stop if s) else (middle + 1, high)
        text = self._decode(low, final=self.finish is not None and low == len(self.tokens))
        self.tokens, self.finish = self.tokens[:low], "stop"
        self.text = text[: min(at for at in (text.find(s) for s in self.stop if s) if at >= 0)]

    def _show(self) -> None:
        """Gives the characters that no later token can change to `on_text`."""
        if self.on_text is None:
            return
        end = len(self.text) if self.finish else len(self.text) - self._held_back()
        if end > self.shown:
            self.on_text(self.text[self.shown : end])
            self.shown = end

    def _held_back(self) -> int:
        """Returns the length of the longest end of the text that may yet become a stop string."""
        longest = max(map(len, self.stop), default=0)
        for n in range(min(longest - 1, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-n:]) for s in self.stop):
                return n
        return 0
