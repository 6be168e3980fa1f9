"""The loop over epochs: train, evaluate, report, save, without waiting for the devices."""

import dataclasses
import math
import time

import jax

from input_pipeline.errors import MAX_UNREADABLE, DataError
from training import metrics, multihost, signals
from training.checkpoints.saving import Saver, Snapshot
from training.errors import NonFiniteError, ReadError
from training.feeds import Feed, Stalled
from training.records import EpochRecord, best
from training.reporting.console import Console
from training.signals import Stopped

# The target duration of one dispatch of steps, in seconds: short enough for a live bar and a prompt
# stop on request, long enough for the cost of a dispatch not to matter.
DISPATCH_SECONDS = 0.25


def train_epochs(
    feed: Feed, snapshot: Snapshot, epochs: int, reporter: Console, saver: Saver
) -> Snapshot:
    """Trains from a snapshot until the run has the given number of epochs, and saves the result.

    Raises:
      NonFiniteError: if the loss or the gradient stops being finite.
      ReadError: if data can no longer be read, or too many images not be decoded. Where there are
        several processes, the one that cannot read ends at once, and the others after it.
      SaveError: if the result could not be saved.
      Stopped: if a signal asked the run to stop, once everything is saved.
    """
    start = time.perf_counter()
    snapshot = dataclasses.replace(snapshot, state=feed.compile(snapshot.state))
    reporter.begin(time.perf_counter() - start)
    with signals.on_request() as request:
        feed.request = request
        try:
            while len(snapshot.records) < epochs:
                snapshot = train_epoch(feed, snapshot, reporter, saver, request)
                snapshot = eval_epoch(feed, snapshot, epochs, reporter, saver, request)
        except DataError as error:
            if jax.process_count() > 1:
                multihost.leave(str(error))
            raise ReadError(f"{error}; {_last_good(saver)}") from error
        saver.finish()
    return snapshot


def train_epoch(
    feed: Feed,
    begun: Snapshot,
    reporter: Console,
    saver: Saver,
    request: signals.Request,
) -> Snapshot:
    """Trains from a snapshot to the end of its epoch. Epochs are counted from 1."""
    epoch = len(begun.records) + 1
    last = epoch * feed.steps_per_epoch
    step, state, sums, seconds = begun.step, begun.state, begun.sums, begun.seconds
    start, steps, votes = time.perf_counter() - seconds, 1, multihost.LateAgreement()

    def now() -> Snapshot:
        position = feed.iterator_state()
        return Snapshot(step, state, sums, seconds, begun.records, position, begun.averaged)

    while step < last:
        step = int(min(step + steps, last, saver.next_step(step)))
        before = sums
        try:
            state, sums = feed.train(state, sums, step)
        except Stalled as stalled:
            state, sums, step = stalled.reached
            if not metrics.finite(jax.device_get(sums)):
                break
            keep(saver, now(), request.signum, stalled=True)
        # The host waits for the previous dispatch only, and the device waits for nothing.
        seen, seconds = jax.device_get(before), time.perf_counter() - start
        if not metrics.finite(seen):
            break
        if seen.steps:
            steps = max(1, int(seen.steps * DISPATCH_SECONDS / seconds))
            speed = {"images_per_second": float(seen.sums.examples) / seconds}
            done = float(seen.steps) / feed.steps_per_epoch
            reporter.progress(epoch, done, metrics.train_averages(seen) | speed)
        signum, save, steps = votes.agree(request.signum, saver.overdue(), steps)
        if (signum or save or saver.due(step)) and step < last:
            if not metrics.finite(jax.device_get(sums)):
                break
            keep(saver, now(), signum)

    sums_seen, seconds = jax.device_get(sums), time.perf_counter() - start
    if not metrics.finite(sums_seen):
        raise NonFiniteError(_non_finite(sums_seen, epoch, feed.steps_per_epoch, saver))
    return now()


def eval_epoch(
    feed: Feed,
    trained: Snapshot,
    epochs: int,
    reporter: Console,
    saver: Saver,
    request: signals.Request,
) -> Snapshot:
    """Evaluates at the end of an epoch, out of ``epochs`` in all, and completes its record."""
    models, averaged = [trained.state.model], None
    try:
        if average := trained.state.averaged:
            averaged = feed.with_statistics(average)
            models = [averaged, *models]
        sums = feed.evaluate(models)
    except Stalled:
        keep(saver, trained, request.signum, stalled=True)
    (eval_sums, *plain_sums), train_sums = jax.device_get((sums, trained.sums))
    averages, tested = metrics.train_averages(train_sums), metrics.averages(eval_sums)
    for plain in map(metrics.averages, plain_sums):
        averages |= {f"plain_test_{name}": value for name, value in plain.items()}
    unreadable = feed.unreadable(train_sums.sums, eval_sums)
    decoded = float(train_sums.sums.examples + eval_sums.examples)
    if unreadable and unreadable > MAX_UNREADABLE * (unreadable + decoded):
        raise ReadError(
            f"{unreadable:,} of {unreadable + decoded:,.0f} images of epoch "
            f"{len(trained.records) + 1} could not be decoded, more than {MAX_UNREADABLE:.0%}; "
            + _last_good(saver)
        )
    record = EpochRecord(
        epoch=len(trained.records) + 1,
        step=trained.step,
        train_loss=averages.pop("loss"),
        train_accuracy=averages.pop("accuracy"),
        test_loss=tested["loss"],
        test_accuracy=tested["accuracy"],
        seconds=trained.seconds,
        images_per_second=float(train_sums.sums.examples) / trained.seconds,
        unreadable=unreadable,
        **averages,
    )
    reporter.epoch(record)
    snapshot = dataclasses.replace(
        trained,
        sums=feed.zero_metrics(),
        seconds=0,
        records=[*trained.records, record],
        averaged=averaged,
    )
    is_best, final = best(snapshot.records) is record, record.epoch == epochs
    signum, save, _ = multihost.agree(request.signum, saver.overdue(is_best), 1)
    if final:
        saver.save(snapshot)
    elif signum or save or saver.due(snapshot.step):
        keep(saver, snapshot, signum)
    elif is_best:
        saver.hold(snapshot)
    return snapshot


def keep(saver: Saver, snapshot: Snapshot, signum: int, stalled: bool = False) -> None:
    """Saves, and ends the run if a signal asked it to stop, or also data do not come."""
    saver.save(snapshot)
    if signum:
        saver.finish()
        raise Stopped(signum, saver.path_of(snapshot.step), stalled)


def _non_finite(sums: metrics.TrainMetrics, epoch: int, steps_per_epoch: int, saver: Saver) -> str:
    """Describes the first step that was not finite, from the metrics of its epoch."""
    loss_is_finite = math.isfinite(sums.sums.loss)
    what = "gradient summary" if loss_is_finite else "loss"
    value = sums.gradient_summary if loss_is_finite else sums.sums.loss
    step = (epoch - 1) * steps_per_epoch + int(sums.steps)
    return (
        f"the {what} was {value} at step {step} (epoch {epoch}), after an eta of "
        f"{sums.eta_last:.4g}; {_last_good(saver)}"
    )


def _last_good(saver: Saver) -> str:
    good = saver.last_good()
    return f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
