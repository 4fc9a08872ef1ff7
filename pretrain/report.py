"""The curves of runs as a PNG, and a summary of runs in Markdown."""

import statistics
from pathlib import Path
from typing import Any

from data.common.files import UserError, check_places, make_output_folder, whole_file
from pretrain.record import Record, markdown_table, read_records

CURVES, SUMMARY = "curves.png", "report.md"
PANELS = (
    ("train/loss", "training loss", "nats a target"),
    ("validation/loss", "held-out loss", "nats a target"),
    ("train/learning_rate", "learning rate", "learning rate"),
    ("train/tokens_per_second", "throughput", "tokens a second"),
)
NOISY = "train/loss"
POINTS = 100  # a noisy curve with more points gets a running mean
DASHES = ("-", "--", ":", "-.")


def report(runs: list[Path], out: Path) -> str:
    """Write the curves and the summary of runs into a folder, and return the summary.

    Raises UserError, before it writes, if a run has no record or the folder holds anything but an earlier report.
    """
    check_places(out, runs)
    others = {path.name for path in out.iterdir()} - {CURVES, SUMMARY} if out.is_dir() else set()
    if others:
        raise UserError(f"{out}: exists and is not a report (it holds {min(others)}); choose another --out")
    records = read_records(runs)
    summary = summarise(records)
    make_output_folder(out)
    plot_curves(records, out / CURVES)
    with whole_file(out / SUMMARY) as stream:
        stream.write(f"{summary}\n\n![Curves]({CURVES})\n".encode())
    return summary


def summarise(records: dict[str, Record]) -> str:
    """A table in Markdown with a row for each run."""
    header = ["run", "step", "tokens", "training loss", "held-out loss", "lowest held-out loss"]
    header += ["tokens a second, median", "ranks", "devices"]
    return markdown_table(header, [[name, *_row(record)] for name, record in records.items()])


def _row(record: Record) -> list[str]:
    start, step = record.newest_start(), max(record.figures)
    loss, held_out = record.curve("train/loss"), record.curve("validation/loss")
    speed = record.curve("train/tokens_per_second").values()
    best = min(held_out, key=held_out.__getitem__, default=0)
    return [
        f"{step:,} of {start['train.steps']:,}",
        f"{step * start['train.global_batch_tokens']:,}",
        f"{loss[max(loss)]:.4f}" if loss else "-",
        f"{held_out[max(held_out)]:.4f}" if held_out else "-",
        f"{held_out[best]:.4f} at step {best:,}" if held_out else "-",
        f"{statistics.median(speed):,.0f}" if speed else "-",
        str(start.get("ranks", "-")),
        start.get("devices", "-"),
    ]


def plot_curves(records: dict[str, Record], path: Path) -> None:
    """Draw the curves of runs into a PNG file: loss, held-out loss, learning rate and throughput, by step.

    A long curve of the training loss is drawn thin, with a running mean over it; the title says how many reports the
    mean takes.
    """
    from matplotlib.figure import Figure  # takes half a second; without pyplot it needs no display

    window = max(1, max(len(record.curve(NOISY)) for record in records.values()) * 2 // POINTS)
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, (name, title, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        mean_of = window if name == NOISY else 1
        note = f" (thick: mean of {mean_of} reports)" if mean_of > 1 else ""
        axes.set(title=title + note, xlabel="step", ylabel=unit)
        for number, (run, record) in enumerate(records.items()):
            style = {"color": f"C{number % 10}", "linestyle": DASHES[number // 10 % len(DASHES)]}
            _draw(axes, record.curve(name), mean_of, label=run, **style)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if not name.endswith("loss"):
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.set(xticks=[], yticks=[], xlabel="", ylabel="nothing recorded")
    figure.axes[2].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.axes[3].yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=100)


def _draw(axes: Any, curve: dict[int, float], mean_of: int, **style: Any) -> None:
    steps, values = list(curve), list(curve.values())
    if mean_of > 1 and len(values) > mean_of:
        axes.plot(steps, values, linewidth=0.6, alpha=0.35, color=style["color"])
        sides = [min(mean_of // 2, place, len(values) - 1 - place) for place in range(len(values))]  # alike, so no lag
        values = [statistics.fmean(values[place - side : place + side + 1]) for place, side in enumerate(sides)]
    axes.plot(steps, values, marker="o" if len(values) < 30 else "", markersize=3, **style)
