"""What is looked at before a run: what is refused, what the user is warned of, and which options cannot act.

``engine/build.py`` asks all of it while it makes the instances. What a description alone can get wrong is
refused elsewhere: a single value where its option is declared (``specs/options.py``), a cluster in
``specs/cluster_checks.py``, an instance that vLLM would not start in ``memory/start_up.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from servesim.cost.bundle import range_warnings
from servesim.errors import InputError
from servesim.results.stated_errors import PER_VERSION, minor_versions_apart
from servesim.specs.block_layers import ATTENTION_KINDS, attention_groups
from servesim.specs.conditions import Scene
from servesim.specs.speculative import OPTION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from servesim.cost.bundle import Bundle
    from servesim.memory.plan import KvCapacity
    from servesim.specs.cluster import ClusterSpec, InstanceSpec
    from servesim.specs.instance_options import InstanceOptions
    from servesim.specs.model import ModelSpec
    from servesim.specs.options import RuntimeOptions
    from servesim.specs.speculative import SpeculativeSpec
    from servesim.workload.request import Workload

FAR_APART = 5
"""Minor versions of vLLM between the tables and the one asked for, from which on a run warns."""
_ONE_FOR_ALL = (
    *("async_scheduling", "enable_block_copy"),
    *("decode_context_parallel_size", "dcp_comm_backend"),
)
"""Options that a lock-step group has one of: they say how waves follow each other and what layers share."""
_FORMAT_IN_NAME = re.compile(
    r"[-_.](fp8|nvfp4|fp4|mxfp4|int8|int4|awq|gptq|w4a16|w8a8)([-_.]|$)", re.IGNORECASE
)


def check_requested_models(cluster: ClusterSpec, workload: Workload) -> None:
    """Raise InputError if a request asks for a model that no instance serves."""
    served = {spec.model_name for _, spec in cluster.instances}
    for request in workload.special:
        if request.model and request.model not in served:
            raise InputError(
                f"{workload.source}: request {request.index} asks for model {request.model}, which no "
                f"instance serves; served: {', '.join(sorted(served))}"
            )


def check_adapters(cluster: ClusterSpec, workload: Workload, resolved: Sequence[InstanceOptions]) -> None:
    """Raise InputError if a request names an adapter and may come to an instance that serves none."""
    without = [
        (index, spec.model_name)
        for index, (_, spec) in enumerate(cluster.instances)
        if not resolved[index].enable_lora
    ]
    if not without:
        return
    for request in (request for request in workload.special if request.lora is not None):
        for index, model in without:
            if request.model in (None, model):
                raise InputError(
                    f"{workload.source}: request {request.index} names the LoRA adapter {request.lora}, and "
                    f"instance {index} serves none; add --enable-lora, with --max-loras for more than one in "
                    "a step"
                )


def check_agreement(
    placed: Sequence[tuple[int, InstanceSpec]], group: Sequence[int], resolved: Mapping[int, InstanceOptions]
) -> None:
    """Raise InputError if instances that go in lock-step want to be run in different ways.

    Args:
        placed: (node, spec) of every instance.
        group: indices of the instances that go in lock-step.
        resolved: index of each of them -> its options.
    """
    first = group[0]
    for name in _ONE_FOR_ALL:
        wanted = getattr(resolved[first], name)
        for index in group[1:]:
            own = getattr(resolved[index], name)
            if own != wanted:
                raise InputError(
                    f"instance {index}: {name} {str(own).lower()} is not allowed; must be "
                    f"{str(wanted).lower()} as in instance {first}, the same dp_group "
                    f"'{placed[first][1].dp_group}'"
                )


def check_speculation(drafts: SpeculativeSpec, model: ModelSpec, capacity: KvCapacity) -> None:
    """Refuse speculative decoding that is not simulated with this model.

    Raises:
        InputError: not all layers keep every token, or MTP is asked for and the model has no layers for it or
            a module of its own for every draft.
    """
    if capacity.plan is not None:
        raise InputError(
            f"{OPTION}: speculative decoding is not simulated with {model.name}, whose layers do not "
            "all keep every token; leave it out, or choose a model of full attention"
        )
    modules = len(model.layers.mtp)
    if drafts.method == "mtp" and not modules:
        raise InputError(
            f"{OPTION}: method mtp: {model.name} has no MTP layers (num_nextn_predict_layers in its config); "
            "choose another method"
        )
    if drafts.method == "mtp" and modules > 1 and drafts.num_tokens > 1:
        raise InputError(
            f"{OPTION}: method mtp: {model.name} has {modules} MTP modules, one for each draft, which is not "
            "simulated; give num_speculative_tokens 1"
        )


def warnings_about(bundle: Bundle, model: ModelSpec, options: InstanceOptions) -> list[str]:
    """What a user should know before trusting a run of this instance."""
    found = bundle.unstated()
    found += range_warnings(bundle, options.max_num_batched_tokens, options.max_num_seqs)
    found += _weight_warnings(model)
    if (apart := minor_versions_apart(bundle.meta, options.plan_as_vllm)) >= FAR_APART:
        found.append(
            f"the kernel times are of vLLM {bundle.meta['vllm_version']}, {apart} minor versions from "
            f"--vllm-version {options.plan_as_vllm}; each widens the band of the figures by "
            f"{PER_VERSION * 100:.1f} %"
        )
    if len(attention_groups(model.layers)) > 1 and ATTENTION_KINDS not in bundle.meta:
        found.append(
            f"{model.name}: its layers attend in several ways, and the bundle has one table of attention for "
            "all (it was made by an older version); make it again with servesim profile --force"
        )
    return found


def _weight_warnings(model: ModelSpec) -> list[str]:
    """What a user should know about the format of a checkpoint's weights."""
    formats = model.layers.formats
    if formats.method is None and (named := _FORMAT_IN_NAME.search(model.name)) and not model.is_8bit:
        return [
            f"{model.name}: the name says {named[1]}, but no quantization_config in its config.json and no "
            f"hf_quant_config.json beside it; taken as {model.torch_dtype}"
        ]
    return []


def scene(
    cluster: ClusterSpec,
    models: Mapping[str, ModelSpec],
    resolved: Sequence[InstanceOptions],
    workload: Workload,
    options: RuntimeOptions,
) -> Scene:
    """The run as its options see it."""
    special = workload.special
    plain = len(special) < len(workload)  # there are others, which say nothing of all this
    return Scene(
        cluster=cluster,
        models=models,
        resolved=tuple(resolved),
        options=options,
        num_requests=len(workload),
        has_sessions=any(request.predecessor >= 0 for request in special),
        priorities=len({request.priority for request in special} | ({0} if plain else set())),
        has_ids=any(request.has_ids for request in special),
        adapters=len({request.lora for request in special} - {None}),
        names_models=not plain and all(request.model is not None for request in special),
        drawn_arrivals=workload.drawn_arrivals,
        equal_lengths=_equal_lengths(workload),
    )


def _equal_lengths(workload: Workload) -> bool:
    """Whether all prompts, and all answers, are of one length; a single request says nothing."""
    lengths = [workload.column(name) for name in ("input_tokens", "output_tokens")]
    return len(workload) > 1 and all(bool((each == each[0]).all()) for each in lengths)
