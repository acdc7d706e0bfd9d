"""A training run from start to finish; read `fit` from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsezoo_jax import storage
from sparsezoo_jax.data import BatchIterator, merge_states
from sparsezoo_jax.errors import StorageError, require
from sparsezoo_jax.sharding import addressable_rows, device_put
from sparsezoo_jax.training.checkpoint import Checkpointer, RunRecord
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.goodput import Account
from sparsezoo_jax.training.guards import SpikeGuard, stop_if_diverging, stop_if_rewound_too_often
from sparsezoo_jax.training.interrupts import Requests
from sparsezoo_jax.training.lease import Lease
from sparsezoo_jax.training.lemo import Fitted
from sparsezoo_jax.training.local_checkpoints import LocalCheckpoints, newest, run_id
from sparsezoo_jax.training.merging import merge_params
from sparsezoo_jax.training.parameters import restore_params
from sparsezoo_jax.training.phases import Phases
from sparsezoo_jax.training.processes import barrier, gather, in_all
from sparsezoo_jax.training.shares import TokenShares
from sparsezoo_jax.training.speed import SpeedMeter, yardstick
from sparsezoo_jax.training.state import Build, Placement, PureDict, TrainState, first_device, flatten, parameter_count
from sparsezoo_jax.training.step import Batch, Metrics
from sparsezoo_jax.training.usual_writers import METRICS, open_writers
from sparsezoo_jax.training.warm_start import WarmStart
from sparsezoo_jax.training.writers import Histogram, MetricWriter, Writers, has_steps

Evaluate = Callable[[Any, Callable[[], None]], Mapping[str, float]]
"""From the model (an nnx.Module) to metrics of the validation split, `loss` (nats a token) among them.

The second argument is to be called between batches: it says that the evaluation makes progress, and ends it with an
exception when the run was asked to stop."""

CHECKPOINTS = "checkpoints"
SAVED_ONCE = "checkpoints.saved"
"""A file of a run that has had a complete checkpoint."""


class EvaluationInterrupted(Exception):  # noqa: N818
    """Raised between the batches of an evaluation when the run was asked to stop."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    model: nnx.Module
    """The trained model."""
    state: TrainState
    """The final train state; of a finished run with `merge_last` its parameters are the averages."""
    metrics: dict[str, Any]
    """Metrics of the last step made; empty if none was made."""
    evaluation: dict[str, float]
    """Metrics of the last evaluation; empty if there was none."""
    step: int
    """Train step counter at the end."""
    resumed_from: int
    """Step of the checkpoint that the run went on from, 0 if none."""
    finished: bool
    """False if the run stopped early: by `stop_at` or by a signal."""
    seconds: float
    """Wall-clock time of this call."""
    tokens_per_second: float
    """Target tokens a second without the first step (compilation), evaluations and checkpoints; NaN if unknown."""
    time_to_first_step: float
    """Seconds from the call to the end of its first step; NaN if none was made."""


def fit(
    config: TrainConfig,
    *,
    build: Build,
    data: BatchIterator,
    batch_shape: tuple[int, int],
    workdir: Path | str,
    evaluate: Evaluate | None = None,
    place: Placement | None = None,
    warm_start: WarmStart | None = None,
    before_writing: Callable[[], None] | None = None,
    writers: Sequence[MetricWriter] | None = None,
    more_writers: Sequence[MetricWriter] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    histograms: Callable[[nnx.Module], Mapping[str, Histogram]] | None = None,
    phases: Phases | None = None,
    flops_per_token: Mapping[str, float] | None = None,
    tokens_by_corpus: Callable[[], Mapping[str, int]] | None = None,
    fitted: Fitted | None = None,
) -> FitResult:
    """Train a model until `config.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Args:
      build: makes the model; called under jit.
      data: training batches; not closed here.
      batch_shape: (B, T) of a global batch; `data` gives the rows of it that this process's devices hold.
      workdir: gets checkpoints/, metrics.jsonl, tensorboard/ and profile/.
      evaluate: called on the model every `eval_every` steps, with every checkpoint if `keep_best`, and at the end.
      place: from the logical axes and shape of an array to its sharding; axes of a batch are ('batch', 'length').
        Default: everything on the first device.
      warm_start: gives the parameters and other variables of a run that has no checkpoint yet, and with `config.lora`
        of any run the parameters that adapters are trained for. Default: those that `build` makes.
      before_writing: called once when the configuration has been checked, before the first file is written.
      writers: instead of the usual ones (metrics.jsonl, progress, and `config.writers`).
      more_writers: beside these.
      hyperparameters: what the usual writers note of the run, by name.
      histograms: made of the model after each evaluation, for the writers that show them.
      phases: tells a watchdog what the run is doing.
      flops_per_token: FLOPs of a train step per token by the name of a metric, which is logged as their share of the
        devices' peak, where that is known.
      tokens_by_corpus: target tokens of each corpus of a mixture in the batch that `data` gave last, of this process's
        rows; their shares are logged.
      fitted: what was measured for `config.lemo`, where it needs that.

    Raises:
      ConfigError: an objective for a loss, or a group or adapters for parameters, that the model does not have;
        adapters without `warm_start`; an accumulation that does not divide B.
      UserError: the checkpoint belongs to another model or optimizer.
      RunInUseError: another process trains in `workdir`.
      StorageError: saving failed, no checkpoint in `workdir` can be read, or there is a log of steps without any.
      TrainingDiverged: `max_skipped_steps` steps in a row were not finite, or `spike.max_rewinds` rewinds did not help.
    """
    started = time.monotonic()
    workdir = storage.path(workdir)
    is_main = jax.process_index() == 0
    phases = Phases() if phases is None else phases

    # ---------------------------------------------------------------------------------------------------------- Build
    place = first_device if place is None else place
    prepared = prepare_step(config, build, batch_shape, place, fitted=fitted)
    shardings, train_step = prepared.shardings, prepared.step
    adapts = prepared.adapters is not None
    allowed = "needs train.init_from, the run whose parameters get adapters"
    require(not adapts or warm_start is not None, *config.lora.asked, allowed)
    batch_sharding = prepared.batch["tokens"].sharding
    rows = addressable_rows(batch_sharding, batch_shape)

    with contextlib.ExitStack() as resources:
        # -------------------------------------------------------------------------------------- Initialise or restore
        barrier("before_writing")  # no process writes while another one still looks at what is there
        lease = Lease(workdir)
        resources.callback(lease.release)
        in_all(lambda: _take(lease, before_writing) if is_main else None)
        _refuse_lost_checkpoints(workdir)
        kept = config.merged_steps()
        checkpointer = Checkpointer(
            workdir / CHECKPOINTS,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            keep_steps=kept,
            mark=workdir / SAVED_ONCE,
        )
        resources.enter_context(checkpointer)
        # Order of restoring:
        # 1. parameters, model state (random streams included), optimizer, objectives and counters, all from one step,
        #    on a local disk if there is a newer one;
        # 2. the position in the data, saved with them;
        # 3. the metrics files, cut back to that step (below, when they are opened).
        # Without a checkpoint: initialise, from another run's parameters if there is one, and start at the first data.
        # With adapters, what they are trained for comes from that other run every time.
        local = None
        if config.local_checkpoints is not None:
            local = LocalCheckpoints(config.local_checkpoints, run_id(workdir))
            resources.callback(local.close)
        restored = newest(checkpointer, local, prepared.abstract)
        base = warm_start.read(place) if adapts and warm_start is not None else None
        if restored is None:
            state = prepared.first_state(jax.random.key(config.seed))
            record = RunRecord()
            # The optimizers' first states do not depend on the parameters' values.
            if base is not None and warm_start is not None:
                state = prepared.with_base(state, *base)
                record = RunRecord(base=warm_start.identity())
            elif warm_start is not None:
                own, places = (state.params, state.model_state), (shardings.params, shardings.model_state)
                params, model_state = warm_start(own, places, place)
                state = dataclasses.replace(state, params=params, model_state=model_state)
            first = 0
        else:
            state = restored.state if base is None else prepared.with_base(restored.state, base[0])
            data.set_state(restored.data_state)
            first = int(state.step)
            missing = [step for step in kept if step <= first and step not in checkpointer.steps()]
            allowed = f"averages checkpoints that {workdir} no longer has: {', '.join(map(str, missing))}"
            require(not missing, "train.merge_last", config.merge_last, allowed)
            record = dataclasses.replace(restored.record, starts=restored.record.starts + 1)
        if is_main:
            parameters = f"{parameter_count(prepared.template):,} parameters"
            if adapts:
                trained = sum(x.size for x in flatten(prepared.abstract.params).values())
                parameters = f"{parameters}, {trained:,} trained"
            origin = f"resuming from step {first} in {workdir}" if restored else f"training from step 0 in {workdir}"
            print(f"{origin}: {parameters}, {config.steps} steps", file=sys.stderr)

        last = config.steps if config.stop_at is None else min(config.steps, config.stop_at)
        if writers is None and is_main:
            writers, lost = open_writers(config.writers, workdir, last, first, record.unlogged, hyperparameters or {})
            record = dataclasses.replace(record, lost_steps=record.lost_steps + lost)
        writer = Writers((*(writers or ()), *(more_writers if is_main else ())))
        resources.callback(writer.close)
        account = Account(phases, record)
        pending = _Pending()
        speed = SpeedMeter(yardstick(batch_sharding.device_set, flops_per_token or {}))
        guard = SpikeGuard(config.spike, record.losses)
        shares = TokenShares()
        latest: dict[str, Any] = {}
        evaluation: dict[str, float] = {}
        time_to_first_step = float("nan")
        interrupted = evaluated = False
        saved_at = time.monotonic()
        spiked: int | None = None
        step = first

        def finish_step() -> None:
            """Wait for the step under way, count it, write its row when due, and look whether its loss is right."""
            nonlocal latest, spiked
            found = pending.pop()
            if found is None:
                return
            done, latest, counts = found
            shares.add(counts)
            # The first step is mostly compilation; the clock starts when it is over.
            if done == first + 1:
                speed.start()
            else:
                speed.add(latest["tokens"])
            if done % config.log_every == 0 or done == last:
                writer.write(done, {**latest, **shares.take(), **speed.take(), **account.take(done)})
            stop_if_diverging(done, latest, config.max_skipped_steps, checkpointer)
            if guard.is_spike(done, latest["loss"]) and config.spike.mode == "rewind":
                spiked = done

        profiler = resources.enter_context(_Profiler(config, workdir))
        requests = resources.enter_context(Requests())

        def between_batches() -> None:
            """Called after each batch of an evaluation, which may take long."""
            phases.enter("evaluation")
            # Whoever sends a signal may soon send a harder one: save first of all.
            if requests.agreed().stop:
                raise EvaluationInterrupted

        # ------------------------------------------------------------------------------------------------- Step loop
        phases.enter("step")
        while step < last and not interrupted:
            profiler.before_step(step + 1)
            with phases("data"):
                batch = _to_device(next(data), batch_shape, batch_sharding, rows)
                drawn = {} if tokens_by_corpus is None else tokens_by_corpus()
            with phases("compilation" if step == first else "step"):
                limit = (jnp.float32(guard.limit(step + 1)),) if config.spike.mode == "skip" else ()
                state, metrics = train_step(state, batch, *limit)
                # The device works on this step while the host reads the metrics of the one before.
                finish_step()
                step += 1
                pending.push(step, metrics, drawn)
                if step == first + 1:
                    finish_step()
                    time_to_first_step = time.monotonic() - started
            profiler.after_step(step, state)
            # A save that failed is to be known now, not at the next one, which may be hours away.
            checkpointer.check()

            # ------------------------------------------------------------------------------------ Requests, schedule
            saves = step == last or _is_due(step, config.checkpoint_every)
            # With several processes, agreeing takes a collective, so it is done now and then.
            if jax.process_count() == 1 or step % config.log_every == 0:
                minutes = (time.monotonic() - saved_at) / 60
                asked = requests.agreed(save=is_main and 0 < config.checkpoint_every_minutes <= minutes)
                interrupted = asked.stop
                saves = saves or asked.stop or asked.save
            saves_locally = local is not None and not saves and _is_due(step, config.local_every())
            evaluates = step == config.steps or (saves and config.keep_best) or _is_due(step, config.eval_every)
            if saves or saves_locally or evaluates:
                finish_step()

            # ------------------------------------------------------------------------------------------------ Rewind
            if spiked is not None:
                stop_if_rewound_too_often(spiked, account.record.rewinds, config.spike.max_rewinds, checkpointer)
                pending.pop()
                with phases("save"):
                    checkpointer.wait()
                    restored = checkpointer.restore(prepared.abstract)
                if restored is None:
                    print(f"warning: the loss spiked at step {spiked}; no checkpoint to go back to", file=sys.stderr)
                else:
                    state = dataclasses.replace(restored.state, frozen=state.frozen)
                    back = int(state.step)
                    data.set_state(restored.data_state)
                    for _ in range(spiked - back):
                        with phases("data"):
                            next(data)
                    if is_main:
                        passed = f"passing over {spiked - back} batches"
                        print(f"the loss spiked at step {spiked}: back to step {back}, {passed}", file=sys.stderr)
                    if local is not None:
                        local.forget_after(back)
                    account.rewound(restored.record, steps=step - back, batches=spiked - back)
                    guard.forget_after(back)
                    writer.rewind(back)
                    step = back
                spiked = None
                continue

            # ---------------------------------------------------------------------------------------------- Evaluate
            validation_loss = None
            if evaluate is not None and evaluates and not interrupted:
                try:
                    # Until its first batch is done, the first evaluation of a start is mostly compilation.
                    with phases("evaluation" if evaluated else "compilation"), speed.paused():
                        model = prepared.model(state)
                        evaluation = dict(evaluate(model, between_batches))
                    evaluated = True
                    writer.write(step, evaluation, split="validation")
                    if histograms is not None:
                        writer.write_histograms(step, histograms(model))
                    validation_loss = evaluation.get("loss")
                except EvaluationInterrupted:
                    interrupted = saves = True

            # -------------------------------------------------------------------------------------------- Checkpoint
            if saves or saves_locally:
                with phases("save"), speed.paused():
                    if is_main and saves:
                        lease.check()
                    # Rows up to a checkpoint's step are in the log or in the checkpoint: no step is ever missing.
                    current = account.snapshot(guard.state(), unlogged=writer.flush())
                    # Each process knows where its own rows are; whoever restores them may have others.
                    position = merge_states(gather(data.get_state()))
                    if saves:
                        checkpointer.save(state, position, validation_loss, step=step, record=current)
                        saved_at = time.monotonic()
                    elif local is not None:
                        local.save(state, position, step=step, record=current)

        # ---------------------------------------------------------------------------------------------------- Finish
        finish_step()
        with phases("save"):
            checkpointer.wait()
        finished = step >= config.steps and not interrupted
        if finished and kept:
            with phases("evaluation"):
                state = _merged(state, workdir, config)
            if is_main:
                print(f"the run ends as the average of steps {', '.join(map(str, kept))}", file=sys.stderr)
        phases.enter("other")
        signal_name = requests.signal.name if requests.signal else "the signal of another process"

    if is_main and not finished:
        why = f"on {signal_name}" if interrupted else "at train.stop_at"
        print(f"stopped {why} after step {step}; run the same command on {workdir} to go on", file=sys.stderr)
    if is_main and step > first:
        print(account.summary(step), file=sys.stderr)
    return FitResult(
        model=prepared.model(state),
        state=state,
        metrics=latest,
        evaluation=evaluation,
        step=step,
        resumed_from=first,
        finished=finished,
        seconds=time.monotonic() - started,
        tokens_per_second=speed.tokens_per_second,
        time_to_first_step=time_to_first_step,
    )


class _Pending:
    """The newest step's metrics, read one step late: the device works on the next step meanwhile."""

    def __init__(self):
        self._pending: tuple[int, Metrics, Mapping[str, int]] | None = None

    def push(self, step: int, metrics: Metrics, counts: Mapping[str, int]) -> None:
        self._pending = (step, metrics, counts)

    def pop(self) -> tuple[int, dict[str, Any], Mapping[str, int]] | None:
        """The pending step, its metrics, scalars as floats, once the step is done, and its tokens by corpus; None if no
        step is pending.
        """
        if self._pending is None:
            return None
        (step, metrics, counts), self._pending = self._pending, None
        return step, {name: x if x.ndim else float(x) for name, x in jax.device_get(metrics).items()}, counts


class _Profiler:
    """A jax.profiler trace of the steps that the configuration asks for."""

    def __init__(self, config: TrainConfig, workdir: Path):
        self._config, self._mirror, self._running = config, storage.Mirror(workdir / "profile"), False

    def __enter__(self) -> _Profiler:
        return self

    def before_step(self, step: int) -> None:
        if step == self._config.profile_start:
            jax.profiler.start_trace(str(self._mirror.local))
            self._running = True

    def after_step(self, step: int, result: Any) -> None:
        if self._running and step + 1 == (self._config.profile_start or 0) + self._config.profile_steps:
            # Steps run asynchronously: without waiting the trace would end before they do.
            jax.block_until_ready(result)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            with contextlib.suppress(OSError):  # a trace is not worth the run
                self._mirror.send(now=True)


def _merged(state: TrainState, workdir: Path, config: TrainConfig) -> TrainState:
    """`state` with the average of the run's last checkpoints as its parameters, where the parameters are."""
    places = {path: array.sharding for path, array in flatten(state).items()}

    def read(directory: Path, step: int) -> tuple[PureDict, PureDict]:
        return restore_params(directory, step, sharding_of=lambda path, shape: places[path])

    steps, decay = config.merged_steps(), config.merge_decay
    params, model_state = merge_params(workdir / CHECKPOINTS, steps=steps, decay=decay, read=read)
    return dataclasses.replace(state, params=params, model_state=model_state)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _to_device(batch: Any, shape: tuple[int, int], sharding: jax.sharding.Sharding, rows: range) -> Batch:
    local, found = (len(rows), shape[1]), batch["targets"].shape
    if found != local:
        raise ValueError(f"a batch of this process has shape {found}, not {local}")
    return device_put(batch, sharding, shape, rows.start)


def _take(lease: Lease, before_writing: Callable[[], None] | None) -> None:
    lease.acquire()
    if before_writing is not None:
        before_writing()


def _refuse_lost_checkpoints(workdir: Path) -> None:
    """Raise `StorageError` where checkpoints were and there are none: as after a failed mount.

    That leaves no directory where it was linked, and an empty one where it was mounted. A bucket is not mounted, and
    has no directory before the first checkpoint is in it.
    """
    directory, mark = workdir / CHECKPOINTS, workdir / SAVED_ONCE

    def check() -> None:
        lost, traces = "", []
        if storage.is_object(workdir):
            return
        if not directory.is_dir() and has_steps(workdir / METRICS):
            lost, traces = f"is missing, but {METRICS} has steps", [workdir / METRICS, mark]
        elif mark.exists() and not any(directory.glob("[0-9]*")):
            lost, traces = "is empty, but has held checkpoints", [mark]
        if lost:
            found = " and ".join(str(path) for path in traces if path.exists())
            raise StorageError(
                f"{directory} {lost}: is a file system not mounted? To start again from step 0, delete {found}"
            )

    in_all(check)
