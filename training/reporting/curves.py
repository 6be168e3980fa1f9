"""Plots a run: loss, accuracy and the automatic learning rate."""

import io
from collections.abc import Sequence

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from training import workdir
from training.records import EpochRecord

TRAIN, TEST, PLAIN, ETA = "#7a8ba3", "#c8452f", "#e5a99e", "#2f6f5e"


def draw(records: Sequence[EpochRecord], title: str, path: epath.Path) -> None:
    """Plots the records of ``metrics.jsonl``. The file is replaced whole or not at all."""
    # Fixed margins: computing them each time would take as long as all the rest.
    margins = {"left": 0.04, "right": 0.985, "bottom": 0.14, "top": 0.82, "wspace": 0.16}
    figure = Figure(figsize=(12, 3.6), dpi=110)
    loss, accuracy, eta = figure.subplots(1, 3, gridspec_kw=margins)
    epochs, single = [r.epoch for r in records], len(records) == 1

    def line(axes: Axes, name: str, color: str, label: str) -> None:
        # A line of one point is invisible, and so is an area of one.
        marker = "o" if single else None
        axes.plot(
            epochs, [getattr(r, name) for r in records], color=color, label=label, marker=marker
        )

    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        line(axes, f"train_{name}", TRAIN, "training")
        if records[0].plain_test_loss is not None:
            line(axes, f"plain_test_{name}", PLAIN, "test, not averaged")
        line(axes, f"test_{name}", TEST, "test")
        axes.set_title(name.capitalize())
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    low, high = ([getattr(r, name) for r in records] for name in ("eta_min", "eta_max"))
    spread = {"color": ETA, "alpha": 0.2, "label": "range in epoch"}
    if single:
        eta.vlines(epochs, low, high, linewidth=8, **spread)
    else:
        eta.fill_between(epochs, low, high, linewidth=0, **spread)
    line(eta, "eta", ETA, "mean")
    eta.set_title("Automatic learning rate eta")
    for axes in (loss, eta):
        # With zero among the values, the margin above them is in proportion to their size.
        axes.update_datalim([(epochs[0], 0)])
        axes.autoscale_view()
        axes.set_ylim(bottom=0)
    for axes in (loss, accuracy, eta):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if single:
            axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)

    png = io.BytesIO()
    figure.savefig(png, format="png")
    workdir.write(path, png.getvalue())
