"""Track the memory use and open files of every process of a run, for `soak --memory`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import head, row
from benchmarks.soak_run import Run

STEPS = 2000
# Number of training steps between two memory samples.
BETWEEN = 200

# Number of training steps between a checkpoint and the next memory sample.
AFTER = 20

# Number of memory readings per sample. A sample is the minimum of these readings, because downloads
# and uploads briefly use more memory.
READS = 50
TOLERANCE = 0.02
UNITS = ("MB", "files")
# Maps the name of each process to its resident memory in MB and its number of open files.
Sample = dict[str, tuple[float, int]]


def follow(run: Run) -> list[tuple[int, Sample]]:
    """Return memory samples of all processes of a run, taken every `BETWEEN` training steps."""
    samples = []
    for step in range(BETWEEN, STEPS + 1, BETWEEN):
        if run.reach(step + AFTER):
            reads = [read(run)]
            while len(reads) < READS:
                run.wait(0.1)
                reads.append(read(run))
            least = {
                name: (min(read[name][0] for read in reads), min(read[name][1] for read in reads))
                for name in reads[0]
            }
            samples.append((run.newest, least))
    run.finish()
    return samples


def read(run: Run) -> Sample:
    """Return each process's current memory and number of open files."""
    ranks, _ = run.processes()
    names = {"launcher": run.launcher}
    for number, rank in enumerate(ranks):
        names[f"process {number}"] = rank
        loaders = sorted(rank.children(recursive=True), key=lambda loader: loader.pid)
        for loader, of in zip(loaders, ("training", "evaluation")):
            names[f"loader of {of} of process {number}"] = loader
    return {name: (p.memory_info().rss / 1e6, p.num_fds()) for name, p in names.items()}


def table(samples: Sequence[tuple[int, Sample]]) -> tuple[str, float]:
    """Return a Markdown table of memory use and open files, and their largest relative growth."""
    steps = [step for step, _ in samples]
    lines = [head("process", *(f"step {step}" for step in steps), "growth")]
    worst = 0.0
    for name in samples[0][1]:
        for i, unit in enumerate(UNITS):
            values = [sample[name][i] for _, sample in samples]
            growth = values[-1] / values[0] - 1
            worst = max(worst, growth)
            shown = (f"{value:.{1 - i}f}" for value in values)
            lines.append(row(f"{name}, {unit}", *shown, f"{growth:+.1%}"))
    return "\n".join(lines), worst


def draw(samples: Sequence[tuple[int, Sample]], path: Path) -> None:
    """Plot memory and open files over the training steps, and save the plot as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=80, layout="constrained")
    for axis, unit, i in zip(figure.subplots(2, 1, sharex=True), UNITS, (0, 1)):
        for name in samples[0][1]:
            values = [sample[name][i] for _, sample in samples]
            axis.plot([step for step, _ in samples], values, marker="o", markersize=3, label=name)
        axis.set_ylim(bottom=0)
        axis.set_ylabel({"MB": "resident memory, MB", "files": "open files"}[unit])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8, ncols=2)
    figure.axes[1].set_xlabel("step")
    FigureCanvasAgg(figure).print_png(str(path))
