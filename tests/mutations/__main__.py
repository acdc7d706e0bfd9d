"""Apply faults to a copy of the repository, one at a time, and see whether the tests named for them fail."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sparsezoo_jax.native.build import LIBRARY
from tests.mutations import ROOT, Mutation, load

PASSED, FAILED = 0, 1  # pytest's exit statuses; any other is a run that says nothing


def run_tests(copy: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Exit status of pytest in the copy, and the end of what it printed."""
    environment = os.environ | {"PYTHONPATH": str(copy), "JAX_COMPILATION_CACHE_DIR": str(copy / ".xla")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def build(copy: Path) -> None:
    """Compile the copy's native library, without which one of other sources would fail every native test.

    Raises:
      ValueError: it can't be compiled.
    """
    command = [sys.executable, "-m", "sparsezoo_jax.native"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)


def main() -> int:
    """Print a line for each mutation; the exit status is 1 if any survived or could not be tried."""
    known = {mutation.name: mutation for mutation in load()}
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; none: all")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{unknown[0]}: no such mutation; there are {', '.join(sorted(known))}")
    chosen: list[Mutation] = [known[name] for name in dict.fromkeys(names)] or list(known.values())

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(
            ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs", ".*_cache")
        )
        status, output = run_tests(copy, dict.fromkeys(test for mutation in chosen for test in mutation.tests))
        if status != PASSED:
            print(f"{output}\nthe tests don't pass as they are", file=sys.stderr)
            return 1
        bad = 0
        for mutation in chosen:
            path = copy / mutation.file
            source = path.read_text()
            library = copy / LIBRARY.relative_to(ROOT)
            compiled = library.read_bytes() if mutation.native and library.exists() else None
            try:
                path.write_text(mutation.applied(source))
                if mutation.native:
                    build(copy)
                status, output = run_tests(copy, mutation.tests)
            except ValueError as error:
                status, output = -1, str(error)
            finally:
                path.write_text(source)
                if compiled is not None:
                    library.write_bytes(compiled)
            bad += status != FAILED
            verdict = {PASSED: "SURVIVED", FAILED: "caught"}.get(status, "NOT TRIED")
            print(f"{verdict:9}  {mutation.name}", flush=True)
            if verdict == "NOT TRIED":
                print(output, file=sys.stderr)
        print(f"{len(chosen) - bad} of {len(chosen)} caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
