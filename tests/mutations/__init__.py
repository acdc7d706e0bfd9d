"""Faults that the tests must catch: `python -m tests.mutations [NAME...]`.

Each is data in a TOML file of this folder: one text of the package for another, and the tests that must then fail.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """A fault: `old`, which occurs once in `file`, becomes `new`, and `tests` (as pytest names them) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def native(self) -> bool:
        """Whether it is in the sources of the native library, which is compiled again then."""
        return self.file.startswith("sparsezoo_jax/native/src/")

    def applied(self, source: str) -> str:
        """The source with the fault.

        Raises:
          ValueError: `old` doesn't occur exactly once.
        """
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {count} times in {self.file}, not once")
        return source.replace(self.old, self.new)


def load() -> list[Mutation]:
    """All mutations, file by file."""
    tables = [tomllib.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("*.toml"))]
    return [
        Mutation(name, fields["file"], fields["old"], fields["new"], tuple(fields["tests"]))
        for table in tables
        for name, fields in table.items()
    ]
