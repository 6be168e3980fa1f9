"""The figures of the paper, as far as the budget allows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from experiments import tasks
from experiments.figures.runs import (
    COLOURS,
    Need,
    Run,
    best_runs,
    curve,
    final,
    legend,
    picture,
    row,
    table,
    there,
    tuned,
)
from experiments.tasks import Budget, Task

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

IMAGES = 50_000
SEEDS = (0, 1, 2)


def fcn(budget: Budget, epochs: int, *, batch_size: int = 128, **changes: Any) -> Task:
    """Returns the fully connected network on CIFAR-10 for some epochs, or very small."""
    if budget == "smoke":
        depth, width = min(changes["depth"], 4), min(changes["width"], 16)
        return tasks.create("fcn", budget, batch_size=batch_size, depth=depth, width=width, steps=4)
    steps = epochs * (IMAGES // batch_size)
    return tasks.create("fcn", budget, batch_size=batch_size, steps=steps, **changes)


def epoch_of(task: Task) -> float:
    """Returns the steps of an epoch."""
    images = 1_281_167 if task.settings["dataset"] == "imagenet" else IMAGES
    return images / task.batch_size


class Deep:
    """A network of 32 layers: AGD, and Adam and SGD at their usual rates."""

    published = (
        "A fully connected network of 32 layers on CIFAR-10 trains with AGD, and does not with "
        "Adam at 0.001 or SGD at 0.1 (figure 1)."
    )

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run for each of the three."""
        task = fcn(budget, 20, depth=32, width=256)
        return [Need(task, "agd"), Need(task, "adam", 1e-3), Need(task, "sgd", 1e-1)]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each."""
        found = there(self.needs(budget, runs), runs)
        return [table(row([run], optimiser=run["key"]["optimizer"]) for run in found)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the losses and the accuracy."""
        canvas, panels = picture(3)
        for need in self.needs(budget, runs):
            _curves(panels, there([need], runs), epoch_of(need.task))
        legend(canvas)
        return canvas


class Rates:
    """The loss at each learning rate of Adam and SGD, and that of AGD, which has none."""

    published = (
        "ResNet-18 on CIFAR-10: AGD, without a rate, reaches an accuracy of 91.2%, Adam at the "
        "best of its rates 92.9% (figure 2)."
    )
    rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

    def tasks(self, budget: Budget) -> list[Task]:
        """Returns the tasks: that of the paper is beyond two cores."""
        if budget == "gpu":  # Five epochs, as there are 20 runs.
            return [tasks.create("resnet18", budget, steps=5 * (IMAGES // 128))]
        return [tasks.create(name, budget) for name in ("fcn", "gpt")]

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns AGD and the grids, on each task."""
        return [
            need
            for task in self.tasks(budget)
            for need in (
                Need(task, "agd"),
                *(Need(task, "adamw", rate) for rate in self.rates[:9]),
                *(Need(task, "sgd", rate) for rate in self.rates[2:]),
            )
        ]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each."""
        found = there(self.needs(budget, runs), runs)
        return [table(row([run], **_name(run)) for run in found)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the final validation loss against the learning rate."""
        canvas, panels = picture(len(self.tasks(budget)))
        for axes, task in zip(panels, self.tasks(budget), strict=True):
            needs = [need for need in self.needs(budget, runs) if need.task is task]
            for optimizer in ("adamw", "sgd"):
                found = there((n for n in needs if n.optimizer == optimizer), runs)
                rates, losses = [run["key"]["rate"] for run in found], list(map(final, found))
                axes.plot(rates, losses, marker="o", color=COLOURS[optimizer], label=optimizer)
            for run in there(needs[:1], runs):
                axes.axhline(final(run), color=COLOURS["agd"], linewidth=2, label="agd, no rate")
                least = min(final(run) for run in there(needs, runs))
                axes.set_ylim(0.8 * least, 1.3 * run["validation"]["loss"][0])
            axes.set(xscale="log", title=task.name, xlabel="learning rate")
            axes.set_ylabel("final validation loss")
        legend(canvas)
        return canvas


class Breadth:
    """AGD on the paper's networks, with the range of eta in each epoch."""

    published = (
        "Accuracy of AGD, and of the best tuned baseline: fcn of depth 16 and width 512 on "
        "CIFAR-10 52.7% (Adam 53.5%), ResNet-18 on CIFAR-10 91.2% (Adam 92.9%), VGG-16 on "
        "CIFAR-100 67.4% (Adam 69.7%), ResNet-50 on ImageNet 65.5% (figure 3)."
    )

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run of each network."""
        names = ("resnet18", "vgg16", "resnet50")[: 3 if budget == "gpu" else 2]
        networks = (tasks.create(name, budget) for name in names)
        return [Need(task, "agd") for task in (fcn(budget, 200, depth=16, width=512), *networks)]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each."""
        found = there(self.needs(budget, runs), runs)
        return [table(row([run], task=run["key"]["task"]) for run in found)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the training loss, and below it eta."""
        needs = self.needs(budget, runs)
        canvas, panels = picture(2 * len(needs))
        for need, loss, eta in zip(needs, panels[::2], panels[1::2], strict=True):
            found = there([need], runs)
            curve(loss, found, "train", "loss", per_epoch=epoch_of(need.task))
            for run in found:
                x = [step / epoch_of(need.task) for step in run["train"]["step"]]
                low, high = run["train"]["eta_min"], run["train"]["eta_max"]
                eta.fill_between(x, low, high, color=COLOURS["agd"], alpha=0.4)
            loss.set(title=need.task.name, xlabel="epoch", ylabel="training loss", yscale="log")
            eta.set(title=need.task.name, xlabel="epoch", ylabel="range of eta", yscale="log")
        legend(canvas)
        return canvas


class Tuned:
    """AGD against Adam and SGD, each at its best rate, and how large their steps are."""

    published = (
        "A fully connected network of depth 8 and width 256 on CIFAR-10: AGD is comparable to Adam "
        "and SGD at their best rates (figure 4)."
    )
    optimizers = ("agd", "adam", "sgd")

    def task(self, budget: Budget) -> Task:
        """Returns the task."""
        return fcn(budget, 20, depth=8, width=256)

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns the grids, and three seeds of the best."""
        task = self.task(budget)
        return [n for name in self.optimizers for n in tuned(task, name, SEEDS, runs, "train")]

    def found(self, budget: Budget, runs: dict[str, Run]) -> list[list[Run]]:
        """Returns the best runs of each, those with the lowest training loss."""
        task = self.task(budget)
        return [best_runs(task, name, SEEDS, runs, "train") for name in self.optimizers]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each."""
        return [table(row(found, **_name(found[0])) for found in self.found(budget, runs) if found)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws losses, accuracy and the relative size of steps, averaged over layers."""
        canvas, panels = picture(4)
        epoch = epoch_of(self.task(budget))
        for found in self.found(budget, runs):
            _curves(panels, found, epoch)
            curve(panels[3], found, "train", "size", per_epoch=epoch)
        panels[3].set(xlabel="epoch", ylabel="relative size of a step", yscale="log")
        legend(canvas)
        return canvas


class Sizes:
    """AGD over depths and widths."""

    published = (
        "Test accuracy on CIFAR-10 from 42.55% (depth 2, width 64) to 63.7% (depth 4, width "
        "2048; figure 5)."
    )
    depths = (2, 4, 8, 16, 32)

    def widths(self, budget: Budget) -> tuple[int, ...]:
        """Returns the widths."""
        return {"smoke": (8, 16), "cpu": (64, 128, 256, 512)}.get(
            budget, (64, 128, 256, 512, 1024, 2048)
        )

    def need(self, budget: Budget, depth: int, width: int) -> Need:
        """Returns a run."""
        return Need(fcn(budget, 200 if budget == "gpu" else 10, depth=depth, width=width), "agd")

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run of each size."""
        sizes = itertools.product(self.depths, self.widths(budget))
        return [self.need(budget, depth, width) for depth, width in sizes]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns the accuracies, and the training losses, over depth and width."""
        results: list[Callable[[Run], str]] = [
            lambda run: f"{100 * run['validation']['accuracy'][-1]:.1f}%",
            lambda run: f"{final(run, 'train'):.4f}",
        ]
        names = ("accuracy: depth", "training loss: depth")
        return [
            table(
                {name: depth}
                | {
                    f"width {width}": result(run)
                    for width in self.widths(budget)
                    for run in there([self.need(budget, depth, width)], runs)
                }
                for depth in self.depths
            )
            for name, result in zip(names, results, strict=True)
        ]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws accuracy and training loss against depth, a curve for each width."""
        import matplotlib as mpl

        canvas, (accuracy, loss) = picture(2)
        shades = mpl.colormaps["Reds"]
        for number, width in enumerate(self.widths(budget), 2):
            found = there((self.need(budget, depth, width) for depth in self.depths), runs)
            depths = [run["key"]["depth"] for run in found]
            style: dict[str, Any] = {
                "color": shades(number / (len(self.widths(budget)) + 1)),
                "marker": "o",
                "label": f"width {width}",
            }
            accuracy.plot(depths, [run["validation"]["accuracy"][-1] for run in found], **style)
            loss.plot(depths, [final(run, "train") for run in found], **style)
        for axes, label in ((accuracy, "accuracy"), (loss, "training loss")):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="depth", ylabel=label, xticks=self.depths, xticklabels=self.depths)
        legend(canvas)
        return canvas


class Batches:
    """AGD over batch sizes, for the same number of epochs."""

    published = (
        "A fully connected network of depth 4 on CIFAR-10, at four batch sizes rising from 32 to "
        "4096: test accuracy 55.0, 58.0, 60.0 and 59.8% (figure 6)."
    )
    sizes = (32, 128, 512, 4096)

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run of each batch size."""
        epochs = 200 if budget == "gpu" else 20
        batch_sizes = (32, 128) if budget == "smoke" else self.sizes
        networks = (fcn(budget, epochs, batch_size=b, depth=4, width=512) for b in batch_sizes)
        return [Need(task, "agd") for task in networks]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each."""
        found = there(self.needs(budget, runs), runs)
        return [table(row([run], **{"batch size": run["key"]["batch_size"]}) for run in found)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws training loss and accuracy against epochs, a curve for each batch size."""
        import matplotlib as mpl

        needs = self.needs(budget, runs)
        canvas, panels = picture(3)
        for number, need in enumerate(needs, 2):
            style = {
                "color": mpl.colormaps["Reds"](number / (len(needs) + 1)),
                "label": f"batch size {need.task.batch_size:,}",
            }
            _curves(panels, there([need], runs), epoch_of(need.task), **style)
        legend(canvas)
        return canvas


def _name(run: Run) -> dict[str, Any]:
    """Returns the fields that name a run of a grid."""
    key = run["key"]
    rate = "" if key["optimizer"] == "agd" else f"{key['rate']:g}"
    return {"task": key["task"], "optimiser": key["optimizer"], "rate": rate}


def _curves(panels: list[Axes], found: list[Run], epoch: float, **style: Any) -> None:
    """Draws training loss, validation loss and accuracy against epochs."""
    parts = (("train", "loss"), ("validation", "loss"), ("validation", "accuracy"))
    for axes, (part, column) in zip(panels, parts, strict=False):
        curve(axes, found, part, column, per_epoch=epoch, **style)
        name = "training loss" if part == "train" else f"validation {column}"
        axes.set(xlabel="epoch", ylabel=name, yscale="log" if part == "train" else "linear")
