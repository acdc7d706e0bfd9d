"""Uploading a checkpoint to the Hugging Face hub with the user's own login."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsezoo_jax.errors import StorageError, UserError, require
from sparsezoo_jax.untrusted import printable

#: Files of an earlier upload that go when this one does not have them: shards of another number.
REPLACED = ["*.safetensors", "*.safetensors.index.json"]


def check(name: str) -> None:
    """Check that `name` can be a repository and that somebody is logged in, before any work is done.

    Raises:
      UserError: not OWNER/NAME, huggingface_hub is not installed, or nobody is logged in.
      StorageError: the hub can't be reached.
    """
    hub = _library()
    owner, _, rest = name.partition("/")
    try:
        hub.utils.validate_repo_id(name)
        valid = bool(owner and rest)
    except hub.utils.HFValidationError:
        valid = False
    require(valid, "--push", printable(name), "must be OWNER/NAME of letters, digits, '-', '_' and '.'")
    _call(name, lambda: hub.HfApi().whoami())


def push(directory: Path, name: str, *, public: bool) -> str:
    """Upload a checkpoint; returns its address.

    A repository that does not exist is made, private unless `public`. One that does exist stays as private as it is;
    what it held remains in its history.

    Raises:
      UserError, StorageError: as `check`, or the hub refuses.
    """
    api = _library().HfApi()
    made = _call(name, lambda: api.create_repo(name, private=not public, exist_ok=True))
    _call(name, lambda: api.upload_folder(repo_id=name, folder_path=directory, delete_patterns=REPLACED))
    return str(made)


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UserError("huggingface_hub is not installed: pip install -e '.[hf]'") from None
    return huggingface_hub


def _call(name: str, ask: Any) -> Any:
    """What the hub answers; its faults in one line."""
    errors = _library().errors
    try:
        return ask()
    except errors.LocalTokenNotFoundError:
        raise UserError(f"--push={name}: nobody is logged in to the hub; run: hf auth login") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"--push={name}: HF_HUB_OFFLINE is set, so nothing can be uploaded") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise UserError(f"--push={name}: the hub does not know this login; run: hf auth login") from None
        said = printable(error.server_message or "no reason given", limit=300)
        raise UserError(f"--push={name}: the hub refuses, {status}: {said}") from None
    except Exception as error:  # of the HTTP library, which is not the same one in all versions
        said = printable(" ".join(str(error).split()) or type(error).__name__, limit=300)
        raise StorageError(f"--push={name}: the hub can't be reached: {said}") from None
