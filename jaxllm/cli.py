"""`jaxllm VERB …`: finds the verb's function and calls it. A verb's module is imported only when it is called."""

import contextlib
import dataclasses
import difflib
import importlib
import json
import pathlib
import sys
import traceback

from jaxllm import __version__
from jaxllm.errors import STOPPED, RunError, Stopped, UserError, writing
from jaxllm.platform import use_huge_pages


@dataclasses.dataclass(frozen=True)
class Verb:
    """One command: where its settings and its function are, and what it says of itself."""

    settings: str  # module:dataclass; importing it must not import jax
    function: str  # module:function(cfg) -> dict or None
    usage: str
    summary: str
    takes: str = "config"  # what stands after the verb: config, run, runs, run or nothing, config or nothing, nothing


VERBS = {
    "tokenizer": Verb("jaxllm.data.config:TokenizerVerb", "jaxllm.data.tokenizer:main", "tokenizer CONFIG.yaml",
                      "train a SentencePiece tokenizer and report on it"),
    "data": Verb("jaxllm.data.pipeline_config:DataVerb", "jaxllm.data.pipeline:main", "data CONFIG.yaml",
                 "clean, filter, deduplicate and mix raw text; say what was dropped and why"),
    "data review": Verb("jaxllm.data.review.config:ReviewVerb", "jaxllm.data.review.verb:main", "data review FOLDER",
                        "let experts label what was kept and removed; tell how right the filters are", takes="run"),
    "pretrain": Verb("jaxllm.train.config:PretrainConfig", "jaxllm.train.pretrain:main", "pretrain CONFIG.yaml",
                     "train a language model from text; run again to go on"),
    "sft": Verb("jaxllm.align.sft_config:SFTConfig", "jaxllm.align.sft:main", "sft CONFIG.yaml --base.run=RUN",
                "teach a trained model to follow instructions; run again to go on"),
    "reward": Verb("jaxllm.align.reward_config:RewardVerb", "jaxllm.align.reward:main", "reward CONFIG.yaml",
                   "train a model that scores answers from ranked ones"),
    "dpo": Verb("jaxllm.align.dpo_config:DPOVerb", "jaxllm.align.dpo_run:main", "dpo CONFIG.yaml --base.run=RUN",
                "align a model with compared answers alone: DPO, IPO, KTO, ORPO, SimPO"),
    "rlhf": Verb("jaxllm.align.rlhf_config:RLHFConfig", "jaxllm.align.rlhf_run:main", "rlhf CONFIG.yaml",
                 "align a model by reinforcement learning: PPO or GRPO and its kin"),
    "generate": Verb("jaxllm.generate.config:GenerateVerb", "jaxllm.generate.verb:main", "generate RUN --prompt=TEXT",
                     "continue prompts with a trained model", takes="run"),
    "chat": Verb("jaxllm.generate.config:ChatVerb", "jaxllm.generate.chat:main", "chat RUN",
                 "talk to a trained model in the terminal", takes="run"),
    "rlhf collect": Verb("jaxllm.align.collect.config:CollectVerb", "jaxllm.align.collect.verb:main",
                         "rlhf collect [RUN] --prompts=FILE | --answers=FILE",
                         "let people compare answers in the browser; write preferences", takes="run or nothing"),
    "report": Verb("jaxllm.report.config:ReportVerb", "jaxllm.report.page:main", "report RUN [RUN ...]",
                   "write one HTML page of curves, samples and settings", takes="runs"),
    "plan compile": Verb("jaxllm.plan.compile_config:CompileVerb", "jaxllm.plan.compile:main",
                         "plan compile CONFIG.yaml --topology=v5e-256",
                         "compile the step for TPUs that are not here; tell its memory, links and time"),
    "plan advise": Verb("jaxllm.plan.advise_config:AdviseVerb", "jaxllm.plan.advise:main", "plan advise CONFIG.yaml",
                        "weigh an API, an open model and one of your own: cost, break-even, what rules one out"),
    "plan size": Verb("jaxllm.plan.size_config:SizeVerb", "jaxllm.plan.size:main", "plan size [CONFIG.yaml]",
                      "from a budget, data, a size, a latency or a deadline to the rest, by every scaling law",
                      takes="config or nothing"),
    "plan fit": Verb("jaxllm.plan.fit_config:FitVerb", "jaxllm.plan.fit:main", "plan fit RUN [RUN ...] | TABLE.csv",
                     "fit the scaling laws to your own runs; predict a larger one with its interval", takes="runs"),
    "plan ladder": Verb("jaxllm.plan.ladder_config:LadderVerb", "jaxllm.plan.ladder:main", "plan ladder CONFIG.yaml",
                        "make a family of small runs on your text, fit the laws to them, and foretell the largest one"),
    "plan search": Verb("jaxllm.plan.search_config:SearchVerb", "jaxllm.plan.search:main", "plan search CONFIG.yaml",
                        "search for hyper-parameters with small runs; say what to widen, fix or narrow; run again to go on"),
    "plan coordcheck": Verb("jaxllm.plan.coordcheck_config:CoordCheckVerb", "jaxllm.plan.coordcheck:main",
                            "plan coordcheck CONFIG.yaml",
                            "see whether activations change at one speed at every width, with muP and without"),
    "plan batch": Verb("jaxllm.plan.batch_config:BatchVerb", "jaxllm.plan.batch:main", "plan batch RUN",
                       "from a run's gradient noise: the critical batch, and steps, tokens and rate of other batches",
                       takes="run"),
    "inspect": Verb("jaxllm.train.config:InspectVerb", "jaxllm.train.inspect:main", "inspect RUN",
                    "print what a run's checkpoint holds", takes="run"),
    "plan schedule": Verb("jaxllm.plan.config:ScheduleVerb", "jaxllm.plan.schedule:main",
                          "plan schedule --stages=4 --micro_batches=8 --schedule=1f1b",
                          "draw which pipeline stage computes what at which tick", takes="nothing"),
    "doctor": Verb("jaxllm.report.config:DoctorVerb", "jaxllm.doctor:main", "doctor",
                   "say what this machine has, what is missing, and how to mend it", takes="nothing"),
}


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code (0 done, 1 failed, 2 user's mistake, 75 stopped and resumable)."""
    try:
        return _run(argv)
    except UserError as e:
        print(f"jaxllm: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"jaxllm: {e}", file=sys.stderr)
        return 1
    except Stopped as e:
        print(f"jaxllm: {e}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jaxllm … | head`
        return 0
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] == "jaxllm":
            raise
        print(f"jaxllm: the package {e.name!r} is missing; install what jaxllm needs: {sys.executable} -m pip install -e "
              f"{pathlib.Path(__file__).parents[1]}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        print("jaxllm: this is a bug in jaxllm, not a mistake of yours; please report the lines above", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] not in VERBS and argv[1:] in ([], ["-h"], ["--help"]) and any(name.startswith(f"{argv[0]} ") for name in VERBS):
        print(overview(f"{argv[0]} "))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"jaxllm {__version__}")
        return 0
    verb, rest = find_verb(argv)
    if "--help" in rest or "-h" in rest:
        from jaxllm import config

        print(config.help_text(_find(verb.settings), f"usage: jaxllm {verb.usage} [--key=value ...]\n{verb.summary}"))
        return 0
    cfg, json_to = parse(verb, rest)
    function = _find(verb.function)
    try:
        # With --json=- standard output is the JSON alone.
        with contextlib.redirect_stdout(sys.stderr) if json_to == "-" else contextlib.nullcontext():
            result = function(cfg)
    except RunError as e:
        if e.result is not None:
            _write_json(e.result, json_to)
        raise
    _write_json(result, json_to)
    return 0


def find_verb(argv: list[str]) -> tuple[Verb, list[str]]:
    """Returns the verb that the first two words, or the first, name, and the words after it."""
    for n in (2, 1):
        if " ".join(argv[:n]) in VERBS:
            return VERBS[" ".join(argv[:n])], argv[n:]
    under = [name for name in VERBS if name.startswith(f"{argv[0]} ")]
    name = " ".join(argv[:2]) if under else argv[0]
    known = under or list(VERBS)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; verbs: {', '.join(known)}"
    raise UserError(f"unknown verb {name!r}{hint}")


def _write_json(result: dict | None, json_to: str | None) -> None:
    if json_to == "-":
        print(json.dumps(result))
    elif json_to:
        with writing(json_to):
            pathlib.Path(json_to).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse(verb: Verb, argv: list[str]):
    """Returns (the verb's settings, where --json goes or None) of the words after the verb."""
    from jaxllm import config

    words = [w for w in argv if not w.startswith("--")]
    flags = [w[2:] for w in argv if w.startswith("--")]
    json_to = next((f[5:] for f in flags if f.partition("=")[0] == "json"), None)
    if json_to is not None:
        _check_json(json_to)
    overrides = [f if "=" in f else f"{f}=true" for f in flags if f.partition("=")[0] != "json"]
    if verb.takes == "config or nothing" and not words:
        return config.load(_find(verb.settings), None, overrides), json_to
    if verb.takes in ("config", "config or nothing"):
        if len(words) != 1:
            raise UserError(f"expected one config file, found {words or 'none'}; usage: jaxllm {verb.usage}")
        # a run's own config.yaml is a config too: what it tells besides settings is passed over
        told = ("verb", "versions", "commit", "parameters")
        return config.load(_find(verb.settings), words[0], overrides, ignore=told), json_to
    if verb.takes == "nothing" and words:
        raise UserError(f"unexpected {words[0]!r}; usage: jaxllm {verb.usage}")
    if verb.takes == "run" and len(words) != 1:
        raise UserError(f"expected one run folder, found {words or 'none'}; usage: jaxllm {verb.usage}")
    if verb.takes == "runs" and not words:
        raise UserError(f"expected at least one run folder; usage: jaxllm {verb.usage}")
    if verb.takes == "run or nothing" and len(words) > 1:
        raise UserError(f"expected one run folder at most, found {words}; usage: jaxllm {verb.usage}")
    cfg = config.load(_find(verb.settings), None, overrides)
    if words and verb.takes in ("run", "run or nothing"):
        cfg = dataclasses.replace(cfg, run=words[0])
    elif verb.takes == "runs":
        cfg = dataclasses.replace(cfg, runs=tuple(words))
    return cfg, json_to


def _check_json(path: str) -> None:
    """Raises UserError now rather than after hours of work."""
    if not path:
        raise UserError("--json: should be --json=FILE, or --json=- for standard output")
    if path != "-":
        with writing(path), open(path, "a", encoding="utf-8"):
            pass


def overview(under: str = "") -> str:
    """Returns the table of the verbs, or of those whose name starts with `under`."""
    shown = {name: verb for name, verb in VERBS.items() if name.startswith(under)}
    width = max(map(len, shown))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in shown.items())
    return (f"jaxllm {__version__}: from raw text to an aligned, measured, exported language model\n\n"
            f"usage: jaxllm VERB ... [--dotted.key=value ...]\n\n{verbs}\n\n"
            "jaxllm VERB --help prints every setting of a verb with its type, default and meaning")


def _find(reference: str):
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def entry_point() -> None:
    """What the installed `jaxllm` script and `python -m jaxllm` call: a command that computes gets huge pages first."""
    computing = ("pretrain", "sft", "reward", "dpo", "rlhf", "generate", "chat")
    if "--help" not in sys.argv and ((sys.argv[1:2] and sys.argv[1] in computing) or sys.argv[1:3] == ["plan", "ladder"]):
        use_huge_pages()
    sys.exit(main(sys.argv[1:]))
