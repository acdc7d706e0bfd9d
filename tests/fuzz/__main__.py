"""Fuzz for as long as told: `python -m tests.fuzz [--seconds N] [TARGET...]`.

Each target gets N seconds. With atheris (pip install atheris) coverage guides the inputs; without it hypothesis draws
them. Ends with status 1 after a fault, with what was read and the traceback.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import traceback


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").strip())
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--engine", choices=("atheris", "hypothesis"), help="default: atheris if it is installed")
    parser.add_argument("--guided", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    args = parser.parse_args()
    engine = args.engine or ("atheris" if importlib.util.find_spec("atheris") else "hypothesis")
    if args.guided:
        return guided(args.targets[0], args.seconds)
    from tests.fuzz.targets import TARGETS

    unknown = [name for name in args.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    faults = 0
    for name in args.targets or TARGETS:
        if engine == "atheris":
            command = (sys.executable, "-m", "tests.fuzz", "--guided", "--seconds", str(args.seconds), name)
            status = subprocess.run(command, check=False).returncode
            failed = status != 0
            print(
                f"{name}: {f'a fault (exit status {status})' if failed else 'no fault'} in {args.seconds} s", flush=True
            )
        else:
            failed = drawn(name, args.seconds)
        faults += failed
    return int(faults > 0)


def drawn(name: str, seconds: float) -> bool:
    """Inputs of hypothesis; whether there was a fault."""
    from tests.fuzz.run import property_of

    end, start, count = time.monotonic() + seconds, time.time_ns(), 0
    while time.monotonic() < end:
        try:
            property_of(name, 100, start + count)()
        except BaseException as error:  # the Rust side's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            print(f"{name}: a fault after {count:,} inputs", flush=True)
            return True
        count += 100
    print(f"{name}: no fault in {count:,} inputs", flush=True)
    return False


def guided(name: str, seconds: int) -> int:
    """Inputs of atheris, which takes the process over and ends it."""
    import atheris

    with atheris.instrument_imports(include=["sparsezoo_jax", "json"]):
        from tests.fuzz.run import property_of

    one_input = property_of(name, 1).hypothesis.fuzz_one_input
    prefix = f"-artifact_prefix={tempfile.gettempdir()}/{name}-"  # where an input with a fault is kept
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", prefix], one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
