"""Hatchling's hook: a wheel carries the kernel build in ``moe_fused/_kernel/``, an editable install uses ``build/``."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Where moe_fused.hub looks for the build and for the repository id inside an installed wheel.
DESTINATION = "moe_fused/_kernel"


def _builder(root: Path) -> ModuleType:
    """``scripts/build_kernel.py`` as a module; under an isolated build nothing of the checkout is on ``sys.path``."""
    name = "_moe_fused_build_kernel"
    spec = importlib.util.spec_from_file_location(name, root / "scripts" / "build_kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses looks its module up there
    spec.loader.exec_module(module)
    return module


class KernelBuildHook(BuildHookInterface):
    """Builds all variants before hatchling collects the files."""

    PLUGIN_NAME = "custom"
    _staging: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        builder = _builder(root)
        try:
            if version == "editable":
                builder.build(root, root / "build")
                return
            self._staging = tempfile.TemporaryDirectory(prefix="moe-fused-kernel-")
            for variant in builder.build(root, Path(self._staging.name)):
                build_data["force_include"][str(variant)] = f"{DESTINATION}/{variant.name}"
        except builder.BuildError as error:
            self.app.abort(f"cannot build the kernel: {error}")
        build_data["force_include"][str(root / "build.toml")] = f"{DESTINATION}/build.toml"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._staging is not None:
            self._staging.cleanup()
