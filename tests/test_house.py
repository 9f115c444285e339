"""What a newcomer may count on: the documented command, the order of the packages, a tidy repository."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from docs import refresh

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "servesim"
DOCUMENTED = """\
python -m serving --cluster-config 'configs/cluster/single_node_single_instance.json' \\
  --dtype bfloat16 --kv-cache-dtype fp8 --block-size 16 \\
  --dataset 'workloads/example_trace.jsonl' --output 'outputs/fp8_kv_run.csv' --log-interval 1.0"""
HEARTBEAT = r"^\[INFO\] step=\d+ batch=\d+ prompt_t=\S+ tok/s decode_t=\S+ tok/s npu_mem=\d+\.\d GB "

MAY_IMPORT = {
    "_version": set(),
    "compiled": set(),
    "slotted": set(),
    "errors": set(),
    "terminal": set(),
    "specs": {"errors"},
    "network": {"specs", "errors"},
    "workload": {"specs", "errors"},
    "memory": {"specs", "errors"},
    "cost": {"memory", "network", "specs", "errors"},
    "power": {"specs", "errors"},
    "results": {"memory", "power", "workload", "specs", "errors", "_version"},
    "engine": {"results", "memory", "cost", "network", "power", "workload", "specs", "errors"},
    "api": {"profiler", "engine", "results", "workload", "specs", "errors"},
    "profiler": {"cost", "memory", "network", "results", "specs", "errors", "_version"},
    "explore": {"api", "engine", "results", "memory", "cost", "workload", "specs", "errors", "_version"},
    "report": {"bench", "explore", "results", "specs", "errors", "_version"},
    "server": {"engine", "memory", "results", "workload", "specs", "errors", "_version"},
    "bench": {
        "explore",
        "api",
        "engine",
        "results",
        "memory",
        "workload",
        "cost",
        "specs",
        "errors",
        "_version",
    },
}
"""Package or module of servesim/ -> what it may import. Only ``cli`` and the public API import everything."""
RECORDS = {
    "state": "engine.request_state:RequestState",
    "victim": "engine.request_state:RequestState",
    "batch": "engine.batch:Batch",
    "wave": "engine.step_loop:Wave",
    "journey": "engine.connector:Journey",
    "record": "results.records:RequestRecord bench.scheduler_log:LoggedRequest",
    "table": "memory.kv_cache:BlockTable memory.group_tables:GroupedTable",
    "own": "memory.group_tables:GroupTable",
    "hits": "memory.group_tables:GroupHits",
    "flow": "network.links:_Flow",
    "request": "workload.request:Request",
    "copy": "workload.request:Request",
    "workload": "workload.request:Workload",
    "kept": "engine.build:Kept",
    "cursor": "results.heartbeat:_Cursor",
    "stream": "server.live:Stream",
    "asked": "server.asked:Asked",
    "limit": "explore.rate_search:LoadLimit",
    "plan": "explore.plan_result:Plan",
    "found": "explore.plan_result:Plan",
    "trial": "explore.plan_result:Trial",
    "finalist": "explore.plan_result:Finalist",
    "tally": "bench.replay:Tally",
    "segment": "bench.replay_folder:Segment",
    "log": "bench.scheduler_log:SchedulerLog",
    "records": "bench.scheduler_log:LoggedRequest",
    "step": "bench.scheduler_log:LoggedStep",
    "stack": "specs.families.stack:Stack",
    "cluster": "specs.cluster:ClusterSpec",
    "changed": "specs.cluster:ClusterSpec",
}
"""Plain data that functions fill in, by the name it goes by -> its classes.

A change from outside can break nothing here, since they have no behaviour: a request in the system is kept
in one piece, and who works on it writes down how far it is."""
LIBRARY = {"parser", "action", "args", "sys", "warnings", "logger", "frame"}
"""Objects of the standard library and of pandas, which are set up this way."""
FOR_ALL = {"compiled", "results.atomic", "slotted", "terminal"}
"""Modules that any package which writes files, or lines for people, may import; ``slotted`` and ``compiled``
are for all."""


def _committed() -> list[Path]:
    """Files of the repository, or everything there is where git cannot tell."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Modules of servesim that a file imports anywhere, without the leading ``servesim.``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.removeprefix("servesim.") for name in found if name.startswith("servesim.")}


def _copy(folder: Path) -> Path:
    """What of a clone the simulator needs."""
    for part in ("servesim", "serving", "configs", "workloads", "profiler"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=False
    )


def test_the_documented_command_runs_verbatim_in_a_clone(tmp_path: Path) -> None:
    clone = _copy(tmp_path)
    done = _python(shlex.split(DOCUMENTED.replace("\\\n", ""))[1:], clone)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(HEARTBEAT, done.stdout, re.MULTILINE)) > 10
    assert len((clone / "outputs/fp8_kv_run.csv").read_text().splitlines()) == 301


def test_a_missing_bundle_is_named_with_the_remedy(tmp_path: Path) -> None:
    clone = _copy(tmp_path)
    done = _python(shlex.split(DOCUMENTED.replace("\\\n", "").replace("bfloat16", "int8"))[1:], clone)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "FileNotFoundError: profiler/perf/RTXPRO6000/meta-llama/Llama-3.1-8B/int8-kvfp8/ does not exist\n"
    )
    assert "servesim profile meta-llama/Llama-3.1-8B --hardware RTXPRO6000" in done.stderr
    assert done.stdout == ""
    assert list(clone.glob("outputs/*")) == []


def test_the_readme_shows_the_documented_command() -> None:
    assert DOCUMENTED in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_sets_up_in_two_commands() -> None:
    (block,) = [
        block
        for block in refresh.blocks((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
        if "setup" in block.words
    ]
    first, second = (command.text for command in refresh.commands(block))
    assert first.startswith("python3 -m venv ")
    assert first.endswith("servesim compare")
    assert "pytest" in second


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "serving", "--help"],
        ["-c", "import servesim"],
        ["-m", "servesim", "--help"],
        ["-m", "servesim", "profile", "--help"],
    ],
)
def test_help_and_import_load_nothing_heavy(arguments: list[str]) -> None:
    done = _python(["-X", "importtime", *arguments], ROOT)
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "servesim" in loaded
    assert loaded & {"numpy", "rich", "pydantic", "pandas", "pyarrow", "matplotlib", "yaml"} == set()


def test_every_folder_and_file_of_the_package_says_what_it_is_for() -> None:
    folders = {path.parent for path in _python_files()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in _python_files()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) and path.name != "_version.py"
    ]
    assert silent == []


def test_no_package_imports_one_above_it() -> None:
    wrong = []
    for path in _python_files():
        package = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if package in ("cli", "__init__", "__main__", "door"):
            continue
        for name in sorted(_imports(path) - FOR_ALL):
            imported = name.partition(".")[0]
            if imported not in {package, *MAY_IMPORT.get(package, set())}:
                wrong.append(f"{path.relative_to(ROOT)} imports servesim.{name}")
    assert wrong == []


def test_the_order_of_the_packages_has_no_circle() -> None:
    done: set[str] = set()
    left = dict(MAY_IMPORT)
    while left:
        ready = {name for name, imports in left.items() if imports <= done}
        assert ready, f"circle among {sorted(left)}"
        done |= ready
        left = {name: imports for name, imports in left.items() if name not in ready}


def _set_from_outside(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Attributes that are set on something else than ``self`` or what the same function made."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    made_in: dict[ast.AST, set[str]] = {}
    for function in functions:  # outer ones first, so that inner ones have the last word
        made = {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            for target in node.targets
            if isinstance(target, ast.Name)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id.lstrip("_")[:1].isupper()
        }
        made_in.update((node, made) for node in ast.walk(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            owner = node.value
            own = isinstance(owner, ast.Name) and owner.id in {"self", "cls", *made_in.get(node, ())}
            if not own and not node.attr.startswith("__"):
                yield node


def _fields(names: str) -> set[str]:
    """What instances of classes of the package can hold."""
    fields: set[str] = set()
    for name in names.split():
        module, _, attribute = name.partition(":")
        found = getattr(importlib.import_module(f"servesim.{module}"), attribute)
        for kind in ("__slots__", "__dataclass_fields__", "__private_attributes__"):
            fields.update(getattr(found, kind, ()))
    return fields


def test_no_attribute_is_set_from_outside() -> None:
    fields = {name: _fields(where) for name, where in RECORDS.items()}
    wrong = []
    for path in _python_files():
        for node in _set_from_outside(ast.parse(path.read_text(encoding="utf-8"))):
            owner = node.value.value if isinstance(node.value, ast.Subscript) else node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name in LIBRARY or node.attr in fields.get(name.lstrip("_"), ()):
                continue
            wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} sets {ast.unparse(node)}")
    assert wrong == []


def test_attributes_set_from_outside_are_found() -> None:
    source = (
        "def f(loop):\n  loop.noise = 1\n  made = Loop()\n  made.noise = 1\n  loop.log.tier += 1\n"
        "  for loop.index in (1,): pass\n  found = get()\n  found.x, y = 1, 2\n"
    )
    found = {ast.unparse(node) for node in _set_from_outside(ast.parse(source))}
    assert found == {"loop.noise", "loop.log.tier", "loop.index", "found.x"}


def _loaded_with(path: Path, modules: set[str]) -> set[str]:
    """Modules of servesim that are imported when a file is: not in functions, and not for types alone."""
    found: set[str] = set()

    def look(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found.update({node.module, *(f"{node.module}.{name.name}" for name in node.names)})
            elif isinstance(node, ast.If) and ast.unparse(node.test) not in (
                "TYPE_CHECKING",
                "__name__ == '__main__'",
            ):
                look([*node.body, *node.orelse])
            elif isinstance(node, ast.ClassDef | ast.With | ast.Try):
                look(node.body)

    look(ast.parse(path.read_text(encoding="utf-8")).body)
    return {name.removeprefix("servesim.") for name in found} & modules


def test_no_two_files_wait_for_each_other() -> None:
    names = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in _python_files()}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    left = {name: _loaded_with(path, set(names)) - {name} for name, path in names.items()}
    while left:
        ready = {name for name, imports in left.items() if not imports & set(left)}
        assert ready, f"import cycle among {sorted(left)}"
        left = {name: imports for name, imports in left.items() if name not in ready}


def test_cost_knows_no_request() -> None:
    assert all("workload" not in name for path in (PACKAGE / "cost").rglob("*.py") for name in _imports(path))


def test_no_file_names_a_machine_or_how_it_came_to_be() -> None:
    # put together from parts, so that this file is not found itself
    places = "|".join(("/" + "work", "/" + "root", "/" + "tmp", "/" + "Users"))
    words = "|".join(("proto" + "type", "issue " + "#?[0-9]", "brief" + r"\.md"))
    forbidden = re.compile(rf"(?<![\w.$*-])(?:{places})/|\b(?:{words})", re.IGNORECASE)
    found = []
    for path in _committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if (hit := forbidden.search(line)) and path.name not in ("LICENSE", "chart.umd.min.js"):
                found.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]}")
    assert found == []


def test_no_large_file_is_committed() -> None:
    sizes = {path: path.stat().st_size for path in _committed()}
    assert {path.name: size for path, size in sizes.items() if size > 3_000_000} == {}
    assert sum(sizes.values()) < 40_000_000


def test_every_benchmark_finds_its_section() -> None:
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    written = {
        name
        for script in (ROOT / "benchmarks").glob("*.py")
        for name in re.findall(
            r'(?:write_section|against_recordings|command)\("([a-z-]+)"', script.read_text(encoding="utf-8")
        )
    }
    assert {"accuracy", "recorded-steps", "silicon"} < written
    for name in written:
        assert 0 <= page.find(f"<!-- {name}:begin -->") < page.find(f"<!-- {name}:end -->"), name
