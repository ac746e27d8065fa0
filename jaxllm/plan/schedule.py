"""`jaxllm plan schedule`: draws a pipeline's table and says what it leaves idle and what it keeps."""

import pathlib
import shutil

from jaxllm.errors import UserError, writing
from jaxllm.parallel.schedule import BACKWARD, FORWARD, INPUT, KINDS, WEIGHT, Op, Schedule, make, too_few
from jaxllm.plan.config import ScheduleVerb

COLORS = {FORWARD: "#4c78c8", BACKWARD: "#59a14f", INPUT: "#7fbf6b", WEIGHT: "#e09f3e", None: "#eceef0"}
MEANINGS = {FORWARD: "forward", BACKWARD: "backward", INPUT: "backward by the input", WEIGHT: "backward by the weights",
            None: "idle"}
FORMATS = (".svg", ".png", ".pdf")


def main(cfg: ScheduleVerb) -> dict:
    """Prints the table, the bubble and the live activations next to their formulas; returns them too."""
    if cfg.picture is not None and pathlib.Path(cfg.picture).suffix not in FORMATS:
        raise UserError(f"picture={cfg.picture}: should end in {', '.join(FORMATS)}")
    if cfg.picture is not None and not pathlib.Path(cfg.picture).absolute().parent.is_dir():
        raise UserError(f"picture={cfg.picture}: there is no folder {pathlib.Path(cfg.picture).parent}")
    schedule = make(cfg.schedule, cfg.stages, cfg.micro_batches, cfg.virtual_stages)
    found = facts(schedule)
    print(as_text(schedule, shutil.get_terminal_size((128, 24)).columns))
    print(describe(found))
    if warning := too_few(schedule):
        print(f"! {warning}")
    if cfg.picture is not None:
        with writing(cfg.picture):
            draw(schedule, cfg.picture)
        print(f"picture: {cfg.picture}")
    return found


def facts(schedule: Schedule) -> dict:
    """Returns what `--json` writes: the counts of the table beside what the formulas say."""
    kind, shape = KINDS[schedule.name], (schedule.stages, schedule.micro_batches, schedule.virtual_stages)
    return {
        "schedule": schedule.name, "stages": shape[0], "micro_batches": shape[1], "virtual_stages": shape[2],
        "ticks": len(schedule.rows), "idle_share": float(schedule.idle()), "idle_formula": kind.formula,
        "idle_of_formula": float(kind.idle(*shape)), "live": schedule.live(), "live_of_formula": kind.live(*shape),
        "table": [[name(row[s], schedule) for row in schedule.rows] for s in range(schedule.stages)],
    }


def describe(found: dict) -> str:
    p, m, v = found["stages"], found["micro_batches"], found["virtual_stages"]
    n = f"p={p}, m={m}" + (f", v={v}" if v > 1 else "")
    unit = "micro-batch" if v == 1 else "micro-batch and chunk"
    return "\n".join([
        f"{found['schedule']}: {p} stages, {m} micro-batches{f', {v} chunks a stage' if v > 1 else ''}, {found['ticks']} ticks",
        f"idle: {found['idle_share']:.2%}; {found['idle_formula']} with {n}: {found['idle_of_formula']:.2%}",
        f"live activations (one {unit} each), stage 0 to {p - 1}: {' '.join(map(str, found['live']))}",
    ])


def name(op: Op | None, schedule: Schedule) -> str:
    """Returns "F3" for the forward of micro-batch 3, "F3b" for that of the stage's second chunk, "" for no work."""
    if op is None:
        return ""
    return f"{op.kind}{op.micro}" + (chr(ord("a") + op.chunk % 26) if schedule.virtual_stages > 1 else "")


def as_text(schedule: Schedule, columns: int) -> str:
    """Returns the table, a line for each stage, in as many blocks of ticks as the width asks for."""
    cells = [[name(op, schedule) for op in row] for row in schedule.rows]
    width = max(len(cell) for row in cells for cell in row) + 1
    head = len(f"stage {schedule.stages - 1}") + 1
    ticks = max((columns - head) // width, 1)
    blocks = []
    for start in range(0, len(cells), ticks):
        block = cells[start : start + ticks]
        marks = (start + i if i % 4 == 0 else "" for i in range(len(block)))
        lines = [f"{'tick':<{head}}" + "".join(f"{mark:<{width}}" for mark in marks)]
        for s in range(schedule.stages):
            lines.append(f"{f'stage {s}':<{head}}" + "".join(f"{row[s] or '.':<{width}}" for row in block))
        blocks.append("\n".join(line.rstrip() for line in lines))
    kinds = dict.fromkeys(op.kind for row in schedule.rows for op in row if op)
    chunks = "; letters: chunks" if schedule.virtual_stages > 1 else ""
    legend = ", ".join(f"{k} {MEANINGS[k]}" for k in kinds)
    return "\n\n".join(blocks) + f"\n{legend}, . idle; numbers: micro-batches{chunks}\n"


def draw(schedule: Schedule, path: str) -> None:
    """Writes the table as a picture: a row of boxes for each stage, coloured by what is done."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    p, ticks = schedule.stages, len(schedule.rows)
    box = min(max(18 / ticks, 0.16), 0.34)  # inches
    figure = Figure(figsize=(ticks * box + 1.2, p * 0.34 + 1.3), layout="constrained")
    axes = figure.add_subplot()
    for t, row in enumerate(schedule.rows):
        for s, op in enumerate(row):
            later = op is not None and op.chunk % 2 == 1  # chunks alternate in strength
            axes.add_patch(Rectangle((t, s), 1, 1, facecolor=COLORS[op and op.kind], alpha=0.65 if later else 1,
                                     edgecolor="white", linewidth=0.8))
            if op:
                axes.text(t + 0.5, s + 0.5, str(op.micro), ha="center", va="center",
                          color="white" if op.kind in (FORWARD, BACKWARD) and not later else "#222222",
                          fontsize=7 if box > 0.2 else 5)
    axes.set(xlim=(0, ticks), ylim=(p, 0), xlabel="tick (numbers in boxes: micro-batches)", yticks=[s + 0.5 for s in range(p)],
             yticklabels=[f"stage {s}" for s in range(p)])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(describe(facts(schedule)).split("\nlive")[0], fontsize=9, loc="left")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    kinds = [*dict.fromkeys(op.kind for row in schedule.rows for op in row if op), None]
    handles = [Patch(facecolor=COLORS[k], label=MEANINGS[k]) for k in kinds]
    if schedule.virtual_stages > 1:
        handles.append(Patch(facecolor="none", label="pale: a stage's " + ("second chunk" if schedule.virtual_stages == 2 else
                                                                            "2nd, 4th, … chunk")))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxllm"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
