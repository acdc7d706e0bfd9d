"""Imports jax without the complaints of plugins for hardware that this machine does not have.

The extra [aot] installs libtpu and the CUDA plugin to compile with. jax would try both as devices, fail, and print tens
of lines before it computes on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

_NOISE = ("cudart_stub.cc", "All log messages before absl::InitializeLog()")


def _exists(*patterns: str) -> bool:
    return any(glob.glob(pattern) for pattern in patterns)


def has_nvidia() -> bool:
    """Whether there is a driver of an NVIDIA GPU."""
    return _exists("/dev/nvidia*", "/dev/dxg")


def has_accelerator() -> bool:
    """Whether jax may find anything but the CPU here."""
    plugins = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    known = plugins <= {"cuda12", "cuda13", "xla_cuda12", "xla_cuda13"}
    return not known or has_nvidia() or _exists("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Hold back what native code writes to stderr, and pass on all of it but the lines known to mean nothing."""
    sys.stderr.flush()
    try:
        before = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not any(text in line for text in _NOISE)))


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed, where jax computes on the CPU; before jax starts its threads.

    A program's temporaries are allocated when it starts and freed when it ends. Left alone, glibc gives blocks of
    their size back to the system every time, and the system fills every page with zeros when it is used again: a third
    of a tiny model's train step. For commands that run one program over and over. Does nothing with another C library
    or an accelerator, or where the environment sets MALLOC_ARENA_MAX.
    """
    if has_accelerator() or "MALLOC_ARENA_MAX" in os.environ or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # the parameters' numbers in malloc.h
    # One heap for all threads: those of threads are too small for such blocks, which are mapped instead.
    for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1), (top_pad, 64 << 20)):
        if not libc.mallopt(parameter, value):
            raise RuntimeError(f"mallopt({parameter}, {value}) was refused")


def import_jax() -> None:
    """Import jax; on a machine without an accelerator, tell it not to look for one unless JAX_PLATFORMS says so."""
    if "jax" in sys.modules:
        return
    if not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if importlib.util.find_spec("jax_cuda12_plugin") is None or has_nvidia():
        return
    with without_noise():
        importlib.import_module("jax")
        plugin = importlib.import_module("jax_plugins.xla_cuda12")
        # jax loads this library with its first computation, wherever that is; it complains while it loads.
        for path in glob.glob(os.path.join(next(iter(plugin.__path__)), "xla_cuda_plugin.so")):
            ctypes.CDLL(path)


import_jax()
