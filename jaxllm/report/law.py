"""Watching a run by a scaling law: what the law says at so many tokens, and when the run falls behind.

The law tells the loss of a run that ends after D tokens with its learning rate brought down. A run on its way to more tokens
still has a high rate, so it lies above the law of the tokens seen so far, and comes down to it as its own rate falls. How far
above it is, at the same share of the way, is much alike in healthy runs of one schedule (Qiu et al. 2025, arXiv 2507.02119,
show whole curves of several sizes fall on one another). So what is judged is the excess over the law:

- with the curves of healthy runs of the same schedule in the law file (`usual`): it should be no more than theirs at that
  share of the way, and a margin;
- without: it should not have grown by more than GROWTH over its own lowest.

Either must hold over a whole window of lines before anything is said, so a single spike is none. NumPy only: no jax here.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np

from jaxllm.errors import UserError

CONSTANTS = ("E", "A", "B", "alpha", "beta")
BEGIN = 0.1  # of a run's tokens: before it the loss is that of the warm-up
WINDOW = 0.05  # of a run's lines that a median is taken over: a few spikes do not move it
LEAST_LINES = 8  # in a window
MARGIN = 0.03  # over the excess of healthy runs
GROWTH = 0.05  # over the run's own lowest excess, where no curves of healthy runs are known
NOISES = 2.0  # standard errors of a window's mean that are allowed besides
END = 0.02  # of the law's loss: how far above it the last held-out loss may be
SCHEDULE = ("schedule", "final", "decay_share")  # settings that decide the shape of a run's curve


@dataclasses.dataclass(frozen=True)
class WatchedLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, and how far above it healthy runs were on their way."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    residual: float = 0.0  # root mean square of the log residuals of the runs it was fitted to
    tokens: tuple[float, float] | None = None  # the least and the most of those runs
    share: tuple[float, ...] = ()  # of a run's tokens
    usual: tuple[float, ...] = ()  # excess of healthy runs there
    schedule: dict | None = None  # of those runs

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def usual_at(self, share: float) -> float:
        return float(np.interp(share, self.share, self.usual))


def read_constants(path, setting: str) -> tuple[dict[str, float], dict]:
    """Returns (the five constants of a law file, all it holds); raises UserError, naming the setting that gave the path."""
    where = f"{setting}={path}"
    try:
        held = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
        own = {key: float(held[key]) for key in CONSTANTS}
    except OSError as e:
        raise UserError(f"{where}: cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{where}: should be what `jaxllm plan fit --law_file=FILE` writes: {e!r}") from None
    if not all(math.isfinite(v) for v in own.values()) or min(v for k, v in own.items() if k != "E") <= 0 or own["E"] < 0:
        raise UserError(f"{where}: A, B, alpha and beta should be above 0 and E at least 0")
    return own, held


def read_law(path) -> WatchedLaw:
    """Returns the law of `log.law`; raises UserError for a file that holds none."""
    own, held = read_constants(path, "log.law")
    try:
        watch = held.get("watch") or {}
        span = held.get("range", {}).get("tokens")
        return WatchedLaw(**own, residual=float(held.get("residual_rms", 0.0)),
                          tokens=span and (float(span[0]), float(span[1])),
                          share=tuple(map(float, watch.get("share", ()))), usual=tuple(map(float, watch.get("usual", ()))),
                          schedule=watch.get("schedule"))
    except (ValueError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"log.law={path}: should be what `jaxllm plan ladder` or `plan fit` writes: {e!r}") from None


class Watch:
    """Compares one run with a law, line by line."""

    def __init__(self, law: WatchedLaw, *, parameters: float, tokens: float, lines: int, schedule: dict):
        """`tokens` of all of the run, in about `lines` log lines; `schedule`: the settings of it that SCHEDULE names."""
        self.law, self.parameters, self.tokens = law, parameters, tokens
        self.same_schedule = bool(law.share) and law.schedule == {key: schedule.get(key) for key in SCHEDULE}
        # a law says nothing of far fewer tokens than its runs had
        self.begin = max(BEGIN * tokens, law.tokens[0] / 2 if law.tokens else 0.0)
        self.window = max(LEAST_LINES, round(WINDOW * lines))
        self.seen: list[tuple[float, float]] = []  # tokens and losses, of as many lines as the noise is judged by
        self.lowest, self.bad, self.good, self.behind = math.inf, 0, 0, False

    def describe(self) -> str:
        end = self.law.loss(self.parameters, self.tokens)
        how = "judged by the curves of the law's own runs" if self.same_schedule else \
            f"judged by how its excess grows ({'another schedule than' if self.law.share else 'no curves of'} the law's runs)"
        far = ""
        if self.law.tokens and not self.law.tokens[0] / 2 <= self.tokens <= self.law.tokens[1] * 30:
            far = f"; ! its runs had {self.law.tokens[0]:.3g} to {self.law.tokens[1]:.3g} tokens"
        return (f"law: a loss of {end:.4f} at the end, for {self.parameters:.4g} parameters and {self.tokens:.4g} tokens; "
                f"{how}{far}")

    def line(self, tokens: float, loss: float) -> dict[str, float]:
        """Takes a line's loss; returns what is logged beside it: the law's loss here, the excess of the window's median over
        the law of the window's middle, and its limit. {} in the warm-up, and at fewer tokens than the law is of."""
        if tokens < self.begin or not math.isfinite(loss):
            return {}
        self.seen = [*self.seen, (tokens, loss)][-4 * self.window :]
        told = {"law_loss": round(self.law.loss(self.parameters, tokens), 5)}
        if len(self.seen) < self.window:
            return told
        at, middle = np.median(self.seen[-self.window :], axis=0)
        excess = middle / self.law.loss(self.parameters, at) - 1
        usual, room = self._usual(at, excess), self._room(middle)
        limit = usual + room
        self.bad = self.bad + 1 if excess > limit else 0
        self.good = self.good + 1 if excess < usual + room / 2 else 0  # not at once good where it is no longer bad
        return told | {"law_excess": round(float(excess), 5), "law_limit": round(float(limit), 5)}

    def _usual(self, at: float, excess: float) -> float:
        """Returns the excess that a healthy run has here."""
        self.lowest = min(self.lowest, excess)
        return self.law.usual_at(at / self.tokens) if self.same_schedule else self.lowest

    def _room(self, middle: float) -> float:
        """Returns how much larger than usual the excess may be."""
        losses = np.array([y for _, y in self.seen])
        # of differences of normal numbers the median size is 0.954 standard deviations; a median's error is 1.25 of a mean's
        noise = NOISES * 1.25 * float(np.median(np.abs(np.diff(losses)))) / 0.954 / math.sqrt(self.window) / middle
        return (MARGIN if self.same_schedule else GROWTH) + noise

    def event(self, line: dict) -> tuple[str, str] | None:
        """Returns (kind, what is said) when a whole window of lines says that the run fell behind, or caught up again."""
        if not self.behind and self.bad >= self.window:
            self.behind = True
            most = "runs of the law were at most" if self.same_schedule else "it should be at most"
            return "falls_behind", (
                f"falls behind the law: the median loss of the last {self.window} lines is {line['law_excess']:+.1%} from the "
                f"{line['law_loss']:.4f} that {self.parameters:.3g} parameters and {line['tokens']:.3g} tokens can reach; at "
                f"this point {most} {line['law_limit']:+.1%}")
        if self.behind and self.good >= self.window:
            self.behind = False
            return "caught_up", f"has caught up with the law: {line['law_excess']:+.1%} from it"
        return None

    def end(self, eval_loss: float) -> tuple[float, float, bool]:
        """Returns (the law's loss for the whole run, how far the last held-out loss is from it, whether that is too far)."""
        end = self.law.loss(self.parameters, self.tokens)
        return end, eval_loss / end - 1, eval_loss / end - 1 > max(END, 3 * self.law.residual)


def replayed(watch: Watch, lines: list[dict]) -> list[tuple[int, str]]:
    """Returns (step, kind) of what would have been said of a run with these log lines."""
    said = []
    for line in lines:
        if isinstance(line.get("loss"), (int, float)) and "tokens" in line:
            event = watch.event(line | watch.line(line["tokens"], line["loss"]))
            said += [(line["step"], event[0])] if event else []
    return said


def what_to_look_at(lines: list[dict]) -> str:
    """Returns what usually makes a run fall behind, with what its own lines tell of each."""
    lines = [x for x in lines if isinstance(x.get("loss"), (int, float)) and math.isfinite(x["loss"])]
    if not lines:
        return ""
    losses, norms = (np.array([x.get(key, np.nan) for x in lines], float) for key in ("loss", "grad_norm"))
    recent = max(len(lines) // 10, LEAST_LINES)
    jumps = np.diff(losses)
    usual = float(np.median(np.abs(jumps))) if len(jumps) else 0.0
    spikes = int(np.sum(jumps > 8 * usual)) if usual else 0
    ratio = float(np.nanmean(norms[-recent:]) / np.nanmedian(norms)) if np.isfinite(norms).any() else math.nan
    rate = f" ({lines[-1]['lr']:.3g} now)" if "lr" in lines[-1] else ""
    norm = f" (the last {recent} lines have {ratio:.2g} times its median)" if math.isfinite(ratio) else ""
    said = [f"learning rate{rate}", f"gradient norm{norm}", f"loss spikes ({spikes} so far)",
            "data (order, duplicates, another mixture or tokenizer than the law's)", "batch size", "precision"]
    return "look at: " + "; ".join(said)
