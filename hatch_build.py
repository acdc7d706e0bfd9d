"""Compiles the native CPU library into wheels, in place for editable installations; goes on without a compiler."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):
    """Adds the library to wheels, which then are for one platform; without it they are pure Python and as complete."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        path = Path(self.root) / "sparsezoo_jax" / "native" / "build.py"
        spec = importlib.util.spec_from_file_location("sparsezoo_native_build", path)
        assert spec is not None
        assert spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        target = native.LIBRARY
        if version != "editable":
            self._folder = tempfile.TemporaryDirectory()
            target = Path(self._folder.name) / native.LIBRARY.name
        try:
            native.build(target, portable=version != "editable")
        except (native.BuildError, OSError) as error:
            self.app.display_warning(f"Without the native CPU library: {error}")
            return
        # The library is loaded through ctypes and knows jaxlib's interface for it, which is no Python's: one wheel
        # serves all versions of Python.
        build_data["pure_python"], build_data["tag"] = False, f"py3-none-{native.platform_tag(target)}"
        if version != "editable":
            inside = os.path.relpath(native.LIBRARY, self.root)
            build_data["force_include"][str(target)] = inside
