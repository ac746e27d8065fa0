"""`jaxllm plan size`: from a budget, data, a size, a latency or a deadline to the rest, with the spread between laws."""

import dataclasses
import math
import pathlib

from jaxllm import hardware
from jaxllm.errors import UserError, check_folder
from jaxllm.model.config import ModelConfig
from jaxllm.plan import budget, failures, kaplan, laws, rental, repeat, roofline, serving, shapes, size_text, verdict
from jaxllm.plan.budget import Rate
from jaxllm.plan.law_file import read_law
from jaxllm.plan.size_config import SizeVerb
from jaxllm.plan.topology import generations, known
from jaxllm.train.flops import parameter_count, training_flops_per_token


def main(cfg: SizeVerb) -> dict:
    """Prints the plan and writes its page; returns what `--json` writes."""
    check_folder("page", cfg.page)
    found = plan(cfg)
    print(size_text.whole(cfg, found))
    if cfg.page is not None:
        from jaxllm.plan import size_page
        from jaxllm.report.page import write

        write(size_page.page(cfg, found), pathlib.Path(cfg.page))
        print(f"\npage: {cfg.page}")
    return found


@dataclasses.dataclass(frozen=True)
class Solved:
    """What was settled, and by what."""

    parameters: float  # asked for; the architecture's true count is within 2 % of it
    tokens: float
    flops: float
    chose_parameters: str
    chose_tokens: str


def plan(cfg: SizeVerb) -> dict:
    """Returns the whole plan as nested dicts of plain numbers; raises UserError where what was asked is impossible."""
    law, chip = chosen_law(cfg), hardware.find(cfg.hardware.chip)
    rate = budget.rate(chip, cfg.hardware.mfu, cfg.hardware.usd_per_hour, cfg.hardware.watts)
    flops, budget_of = budget_flops(cfg, rate)
    check_enough(cfg, flops)
    cap = latency_cap(cfg, chip)
    solved = solve(cfg, law, flops, budget_of, cap)
    model = architecture(cfg, solved.parameters)
    found = {
        "given": given(cfg), "law": {"name": law.name, "source": law.source},
        "budget_flops": flops, "budget_of": budget_of, "latency_cap": cap,
        "plan": dataclasses.asdict(solved) | described(cfg, law, model, solved),
        "training": training(cfg, rate, model, solved), "decoding": decoding(cfg, chip, model),
        "spread": laws.spread(laws.FLOPS_A_TOKEN * solved.parameters * solved.tokens if flops is None else flops),
        "kaplan_parameters": float(kaplan.KAPLAN.optimal(solved.flops)[0]),
        "table": [{"parameters": n, **{key: {"flops": r["flops"], "tokens": r["tokens"]} for key, one in laws.LAWS.items()
                                       for r in laws.table(one, [n])}} for n in laws.TABLE_SIZES],
    }
    found["verdict"] = verdict.judge(cfg, law, solved.parameters, solved.tokens)
    if cfg.serving.tokens:
        usual, best = serving.cheapest_of_quality(laws.parametric(law), solved.parameters, solved.tokens, cfg.serving.tokens)
        found["lifetime"] = {"usual": _lifetime(usual), "cheapest": _lifetime(best)}
    return found


def chosen_law(cfg: SizeVerb) -> laws.Law:
    """Returns the law that decides; raises UserError for a file that holds none."""
    if cfg.law_file is None:
        return laws.LAWS[cfg.law]
    return read_law(cfg.law_file)


def given(cfg: SizeVerb) -> dict[str, float]:
    names = ("flops", "chip_hours", "usd", "days", "tokens", "parameters", "latency_ms")
    return {name: value for name in names if (value := getattr(cfg, name)) is not None}


def budget_flops(cfg: SizeVerb, rate: Rate) -> tuple[float | None, str]:
    """Returns (FLOPs, the setting that bounds them): the least of what was given; (None, "") where nothing bounds them."""
    found = {}
    if cfg.flops is not None:
        found["flops"] = cfg.flops
    if cfg.chip_hours is not None:
        found["chip_hours"] = cfg.chip_hours * rate.flops_per_hour
    if cfg.usd is not None:
        found["usd"] = rate.hours_for(cfg.usd) * rate.flops_per_hour
    if cfg.days is not None and cfg.hardware.chips is not None:
        found["days x hardware.chips"] = cfg.days * 24 * cfg.hardware.chips * rate.flops_per_hour
    if not found:
        return None, ""
    least = min(found, key=found.get)
    return found[least], least


def check_enough(cfg: SizeVerb, flops: float | None) -> None:
    if flops is not None or cfg.tokens is not None or cfg.parameters is not None or cfg.latency_ms is not None:
        return
    if cfg.days is not None:
        raise UserError(f"days={cfg.days:g}: a deadline alone says nothing of the size; add hardware.chips, or one of flops, "
                        "chip_hours, usd, tokens, parameters, latency_ms")
    raise UserError("nothing to go by: give two (or one) of a budget (flops, chip_hours or usd), tokens, parameters, "
                    "latency_ms and days, e.g. --usd=50000 --tokens=20e9")


def architecture(cfg: SizeVerb, parameters: float) -> ModelConfig:
    return shapes.architecture(parameters, cfg.shape.vocab_size, seq_len=cfg.shape.seq_len, tied=cfg.shape.tied)


def latency_cap(cfg: SizeVerb, chip: hardware.Chip) -> float | None:
    """Returns the largest size that decodes within latency_ms by the roofline; raises UserError by how much none does."""
    if cfg.latency_ms is None:
        return None
    serves, s = hardware.find(cfg.serving.chip or chip.name), cfg.serving
    settings = {"batch": s.batch, "context": s.context, "weight_bytes": s.weight_bytes, "cache_bytes": s.cache_bytes}
    # The smallest that every setting has a shape for: twice the least count leaves room for widths of multiples of 128.
    least = 2 * shapes.smallest(cfg.shape.vocab_size)

    def step(n: float):
        return roofline.decode(architecture(cfg, n), serves, s.chips, **settings)

    cap = roofline.largest(cfg.latency_ms / 1000, lambda n: architecture(cfg, n), least, serves, s.chips, **settings)
    where = f"on {s.chips} {serves.name} (batch {s.batch}, {s.context:,} positions)"
    if not cap:
        one = step(least)
        if not one.fits:
            raise UserError(f"serving: even {least / 1e6:.0f} M parameters with their cache take {one.held_bytes / 1e9:.2f} GB "
                            f"{where}, which have {one.memory_bytes / 1e9:.2f}; raise serving.chips or lower serving.batch")
        raise UserError(f"latency_ms={cfg.latency_ms:g}: below the roofline: even {least / 1e6:.0f} M parameters take at least "
                        f"{one.seconds * 1000:.3g} ms a token {where}, {one.seconds * 1000 / cfg.latency_ms:.3g} times that")
    if cfg.parameters is not None and cfg.parameters > cap:
        own = step(cfg.parameters)
        if own.seconds * 1000 > cfg.latency_ms:
            ms = own.seconds * 1000
            raise UserError(f"latency_ms={cfg.latency_ms:g}: below the roofline: {cfg.parameters / 1e9:.3g} B parameters take "
                            f"at least {ms:.3g} ms a token {where}, {ms / cfg.latency_ms:.3g} times that; "
                            f"up to {cap / 1e9:.3g} B meet it")
        if not own.fits:
            raise UserError(f"parameters={cfg.parameters:g}: takes {own.held_bytes / 1e9:.1f} GB {where}, which have "
                            f"{own.memory_bytes / 1e9:.1f}; up to {cap / 1e9:.3g} B fit")
    return cap


def solve(cfg: SizeVerb, law: laws.Law, flops: float | None, budget_of: str, cap: float | None) -> Solved:
    """Returns size, tokens and FLOPs: what was given, and of the rest what the law says is best."""
    if cfg.parameters is not None:
        n, why = cfg.parameters, "parameters was given"
    elif flops is not None:
        if cfg.tokens is not None and law.optimal(flops)[1] > cfg.tokens:
            n, why = repeat.optimal(flops, cfg.tokens, laws.parametric(law))[0], f"the best for {budget_of} where tokens repeat"
        else:
            n, why = float(law.optimal(flops)[0]), f"the best for {budget_of} by the law"
    elif cfg.tokens is not None:
        n, why = float(law.parameters_for(cfg.tokens)), "the size for which tokens is the best amount of data"
    else:
        n, why = cap, "the largest within latency_ms"
    if cap is not None and n > cap:
        n, why = cap, f"the largest within latency_ms ({why}: {n / 1e9:.3g} B)"
    check_smallest(cfg, law, n, flops, budget_of)
    model = architecture(cfg, n)
    per_token = training_flops_per_token(model, cfg.shape.seq_len)
    if flops is not None:
        d, what = flops / per_token, f"what {budget_of} pays for"
        if d < cfg.shape.seq_len:
            row = per_token * cfg.shape.seq_len
            raise UserError(f"{budget_of} pays for {d:.3g} tokens of {n / 1e9:.3g} B parameters, less than a row of "
                            f"{cfg.shape.seq_len:,} (shape.seq_len): that takes {row:.3g} FLOPs, {row / flops:,.3g} times the "
                            "budget")
    elif cfg.tokens is not None:
        d, what = cfg.tokens, "tokens was given"
    else:
        d, what = float(law.tokens_for(n)), "the best amount of data for the size"
    return Solved(float(n), float(d), float(d * per_token), why, what)


def check_smallest(cfg: SizeVerb, law: laws.Law, n: float, flops: float | None, budget_of: str) -> None:
    least = shapes.smallest(cfg.shape.vocab_size)
    if n >= least:
        return
    asked = f"{budget_of} asks for" if flops is not None else "tokens asks for" if cfg.parameters is None else "parameters is"
    needed = laws.FLOPS_A_TOKEN * least * float(law.tokens_for(least))
    short = f", which wants {needed:.3g} FLOPs, {needed / flops:,.3g} times the budget" if flops is not None else ""
    raise UserError(f"{asked} {n:,.0f} parameters, fewer than the smallest model with "
                    f"shape.vocab_size={cfg.shape.vocab_size:,} has: {least:,.0f}{short}; a smaller vocabulary "
                    "(256: bytes) makes smaller models")


def described(cfg: SizeVerb, law: laws.Law, model: ModelConfig, solved: Solved) -> dict:
    """Returns the architecture and what its loss is by the law."""
    count = sum(parameter_count(model).values())
    unique = cfg.tokens if cfg.tokens is not None else solved.tokens
    one = laws.parametric(law)
    loss = repeat.loss_of(one, solved.parameters, solved.tokens, cfg.tokens)
    keys = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "max_seq_len", "tied")
    return {
        "true_parameters": count, "tokens_a_parameter": solved.tokens / solved.parameters,
        "model": {key: getattr(model, key) for key in keys}, "epochs": solved.tokens / unique,
        "effective_tokens": float(repeat.effective_tokens(solved.tokens, unique)), "loss": float(loss),
        "loss_law": one.name + ("" if cfg.tokens is None else " with repeated data"),
        "six_n_d": laws.FLOPS_A_TOKEN * count * solved.tokens,
    }


def training(cfg: SizeVerb, rate: Rate, model: ModelConfig, solved: Solved) -> dict:
    """Returns time, money, energy, memory, checkpoints and failures of the plan."""
    h = cfg.hardware
    hours = rate.chip_hours(solved.flops)
    chips = h.chips
    if chips is None and cfg.days is not None:
        chips = math.ceil(hours / (cfg.days * 24) * (1 - 1e-9))
    again = budget.recomputed_per_token(model, cfg.shape.seq_len, cfg.shape.remat)
    per_token = training_flops_per_token(model, cfg.shape.seq_len)
    price, power = rental.usd_per_hour(rate.chip.name), rental.watts(rate.chip.name)
    faults = rental.chip_hours_between_failures()
    found = {
        "chip": rate.chip.name, "mfu": rate.mfu, "flops_a_token": per_token, "recomputed_a_token": again, "chip_hours": hours,
        "usd": rate.usd(hours), "usd_per_hour": rate.usd_per_hour,
        "usd_source": "given" if h.usd_per_hour else price and f"{price.source}, {price.date}",
        "kwh": rate.kwh(hours, h.pue), "watts": rate.watts, "watts_source": "given" if h.watts else power and power.source,
        "reported_mfu": [r._asdict() for r in rental.reported_mfu()],
        "checkpoint_bytes": budget.checkpoint_bytes(sum(parameter_count(model).values())), "chips": chips,
    }
    if chips is None:
        return found
    seconds = hours / chips * budget.HOUR
    between = h.hours_between_failures or faults.value
    told = "given" if h.hours_between_failures else f"Llama 3 405 B on 16,384 H100 (2024), {faults.source.split('/')[2]}"
    expected = failures.expect(seconds, chips, between, h.save_seconds, h.restart_seconds)
    devices = chips * rate.chip.devices
    held = budget.device_bytes(model, devices=devices, rows=h.rows, seq_len=cfg.shape.seq_len, remat=cfg.shape.remat)
    return found | {
        "days": seconds / budget.DAY, "slice": smallest_slice(rate.chip.name, chips),
        "failures": {k: v if math.isfinite(v) else None for k, v in dataclasses.asdict(expected).items()}
        | {"chip_hours": between, "source": told},
        "device_bytes": held, "device_memory": rate.chip.memory_bytes, "fits": sum(held.values()) <= rate.chip.memory_bytes,
    }


def smallest_slice(chip: str, chips: int) -> str | None:
    """Returns the name of the smallest TPU slice that holds so many chips; None: no TPU, or more than a slice has."""
    cores = {name: g.cores for name, g in generations().items() if g.chip == chip}
    sizes = [(math.prod(sides), name) for name, sides in known().items() if name.partition("-")[0] in cores]
    return min(((n, name) for n, name in sizes if n >= chips), default=(0, None))[1]


def decoding(cfg: SizeVerb, chip: hardware.Chip, model: ModelConfig) -> dict:
    s = cfg.serving
    serves = hardware.find(s.chip or chip.name)
    step = roofline.decode(model, serves, s.chips, batch=s.batch, context=s.context, weight_bytes=s.weight_bytes,
                           cache_bytes=s.cache_bytes)
    return dataclasses.asdict(step) | {"chip": serves.name, "seconds": step.seconds, "bound": step.bound, "fits": step.fits,
                                       "tokens_per_s": s.batch / step.seconds}


def _lifetime(one: serving.Lifetime) -> dict:
    return dataclasses.asdict(one) | {name: getattr(one, name) for name in ("training_flops", "serving_flops", "flops")}

