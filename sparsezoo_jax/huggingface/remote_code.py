"""PyTorch code that is written beside a checkpoint, for models that transformers has no class for.

The modules in `remote/` are one kind each. A checkpoint gets one file that holds those of its own kinds, one after
another: transformers copies what it runs, and who reads it sees this model and no other.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.models import DecoderConfig

CONFIGURATION, MODELING = "configuration_sparsezoo.py", "modeling_sparsezoo.py"
_MODULES = Path(__file__).parent / "remote"
_HEADER = '''# SPDX-License-Identifier: Apache-2.0
"""PyTorch code of a model that sparsezoo_jax trained, for transformers: load it with `trust_remote_code=True`.

{parts}

What a model leaves out for a token is computed here all the same and masked, or multiplied by 0: logits are those of
the trained model, and the time is that of a dense one.
"""
'''


def remote_files(model: DecoderConfig, source: object) -> dict[str, str]:
    """The Python files of a checkpoint by name.

    Raises:
      UserError: kinds that have no PyTorch form.
    """
    ffns = (model.ffn, *([] if model.first_ffn is None else [model.first_ffn]))
    kinds = [("attention", model.attention.kind), *(("ffn", ffn.kind) for ffn in ffns)]
    kinds.append(("residual", model.residual.kind))
    for part, kind in kinds:
        known = sorted(path.stem.removeprefix(f"{part}_") for path in _MODULES.glob(f"{part}_*.py"))
        if kind not in known:
            allowed = f"has no PyTorch form that could be written for transformers; those of {', '.join(known)} have"
            raise UserError(f"{source}: model.{part}.kind={kind}: {allowed}")
    wanted = dict.fromkeys([*(f"{part}_{kind}" for part, kind in kinds), "decoder"])
    modeling = joined(list(wanted))
    # A process of transformers keeps one class of models for each text of a configuration's file: without this, of two
    # checkpoints the second would get the first one's code.
    fingerprint = hashlib.sha256(modeling.encode()).hexdigest()
    configuration = (_MODULES / CONFIGURATION).read_text(encoding="utf-8")
    return {CONFIGURATION: f"# Goes with {MODELING} {fingerprint[:16]}.\n{configuration}", MODELING: modeling}


def joined(names: list[str]) -> str:
    """One module of those in `remote/` called `names` and all that they import from there."""
    modules = list(dict.fromkeys(name for wanted in names for name in _with_imports(wanted)))
    imports: dict[str, set[str]] = {}
    parts, bodies = [], []
    for name in modules:
        text = (_MODULES / f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        documentation = ast.get_docstring(tree) or ""
        for node in _imports(tree):
            if isinstance(node, ast.Import):
                imports.update({ast.unparse(node): set()})
            elif not _is_local(node):
                source = "." * node.level + (node.module or "")
                imports.setdefault(source, set()).update(map(ast.unparse, node.names))
        if name in names:
            parts.append(f"- {documentation.splitlines()[0]}")
        banner = "\n".join(f"# {line}".rstrip() for line in documentation.splitlines())
        bodies.append(f"# {'-' * 118}\n{banner}\n# {'-' * 118}\n\n\n{_body(text, tree)}")
    header = f"{_HEADER.format(parts=chr(10).join(parts))}\n{_import_lines(imports)}"
    return f"{header}\n\n" + "\n\n\n".join(bodies) + "\n"


def _with_imports(name: str) -> Iterator[str]:
    """The modules that this one imports from `remote/`, and theirs, before itself."""
    tree = ast.parse((_MODULES / f"{name}.py").read_text(encoding="utf-8"))
    for node in _imports(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and _is_local(node):
            yield from _with_imports(node.module)
    yield name


def _imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def _is_local(node: ast.ImportFrom) -> bool:
    """Whether a module's import becomes a part of the one file; the configuration stays a file of its own."""
    return node.level == 1 and f"{node.module}.py" != CONFIGURATION


def _body(text: str, tree: ast.Module) -> str:
    """A module's lines after its docstring and imports, comments that belong to what follows included."""
    last = max([1, *(node.end_lineno or 1 for node in _imports(tree))])
    if len(_imports(tree)) == 0:
        last = tree.body[0].end_lineno or 1
    return "\n".join(text.splitlines()[last:]).strip("\n")


def _import_lines(imports: dict[str, set[str]]) -> str:
    """Import statements in three groups: the standard library, other libraries, files of the checkpoint."""
    groups: list[list[str]] = [[], [], []]
    for source, names in sorted(imports.items()):
        line = f"from {source} import {', '.join(sorted(names))}" if names else source
        top = source.removeprefix("import ").split(".")[0]
        groups[2 if source.startswith(".") else 0 if top in sys.stdlib_module_names else 1].append(line)
    return "\n\n".join("\n".join(sorted(group, key=lambda line: line.startswith("from"))) for group in groups if group)
