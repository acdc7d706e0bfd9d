"""A Hugging Face checkpoint to a run directory and back: one loop over the rows of a layout's table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsezoo_jax import storage
from sparsezoo_jax.config import RunConfig, read_config
from sparsezoo_jax.data import Tokenizer, find_tokenizer
from sparsezoo_jax.data.config import DataConfig
from sparsezoo_jax.data.tiktoken_files import TokenizerFamily
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.huggingface.layouts import (
    SPARSEZOO,
    Entry,
    Layout,
    layout_of,
    read_model,
    write_model,
    written_for_transformers,
)
from sparsezoo_jax.huggingface.model_card import CARD, Written, model_card
from sparsezoo_jax.huggingface.remote_code import remote_files
from sparsezoo_jax.huggingface.tensors import TensorFiles, library, open_tensors, write_tensors
from sparsezoo_jax.huggingface.tokenizer_files import complete_tokenizer, copy_tokenizer, token_ids
from sparsezoo_jax.models import Decoder, DecoderConfig
from sparsezoo_jax.run_dir import CHECKPOINTS, CONFIG, stored_parameters, write_config
from sparsezoo_jax.training.parameters import save_params, saved_steps
from sparsezoo_jax.training.state import ModelTemplate, initial_variables
from sparsezoo_jax.untrusted import printable, read_json

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
MAX_LISTED = 20
MAX_FILE_BYTES = 5 * 10**9
ALIGNMENT = 8
"""Bytes that divide where an array begins in a file of several types."""
Arrays = Mapping[str, jax.ShapeDtypeStruct]
"""Shape and type of arrays by path."""


class Conversion(NamedTuple):
    """What a conversion made."""

    model_type: str
    """Hugging Face's name of the architecture."""
    parameters: int
    """Number of parameters."""
    dtype: str
    """Their type."""
    tokenizer: bool
    """Whether a tokenizer came along."""
    notes: tuple[str, ...] = ()
    """What a user should know."""


class Place(NamedTuple):
    """Where one tensor lives: the parameters it holds, and their index in the stacks of layers and experts."""

    entry: Entry
    name: str
    paths: tuple[str, ...]
    index: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the parameters, without the stacks."""
    experts: int
    """Of one layer; 1 where there are none."""


def from_hf(
    source: Path, directory: Path, *, not_finite: bool = False, tokenizer_family: TokenizerFamily | None = None
) -> Conversion:
    """Make a run directory, with one checkpoint at step 0, of a checkpoint in Hugging Face's layout.

    Args:
      source: holds config.json, model.safetensors or pytorch_model.bin (or shards and their index), and tokenizer
        files if there are any.
      directory: empty or absent.
      not_finite: take weights that are NaN or infinite, too.
      tokenizer_family: of a rank file of tiktoken, as in `load_tokenizer`; such a tokenizer becomes a tokenizer.json.

    Raises:
      UserError: weights that are not finite; a model that is not supported, or tensors that are missing, unexpected or
        of the wrong shape or type, all in one message; `directory` is not empty; safetensors (or torch, for its files)
        is not installed. Nothing is written then.
      StorageError: reading or writing failed.
    """
    library()
    if not source.is_dir():
        raise UserError(
            f"{source}: no such directory; download the checkpoint first (hf download NAME --local-dir DIR)"
        )
    require_empty(directory)
    values = read_object(source / "config.json")
    quantized = values.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{source}: is quantized by {printable(method)}, which is not read; take it in bfloat16 or float32"
        )
    with contextlib.ExitStack() as stack:
        opened = functools.cache(lambda: stack.enter_context(open_tensors(source)))
        completed = layout_of(values, source / "config.json").completed
        if completed is not None:
            values = completed(values, opened().shapes)
        layout, model = read_model(values, source / "config.json")
        tokenizer = find_tokenizer(source, tokenizer_family)
        _check_vocabulary(source, tokenizer, model)
        files = opened()
        (parameters, variables), layout = _shapes(model), layout.named_as(files.shapes)
        found = list(places(layout, model, {**parameters, **variables}))
        names, dtype, notes = _check(source, layout, model, files, found, parameters)
        model = dataclasses.replace(model, param_dtype=dtype, dtype="bfloat16" if dtype == "bfloat16" else "float32")
        config = RunConfig(
            arch=layout.arch,
            size=f"{layout.model_type}_hf",
            model=model,
            train=layout.train(model),
            data=DataConfig(tokenizer=str(directory.absolute()), seq_len=min(DataConfig().seq_len, model.max_seq_len)),
        )

        def read(name: str) -> np.ndarray:
            values = files.read(name)
            if not not_finite and not np.isfinite(values.astype(np.float32, copy=False)).all():
                raise UserError(
                    f"{source}: {printable(name)} has values that are not finite (NaN or infinite); --not-finite takes "
                    "them all the same"
                )
            return values

        # Writing a checkpoint makes a copy in memory. That is to be the only one, so the arrays wait in a file.
        parts = (
            (path, place.index, part)
            for place in found
            for path, part in zip(place.paths, to_ours(place.entry, read(names[place.name]), place.shapes), strict=True)
        )
        held = _described(found, parameters, variables, dtype)
        with _mapped(directory, held, parts) as arrays:
            state = {path: arrays.get(path, initial) for path, initial in _variables(model).items()}
            save_params(directory / CHECKPOINTS, {path: arrays[path] for path in parameters}, state)
    copy_tokenizer(source, directory, tokenizer)
    write_config(directory, config)  # last: an interrupted conversion leaves no run behind
    count = sum(math.prod(shape) for shape in parameters.values())
    return Conversion(layout.model_type, count, dtype, tokenizer is not None, notes)


def to_hf(
    directory: Path,
    destination: Path,
    *,
    released: bool = False,
    name: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Conversion:
    """Write a run, as `run_dir.load` takes it, in Hugging Face's layout.

    Args:
      directory: a run directory.
      destination: empty or absent; gets config.json, model.safetensors, generation_config.json, the run's tokenizer, a
        model card and, for models that transformers has no class for, Python files.
      released: write the layout of the family's released checkpoints, also where transformers lacks their classes.
      name: OWNER/NAME on the hub, for the model card.
      max_file_bytes: a checkpoint larger than this is written in several files and an index.

    Raises:
      UserError: no run there; a kind that has no PyTorch form; with `released` a model that no released layout can
        hold, all that differs in one message; `destination` is not empty; safetensors is not installed. Nothing is
        written then.
      StorageError: reading or writing failed.
    """
    library()
    require_empty(destination)
    config = read_config(directory / CONFIG)
    model = config.model
    if model.images.patch is not None:
        raise UserError(f"{directory}: a model of images, for which there is no layout")
    layout, values = (write_model if released else written_for_transformers)(model, directory)
    own = layout.model_type == SPARSEZOO.model_type
    code = remote_files(model, directory) if own else {}
    step, notes = _step_of(directory, model, own=own), ()
    if own:
        values["arch"] = config.arch
        notes = ("modules of multi-token prediction are left out: only training uses them",) * (model.mtp_layers > 0)
    tokenizer = find_tokenizer(directory)
    saved, variables = _shapes(model)
    # What transformers runs: no filling of the vocabulary, and in our own layout nothing that only training uses.
    plain = dataclasses.replace(model, vocab_multiple=1, mtp_layers=0 if own else model.mtp_layers)
    parameters, _ = _shapes(plain)
    found = {place.name: place for place in places(layout, plain, {**parameters, **variables})}
    held = _described(found.values(), parameters, variables, model.param_dtype)
    tensors = {name: (tensor_shape(place), held[place.paths[0]].dtype) for name, place in found.items()}
    homeless = sorted(parameters.keys() - {path for place in found.values() for path in place.paths})
    if homeless:
        raise UserError(f"{directory}: {_listed(homeless)}: have no place in a {layout.architecture} checkpoint")
    values |= {"torch_dtype": model.param_dtype, **token_ids(tokenizer)}
    count = sum(math.prod(shape) for shape in parameters.values())
    loads = own or not layout.needs_code
    written = Written(layout.model_type, count, model.param_dtype, own, tokenizer is not None, loads)
    card = model_card(directory, config, step, written, name)
    parts = _saved(directory, config, {**saved, **variables}, held)
    with _mapped(destination, held, parts) as arrays:

        def value_of(name: str) -> np.ndarray:
            place = found[name]
            return to_tensor(place.entry, [arrays[path][place.index] for path in place.paths])

        try:
            destination.mkdir(parents=True, exist_ok=True)
            write_tensors(destination, tensors, value_of, max_file_bytes)
            copy_tokenizer(directory, destination, tokenizer)
            complete_tokenizer(directory, destination, tokenizer, model.max_seq_len)
            for file, text in {**code, CARD: card, CONFIG: json.dumps(values, indent=2) + "\n"}.items():
                storage.write_atomic(destination / file, text.encode())
        except OSError as error:
            raise StorageError(f"{destination}: {error.strerror}") from error
    return Conversion(layout.model_type, count, model.param_dtype, tokenizer is not None, notes)


def _step_of(directory: Path, model: DecoderConfig, *, own: bool) -> int:
    """The newest checkpoint's step, at which a warm-up of routed widths must be over where nothing says so but it."""
    steps = saved_steps(directory / CHECKPOINTS)
    step, warmup = steps[-1] if steps else 0, getattr(model.residual, "warmup_steps", 0)
    if own and step < warmup:
        allowed = f"must be over, but the newest checkpoint is of step {step}"
        raise UserError(f"{directory}: model.residual.warmup_steps={warmup}: {allowed}")
    return step


def _saved(
    directory: Path, config: RunConfig, shapes: Mapping[str, tuple[int, ...]], wanted: Arrays
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """The wanted arrays of a run's newest checkpoint as parts of arrays; they are to be those of its configuration.

    Of each the first entries in the `wanted` shape: a padded vocabulary loses its padding.
    """
    seen = set()
    for path, array in stored_parameters(directory, config, state=wanted):
        if array.shape != shapes.get(path):
            raise UserError(f"{directory}: {path} is {array.shape} in the checkpoint, {shapes.get(path)} by {CONFIG}")
        seen.add(path)
        if path in wanted:
            yield path, (), array[tuple(slice(size) for size in wanted[path].shape)]
    if missing := wanted.keys() - seen:
        raise UserError(f"{directory}: the checkpoint lacks {', '.join(sorted(missing))}")


@contextlib.contextmanager
def _mapped(
    beside: Path, held: Arrays, parts: Iterable[tuple[str, tuple[int, ...], np.ndarray]]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Arrays in an unnamed file, made from their parts: path, first indices, values.

    The file is on the disk of `beside`, or in the temporary directory if that is in an object store.
    """
    directory = Path(tempfile.gettempdir()) if storage.is_object(beside) else beside.absolute().parent
    sizes = [-(-array.dtype.itemsize * array.size // ALIGNMENT) * ALIGNMENT for array in held.values()]
    offsets = dict(zip(held, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115, closed below
    except OSError as error:
        raise StorageError(f"{directory}: {error.strerror}") from error
    with file:
        try:
            for path, index, part in parts:
                shape, dtype = held[path].shape, held[path].dtype
                before = int(np.ravel_multi_index(index, shape[: len(index)])) if index else 0
                file.seek(offsets[path] + before * part.size * dtype.itemsize)
                file.write(np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data)
            file.flush()
            arrays = {path: np.memmap(file, x.dtype, "r", offsets[path], x.shape) for path, x in held.items()}
        except OSError as error:
            raise StorageError(f"{directory}: {error.strerror}") from error
        yield arrays


def places(layout: Layout, model: DecoderConfig, parameters: Mapping[str, tuple[int, ...]]) -> Iterator[Place]:
    """Every tensor of a checkpoint, from the rows of its layout; `parameters` are our stacked shapes by path.

    The layers of modules of multi-token prediction are numbered on from the decoder's.
    """
    layers: list[tuple[str, tuple[int, ...]]] = [
        (f"segments/{s}/blocks/{position}/", (repeat,))
        for s, segment in enumerate(model.segments())
        for repeat in range(segment.repeats)
        for position in range(len(segment.period))
    ]
    modules = [f"mtp/{i}/" for i in range(model.mtp_layers)]
    layers += [(f"{module}segment/blocks/0/", (0,)) for module in modules]
    experts = getattr(model.ffn, "experts", 1)
    for entry in layout.entries:
        homes: list[tuple[str, tuple[int, ...]]] = [("", ())]
        if "{layer}" in entry.name:
            homes = layers
        elif "{module}" in entry.name:
            homes = [(module, ()) for module in modules]
        for number, (prefix, index) in enumerate(homes):
            paths = tuple(prefix + path for path in entry.paths)
            if not all(path in parameters for path in paths):
                continue
            numbers = {"layer": number, "module": model.layers + number}
            shapes = tuple(parameters[path][len(index) :] for path in paths)
            if "{expert}" not in entry.name:
                yield Place(entry, entry.name.format(**numbers), paths, index, shapes, experts)
                continue
            for expert in range(shapes[0][0]):
                name = entry.name.format(**numbers, expert=expert)
                yield Place(entry, name, paths, (*index, expert), tuple(shape[1:] for shape in shapes), experts)


def matrix_shape(entry: Entry, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape [in, out] (or [n]) of a parameter of this shape once heads are joined."""
    inputs, outputs = math.prod(shape[: entry.inputs]), math.prod(shape[entry.inputs :])
    return (inputs, outputs) if entry.inputs else (outputs,)


def tensor_shape(place: Place) -> tuple[int, ...]:
    """The shape of a tensor in a checkpoint."""
    if place.entry.whole:
        return place.shapes[0]
    matrices = [matrix_shape(place.entry, shape) for shape in place.shapes]
    joined = (*matrices[0][:-1], sum(shape[-1] for shape in matrices))
    shape, axis = joined[::-1] if place.entry.transposed else joined, place.entry.expert_axis
    if axis is None:
        return shape
    return place.experts, *(n // place.experts if i == axis else n for i, n in enumerate(shape))


def to_ours(entry: Entry, tensor: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The parameters of these shapes that a tensor holds."""
    if entry.whole:
        return [tensor]
    if entry.expert_axis is not None:
        tensor = np.concatenate(tensor, axis=entry.expert_axis)
    joined = tensor.T if entry.transposed else tensor
    ends = np.cumsum([matrix_shape(entry, shape)[-1] for shape in shapes])[:-1]
    parts = [part.reshape(shape) for part, shape in zip(np.split(joined, ends, axis=-1), shapes, strict=True)]
    return [_reordered(part, entry.rotated, columns=2) for part in parts] if entry.rotated else parts


def to_tensor(entry: Entry, parameters: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `to_ours`."""
    if entry.whole:
        return parameters[0]
    if entry.rotated:
        parameters = [_reordered(x, entry.rotated, columns=entry.rotated // 2) for x in parameters]
    matrices = [x.reshape(matrix_shape(entry, x.shape)) for x in parameters]
    joined = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=-1)
    return joined.T if entry.transposed else joined


def _reordered(x: np.ndarray, rotated: int, *, columns: int) -> np.ndarray:
    """`x` with the last `rotated` entries of its last dimension read as rows of so many columns, and these in turn."""
    kept, turned = np.split(x, [x.shape[-1] - rotated], axis=-1)
    turned = turned.reshape(*x.shape[:-1], rotated // columns, columns).swapaxes(-1, -2)
    return np.concatenate([kept, turned.reshape(*x.shape[:-1], rotated)], axis=-1)


def _shapes(model: DecoderConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of parameters and of other variables by path."""
    template = ModelTemplate(lambda rngs: Decoder(model, rngs=rngs))
    parts = (template.parameters, template.variables)
    parameters, variables = ({path: variable.shape for path, variable in part.items()} for part in parts)
    return parameters, variables


def _described(
    found: Iterable[Place],
    parameters: Mapping[str, tuple[int, ...]],
    variables: Mapping[str, tuple[int, ...]],
    dtype: str,
) -> dict[str, jax.ShapeDtypeStruct]:
    """All parameters, and those variables that have a place in a checkpoint, which are float32 on both sides."""
    stored = {path: variables[path] for place in found for path in place.paths if path in variables}
    parts = ((parameters, jnp.dtype(dtype)), (stored, jnp.dtype("float32")))
    return {path: jax.ShapeDtypeStruct(shape, kind) for part, kind in parts for path, shape in part.items()}


def _variables(model: DecoderConfig) -> dict[str, Any]:
    """What a checkpoint does not have of a model, as it is before training (counts of silent steps, for example)."""

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(model, rngs=rngs)

    template = ModelTemplate(build)
    return initial_variables(template, build) if template.variables else {}


def _check(
    source: Path,
    layout: Layout,
    model: DecoderConfig,
    files: TensorFiles,
    wanted: Sequence[Place],
    parameters: Collection[str],
) -> tuple[dict[str, str], Any, tuple[str, ...]]:
    """Match the files' tensors with those wanted: names in the files by the layout's names, parameter type, notes."""
    stored: dict[str, str] = {}
    unexpected = []
    keys = {layout.key(place.name) for place in wanted}
    for name in files.shapes:
        key = layout.key(name)
        if key in keys and key not in stored:
            stored[key] = name
        elif not layout.is_ignored(key, tied=model.tie_embeddings):
            unexpected.append(name)
    names = {place.name: stored[layout.key(place.name)] for place in wanted if layout.key(place.name) in stored}
    shapes = [
        f"{names[place.name]} is {list(files.shapes[names[place.name]])}, must be {list(tensor_shape(place))}"
        for place in wanted
        if place.name in names and files.shapes[names[place.name]] != tensor_shape(place)
    ]
    types = [f"{name} is {files.dtypes[name]}" for name in names.values() if files.dtypes[name] not in DTYPES]
    problems = {
        "missing": [place.name for place in wanted if place.name not in names],
        "unexpected": unexpected,
        "wrong shape": shapes,
        f"wrong type (must be {', '.join(DTYPES)})": types,
    }
    found = [f"{kind}: {_listed(items)}" for kind, items in problems.items() if items]
    if model.tie_embeddings and (untied := _untied_head(layout, files, names)):
        found.append(untied)
    if found:
        raise UserError(f"{source}: tensors do not fit its config.json: {'; '.join(found)}")
    typed = [names[place.name] for place in wanted if place.paths[0] in parameters]
    dtypes, notes = sorted({DTYPES[files.dtypes[name]] for name in typed}), layout.notes(files.shapes)
    if dtypes in (["float32"], ["bfloat16"]):
        return names, dtypes[0], notes
    return names, "float32", (*notes, f"tensors are {' and '.join(dtypes)}: parameters are stored as float32")


def _untied_head(layout: Layout, files: TensorFiles, names: Mapping[str, str]) -> str | None:
    """What is wrong with a head that is stored although the embedding takes its place; None if they are equal."""
    head = next((name for name in files.shapes if layout.key(name) == "lm_head.weight"), None)
    embedding = next((names[e.name] for e in layout.entries if e.paths == ("embedding_VD",) and e.name in names), None)
    if head is None or embedding is None:
        return None
    equal = files.shapes[head] == files.shapes[embedding] and np.array_equal(files.read(head), files.read(embedding))
    return None if equal else f"{head} is not {embedding}, though tie_word_embeddings says so"


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


def _check_vocabulary(source: Path, tokenizer: Tokenizer | None, model: DecoderConfig) -> None:
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source}: vocab_size={model.vocab_size}: must be at least the tokenizer's {tokenizer.vocab_size}"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file.

    Raises:
      UserError: there is none, or it holds something else. StorageError: it can't be read.
    """
    try:
        values = read_json(path, finite=True)
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no checkpoint here ({path.name} is missing)") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return values


def require_empty(directory: Path) -> None:
    """Raise `UserError` unless `directory` is empty or absent."""
    try:
        entries = sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []
    except StorageError:  # of a store
        raise
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; name a directory") from None
    if entries:
        raise UserError(f"{directory}: is not empty ({', '.join(entries[:4])}); name another directory")
