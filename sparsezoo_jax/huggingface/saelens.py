"""Autoencoders in the layout of SAELens (cfg.json and sae_weights.safetensors) to autoencoder directories and back.

Kinds are those of what a dictionary computes in use, so several of ours become one of SAELens': thresholds of
`batch_topk`, `feature_choice` and `gba` are those of a JumpReLU. Features and reconstructions stay what they were:
scales of inputs are multiplied into the matrices, because SAELens keeps none.

Source of the layout: SAELens 6 (https://decoderesearch.github.io/SAELens), whose older files are read, too.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from sparsezoo_jax import storage
from sparsezoo_jax.autoencoders import (
    GBASAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    GatedSAE,
    JumpReLUSAE,
    SAEConfig,
    SAERun,
    SAETrainConfig,
    SparseAutoencoder,
    StandardSAE,
    TopKSAE,
    load_sae,
    save_sae,
)
from sparsezoo_jax.autoencoders.config import TRANSCODER, Site
from sparsezoo_jax.autoencoders.model import transcodes, unit_rows
from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.huggingface.conversion import read_object, require_empty
from sparsezoo_jax.huggingface.tensors import library, open_file, write_tensors
from sparsezoo_jax.untrusted import MAX_SIZE, printable

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: The layout that is written; without a version of 6 or later SAELens takes files for those of an older one.
LAYOUT = "6.0.0"

Tensors = dict[str, np.ndarray]


class Converted(NamedTuple):
    """What a conversion made."""

    kind: str
    """Ours, of a directory of ours, or the architecture of SAELens."""
    width: int
    features: int


#: Names of TransformerLens for what our sites are; `{}` is the number of the layer, from 0.
_HOOKS: dict[str, str] = {
    "residual": "blocks.{}.hook_resid_post",
    "ffn_output": "blocks.{}.hook_mlp_out",
    "ffn_gate": "blocks.{}.mlp.hook_post",
    TRANSCODER: "blocks.{}.ln2.hook_normalized",
}
#: Others that are read, and what has to be added to the number for ours.
_READ_HOOKS: dict[str, tuple[Site, int]] = {
    "hook_resid_post": ("residual", 1),
    "hook_resid_pre": ("residual", 0),
    "hook_mlp_out": ("ffn_output", 1),
    "mlp.hook_post": ("ffn_gate", 1),
}


# ---------------------------------------------------------------------------------------------------------------- out


def to_saelens(directory: Path, destination: Path) -> Converted:
    """Write an autoencoder of ours in SAELens' layout.

    Args:
      directory: as `save_sae` made it.
      destination: empty or absent; gets cfg.json and sae_weights.safetensors, float32.

    Raises:
      UserError: no autoencoder there, one that SAELens has no architecture for, or `destination` is not empty; nothing
        is written then.
      StorageError: reading or writing failed.
    """
    library()
    require_empty(destination)
    autoencoder, run = load_sae(directory)
    config, tensors = exported(autoencoder, run)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        described = {name: (value.shape, value.dtype) for name, value in tensors.items()}
        write_tensors(
            destination, described, tensors.__getitem__, sum(x.nbytes for x in tensors.values()), single=WEIGHTS
        )
        storage.write_atomic(destination / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise StorageError(f"{destination}: {error.strerror}") from error
    return Converted(config["architecture"], config["d_in"], config["d_sae"])


def exported(autoencoder: SparseAutoencoder, run: SAERun) -> tuple[dict[str, Any], Tensors]:
    """What cfg.json and sae_weights.safetensors of an autoencoder hold.

    Raises:
      UserError: SAELens has no architecture for it.
    """
    sae, state = autoencoder.config, autoencoder.state
    params = {name: np.asarray(value, np.float32) for name, value in autoencoder.params.items()}
    transcoder = transcodes(state)
    architecture, tensors, more = _computed(sae, params, state)
    if transcoder:
        names = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
        if architecture not in names:
            raise UserError(f"sae.kind={sae.kind}: SAELens has no transcoder of this kind")
        architecture = names[architecture]
        if "w_skip_DD" in params:
            architecture = architecture.replace("transcoder", "skip_transcoder")
            tensors["W_skip"] = params["w_skip_DD"].T
    width, features = tensors["W_enc"].shape
    read, made, rescaling = _scales(sae, state, width)
    tensors["W_enc"] = tensors["W_enc"] / read
    for name in ("W_dec", "b_dec"):
        tensors[name] = tensors[name] * made
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"] * (made / read)
    hooks = {"hook_name": _HOOKS[run.train.site].format((run.train.layer or 1) - 1)}
    if transcoder:
        hooks["hook_name_out"] = _HOOKS["ffn_output"].format((run.train.layer or 1) - 1)
        more["d_out"] = tensors["W_dec"].shape[1]
    config = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcoder,
        "normalize_activations": rescaling,
        "reshape_activations": "none",
        **more,
        "metadata": {"sae_lens_version": LAYOUT, "model_name": run.source, **hooks},
    }
    return config, {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def _computed(sae: SAEConfig, params: Tensors, state: Any) -> tuple[str, Tensors, dict[str, Any]]:
    """Architecture, tensors for inputs as the autoencoder sees them, and further fields."""
    decoder = {"W_dec": params["w_dec_FD"], "b_dec": params["b_dec_D"]}
    if isinstance(sae, GBASAE):
        rows_FD, bias_F = (
            np.asarray(unit_rows(jnp.asarray(params["w_dec_FD"]))),
            np.asarray(state["bias_F"], np.float32),
        )
        tensors = {**decoder, "W_dec": params["scale_F"][:, None] * rows_FD, "W_enc": rows_FD.T}
        if sae.activation == "relu":
            return "standard", {**tensors, "b_enc": bias_F}, {}
        return "jumprelu", {**tensors, "b_enc": np.zeros_like(bias_F), "threshold": -bias_F}, {}
    if isinstance(sae, TopKSAE):
        encoder = params.get("w_enc_DF", params["w_dec_FD"].T)
        bias_F = params.get("b_enc_F", np.zeros(sae.features, np.float32))
        tensors = {
            **decoder,
            "W_dec": params["w_dec_FD"] * np.float32(sae.output_scale),
            "W_enc": encoder,
            "b_enc": bias_F,
        }
        return "topk", tensors, {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    tensors = {**decoder, "W_enc": params["w_enc_DF"]}
    if isinstance(sae, GatedSAE):
        return "gated", {**tensors, **{name: params[f"{name}_F"] for name in ("b_gate", "b_mag", "r_mag")}}, {}
    tensors["b_enc"] = params["b_enc_F"]
    if isinstance(sae, StandardSAE):
        return "standard", tensors, {}
    if isinstance(sae, JumpReLUSAE):
        return "jumprelu", {**tensors, "threshold": params["threshold_F"]}, {}
    assert isinstance(sae, BatchTopKSAE | FeatureChoiceSAE)
    return "jumprelu", {**tensors, "threshold": np.asarray(state["threshold_F"], np.float32)}, {}


def _scales(sae: SAEConfig, state: Any, width: int) -> tuple[float, float, str]:
    """What divides inputs, what multiplies outputs, and the rescaling that SAELens does itself."""
    if sae.normalisation == "none":
        return 1.0, 1.0, "none"
    if sae.normalisation == "token":  # there to a norm of sqrt(D), not of 1
        return math.sqrt(width), math.sqrt(width), "constant_norm_rescale"
    read = float(state["input_scale"])
    return read, float(state["target_scale"]) if transcodes(state) else read, "none"


# ----------------------------------------------------------------------------------------------------------------- in


def from_saelens(source: Path, directory: Path, *, layer: int | None = None, site: Site | None = None) -> Converted:
    """Make an autoencoder directory of ours of one in SAELens' layout.

    Args:
      source: holds cfg.json and sae_weights.safetensors.
      directory: empty or absent.
      layer: from 1, and `site`: where it reads; None: as the file's hook_name says.

    Raises:
      UserError: an architecture, setting or hook that is not read, tensors that are missing, unexpected, of the wrong
        shape or not finite, or `directory` is not empty; nothing is written then.
      StorageError: reading or writing failed.
    """
    library()
    require_empty(directory)
    fields, place = described(source / CONFIG, layer, site)
    shapes = _shapes(fields)
    with open_file(source / WEIGHTS) as files:
        names = set(files.shapes)
        if "scaling_factor" in names - shapes.keys():  # older files have one of ones
            factor = files.read("scaling_factor").astype(np.float32)
            if not np.allclose(factor, 1):
                raise UserError(f"{source / WEIGHTS}: scaling_factor is not 1, which is not read")
            names.remove("scaling_factor")
        faults = [f"{name} is missing" for name in sorted(shapes.keys() - names)]
        faults += [f"{printable(name)} is unexpected" for name in sorted(names - shapes.keys())]
        for name in sorted(names & shapes.keys()):
            if files.shapes[name] != shapes[name]:
                faults.append(f"{name} is {files.shapes[name]}, not {shapes[name]}")
            elif files.dtypes[name] not in ("F64", "F32", "F16", "BF16"):
                faults.append(f"{name} is of type {files.dtypes[name]}")
        if faults:
            raise UserError(f"{source / WEIGHTS}: {'; '.join(faults[:20])}")
        tensors = {name: files.read(name).astype(np.float32) for name in shapes}
    if bad := [name for name, value in tensors.items() if not np.isfinite(value).all()]:
        raise UserError(f"{source / WEIGHTS}: {', '.join(bad)}: values that are not finite (NaN or infinite)")
    autoencoder = imported(fields, tensors)
    run = SAERun(
        source=str(fields["metadata"].get("model_name") or source), step=None, sae=autoencoder.config, train=place
    )
    save_sae(directory, run, autoencoder)
    return Converted(autoencoder.config.kind, fields["d_in"], fields["d_sae"])


def described(path: Path, layer: int | None = None, site: Site | None = None) -> tuple[dict[str, Any], SAETrainConfig]:
    """The checked fields of a cfg.json, in the current layout, and where it reads; see `from_saelens`.

    Raises:
      UserError: something that is not read. StorageError: the file can't be read.
    """
    fields = _current(read_object(path), path)
    _check_settings(fields, path)
    return fields, _place(fields, layer, site, path)


def imported(fields: dict[str, Any], tensors: Tensors) -> SparseAutoencoder:
    """An autoencoder of ours that gives the same features and the same reconstructions.

    Args:
      fields: of cfg.json, in the current layout and checked.
      tensors: float32, of the shapes that they imply.
    """
    architecture, transcoder = fields["architecture"], "transcoder" in fields["architecture"]
    x = dict(tensors)
    if fields.get("rescale_acts_by_decoder_norm"):
        norm_F = np.linalg.norm(x["W_dec"], axis=-1)
        x |= {"W_enc": x["W_enc"] * norm_F, "b_enc": x["b_enc"] * norm_F, "W_dec": x["W_dec"] / norm_F[:, None]}
    if not transcoder and not fields.get("apply_b_dec_to_input", True):
        # Ours are centred: what that takes off, the biases give back.
        shift_F = x["b_dec"] @ x["W_enc"]
        factors = {"b_enc": 1.0, "b_gate": 1.0, "b_mag": np.exp(x["r_mag"]) if "r_mag" in x else 1.0}
        x |= {name: x[name] + factor * shift_F for name, factor in factors.items() if name in x}
    token = fields["normalize_activations"] == "constant_norm_rescale"
    if token:
        root = np.float32(math.sqrt(fields["d_in"]))
        x |= {"W_enc": x["W_enc"] * root, "W_dec": x["W_dec"] / root, "b_dec": x["b_dec"] / root}
    common: dict[str, Any] = {"features": fields["d_sae"], "normalisation": "token" if token else "none"}
    params = {"w_dec_FD": x["W_dec"], "b_dec_D": x["b_dec"], "w_enc_DF": x["W_enc"]}
    if "W_skip" in x:
        params["w_skip_DD"] = x["W_skip"].T
    if architecture == "gated":
        config: SAEConfig = GatedSAE(**common)
        params |= {f"{name}_F": x[name] for name in ("b_gate", "b_mag", "r_mag")}
    else:
        params["b_enc_F"] = x["b_enc"]
        if architecture == "topk":
            config = TopKSAE(k=fields["k"], **common)
        elif "threshold" in x:
            config = JumpReLUSAE(**common)
            # What a threshold below 0 lets through, a ReLU there takes away.
            params["threshold_F"] = np.maximum(x["threshold"], 0)
        else:
            config = StandardSAE(**common)
    one = jnp.float32(1)
    state = {"input_scale": one} | ({"target_scale": one} if transcoder else {})
    return SparseAutoencoder(config, {name: jnp.asarray(value) for name, value in params.items()}, state)


def _current(fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields in the current layout; those before version 6 had other names, and metadata among the rest."""
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: metadata: must be an object")
    version = str(metadata.get("sae_lens_version") or fields.get("sae_lens_version") or "0")
    if version.split(".", 1)[0].isdecimal() and int(version.split(".", 1)[0]) >= 6:
        return {**fields, "metadata": metadata}
    names = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    old = {names.get(name, name): value for name, value in fields.items()}
    activation = old.pop("activation_fn", "relu")
    old.setdefault("architecture", "standard")
    if activation == "topk":
        options = old.get("activation_fn_kwargs")
        old |= {"architecture": "topk", "k": options.get("k") if isinstance(options, dict) else None}
    elif activation != "relu":
        raise UserError(f"{path}: activation_fn={printable(activation)}: must be relu or topk")
    if old.get("finetuning_scaling_factor"):
        raise UserError(f"{path}: finetuning_scaling_factor={printable(old['finetuning_scaling_factor'])}: is not read")
    rescaling = old.get("normalize_activations") or "none"
    old["normalize_activations"] = "expected_average_only_in" if rescaling is True else rescaling
    hook = str(old.get("hook_name", ""))
    old.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    return old | {"metadata": {"model_name": old.get("model_name"), "hook_name": hook}}


#: Architectures that are read, and their tensors beside W_enc, W_dec and b_dec.
_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc", "W_skip"),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"),
}


def _check_settings(fields: dict[str, Any], path: Path) -> None:
    def check(name: str, met: bool, allowed: str) -> None:
        if not met:
            raise UserError(f"{path}: {name}={printable(fields.get(name))}: {allowed}")

    architecture = fields.get("architecture")
    known = isinstance(architecture, str) and architecture in _ARCHITECTURES
    check("architecture", known, f"must be one of {', '.join(_ARCHITECTURES)}")
    transcoder = "transcoder" in str(architecture)
    # The expected average is folded into the weights when SAELens stores them.
    rescalings = ["none", "expected_average_only_in", *([] if transcoder else ["constant_norm_rescale"])]
    fields.setdefault("normalize_activations", "none")
    check(
        "normalize_activations",
        fields["normalize_activations"] in rescalings,
        f"must be one of {', '.join(rescalings)}",
    )
    check("reshape_activations", fields.get("reshape_activations", "none") == "none", "must be none")
    for name in ("d_in", "d_sae"):
        check(name, _whole(fields.get(name)), f"must be a whole number from 1 to {MAX_SIZE}")
    if transcoder:
        check(
            "d_out", fields.get("d_out") == fields["d_in"], f"must be d_in={fields['d_in']}, the width of an FFN here"
        )
    if architecture == "topk":
        allowed = f"must be a whole number from 1 to d_sae={fields['d_sae']}"
        k = fields.get("k")
        check("k", _whole(k) and k <= fields["d_sae"], allowed)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE


def _shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, features = fields["d_in"], fields["d_sae"]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (width, features), "W_dec": (features, width), "b_dec": (width,)}
    for name in _ARCHITECTURES[fields["architecture"]]:
        shapes[name] = (width, width) if name == "W_skip" else (features,)
    return shapes


def _place(fields: dict[str, Any], layer: int | None, site: Site | None, path: Path) -> SAETrainConfig:
    """Where it reads; of its training nothing is known."""
    transcoder = "transcoder" in fields["architecture"]
    hook = str(fields["metadata"].get("hook_name"))
    found = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", hook)
    if found is not None:
        number, name = int(found[1]), found[2]
        known: tuple[Site, int] | None = ("transcoder", 1) if transcoder else _READ_HOOKS.get(name)
        if known is not None and number + known[1] > 0:
            site, layer = site or known[0], layer or number + known[1]
    if transcoder:
        site = site or "transcoder"
    if layer is None or site is None:
        raise UserError(f"{path}: metadata.hook_name={printable(hook)}: is not read; name its --layer and --site")
    if transcoder != (site == TRANSCODER):
        raise UserError(
            f"--site={site}: must be {'transcoder' if transcoder else 'another'} for {fields['architecture']}"
        )
    return SAETrainConfig(layer=layer, site=site, skip="W_skip" in _ARCHITECTURES[fields["architecture"]])
