"""Where the parts of a sweep run: in this process, over several by joblib (extra ``sweep``), or on Ray."""

from __future__ import annotations

import os
import sys
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from servesim.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PartT = TypeVar("PartT")
ItemT = TypeVar("ItemT")
_LOSSES = 3
"""Times in a row that workers may die without one part being finished."""


def check_jobs(jobs: int) -> None:
    """Refuse a number of processes that cannot be had.

    Raises:
        InputError: it is out of range, or joblib is missing.
    """
    if not 1 <= jobs <= 1024:
        raise InputError(f"--jobs: {jobs} is not allowed; must be from 1 to 1024")
    if jobs > 1 and find_spec("joblib") is None:
        raise InputError(
            f"--jobs {jobs}: needs joblib; install it with  pip install 'servesim[sweep]', or leave --jobs "
            "out to run in one process"
        )


def run_parts(
    work: Callable[[PartT], Any],
    left: Callable[[], Sequence[PartT]],
    jobs: int,
) -> Iterator[Any]:
    """Do all the work there is; yields what the parts return, in any order.

    Args:
        work: does one part; importable by name, for it may run in another process.
        left: the parts that are not done yet; is asked again after workers were lost.
        jobs: processes; 1: this one.

    Raises:
        RunError: workers keep dying, for want of memory for example.
    """
    if jobs == 1:
        for part in left():
            yield work(part)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import BrokenProcessPool, TerminatedWorkerError

    losses = 0
    as_here = partial(_as_here, Path.cwd(), dict(os.environ), work)
    while parts := left():
        try:
            running = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
            for outcome in running(delayed(as_here)(part) for part in parts):
                losses = 0
                yield outcome
            return
        except (BrokenProcessPool, TerminatedWorkerError):
            losses += 1
            if losses >= _LOSSES:
                raise RunError(
                    f"worker processes died {losses} times in a row without finishing anything; there may be "
                    "too little memory: try fewer --jobs (finished rows are kept)"
                ) from None


def _as_here(folder: Path, environment: dict[str, str], work: Callable[[PartT], Any], part: PartT) -> Any:
    """``work(part)`` in a worker, as the process that asks would do it.

    Joblib keeps workers for the next call of its process. Those of an earlier sweep may stand in another
    folder, where other files have the same names, and know other variables.
    """
    os.chdir(folder)
    for name in os.environ.keys() - environment.keys():
        if name.startswith("SERVESIM_"):
            del os.environ[name]
    os.environ.update(environment)
    return work(part)


def check_ray() -> None:
    """Refuse ``--ray`` where it cannot be had.

    Raises:
        InputError: ray is missing.
    """
    if find_spec("ray") is None:
        raise InputError(
            "--ray: needs ray; install it with  pip install 'servesim[ray]', or use --jobs N for the "
            "processes of this machine"
        )


def _running_here() -> str:
    """The address of the cluster of this machine, as ``ray start`` leaves it; empty: none answers."""
    mark = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    told = os.environ.get("RAY_ADDRESS", "")
    if not told and mark.is_file():
        told = mark.read_text(encoding="utf-8").strip()
    return told if told and _answers(told) else ""


def _answers(address: str) -> bool:
    """Whether something listens at ``host:port``: Ray itself would try for minutes."""
    import socket

    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return False
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError):
        return False
    return True


class RayPool:
    """Workers on a Ray cluster, one for each of its CPUs; each item goes to one that is free.

    Workers run in this process's working directory with its package, so every node must see the same files
    under the same paths.
    """

    def __init__(self, address: str, jobs: int, tell: Callable[[str], None]) -> None:
        """
        Args:
            address: of a running cluster; ``auto``: one that runs here, else one that is started; ``local``:
                one that is started in any case.
            jobs: workers; 1: as many as the cluster has CPUs.
            tell: gets a line that says which cluster it is.

        Raises:
            InputError: no cluster can be reached at the address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault(
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
        )  # no GPU is asked for, none is hidden
        import ray

        self._ray: Any = ray
        self._own = not ray.is_initialized()
        if self._own:
            self._connect(address, jobs)
        cpus = int(ray.cluster_resources().get("CPU", 1))
        self._size = jobs if jobs > 1 else max(cpus, 1)
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        tell(f"ray: {self._size} workers on {nodes} node{'s' if nodes > 1 else ''} with {cpus} CPUs")

    def _connect(self, address: str, jobs: int) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(
            dict.fromkeys([root, *filter(None, sys.path), os.environ.get("PYTHONPATH", "")])
        )
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        setting = {**quiet, "runtime_env": {"env_vars": {"PYTHONPATH": paths.rstrip(os.pathsep)}}}
        if address == "auto":
            address = _running_here() or "local"
        if address == "local":
            cpus = jobs if jobs > 1 else None
            self._ray.init(address="local", num_cpus=cpus, include_dashboard=False, **setting)
            return
        if not _answers(address):
            raise InputError(
                f"--ray {address}: nothing answers there; start a cluster with  ray start --head, or leave "
                "the address out"
            )
        try:
            self._ray.init(address=address, **setting)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--ray {address}: the cluster cannot be used: {reason}") from None

    def run(
        self,
        make: Callable[[], Callable[[ItemT], Any]],
        items: Mapping[str, ItemT],
        lost: Callable[[str, ItemT], Any],
    ) -> Iterator[Any]:
        """What the workers make of every item, as they are finished.

        Args:
            make: what each worker calls once, for what it then calls with items; importable by name.
            items: by a key.
            lost: the outcome of an item whose worker died :data:`_LOSSES` times.
        """
        ray, folder = self._ray, Path.cwd()

        class Worker:
            """One process of the cluster."""

            def __init__(self) -> None:
                os.chdir(folder)
                self._work = make()

            def do(self, item: Any) -> Any:
                return self._work(item)

        actor = ray.remote(num_cpus=1, max_restarts=0)(Worker)
        waiting, losses = list(items), Counter[str]()
        running: dict[Any, tuple[str, Any]] = {}
        idle: list[Any] = []
        while waiting or running:
            while waiting and len(running) < self._size:
                worker = idle.pop() if idle else actor.remote()
                key = waiting.pop(0)
                running[worker.do.remote(items[key])] = key, worker
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            key, worker = running.pop(ready)
            try:
                outcome = ray.get(ready)
                idle.append(worker)
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError):
                losses[key] += 1
                if losses[key] < _LOSSES:
                    waiting.append(key)
                    continue
                outcome = lost(key, items[key])
            yield outcome
        for worker in idle:
            ray.kill(worker)

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        if self._own:
            self._ray.shutdown()
