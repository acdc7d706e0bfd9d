"""Make a sparser run of a trained one: `python -m sparsezoo_jax.sparsify RUN OUT --method teal --sparsity 0.5`.

Some text is read to see what the maps of each layer read, and OUT becomes a run of one of four
kinds. Its layers leave out the channels that matter least for a token: those of small magnitude (teal), of small
magnitude times the norm of their weights (wina; rsparse reads the others by a low-rank map), or the neurons whose gates
are small (cats). Or weights are 0 for all tokens (magnitude, wanda, gblm), which saves no time by itself. Or neurons of
feed-forward networks are gone (magnitude-sp, wanda-sp, cfsp, flap), and the model is smaller. Or neurons become experts
by domain, of which one router for all layers gives each token one (readme); that alone trains. It is evaluated,
continued, decoded and reported like every other. docs/sparsify.md has the formulas and what the released code does
otherwise.

What was found of finished layers is kept in OUT.partial until OUT is whole: the same command goes on there if it was
cut off (but for readme, which begins anew). With --mesh.* flags devices share the model, the sequences and their
streams.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sparsezoo_jax import cli, platforms
from sparsezoo_jax.corpus_flags import CorpusFlags
from sparsezoo_jax.errors import DataError, UserError, require
from sparsezoo_jax.mesh_flags import MeshFlags
from sparsezoo_jax.path_flags import IN_RUN_STORES
from sparsezoo_jax.sparsification.config import (
    AllocationConfig,
    CalibrationConfig,
    NeuronConfig,
    PruningConfig,
    ReadMEConfig,
    RSparseConfig,
)

ACTIVATIONS = ("cats", "teal", "wina", "rsparse")
WEIGHTS = ("magnitude", "wanda", "gblm")
NEURONS = ("magnitude-sp", "wanda-sp", "cfsp", "flap")
EXPERTS = ("readme",)
#: Methods that are not kept unfinished: what trains, and what reads no text.
WITHOUT_PROGRESS = (*EXPERTS, "magnitude")
#: Name under which is kept that OUT is being written.
_WRITING = "writing"


@dataclass(frozen=True, kw_only=True)
class Sparsify(CorpusFlags, MeshFlags):
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN"), IN_RUN_STORES]
    """Run directory to read."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT"), IN_RUN_STORES]
    """Run directory to make; empty or absent."""
    method: Literal[
        "cats",
        "teal",
        "wina",
        "rsparse",
        "magnitude",
        "wanda",
        "gblm",
        "magnitude-sp",
        "wanda-sp",
        "cfsp",
        "flap",
        "readme",
    ]
    """Left out for a token: cats: neurons of gated networks, by their gates; teal: channels of all linear maps, by
    magnitude; wina: these, by magnitude times the norm of their weights; rsparse: the same, and a low-rank map
    reads the rest. Weights set to 0: magnitude; wanda: by
    magnitude times the norm of their inputs; gblm: these norms and gradients. Neurons removed: magnitude-sp, wanda-sp:
    by their output weights, and the norms of what they put out; cfsp: by these and those of their inputs; flap: by the
    variance of what they put out. Made into experts: readme: neurons that a domain's text activates most."""
    sparsity: float | None = None
    """Share of the channels, neurons or weights that goes, in [0, 1). None: 0.5, or what --pattern says."""
    maps: tuple[str, ...] | None = None
    """Maps that leave channels out, or whose weights are pruned, of q, q_up, k, v, o, gate, up, down, neurons, and of
    mixtures shared_gate, shared_up, shared_neurons, shared_down; none: those of the method."""
    gate: Literal["threshold", "top_k"] | None = None
    """Of cats, teal, wina: threshold: one for a map and layer, from the calibration; top_k: a token's largest. None:
    that of the method."""
    weighted: tuple[str, ...] | None = None
    """Maps whose scores are multiplied by the norms of their weights; none: those of the method."""
    quantile: Literal["magnitude", "symmetric", "grid"] | None = None
    """What a threshold is: see docs/sparsify.md. None: that of the method."""
    rotate: bool = False
    """Of teal, wina: let sublayers read the stream in a basis of their own, which costs a matrix for each (WINA)."""
    released: bool = False
    """Take what the authors' code does where it is not what their paper says (docs/sparsify.md)."""
    dense_tokens: int = 0
    """First tokens of a document that read everything."""
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    """Of teal and wina."""
    rsparse: RSparseConfig = field(default_factory=RSparseConfig)
    """Of rsparse."""
    pattern: str = "unstructured"
    """Of magnitude, wanda, gblm: unstructured, or N:M, which keeps N weights of an output's M consecutive inputs, so
    that the sparsity is 1 - N/M."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """Of magnitude, wanda and gblm."""
    neurons: NeuronConfig = field(default_factory=NeuronConfig)
    """Of magnitude-sp, wanda-sp, cfsp and flap; the multiple of readme, too."""
    readme: ReadMEConfig = field(default_factory=ReadMEConfig)
    """Of readme."""
    step: int | None = None
    """Checkpoint of the run to take; none is the newest."""
    base: Annotated[Path | None, IN_RUN_STORES] = None
    """Of a run of adapters: the run that they were trained for. None: where its configuration says."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """The text that says what maps read."""
    batch_size: int | None = None
    """Sequences in a batch, of the calibration and of the validation split; none is the run's."""
    batches: int = 16
    """Batches of the validation split on which the loss is measured, before and after."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(args: Sequence[str]) -> None:
    """Make the run, measure and print."""
    platforms.keep_freed_memory()
    command = cli.parse(Sparsify, args, prog="sparsify", description=(__doc__ or "").strip())
    figures = sparsify(command)
    if command.json:
        print(json.dumps(cli.without_nan(figures)))
        return
    change = figures["loss"] - figures["loss_dense"]
    rows = [
        ("loss of the dense run", f"{figures['loss_dense']:.4f} nats/token"),
        ("loss at this sparsity", f"{figures['loss']:.4f} nats/token ({change:+.4f})"),
    ]
    if "weights" in figures:
        needed = f"{figures['weights'] / figures['weights_dense']:.2%}"
        whole = "layers (and router)" if "domains" in figures else "layers"
        rows.append((f"weights of the {whole} that a token needs", needed))
    for text, name in (("left out of", "left_out"), ("zeros in", "zeros")):
        rows += [(f"{text} {map}", f"{share:.2%}") for map, share in figures.get(name, {}).items()]
    for map, found in figures.get("too_few_tokens", {}).items():
        listed = ", ".join(f"{expert} of layer {layer}" for layer, expert in found)
        rows.append((f"experts that got too few tokens, {map}", listed))
    if "widths" in figures:
        rows.append(("neurons of the layers", " ".join(map(str, figures["widths"]))))
    if "domains" in figures:
        rows.append(("neurons of an expert, and shared", f"{figures['expert_width']:,}, {figures['shared']:,}"))
        for name, shares in figures["routed"].items():
            rows.append((f"experts of {name}", " ".join(f"{share:.1%}" for share in shares)))
    rows.append(("tokens of the calibration", f"{figures['calibration_tokens']:,}"))
    cli.print_table(f"{command.out}: {command.method} at {figures['sparsity']:g}", ("figure", "value"), rows)
    if command.method in WEIGHTS:
        print("zeros are stored and multiplied like other weights: the run takes as long as the dense one")


def sparsify(command: Sparsify) -> dict[str, Any]:
    """Make the run; returns the figures that are also in its `sparsify.json`.

    Raises:
      UserError: no run there, one that is sparsified, layers that the method can't treat, flags of another method, OUT
        not empty, or too little text; nothing has been written then.
      StorageError: reading or writing failed.
    """
    from sparsezoo_jax.sharding import use_mesh

    with use_mesh(command.build_mesh()):
        return made_run(command)


def made_run(command: Sparsify) -> dict[str, Any]:
    """As `sparsify`, on the mesh that is in use."""
    from sparsezoo_jax import data, run_dir
    from sparsezoo_jax.evaluation import evaluate_corpora
    from sparsezoo_jax.evaluation.sparsified import RECORD
    from sparsezoo_jax.overrides import with_values
    from sparsezoo_jax.sharding import RULES, check_batch
    from sparsezoo_jax.sparsification import is_sparsified, making
    from sparsezoo_jax.sparsification.placement import batch_on_devices
    from sparsezoo_jax.sparsification.progress import Progress
    from sparsezoo_jax.storage import remove_tree, write_atomic
    from sparsezoo_jax.training.lora import LoRAConfig
    from sparsezoo_jax.training.parameters import save_params, saved_steps
    from sparsezoo_jax.training.state import ModelTemplate, flatten
    from sparsezoo_jax.untrusted import read_json

    plan, mesh, unfinished = planned(command), command.build_mesh(), partial_of(command.out)
    require(command.batches > 0, "--batches", command.batches, "must be above 0")
    require(command.batch_size is None or command.batch_size > 0, "--batch-size", command.batch_size, "must be above 0")
    one_device = mesh.size == 1 or command.method not in EXPERTS
    require(one_device, "--method", command.method, f"runs on one device, not on a mesh of {mesh.size}")
    occupied = command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir()))
    if occupied and not unfinished.is_dir():
        raise UserError(f"{command.out}: is not empty; name another directory")
    model, config, tokenizer = loaded(command, command.step)
    if is_sparsified(config.model):
        raise UserError(f"{command.directory}: is sparsified already; take the run that it was made of")
    plan.check(config.model)
    if tokenizer is None:
        raise UserError(f"{command.directory}: has no tokenizer, so no text can be read")

    flags = dataclasses.replace(command, dataset=command.calibration.dataset or command.dataset)
    by_domain = isinstance(plan, making.ReadMEPlan)
    corpora = plan.corpora(flags.corpus(config.data)) if by_domain else flags.corpus(config.data)
    read = data.prepare(corpora, command.calibration.split, tokenizer)
    validation = data.prepare(command.corpus(config.data), "validation", tokenizer)
    batch_size = command.batch_size or config.data.batch_size
    check_batch((batch_size, read.seq_len), mesh)
    rows = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    reader: Any = making.Domains if by_domain else partial(making.Text, rows=rows)
    text = reader(read, batch_size, command.calibration)
    if text.first_tokens() < read.seq_len:
        found = f"{text.first_tokens()} tokens, less than a sequence of {read.seq_len}"
        raise DataError(f"the text to calibrate on has {found}")

    progress = Progress()
    if command.method not in WITHOUT_PROGRESS:
        progress = Progress.open(unfinished, identity_of(command, model, config, read.fingerprint))
    if occupied:
        # Only what this command began to write may be written anew.
        if progress.value(_WRITING) is None:
            raise UserError(f"{command.out}: is not empty; name another directory")
        if (command.out / run_dir.CONFIG).is_file():
            progress.remove()
            return read_json(command.out / RECORD)
        remove_tree(command.out / run_dir.CHECKPOINTS)

    def shown(split: data.PreparedSplit) -> Any:
        return data.evaluation_batches(split, batch_size, command.batches)

    dense, _ = evaluate_corpora(model, validation, shown, to_device=batch_on_devices)
    made = plan.make(model, text, progress)
    target = made.model.config
    found, _ = evaluate_corpora(made.model, validation, shown, to_device=batch_on_devices)

    steps = saved_steps(command.directory / run_dir.CHECKPOINTS)
    figures = {
        "method": command.method,
        "sparsity": plan.share,
        "source": str(command.directory),
        "step": steps[-1] if command.step is None else command.step,
        "calibration_tokens": made.tokens,
        "batches": command.batches,
        "tokens": found.tokens,
        "loss_dense": dense.loss,
        "loss": found.loss,
        **plan.figures(made, found.stats),
    }
    params, variables = ModelTemplate(lambda rngs: type(model)(target, rngs=rngs)).split(made.model)
    progress.set_value(_WRITING, {})
    save_params(command.out / run_dir.CHECKPOINTS, flatten(params), flatten(variables), step=figures["step"])
    tokenizer.save(command.out)
    if made.calibration is not None:
        made.calibration.save(command.out / "calibration.npz")
    content = json.dumps(cli.without_nan(figures), indent=2) + "\n"
    write_atomic(command.out / RECORD, content.encode())
    # The run is one of its own: no adapters, no base, no average of checkpoints.
    changes = {"model": target, "train.lora": LoRAConfig(), "train.merge_last": 1}
    changes |= {"train.init_step": None, "train.init_from": None}
    run_dir.write_config(command.out, with_values(config, changes))  # last: what is interrupted leaves no run behind
    progress.remove()
    return figures


def partial_of(out: Path) -> Path:
    """Where what is found for the run `out` is kept until that is whole."""
    from sparsezoo_jax import storage

    out = storage.absolute(out)
    return out.with_name(f"{out.name}.partial")


def identity_of(command: Sparsify, model: Any, config: Any, text: Any) -> dict[str, Any]:
    """All that what is made depends on, by the names of flags and of other things.

    Args:
      command: its flags, but for where things are and what is only measured.
      model: that of the run.
      config: of the run.
      text: fingerprints of the corpora that are calibrated on.
    """
    import jax

    from sparsezoo_jax.models import build_model
    from sparsezoo_jax.training.checkpoint_format import describe
    from sparsezoo_jax.training.state import ModelTemplate

    names = ("directory", "out", "step", "base", "batches", "json", "batch_size", "mesh")
    own = {field.name for field in dataclasses.fields(CorpusFlags)}
    flags = {f.name: getattr(command, f.name) for f in dataclasses.fields(command) if f.name not in {*names, *own}}
    params, variables = ModelTemplate(lambda rngs: build_model(config.model, rngs)).split(model)
    arrays = json.dumps(describe({"params": params, "state": variables}), sort_keys=True)
    mesh = command.build_mesh()
    return {
        **_flat("-", flags),
        "--batch-size": command.batch_size or config.data.batch_size,
        "run": hashlib.sha256(f"{config.model!r} {arrays}".encode()).hexdigest(),
        "calibration text": text,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "device": jax.devices()[0].device_kind,
        "version of jax": jax.__version__,
    }


def _flat(prefix: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Flags of configurations as they are given, by name."""
    found = {}
    for name, value in flags.items():
        flag = f"{prefix}{'-' if prefix == '-' else '.'}{name.replace('_', '-')}"
        found |= _flat(flag, vars(value)) if dataclasses.is_dataclass(value) else {flag: value}
    return found


def loaded(command: Sparsify, step: int | None) -> Any:
    """A checkpoint of the run, as `run_dir.load` gives it."""
    from sparsezoo_jax import run_dir

    return run_dir.load(command.directory, step=step, base=command.base, mesh=command.build_mesh())


def planned(command: Sparsify) -> Any:
    """What the flags ask for, one of the plans of `sparsification.making`.

    Raises:
      ConfigError: a share out of range, or flags that the method has no use for.
    """
    from sparsezoo_jax.sparsification import making

    refuse_others(command)
    share = 0.5 if command.sparsity is None else command.sparsity
    require(0 <= share < 1, "--sparsity", share, "must be in [0, 1)")
    if command.method in WEIGHTS:
        plan = making.WeightPlan.of(command.method, command.sparsity, command.maps, command.pruning, command.pattern)
        since = command.pruning.since
        return plan if since is None else plan._replace(earlier=lambda: loaded(command, since).model)
    if command.method in NEURONS:
        return making.NeuronPlan.of(command.method, share, command.neurons, command.released)
    if command.method in EXPERTS:
        return making.ReadMEPlan(share, command.readme, command.neurons.multiple, command.released)
    require(command.dense_tokens >= 0, "--dense-tokens", command.dense_tokens, "must be at least 0")
    choices = (command.maps, command.gate, command.weighted, command.quantile)
    return making.ActivationPlan.of(
        command.method,
        share,
        command.released,
        *choices,
        command.dense_tokens,
        command.allocation,
        command.rsparse,
        command.rotate,
    )


def refuse_others(command: Sparsify) -> None:
    """Raise `ConfigError` for flags that are for other methods than the command's."""
    owners = {
        "maps": ACTIVATIONS + WEIGHTS,
        **dict.fromkeys(("weighted", "dense_tokens"), ACTIVATIONS),
        **dict.fromkeys(("gate", "quantile"), ("cats", "teal", "wina")),
        "rotate": ("teal", "wina"),
        "released": ("cats", "teal", "wina", "cfsp", "readme"),
        **dict.fromkeys((f"allocation.{name}" for name in ("kind", "step", "sequences", "last")), ("teal", "wina")),
        **dict.fromkeys((f"rsparse.{f.name}" for f in dataclasses.fields(RSparseConfig)), ("rsparse",)),
        "pattern": WEIGHTS,
        "pruning.compare": WEIGHTS,
        **dict.fromkeys(("pruning.activate", "pruning.since", "pruning.rewind"), WEIGHTS),
        "pruning.gradient_norm": ("gblm",),
        "pruning.gradient_weight": ("gblm",),
        "neurons.widths": ("cfsp", "flap"),
        "neurons.multiple": NEURONS + EXPERTS,
        "neurons.bias": NEURONS,
        "neurons.spread": ("cfsp",),
        "calibration.dataset": ACTIVATIONS + WEIGHTS + NEURONS,
        **dict.fromkeys((f"readme.{f.name}" for f in dataclasses.fields(ReadMEConfig)), EXPERTS),
    }
    for path, methods in owners.items():
        part, *rest = path.split(".")
        value, defaults = getattr(command, part), command
        if rest:
            defaults, value = type(value)(), getattr(value, rest[0])
        name = rest[0] if rest else part
        default = getattr(defaults, name) if rest else type(command).__dataclass_fields__[name].default
        flag = "--" + path.replace("_", "-")
        require(value == default or command.method in methods, flag, value, f"is for --method {', '.join(methods)}")


if __name__ == "__main__":
    cli.run(main)
