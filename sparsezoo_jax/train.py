"""Train a preset: `python -m sparsezoo_jax.train --arch spark`.

On the embedded corpus the tiny presets take two to three minutes on two CPU cores. A workdir that holds a checkpoint is
resumed; the same flags must be given.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic.dataclasses import dataclass

from sparsezoo_jax import cli, platforms, program_cache
from sparsezoo_jax.config import RunConfig, flatten, restorable
from sparsezoo_jax.errors import (
    STRICT,
    ConfigError,
    SparsezooWarning,
    StorageError,
    UserError,
    require,
)
from sparsezoo_jax.path_flags import IN_RUN_STORES
from sparsezoo_jax.sharding import (
    addressable_rows,
    build_mesh,
    check_batch,
    check_neurons,
    device_put,
    named_sharding,
    narrow_columns,
    undivided,
    use_mesh,
)
from sparsezoo_jax.storage import write_atomic

if TYPE_CHECKING:
    from sparsezoo_jax.training.writers import MetricWriter

_STARTED = time.monotonic()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Debug:
    """Ways to look into a run."""

    replay: str | None = None
    """A:B makes steps A to B of the run again, from the newest checkpoint before A, and writes their metrics and the
    norms of every layer to replay-A-B.jsonl; the run itself stays as it is."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train(RunConfig):
    """Flags of the command."""

    workdir: Annotated[Path | None, IN_RUN_STORES] = None
    """Run directory, here or in a bucket (gs://): gets configuration, tokenizer, checkpoints and metrics. Default:
    runs/ARCH-SIZE."""
    fresh: bool = False
    """Refuse a workdir that is not empty instead of going on with the run there."""
    distributed: bool = False
    """One of several processes of this run, each started with the same flags: on the hosts of a TPU pod, under Slurm,
    or wherever `coordinator`, `processes` and `process_id` say so."""
    coordinator: str | None = None
    """HOST:PORT of the first process, where the cluster does not tell by itself."""
    processes: int | None = None
    """Number of processes; with `coordinator`."""
    process_id: int | None = None
    """Number of this process, from 0; with `coordinator`."""
    debug: Debug = Debug()
    """Instead of training."""

    def config(self) -> RunConfig:
        return RunConfig(**{name: getattr(self, name) for name in RunConfig.__dataclass_fields__})


def main(args: Sequence[str]) -> None:
    """Train, evaluate on the validation split, and print what came out and a sample."""
    platforms.keep_freed_memory()
    command = cli.parse_with_preset(Train, args, prog="train", description=(__doc__ or "").strip())
    join_processes(command)
    workdir = command.workdir or Path("runs") / f"{command.arch}-{command.size}"
    try:
        if command.debug.replay is None:
            train(command.config(), workdir, fresh=command.fresh, started=_STARTED)
        else:
            replay(command.config(), workdir, command.debug.replay)
    except UserError as error:
        import jax

        if jax.process_count() == 1:
            raise
        # An ordinary exit would wait for processes that wait for this one.
        from sparsezoo_jax.training.phases import end_process

        end_process(str(error), status=error.exit_status)


def join_processes(command: Train) -> None:
    """Connect this process with the others of the run, if there are any.

    Raises:
      ConfigError: flags that don't go together, or no cluster that could be asked.
    """
    given = {name: getattr(command, name) for name in ("coordinator", "processes", "process_id")}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    require(len(missing) in (0, 3), "--distributed", given, f"{' and '.join(missing)} must be given too")
    if not command.distributed:
        require(len(missing) == 3, "--coordinator", command.coordinator, "works together with --distributed only")
        return
    from sparsezoo_jax.training.peers import join

    program_cache.keep_none_of_several_processes()
    try:
        join(command.coordinator, command.processes, command.process_id, command.train.hang_timeout)
    except (ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError("--distributed", True, f"the processes can't be joined ({why})") from None


def train(
    config: RunConfig,
    workdir: Path,
    *,
    fresh: bool = False,
    writers: Sequence[MetricWriter] = (),
    started: float | None = None,
) -> dict[str, Any]:
    """Train `config` in `workdir`, or go on there; returns the final figures that are also in `evaluation.json`.

    Args:
      fresh: refuse a workdir that is not empty.
      writers: of metrics, beside those of the configuration.
      started: `time.monotonic()` from which the times of the figures count. Default: now.

    Returns:
      The figures by name; none of a run that stopped before its last step.

    Raises:
      UserError: an impossible configuration, corpus or directory, or another process trains there; nothing has been
        written to `workdir` then.
      StorageError: reading or writing failed.
    """
    import jax

    from sparsezoo_jax import run_dir
    from sparsezoo_jax.evaluation import contexts, measure
    from sparsezoo_jax.evaluation.report import run_figures, write_report
    from sparsezoo_jax.models import build_model, train_flops_per_token
    from sparsezoo_jax.training import lemo
    from sparsezoo_jax.training.interrupts import Requests
    from sparsezoo_jax.training.lease import Lease
    from sparsezoo_jax.training.lemo_fitting import fitted_for_run
    from sparsezoo_jax.training.loop import EvaluationInterrupted, fit
    from sparsezoo_jax.training.parameters import saved_steps
    from sparsezoo_jax.training.peers import Peers
    from sparsezoo_jax.training.phases import Phases, Watchdog
    from sparsezoo_jax.training.state import first_device
    from sparsezoo_jax.training.usual_writers import check_writers
    from sparsezoo_jax.training_inputs import open_inputs

    started = time.monotonic() if started is None else started
    check_writers(config.train.writers)
    config = run_dir.with_choices_of_base(run_dir.with_absolute_base(restorable(config)), workdir)
    # ------------------------------------------------------------------------------------------------------- Devices
    mesh = build_mesh(config.mesh)
    batch_shape = (config.data.batch_size, config.data.seq_len)
    check_batch(batch_shape, mesh, accumulation=config.train.accumulation)
    check_division(build_model, config, mesh)
    place = named_sharding(mesh) if mesh.size > 1 else None
    batch_sharding = named_sharding(mesh)(("batch", "length"), batch_shape)
    rows = addressable_rows(batch_sharding, batch_shape)
    is_main = jax.process_index() == 0
    meters = config.eval.meter_batches
    alone, shows = jax.process_count() == 1, config.eval.histograms
    require(meters == 0 or alone, "eval.meter_batches", meters, "must be 0 with several processes")
    require(not shows or alone, "eval.histograms", shows, "must be off with several processes")

    # ------------------------------------------------------------------------------------------- Directory and corpus
    Lease(workdir).refuse_taken()
    resumes = run_dir.open_for_training(workdir, config, fresh=fresh)
    # A run that was killed before its first checkpoint starts from the other run again.
    has_steps = resumes and bool(saved_steps(workdir / run_dir.CHECKPOINTS))
    adapts = config.train.lora.active
    warm_start = None if has_steps and not adapts else run_dir.open_source(config, workdir if has_steps else None)
    trained_on = saved_position(workdir).get("fingerprint") if has_steps else None
    inputs = open_inputs(config, workdir, rows, resumes=resumes, trained_on=trained_on)
    fitted = None
    if config.train.lemo.fits:
        assert warm_start is not None
        with use_mesh(mesh):
            fitted = fitted_for_run(
                config.train.lemo,
                config.model,
                workdir,
                inputs.training_sample,
                warm_start,
                place or first_device,
                seed=config.train.seed,
                has_steps=has_steps,
            )

    def evaluate(model: Any, max_batches: int | None, between: Callable[[], None]):
        return inputs.evaluate(
            model, max_batches, between, lambda batch: device_put(batch, batch_sharding, batch_shape)
        )

    def evaluate_in_training(model: Any, between: Callable[[], None]) -> dict[str, Any]:
        found, further = evaluate(model, config.eval.batches, between)
        figures = {**found.as_arrays(), **further}
        if config.eval.meter_batches == 0:
            return figures
        return {**figures, **measure(model, config.model, inputs.shown(config.eval.meter_batches)).dead()}

    def write_run_files() -> None:
        if not resumes:  # another process may have begun a run meanwhile
            run_dir.open_for_training(workdir, config, fresh=fresh)
        run_dir.write_config(workdir, config)
        inputs.save(workdir)
        if fitted is not None and not (workdir / lemo.FILE).exists():
            fitted.save(workdir / lemo.FILE)

    # --------------------------------------------------------------------------------------------------------- Train
    counted = train_flops_per_token(config.model, config.data.seq_len)
    setup_seconds = time.monotonic() - started
    phases = Phases()
    peers = Peers(phases, config.train.hang_timeout)
    with use_mesh(mesh), Watchdog(phases, config.train.hang_timeout, peers.explain), peers:
        try:
            result = fit(
                config.train,
                build=lambda rngs: build_model(config.model, rngs),
                data=inputs.batches,
                batch_shape=batch_shape,
                workdir=workdir,
                evaluate=evaluate_in_training,
                place=place,
                warm_start=warm_start,
                before_writing=write_run_files,
                more_writers=writers,
                hyperparameters=flatten(config),
                histograms=parameter_histograms if shows else None,
                phases=phases,
                flops_per_token={"mfu_dense": counted.dense, "mfu_sparse": counted.sparse},
                tokens_by_corpus=inputs.tokens_by_corpus,
                fitted=fitted,
            )
        finally:
            inputs.batches.close()
        if not result.finished:
            return {}
        # Without an evaluation before it, this one is mostly compilation until its first batch is done.
        with phases("evaluation" if result.evaluation else "compilation"), Requests() as requests:

            def between_batches() -> None:
                phases.enter("evaluation")
                if requests.agreed().stop:
                    raise EvaluationInterrupted

            try:
                final, further = evaluate(result.model, config.eval.final_batches, between_batches)
            except EvaluationInterrupted:
                if is_main:
                    print(f"stopped in the final evaluation; the same command on {workdir} repeats it", file=sys.stderr)
                return {}

    # ------------------------------------------------------------------------------------------------- Final figures
    figures: dict[str, Any] = {
        "step": result.step,
        "split": config.data.validation_split,
        **final.as_dict(),
        "seconds": round(time.monotonic() - started, 1),
        "seconds_to_first_step": round(result.time_to_first_step + setup_seconds, 1),
        "train_tokens_per_second": round(result.tokens_per_second, 1),
    }
    figures |= inputs.final_figures(further)
    if is_main:
        _write_json(workdir / "evaluation.json", figures)
        inputs.show(figures, workdir)
    if jax.process_count() > 1:
        return figures
    inputs.show_sample(result.model, result.step, workdir)
    if config.eval.report:
        shown, lengths = inputs.shown(config.eval.batches), contexts(config.model)
        run = run_figures(workdir, workdir.name, flatten(config), config.model, result.model, shown, lengths)
        write_report(workdir / "report.html", [run])
        print(f"\nReport: {workdir / 'report.html'}")
    return figures


def replay(config: RunConfig, workdir: Path, window: str) -> None:
    """Make steps of the run in `workdir` again, and print each beside what the log says.

    Raises:
      UserError: no such steps, or a directory without a run of this configuration.
      StorageError: reading or writing failed.
    """
    from sparsezoo_jax import run_dir
    from sparsezoo_jax.data import find_tokenizer
    from sparsezoo_jax.models import build_model
    from sparsezoo_jax.training import replay as replaying
    from sparsezoo_jax.training.checkpoint_format import DamagedCheckpointError
    from sparsezoo_jax.training.state import first_device
    from sparsezoo_jax.training_inputs import open_inputs

    steps = replaying.parse_window(window)
    config = run_dir.with_choices_of_base(run_dir.with_absolute_base(restorable(config)), workdir)
    require(run_dir.open_for_training(workdir, config, fresh=False), "--workdir", workdir, "holds no run to replay")
    mesh = build_mesh(config.mesh)
    batch_shape = (config.data.batch_size, config.data.seq_len)
    check_batch(batch_shape, mesh, accumulation=config.train.accumulation)
    check_division(build_model, config, mesh)
    place = named_sharding(mesh) if mesh.size > 1 else first_device
    batch_sharding = named_sharding(mesh)(("batch", "length"), batch_shape)
    has_text = config.model.images.patch is None
    require(not has_text or find_tokenizer(workdir) is not None, "--workdir", workdir, "has no tokenizer")
    rows = addressable_rows(batch_sharding, batch_shape)
    batches = open_inputs(config, workdir, rows, resumes=True, trained_on=None).batches

    def report(found: replaying.Replayed) -> None:
        verdict = {True: "as logged", False: f"NOT as logged: {found.logged}", None: "not in the log"}[found.is_same]
        loss, norm = found.metrics["loss"], found.metrics["grad_norm"]
        print(f"step {found.step}  loss {loss:.6f}  gradient norm {norm:.6f}  {verdict}")

    with use_mesh(mesh):
        try:
            path = replaying.replay(
                config.train,
                steps,
                build=lambda rngs: build_model(config.model, rngs),
                data=batches,
                batch_shape=batch_shape,
                workdir=workdir,
                place=place,
                to_device=lambda batch: device_put(batch, batch_sharding, batch_shape, rows.start),
                report=report,
                warm_start=run_dir.open_source(config, workdir) if config.train.lora.active else None,
            )
        except DamagedCheckpointError as error:
            raise StorageError(f"{workdir}: the checkpoint before step {steps[0]} is damaged: {error}") from None
        finally:
            batches.close()
    print(path)


def saved_position(workdir: Path) -> dict[str, Any]:
    """The position in the data that the newest checkpoint holds; empty if it can't be read, which resuming will say."""
    from sparsezoo_jax import run_dir
    from sparsezoo_jax.training.parameters import saved_metadata

    try:
        return saved_metadata(workdir / run_dir.CHECKPOINTS).get("data", {})
    except StorageError:
        return {}


#: What to do about a dimension that a mesh axis does not divide.
REMEDIES = {"vocab": "; --model.vocab-multiple pads the vocabulary"}


def check_division(build: Any, config: RunConfig, mesh: Any) -> None:
    """Warn of matrices that a mesh axis should split but does not divide, so that each of its devices holds them whole,
    and on TPUs of those that it cuts into narrow pieces.

    Raises:
      ConfigError: they are an FFN's, so that work would be repeated too.
    """
    from sparsezoo_jax.training.state import ModelTemplate

    if mesh.size == 1:
        return
    parameters = ModelTemplate(lambda rngs: build(config.model, rngs)).parameters
    check_neurons(parameters, mesh)
    if mesh.devices.flat[0].platform == "tpu" and (narrow := narrow_columns(parameters, mesh)) is not None:
        warnings.warn(narrow, SparsezooWarning, stacklevel=2)
    repeated: dict[tuple[str, str], list[str]] = {}
    for name, variable in parameters.items():
        if len(variable.axes or ()) > 1:
            for dimension, axes in undivided(variable.full_axes, variable.shape, mesh).items():
                for axis in axes:
                    repeated.setdefault((axis, dimension), []).append(name)
    for (axis, dimension), names in repeated.items():
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        warnings.warn(
            f"mesh.{axis}={mesh.shape[axis]} doesn't divide '{dimension}': each of its devices holds "
            f"{' and '.join(names[:2])}{more} whole{REMEDIES.get(dimension, '')}",
            SparsezooWarning,
            stacklevel=2,
        )


def _write_json(path: Path, figures: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(cli.without_nan(figures), indent=2) + "\n").encode())


def parameter_histograms(model: Any) -> dict[str, Any]:
    """A histogram of each parameter's values, all layers together, by 'parameters/<path>'."""
    import numpy as np
    from flax import nnx

    from sparsezoo_jax.training.state import flatten as leaves
    from sparsezoo_jax.training.writers import Histogram

    found = leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {f"parameters/{path}": Histogram.of(np.asarray(array, np.float32)) for path, array in found.items()}


if __name__ == "__main__":
    cli.run(main)
