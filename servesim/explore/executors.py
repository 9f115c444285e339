"""Where the parts of a sweep run: in this process, or spread over several by joblib (extra ``sweep``)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from servesim.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PartT = TypeVar("PartT")
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
    while parts := left():
        try:
            running = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
            for outcome in running(delayed(work)(part) for part in parts):
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
