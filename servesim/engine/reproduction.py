"""Saves what it takes to see a fault of the simulator again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from servesim.specs.options import output_fields
from servesim.workload.generators import write_jsonl

if TYPE_CHECKING:
    from servesim.specs.cluster import ClusterSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.workload.request import Workload


_APPLIED = ("hardware", "model", "tp", "num_reqs", "lenient", "request_rate")
"""Options that the loaded cluster and workload hold already."""


def save_reproduction(cluster: ClusterSpec, workload: Workload, options: RuntimeOptions) -> Path:
    """Write the input of a run to a new folder among the temporary files and return the folder.

    In the folder, this is the run again::

        servesim.simulate("cluster.json", "workload.jsonl.gz", **json.load(open("options.json")))

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix="servesim-fault-"))
    described = cluster.model_dump(mode="json", exclude_unset=True)
    chosen = options.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"cluster_config", "dataset", "run_id", *_APPLIED, *output_fields()},
    )
    for name, content in (("cluster.json", described), ("options.json", chosen)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_jsonl(workload, folder / "workload.jsonl.gz")
    return folder
