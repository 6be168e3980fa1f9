"""The epochs of a run: trained, tested, reported and saved, without waiting for the devices."""

import dataclasses
import math
import time

import jax

from training import metrics, peers, processes, stopping
from training.checkpoints import Snapshot
from training.config import TrainConfig
from training.reporting import Reporter
from training.resident import ResidentRun
from training.saver import Saver
from training.stopping import Stopped
from training.streamed import StreamedRun

# A dispatch takes about as many steps as fit in this: few enough for a live bar and to end soon
# when asked to, enough for the cost of a dispatch not to matter.
DISPATCH_SECONDS = 0.25


class NonFiniteError(Exception):
    """The loss or the gradient of a training step was infinite or not a number."""


def train_epochs(
    config: TrainConfig,
    run: ResidentRun | StreamedRun,
    snapshot: Snapshot,
    reporter: Reporter,
    saver: Saver,
) -> Snapshot:
    """Trains from a snapshot until the epochs are done, and saves the end.

    Raises:
      NonFiniteError: if the loss or the gradient stops being finite.
      SaveError: if the end could not be saved.
      Stopped: if a signal asked for it, once all is saved.
    """
    start = time.perf_counter()
    snapshot = dataclasses.replace(snapshot, state=run.compile(snapshot.state))
    reporter.begin(time.perf_counter() - start)
    together = (NonFiniteError, Stopped)
    with peers.watched(config, together), stopping.on_request() as request:
        while len(snapshot.records) < config.epochs:
            snapshot = train_epoch(run, snapshot, reporter, saver, request)
            snapshot = test_epoch(run, snapshot, config.epochs, reporter, saver, request)
        saver.finish()
    return snapshot


def train_epoch(
    run: ResidentRun | StreamedRun,
    begun: Snapshot,
    reporter: Reporter,
    saver: Saver,
    request: stopping.Request,
) -> Snapshot:
    """Trains to the end of the epoch that a snapshot is in, the first being 1."""
    epoch = len(begun.records) + 1
    last = epoch * run.steps_per_epoch
    step, state, sums, seconds = begun.step, begun.state, begun.sums, begun.seconds
    start, steps = time.perf_counter() - seconds, 1

    def now() -> Snapshot:
        changed = {"step": step, "state": state, "sums": sums, "seconds": seconds}
        return dataclasses.replace(begun, **changed, position=run.position())

    while step < last:
        step = min(step + steps, last, saver.next_step(step))
        before, (state, sums) = sums, run.train(state, sums, step)
        # The host waits for the dispatch before this one, the device for nothing.
        seen, seconds = jax.device_get(before), time.perf_counter() - start
        if not metrics.finite(seen):
            break
        if seen.steps:
            steps = max(1, int(seen.steps * DISPATCH_SECONDS / seconds))
            speed = {"images_per_second": float(seen.sums.examples) / seconds}
            done = float(seen.steps) / run.steps_per_epoch
            reporter.progress(epoch, done, metrics.train_averages(seen) | speed)
        signum, save, steps = processes.agree(request.signum, saver.due(step), steps)
        if (signum or save) and step < last:
            if not metrics.finite(jax.device_get(sums)):
                break
            keep(saver, now(), signum)

    sums_seen, seconds = jax.device_get(sums), time.perf_counter() - start
    if not metrics.finite(sums_seen):
        raise NonFiniteError(_non_finite(sums_seen, epoch, run.steps_per_epoch, saver))
    return now()


def test_epoch(
    run: ResidentRun | StreamedRun,
    trained: Snapshot,
    epochs: int,
    reporter: Reporter,
    saver: Saver,
    request: stopping.Request,
) -> Snapshot:
    """Tests at the end of an epoch, of so many, and completes its record."""
    # Several processes test together, and end together afterwards.
    interrupted = lambda: jax.process_count() == 1 and request.signum
    test_sums = run.evaluate(trained.state, interrupted)
    if test_sums is None:
        keep(saver, trained, request.signum)
    test_sums, train_sums = jax.device_get((test_sums, trained.sums))
    averages, tested = metrics.train_averages(train_sums), metrics.averages(test_sums)
    record = {
        "epoch": len(trained.records) + 1,
        "step": trained.step,
        "train_loss": averages.pop("loss"),
        "train_accuracy": averages.pop("accuracy"),
        "test_loss": tested["loss"],
        "test_accuracy": tested["accuracy"],
        **averages,
        "seconds": trained.seconds,
        "images_per_second": float(train_sums.sums.examples) / trained.seconds,
        **run.counts(train_sums.sums, test_sums),
    }
    reporter.epoch(record)
    snapshot = dataclasses.replace(
        trained, sums=run.no_metrics(), seconds=0, records=[*trained.records, record]
    )
    best, final = metrics.best(snapshot.records) is record, record["epoch"] == epochs
    due = saver.due(snapshot.step, best)
    signum, save, _ = processes.agree(request.signum, due, 1)
    if final:
        saver.save(snapshot)
    elif signum or save:
        keep(saver, snapshot, signum)
    elif best:
        saver.hold(snapshot)
    return snapshot


def keep(saver: Saver, snapshot: Snapshot, signum: int) -> None:
    """Saves, and ends the run if a signal asked for it."""
    saver.save(snapshot)
    if signum:
        saver.finish()
        raise Stopped(signum, saver.last_good())


def _non_finite(sums: metrics.TrainMetrics, epoch: int, steps_per_epoch: int, saver: Saver) -> str:
    """What the metrics of an epoch say of its first step that was not finite."""
    loss_is_finite = math.isfinite(sums.sums.loss)
    what = "gradient summary" if loss_is_finite else "loss"
    value = sums.gradient_summary if loss_is_finite else sums.sums.loss
    step, good = (epoch - 1) * steps_per_epoch + int(sums.steps), saver.last_good()
    where = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
    return (
        f"the {what} was {value} at step {step} (epoch {epoch}), after an eta of "
        f"{sums.eta_last:.4g}; {where}"
    )
