"""Renders one chat template: JSON with `template` and `variables` on stdin, with `text` or `error` on stdout.

Run as a file, by `chat`. It imports nothing of this package.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any, NoReturn

SECONDS = 10
"""Processor time that a template may take."""
MEMORY = 1 << 30
"""Bytes of address space that it may take."""


def environment() -> Any:
    """Jinja's sandbox, with what templates of Hugging Face's checkpoints expect."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what the assistant says, for training on it alone; here it is its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **how)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    made.filters["tojson"] = as_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def main() -> None:
    """Render what stdin holds."""
    import jinja2

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    given = json.load(sys.stdin)
    try:
        answer = {"text": environment().from_string(given["template"]).render(**given["variables"])}
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        answer = {"error": str(error).splitlines()[0] if str(error) else type(error).__name__}
    except (MemoryError, RecursionError) as error:
        answer = {"error": f"it needs too much memory or depth ({type(error).__name__})"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
