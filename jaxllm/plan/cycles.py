"""How long a compiled step computes: the cycles that XLA's TPU back end estimates for each fusion, times its runs.

The estimate is the compiler's own and leaves some things out: waiting for collectives, and kernels that come ready-made
(the attention kernel is one custom call). What is left out is counted and said.
"""

import dataclasses
import re

from jaxllm.plan.hlo import Instruction, Module, runs

ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Cycles:
    total: int
    by_part: dict[str, int]  # forward, backward, loss, optimizer
    kernels: int  # runs a step of custom kernels, for which there is no estimate
    unread_loops: int  # loops whose trips could not be read: counted once


def of_instruction(i: Instruction) -> int:
    found = ESTIMATE.search(i.rest)
    return int(found[1]) if found else 0


def count(module: Module) -> Cycles:
    """Returns the estimated cycles of one step on one device."""
    by_part, kernels, unread = {}, 0, 0
    for i, times in runs(module, of_instruction):
        if cycles := of_instruction(i):
            by_part[part(i.op_name)] = by_part.get(part(i.op_name), 0) + cycles * times
        kernels += times * (i.opcode == "custom-call" and "tpu_custom_call" in i.rest)
        unread += i.opcode == "while" and module.trips(i) is None
    return Cycles(sum(by_part.values()), by_part, kernels, unread)


def part(op_name: str) -> str:
    """Returns the part of the step that an instruction belongs to, by the names that jax's transformations leave."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward and loss" if "jvp" in op_name else "optimizer and the rest"
