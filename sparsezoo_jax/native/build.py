"""Compiles the native library; standard library and jaxlib's headers only, for it runs before the package is installed.

One compiler call per source file; `loops.cc` is compiled once for each level of the instruction set, and the library
picks one of them at run time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
#: Where the library is looked for. One serves every Python of a platform, for it is loaded through ctypes.
LIBRARY = FOLDER / f"_sparsezoo-{platform.system().lower()}-{platform.machine().lower()}.so"

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
V3 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2"]
V4 = [*V3, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
V4_BF16 = [*V4, "-mavx512bf16"]
#: Levels of x86-64 above the default: floats in a register, and flags. Old compilers leave out the last one.
LEVELS = {"v3": (8, V3), "v4": (16, V4), "v4_bf16": (16, V4_BF16)}


class BuildError(Exception):
    """No library: there is no compiler, or it failed; the message says which and why."""


def compiler() -> list[str]:
    """The C++ compiler: that of $CXX, or the first of the usual names that exists.

    Raises:
      BuildError: none was found.
    """
    asked = os.environ.get("CXX")
    for command in [shlex.split(asked)] if asked else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: CXX={asked} is no command" if asked else "no g++, clang++ or c++ on the PATH")


def headers() -> tuple[Path, str]:
    """Folder of jaxlib's headers, and its version; without importing it.

    Raises:
      BuildError: jaxlib is not installed.
    """
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("jaxlib, whose headers are needed, is not installed")
    return Path(spec.submodule_search_locations[0]) / "include", importlib.metadata.version("jaxlib")


def fingerprint() -> str:
    """Hash of the sources and of how they are compiled: a library of another one is out of date."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted((FOLDER / "src").iterdir())):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(target: Path = LIBRARY, *, portable: bool = False) -> Path:
    """Compile the library into `target`, which appears only when it is complete; returns its path.

    Args:
      target: a file.
      portable: the library brings its own C++ runtime, so that it needs none of the machine that it is copied to.

    Raises:
      BuildError: there is no compiler, no jaxlib, or the compiler failed.
    """
    command = compiler()
    include, version = headers()
    levels = LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {}
    levels = {level: form for level, form in levels.items() if _knows(command, form[1])}
    defines = [f"-DSPARSEZOO_HAS_{level.upper()}" for level in levels]
    jobs = [(path, []) for path in sorted((FOLDER / "src").glob("*.cc"))]
    for level, (lanes, flags) in {"default": (4, []), **levels}.items():
        named = [f"-DSPARSEZOO_LEVEL={level}", f"-DSPARSEZOO_LANES={lanes}", *flags]
        jobs.append((FOLDER / "src" / "loops.cc", named))
    jobs = [job for job in jobs if job[0].name != "loops.cc" or job[1]]
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(numbered: tuple[int, tuple[Path, list[str]]]) -> str:
            number, (source, flags) = numbered
            out = os.path.join(folder, f"{source.stem}{number}.o")
            names = [f'-DSPARSEZOO_JAXLIB="{version}"', f'-DSPARSEZOO_SOURCES="{fingerprint()}"']
            extra = [*names, *defines, "-isystem", str(include)]
            _run([*command, *FLAGS, *flags, *extra, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, enumerate(jobs)))
        linked = os.path.join(folder, "library")
        own_runtime = ["-static-libstdc++", "-static-libgcc"] if portable and platform.system() == "Linux" else []
        _run([*command, "-shared", *own_runtime, *objects, "-o", linked])
        beside = target.with_suffix(".partial")
        shutil.copyfile(linked, beside)
        os.replace(beside, target)
    return target


def platform_tag(library: Path) -> str:
    """The platform that a wheel with this library is for, as installers name it (PEP 600).

    On Linux that is the oldest glibc which has all that the library uses, whatever this machine's is.
    """
    own = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if platform.system() != "Linux":
        return own
    needed = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library.read_bytes())]
    if not needed:  # another C library, such as musl
        return own
    # jaxlib's own wheels, without which nothing runs, are for 2.27 and newer.
    return f"manylinux_2_{max(27, *needed)}_{platform.machine().lower()}"


def _knows(command: list[str], flags: list[str]) -> bool:
    """Whether the compiler has these flags: AVX512-BF16 came with g++ 10 and clang++ 9."""
    if flags != V4_BF16:  # an error about the others is for the user to see
        return True
    asked = [*command, *flags, "-x", "c++", "-E", os.devnull, "-o", os.devnull]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed:\n{done.stderr}")
