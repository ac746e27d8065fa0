"""The table and the picture of instruction_tuning.py, out of the results that it keeps."""

import pathlib

from synthetic_tasks import UNSEEN, SyntheticTask


def grouped(tasks: list[SyntheticTask]) -> dict[str, list[SyntheticTask]]:
    clusters = dict.fromkeys(task.cluster for task in tasks)
    return {name: [task for task in tasks if task.cluster == name] for name in clusters} | {"all": list(tasks)}


def clusters_of(found: dict, tasks: list[SyntheticTask]) -> dict[str, float]:
    """Returns accuracies by cluster, and of all: means over tasks."""
    return {cluster: sum(found[task.name] for task in some) / len(some) for cluster, some in grouped(tasks).items()}


def errors_of(found: dict, tasks: list[SyntheticTask], n: int) -> dict[str, float]:
    """Returns the standard errors of clusters_of, of the draw of the questions."""
    def error(some):
        return sum(found[t.name] * (1 - found[t.name]) / n for t in some) ** 0.5 / len(some)

    return {cluster: error(some) for cluster, some in grouped(tasks).items()}


def lines_of(found: dict, tasks: list[SyntheticTask], n: int) -> dict[str, dict]:
    """Returns the rows of the table: accuracies of the measured tasks by name, by how the model was made and asked."""
    guess = {t.name: sum(t.guess(row["x"]) for row in t.rows(n, held_out=True)) / n for t in tasks}
    lines = {"guessing": guess} | {f"base, {how}": found["base"][how] for how in found["base"] if "other" not in how}
    for name in found:
        for how in found[name]:
            if name.startswith("tuned-") and "other" not in how:
                lines[f"tuned on {name.removeprefix('tuned-')} other clusters, {how}"] = found[name][how]
    one = {name.removeprefix("one-"): some["0 shots"] for name, some in found.items() if name.startswith("one-")}
    for name, some in one.items():
        lines[f"tuned on {name} alone, 0 shots"] = some
    return lines


def show(found: dict, tasks, others, n: int) -> None:
    names = [*UNSEEN, "all"]
    print("\n" + " " * 44 + "".join(f"{name:>14}" for name in names))
    for name, some in lines_of(found, tasks, n).items():
        means, errors = clusters_of(some, tasks), errors_of(some, tasks, n)
        print(f"{name:<44}" + "".join(f"{means[c]:>8.3f} ±{errors[c]:.3f}" for c in names))
    print(f"\nby task:\n{' ' * 44}" + "".join(f"{task.name:>14}" for task in tasks))
    for name, some in lines_of(found, tasks, n).items():
        print(f"{name:<44}" + "".join(f"{some[task.name]:>14.3f}" for task in tasks))
    for name in found:
        for how in (how for how in found[name] if "other" in how):
            means = clusters_of(found[name][how], others)
            print(f"{name}, {how}: " + "  ".join(f"{cluster} {share:.3f}" for cluster, share in means.items()))


def draw(found: dict, tasks, n: int, path: pathlib.Path) -> None:
    """Draws the ways to ask beside each other for each cluster, and finetuning on the task itself for one task of each."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "instruction tuning"
    import matplotlib.pyplot as plt

    lines, most = lines_of(found, tasks, n), max((int(k.split("-")[1]) for k in found if k.startswith("tuned-")), default=0)
    bars = {"base, 4 shots": "base, asked, 4 examples",
            **{f"base, {k} shots, as a list": f"base, as a list, {k} examples" for k in (0, 1, 4)},
            **{f"tuned on {most} other clusters, {k} shots": f"tuned on {most} other clusters, {k} examples" for k in (0, 4)}}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1), layout="constrained")
    names = [*UNSEEN, "all"]
    for i, (key, label) in enumerate((key, label) for key, label in bars.items() if key in lines):
        means, errors = clusters_of(lines[key], tasks), errors_of(lines[key], tasks, n)
        left.bar([x + (i - 2.5) * 0.14 for x in range(len(names))], [means[c] for c in names], 0.13, label=label,
                 yerr=[errors[c] for c in names], color=("#969696", "#c6dbef", "#6baed6", "#2171b5", "#fd8d3c", "#a63603")[i])
    chance = clusters_of(lines["guessing"], tasks)
    left.hlines([chance[c] for c in names], [x - 0.42 for x in range(len(names))], [x + 0.42 for x in range(len(names))],
                color="black", linewidth=0.8, linestyle="dotted", label="guessing")
    left.set_xticks(range(len(names)), names)
    left.set(ylim=(0, 0.5), ylabel="exact match", title="clusters that were not tuned on")
    left.legend(fontsize=7)
    alone = {name.removeprefix("one-"): some["0 shots"] for name, some in found.items() if name.startswith("one-")}
    sides = {"base, as a list, 0 examples": ("base, 0 shots, as a list", "#c6dbef"),
             f"tuned on {most} other clusters": (f"tuned on {most} other clusters, 0 shots", "#fd8d3c"),
             "finetuned on the task": (None, "#238b45")}
    for i, (label, (key, color)) in enumerate(sides.items()):
        if key is None or key in lines:
            shares = [(lines[key] if key else alone[task])[task] for task in alone]
            right.bar([x + (i - 1) * 0.28 for x in range(len(alone))], shares, 0.26, label=label, color=color,
                      yerr=[(share * (1 - share) / n) ** 0.5 for share in shares])
    right.set_xticks(range(len(alone)), alone, fontsize=8)
    right.set(ylim=(0, 1), title="with labelled data of the task")
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
