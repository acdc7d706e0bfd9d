"""Compiled programs that are kept between commands, so that one with the same shapes need not compile again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sparsezoo_jax.data.config import DataConfig, local_cache
from sparsezoo_jax.errors import ConfigError, SparsezooWarning

#: Flag of every command that keeps and takes no programs.
FLAG = "--no-compilation-cache"
#: Bytes of all programs for one kind of processor; those that were used longest ago go first.
LIMIT = 2 << 30
#: Seconds of compiling below which a program is not worth a file.
WORTH = 0.1


def _setting(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")


def keep_compiled_programs() -> None:
    """Have jax keep compiled programs below the cache directory, and take them from there.

    Leaves alone what the user has told jax (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE), and keeps nothing
    where the cache can't be written. To be called before anything is compiled.
    """
    if _setting("compilation_cache_dir") is not None or not _setting("enable_compilation_cache"):
        return
    try:
        directory = local_cache(DataConfig()) / "programs" / processor()
    except ConfigError:
        return  # a bad SPARSEZOO_CACHE: for the commands to say that use it
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        warnings.warn(
            f"compiled programs are not kept: {there} can't be written to ({FLAG} asks for that without a warning)",
            SparsezooWarning,
            stacklevel=2,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)


def keep_none_of_several_processes() -> None:
    """Undo `keep_compiled_programs`: only the first of a run's processes writes, and others may not see its files.

    A directory that the user has told jax, which all of them see, stays.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", None)


@contextlib.contextmanager
def no_programs_kept() -> Iterator[None]:
    """Neither keep programs nor take kept ones within."""
    before = _setting("enable_compilation_cache")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax looks at its settings once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def processor() -> str:
    """A name for what programs for this machine's CPU depend on.

    Code for a CPU is compiled for all instructions that it has, and jax's key does not say which these were: in a home
    directory that several machines share, one would take code that it can't run.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "model name")})
    text = "\n".join([platform.machine(), platform.processor(), *told])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
