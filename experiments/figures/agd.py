"""What AGD's own choices are worth, and how deep and how wide it goes."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from experiments import tasks
from experiments.figures.runs import (
    Need,
    Run,
    final,
    five_tasks,
    losses_of_tasks,
    row,
    table,
    there,
)
from experiments.tasks import Budget, Task

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Picture


class Choices:
    """AGD by effective depth, without masses, by the number of tensors, and from own weights."""

    published = (
        "The step is shared out by the number of tensors, and starts from orthogonal weights "
        "(the paper, for networks without residual streams, norms and biases)."
    )
    optimizers = ("agd", "agd_mass_one", "agd_tensors", "agd_own_start")

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run of each choice on each task."""
        return [Need(task, name) for task in five_tasks(budget) for name in self.optimizers]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each run, and the geometric means of the ratios to AGD's loss."""
        found = there(self.needs(budget, runs), runs)
        rows = [row([r], task=r["key"]["task"], choice=r["key"]["optimizer"]) for r in found]
        means = []
        for name in self.optimizers:
            pairs = [
                there([Need(task, "agd"), Need(task, name)], runs) for task in five_tasks(budget)
            ]
            if all(len(pair) == 2 for pair in pairs):
                ratios = (final(its) / final(agd) for agd, its in pairs)
                mean = f"{statistics.geometric_mean(ratios):.3f}"
                means.append({"choice": name, "validation loss, of agd's": mean})
        return [table(rows), table(means)]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the validation losses, a panel for each task."""

        def found(task: Task) -> list[list[Run]]:
            return [there([Need(task, name)], runs) for name in self.optimizers]

        its = {task.name: task for task in five_tasks(budget)}
        return losses_of_tasks(its, found, "validation")[0]


class Extremes:
    """Very deep and very wide networks from the first step: AGD, and AdamW at 0.001."""

    published = "Nothing: this is our own comparison."

    def tasks(self, budget: Budget) -> dict[str, Task]:
        """Returns the networks by what is said of them."""
        if budget == "smoke":
            return {"deep": tasks.create("fcn", budget, depth=8, width=16, steps=4)}
        steps = 300 if budget == "cpu" else 3000
        return {
            "fcn, 64 layers": tasks.create("fcn", budget, depth=64, width=256, steps=4 * steps),
            "fcn, 4096 wide": tasks.create("fcn", budget, depth=4, width=4096, steps=steps),
            "gpt, 64 blocks": tasks.create("gpt", budget, depth=64, width=64, steps=steps),
        }

    def of_task(self, task: Task) -> list[Need]:
        """Returns a run of each of the two on a network."""
        return [Need(task, "agd"), Need(task, "adamw", 1e-3)]

    def needs(self, budget: Budget, runs: dict[str, Run]) -> list[Need]:
        """Returns a run of each of the two on each network."""
        return [need for task in self.tasks(budget).values() for need in self.of_task(task)]

    def tables(self, budget: Budget, runs: dict[str, Run]) -> list[pd.DataFrame]:
        """Returns a row for each run."""
        return [
            table(
                row([run], network=name, optimiser=run["key"]["optimizer"])
                for name, task in self.tasks(budget).items()
                for run in there(self.of_task(task), runs)
            )
        ]

    def draw(self, budget: Budget, runs: dict[str, Run]) -> Picture:
        """Draws the training losses, a panel for each network."""

        def found(task: Task) -> list[list[Run]]:
            return [there([need], runs) for need in self.of_task(task)]

        canvas, panels = losses_of_tasks(self.tasks(budget), found, "train")
        for axes in panels:
            axes.set_yscale("log")
        return canvas
