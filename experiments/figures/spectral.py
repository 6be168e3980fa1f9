"""Spectral AGD: variants that were tried, other lengths of runs, and a whole ResNet-18."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from experiments import tasks
from experiments.figures.runs import (
    Need,
    Run,
    best_of_grid,
    final,
    final_losses,
    first,
    five_tasks,
    legend,
    log_axis,
    losses_of_tasks,
    picture,
    row,
    table,
    there,
    tuned,
)
from experiments.optimizers import VARIANTS
from experiments.tasks import Budget, Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Picture

BASE = "agd_spectral_averaged"


class Variants:
    """Spectral AGD with averaged weights and a momentum of 0.95, one thing changed at a time."""

    published = "Nothing: this is our own comparison."
    # The form as it was when variants were tried, by whose losses theirs are divided.
    reference = "v_momentum_95"

    def tasks(self, budget: Budget) -> list[Task]:
        """Returns the five tasks."""
        return five_tasks(budget)[: 1 if budget == "smoke" else None]

    def variants(self, budget: Budget) -> list[str]:
        """Returns spectral AGD as it is, the reference, and these."""
        return [BASE, *VARIANTS][: 2 if budget == "smoke" else None]

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run of each variant on each task."""
        return [Need(task, name) for name in self.variants(budget) for task in self.tasks(budget)]

    def losses(self, budget: Budget, runs: dict[str, Run]) -> dict[str, dict[str, float]]:
        """Returns the validation losses that are there, by variant and task."""
        return {
            name: {
                task.name: final(run)
                for task in self.tasks(budget)
                for run in there([Need(task, name)], runs)
            }
            for name in self.variants(budget)
        }

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns the validation losses, and their geometric means over those of the reference."""
        losses, rows = self.losses(budget, runs), []
        reference = losses[self.reference]
        for name, its in losses.items():
            fields = {"variant": name.removeprefix("v_")}
            fields |= {task: f"{loss:.4f}" for task, loss in its.items()}
            if its.keys() == reference.keys() == {task.name for task in self.tasks(budget)}:
                mean = statistics.geometric_mean(its[task] / reference[task] for task in its)
                fields["mean of all"] = f"{mean:.3f}"
            rows.append(fields)
        return [table(rows)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws a line for each variant, with its losses over those of the reference."""
        import matplotlib as mpl

        canvas, (axes,) = picture(1, 9, 6)
        losses = self.losses(budget, runs)
        markers = itertools.cycle("os^Dv")
        for number, (task, marker) in enumerate(zip(self.tasks(budget), markers, strict=False)):
            reference = losses[self.reference].get(task.name)
            ratios = {
                line: its[task.name] / reference
                for line, its in enumerate(losses.values())
                if reference and task.name in its
            }
            style: dict[str, Any] = {"marker": marker, "label": task.name, "zorder": 3}
            style["color"] = mpl.colormaps["Dark2"](number)
            axes.scatter(list(ratios.values()), list(ratios), **style)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(losses)), [name.removeprefix("v_") for name in losses])
        axes.invert_yaxis()
        axes.set(xlabel="final validation loss, over that with a momentum of 0.95")
        log_axis(axes, (0.9, 1, 1.1, 1.2, 1.3, 1.5))
        legend(canvas)
        return canvas


class Horizons:
    """Runs of half, once and four times the usual length, with nothing set anew."""

    published = "Nothing: this is our own comparison."
    optimizers = (BASE, "adamw_cosine")

    def tasks(self, budget: Budget) -> dict[str, list[Task]]:
        """Returns each of the five tasks at these lengths, by its name."""
        return {
            task.name: [
                tasks.create(task.name, budget, steps=round(factor * task.steps))
                for factor in (0.5, 1, 4)
            ]
            for task in five_tasks(budget)[: 1 if budget == "smoke" else None]
        }

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns the grid of each optimiser for each length, with one seed."""
        return [
            need
            for its in self.tasks(budget).values()
            for task in its
            for name in self.optimizers
            for need in tuned(task, name, (0,), runs)
        ]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns the losses, and after what part of its steps spectral AGD is where AdamW ends."""
        rows = []
        for task in itertools.chain.from_iterable(self.tasks(budget).values()):
            found = {name: best_of_grid(task, name, runs) for name in self.optimizers}
            fields = {"task": task.name, "steps": f"{task.steps:,}"}
            fields |= {name: f"{final(run):.4f}" for name, run in found.items() if run}
            run, reference = found.values()
            if run and reference:
                target = final(reference)
                fields["rate"] = f"{reference['key']['rate']:g}"
                fields["ratio"] = f"{final(run) / target:.3f}"
                if step := first(run, target):
                    fields["where AdamW ends, after"] = f"{step / task.steps:.0%}"
            rows.append(fields)
        return [table(rows)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the final validation losses against the length of the run."""
        its = self.tasks(budget)
        canvas, panels = picture(len(its))
        for axes, (title, lengths) in zip(panels, its.items(), strict=True):
            for name in self.optimizers:
                found = {t.steps: best_of_grid(t, name, runs) for t in lengths}
                losses = {steps: final(run) for steps, run in found.items() if run}
                final_losses(axes, name, losses)
            log_axis(axes, [task.steps for task in lengths], ",")
            axes.set(title=title, xlabel="steps")
        legend(canvas)
        return canvas


class ResNet:
    """The paper's ResNet-18 on CIFAR-10 in bfloat16, 60 epochs, with cross-entropy."""

    published = (
        "AGD 91.2%, Adam 92.9% after 200 epochs in float32 with mean squared error (the paper)."
    )

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run of each optimiser."""
        steps = 2 if budget == "smoke" else 60 * 390
        size = {"batch_size": 4, "width": 8} if budget == "smoke" else {}
        task = tasks.create(
            "resnet18",
            budget,
            loss="xent",
            dtype="bfloat16",
            steps=steps,
            validation=10_000,
            **size,
        )
        needs = [Need(task, BASE), Need(task, "agd"), Need(task, "adamw_cosine", 1e-3)]
        return needs[: 1 if budget == "smoke" else None]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each run."""
        found = there(self.needs(budget, runs), runs)
        return [table(row([run], optimiser=run["key"]["optimizer"]) for run in found)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the validation losses."""
        needs = self.needs(budget, runs)
        found = lambda task: [there([need], runs) for need in needs]
        return losses_of_tasks({"resnet18": needs[0].task}, found, "validation")[0]
