"""Do the class names of profiler/models/*.yaml exist in the installed vLLM, where a profiler looks?

    python benchmarks/vllm_classes.py        # needs vLLM and PyTorch, no GPU

For every architecture file the Python module of its model in vLLM is imported, and every ``class`` and
``within`` is looked up: by the name of a class, of one it derives from, or of an alias in the model's module.
Exit status 1 when one is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from importlib import import_module, metadata
from pathlib import Path

LAYERS = (
    "vllm.model_executor.layers.activation",
    "vllm.model_executor.layers.layernorm",
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.logits_processor",
    "vllm.model_executor.layers.rotary_embedding",
    "vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope",
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm.model_executor.layers.attention",
    "vllm.v1.sample.sampler",
    "torch.nn",
)


def known_classes(model_type: str) -> set[str]:
    """Names that modules of this model can answer to."""
    names: set[str] = set()
    own = f"vllm.model_executor.models.{model_type}"
    wanted = [*LAYERS, own]
    for name in wanted:
        try:
            module = import_module(name)
        except ImportError as error:
            print(f"  cannot import {name}: {error}")
            continue
        for alias, value in vars(module).items():
            if inspect.isclass(value):
                names |= {alias, *(cls.__name__ for cls in value.__mro__)}
                if name == own and value.__module__ == own:  # Phi-3 is Llama, whose module makes its layers
                    bases = {cls.__module__ for cls in value.__mro__[1:]} - {*wanted}
                    wanted += sorted(base for base in bases if base.startswith("vllm."))
    return names


def check_step_types() -> int:
    """Build a step with vLLM's own types, as the worker extension does."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from vllm import SamplingParams
    from vllm.v1.core.sched import output

    from servesim.profiler.vllm_source.steps import StepMaker, requests_of

    maker = StepMaker(output, SamplingParams(temperature=0.0), num_blocks=100)
    step = maker.output(requests_of(32, 64, [(3, 40)]))
    again = maker.output(requests_of(0, 0, [(1, 16)]))
    wrong = step.total_num_scheduled_tokens != 35 or len(again.finished_req_ids) != 4
    fields = [field.name for field in dataclasses.fields(step)]
    print(f"SchedulerOutput of {len(fields)} fields: {'WRONG' if wrong else 'built'}")
    return int(wrong)


def check_worker() -> int:
    """vLLM refuses an extension with a name its worker has; the worker must have what the extension calls."""
    from vllm.v1.worker.gpu_worker import Worker

    from servesim.profiler.vllm_source.extension import LayerTimes

    taken = [name for name in dir(LayerTimes) if not name.startswith("__") and hasattr(Worker, name)]
    absent = [name for name in ("execute_model", "sample_tokens") if not hasattr(Worker, name)]
    print(f"worker extension: {'WRONG: ' + ', '.join(taken + absent) if taken or absent else 'fits'}")
    return len(taken) + len(absent)


def main() -> int:
    """Check every architecture file; returns the exit status."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    import yaml

    try:
        print(f"vLLM {metadata.version('vllm')}")
    except metadata.PackageNotFoundError:
        print("vLLM is not installed; see https://docs.vllm.ai", file=sys.stderr)
        return 2
    missing = check_step_types() + check_worker()
    for path in sorted((Path(__file__).resolve().parent.parent / "profiler" / "models").glob("*.yaml")):
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = known_classes(described["model_type"])
        entries = {layer: entry for table in described["catalog"].values() for layer, entry in table.items()}
        wanted = {
            (layer, name)
            for layer, entry in entries.items()
            for name in (entry["class"], entry.get("within"))
        }
        absent = sorted(f"{layer}: {name}" for layer, name in wanted if name and name not in known)
        print(
            f"{path.name}: {len(entries)} layers, {'missing ' + ', '.join(absent) if absent else 'all found'}"
        )
        missing += len(absent)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
