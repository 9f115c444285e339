"""Compiled modules never hide a source that was edited after they were compiled."""

from __future__ import annotations

import ast
import collections.abc
import json
import shutil
import subprocess
import sys
from hashlib import blake2b
from importlib import import_module
from pathlib import Path

import pytest

import hatch_build
from servesim.cost.attention import FullAttention
from servesim.engine.block_tables import BlockTables
from servesim.engine.simulation import Simulation

ROOT = Path(__file__).resolve().parent.parent


def test_every_module_to_compile_is_there() -> None:
    assert [name for name in hatch_build.MODULES if not (ROOT / name).is_file()] == []


@pytest.mark.skipif(not (ROOT / hatch_build.MARK).is_file(), reason="nothing is compiled here")
def test_what_is_compiled_is_what_runs() -> None:
    homes = [
        import_module(name.removesuffix(".py").replace("/", ".")).__file__ for name in hatch_build.MODULES
    ]
    assert [home for home in homes if home is None or not home.endswith((".so", ".pyd"))] == []


def test_no_compiled_class_inherits_from_an_abstract_one() -> None:
    found = []
    for name in hatch_build.MODULES:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                plain = base.value if isinstance(base, ast.Subscript) else base
                if hasattr(collections.abc, ast.unparse(plain).rpartition(".")[2]):
                    found.append(f"{name}: {ast.unparse(base)}")
    assert found == []


@pytest.mark.skipif(not (ROOT / hatch_build.MARK).is_file(), reason="nothing is compiled here")
@pytest.mark.parametrize("base", [FullAttention, BlockTables, Simulation])
def test_plain_classes_derive_from_compiled_ones(base: type) -> None:
    assert issubclass(type("Derived", (base,), {}), base)


def test_an_edited_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "servesim").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "servesim" / name, tmp_path / "servesim" / name)
    source = tmp_path / "servesim" / "core.py"
    source.write_text("x = 1\n")
    sums = {"servesim/core.py": blake2b(source.read_bytes(), digest_size=16).hexdigest()}
    (tmp_path / hatch_build.MARK).write_text(json.dumps(sums))

    def run(code: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", code]
        environment = {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)

    assert run("import servesim.core").returncode == 0
    source.write_text("x = 2\n")
    done = run("import servesim.core")
    assert done.returncode != 0
    assert b"core.py: was changed after it was compiled" in done.stderr
    source.unlink()
    assert run("import servesim").returncode == 0  # an installed copy without its sources
