"""Reads a compiled program's text: its computations, the instructions in them, and how often each one runs.

XLA's own cost analysis counts the body of a loop once; here a body counts as often as its loop goes round.
"""

import dataclasses
import functools
import re

# what an element of each type takes; pred is a byte
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
         "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "c128": 16}
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?<=[\s)}\]])([a-z][a-z0-9\-]*)\(")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str  # text of its result's type; a tuple's is in parentheses
    operands: tuple[str, ...]
    rest: str  # all that follows the opening parenthesis of the operands

    @functools.cached_property
    def called(self) -> dict[str, str]:
        return dict(CALLED.findall(self.rest))

    @property
    def branches(self) -> list[str]:
        found = BRANCHES.search(self.rest)
        named = [n.strip().lstrip("%") for n in found[1].split(",")] if found else []
        return named or [self.called[k] for k in ("true_computation", "false_computation") if k in self.called]

    @property
    def op_name(self) -> str:
        """Returns where in the traced program it comes from: "jit(train_step)/jvp()/while/body/…"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    entry: str
    computations: dict[str, list[Instruction]]

    def trips(self, loop: Instruction) -> int | None:
        """Returns how often a while loop goes round; None where its condition is no comparison with a constant.

        Loops of jax.lax.scan and of XLA's own rewrites count up from 0 by 1 to the constant that the condition holds.
        """
        known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations[loop.called["condition"]]
        constants = {i.name: int(i.rest.split(")")[0]) for i in condition
                     if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.rest.split(")")[0])}
        for i in condition:
            if i.opcode in ("compare", "fusion"):
                limits = [constants[o] for o in i.operands if o in constants]
                if limits:
                    return max(limits[0], 0)
        return None


def parse(text: str) -> Module:
    """Returns the module that `compiled.as_text()` gives."""
    computations, entry, own = {}, "", None  # the text of each instruction first
    for line in text.splitlines():
        if own is None:
            if (head := HEAD.match(line)) and not line.startswith("HloModule"):
                own = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line == "}":
            own = None
        elif INSTRUCTION.match(line):
            own.append(line)
        elif own:  # a kernel's metadata may run over several lines
            own[-1] += line
    read = {name: [_instruction(*INSTRUCTION.match(line).groups()[1:]) for line in lines]
            for name, lines in computations.items()}
    return Module(entry, read)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")  # of the type; layouts hold no space
    opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
    start = end + opcode.end()
    return Instruction(name, opcode[1], text[:end], tuple(re.findall(r"%([\w.\-]+)", text[start : _closing(text, start - 1)])),
                       text[start:])


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def array_bytes(shape: str) -> list[float]:
    """Returns the bytes of each array in a type's text; layouts and their padding are not looked at."""
    sizes = []
    for kind, dims in ARRAY.findall(shape):
        if kind in BYTES:
            n = 1
            for d in filter(None, dims.split(",")):
                n *= int(d)
            sizes.append(n * BYTES[kind])
    return sizes


def runs(module: Module, weight) -> list[tuple[Instruction, int]]:
    """Returns every instruction that is reached from the entry, inside of fusions too, with how often it runs in a step.

    Of a conditional's branches the one with the largest sum of `weight(instruction)` is taken: on a pipeline's stages some
    device takes it at every tick. A loop whose trips cannot be read counts once.
    """
    costs: dict[str, float] = {}

    def cost(name: str) -> float:
        if name not in costs:
            costs[name] = sum(weight(i) + sum(n * cost(c) for c, n in _inside(module, i, cost))
                              for i in module.computations[name])
        return costs[name]

    out: list[tuple[Instruction, int]] = []

    def walk(name: str, times: int) -> None:
        for i in module.computations[name]:
            out.append((i, times))
            for inner, n in _inside(module, i, cost):
                walk(inner, times * n)

    walk(module.entry, 1)
    return out


def _inside(module: Module, i: Instruction, cost) -> list[tuple[str, int]]:
    """Returns the computations that an instruction runs, and how often at each of its own runs."""
    if i.opcode == "while":
        trips = module.trips(i)
        return [(i.called["body"], 1 if trips is None else trips)]
    if i.opcode == "conditional":
        return [(max(i.branches, key=cost), 1)] if i.branches else []
    if i.opcode in ("fusion", "call", "async-start"):
        return [(i.called[k], 1) for k in ("calls", "to_apply") if k in i.called][:1]
    return []
