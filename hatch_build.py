"""Compiles the core for a wheel, on request: ``SERVESIM_COMPILE=1 python -m build --wheel`` (make
wheel-compiled).

Without the variable the wheel is pure Python, and an editable install always is: neither needs a compiler.
The modules below are compiled by mypyc as they are, and their sources lie beside them. What they were when
they were compiled is written into ``servesim/_compiled.json``, by which the package refuses compiled modules
that are older than their sources. ``python hatch_build.py`` compiles them where they lie, for tests.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a program, for tests
    BuildHookInterface = object

MODULES = (
    "servesim/cost/attention.py",
    "servesim/cost/attention_lookup.py",
    "servesim/cost/batch_shape.py",
    "servesim/cost/bracket.py",
    "servesim/cost/count_term.py",
    "servesim/cost/host_term.py",
    "servesim/cost/stage_cost.py",
    "servesim/engine/adapters.py",
    "servesim/engine/arrivals.py",
    "servesim/engine/batch.py",
    "servesim/engine/block_tables.py",
    "servesim/engine/clock.py",
    "servesim/engine/decode_set.py",
    "servesim/engine/glide.py",
    "servesim/engine/instance.py",
    "servesim/engine/limits.py",
    "servesim/engine/outlook.py",
    "servesim/engine/queue_policy.py",
    "servesim/engine/request_state.py",
    "servesim/engine/router.py",
    "servesim/engine/scheduler.py",
    "servesim/engine/simulation.py",
    "servesim/engine/step_loop.py",
    "servesim/memory/block_pool.py",
    "servesim/memory/kv_cache.py",
    "servesim/results/heartbeat.py",
    "servesim/results/request_record.py",
    "servesim/workload/entries.py",
    "servesim/workload/jsonl.py",
)
"""What a request and a step go through.

None has a class that inherits from one of :mod:`collections.abc`. Compiled, all of these would share its
memory of what is an instance of it, and take each other's instances, and lists, for their own."""
MARK = "servesim/_compiled.json"
NEEDS = ["mypy[mypyc]>=1.11", "setuptools"]


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Adds the compiled modules to a wheel."""

    def _wanted(self) -> bool:
        return self.target_name == "wheel" and os.environ.get("SERVESIM_COMPILE") == "1"

    def dependencies(self) -> list[str]:
        """What building takes beside hatchling; the types of the run's own dependencies are looked at."""
        return [*NEEDS, *self.metadata.core.dependencies] if self._wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is put together."""
        if not self._wanted() or version == "editable":
            return
        self._folder = tempfile.mkdtemp()
        compile_core(Path(self.root), Path(self._folder))
        build_data["pure_python"], build_data["infer_tag"] = False, True
        for path in sorted(Path(self._folder).rglob("*")):
            if path.is_file():
                build_data["force_include"][str(path)] = path.relative_to(self._folder).as_posix()

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is there."""
        del version, build_data, artifact_path
        shutil.rmtree(getattr(self, "_folder", ""), ignore_errors=True)


def compile_core(root: Path, into: Path) -> None:
    """Compile :data:`MODULES` of the checkout ``root``, and put what comes out below ``into``."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    os.chdir(root)
    with tempfile.TemporaryDirectory() as work:
        config = Path(work) / "mypy.ini"
        config.write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n")
        flags = ["--config-file", str(config), "--cache-dir", work]
        extensions = mypycify([*flags, *MODULES], opt_level="3", debug_level="0", target_dir=work)
        command: Any = Distribution({"name": "servesim", "ext_modules": extensions}).get_command_obj(
            "build_ext"
        )
        command.build_lib, command.build_temp = str(into), work
        command.ensure_finalized()
        command.run()
    sums = {name: blake2b((root / name).read_bytes(), digest_size=16).hexdigest() for name in MODULES}
    (into / MARK).write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    compile_core(Path(__file__).resolve().parent, Path(__file__).resolve().parent)
    sys.exit(0)
