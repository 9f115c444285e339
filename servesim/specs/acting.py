"""Says where options do not act: before the run, and from what the run has.

An option that asks for something and cannot act is refused. It is noted in one line where it only says what
holds anyway, where a cluster config brings it along for some of its instances, or where the answer is right
without it (``noted``). What an option needs: :mod:`servesim.specs.conditions`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servesim.errors import InputError
from servesim.specs.acting_keys import notes_of_keys
from servesim.specs.conditions import FIRST_RUNNER, first_runners
from servesim.specs.engine_options import EngineOptions
from servesim.specs.flags import flag_name, flag_of
from servesim.specs.model import shape_twin
from servesim.specs.vllm_versions import AWAITS_BATCHES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servesim.specs.conditions import Scene
    from servesim.specs.options import RuntimeOptions


def check_beside(options: RuntimeOptions) -> None:
    """Raise InputError for an option whose partner is missing."""
    for name in _asked_for(options):
        flag = flag_of(type(options).model_fields[name])
        reason = flag.beside(options) if flag and flag.beside else ""
        if reason:
            told = _told(name, getattr(options, name)).split(" ")[0]
            raise InputError(f"{told}: has no effect {reason}")


def notes_of(scene: Scene) -> list[str]:
    """One line for everything that was asked for and does not act, or not in full.

    Raises:
        InputError: an option was given that cannot act in this run.
    """
    return [
        *_twins(scene),
        *_notes_of_serve_line(scene.options),
        *_notes_of_speculation(scene),
        *_notes_of_pipelines(scene),
        *_notes_of_workload(scene),
        *_notes_of_flags(scene),
        *_notes_of_instances(scene),
        *notes_of_keys(scene),
    ]


def _notes_of_serve_line(options: RuntimeOptions) -> list[str]:
    if options.vllm_serve is None:
        return []
    from servesim.specs.serve_line import read_serve_line

    line = read_serve_line(options.vllm_serve)
    lost = [name for name, value in line.options.items() if getattr(options, name) != value]
    over = [f"vllm serve: other values were given beside it: {', '.join(map(flag_name, lost))}"]
    return [*line.notes, *(over if lost else [])]


def _notes_of_workload(scene: Scene) -> Iterator[str]:
    """What requests ask for and no instance heeds."""
    if scene.priorities > 1 and all(options.scheduling_policy == "fcfs" for options in scene.resolved):
        yield "the priorities of the requests have no effect here: --scheduling-policy is fcfs"
    if scene.options.max_concurrency > 1 and scene.equal_lengths:
        yield (
            "all requests are of the same length in a closed loop, so they march in lock step: prompts are "
            "computed together and come back together, and TTFT may read twice what clients see, whose "
            "lengths vary by some per cent (workload synth --input-len uniform:980:1020)"
        )


def _notes_of_speculation(scene: Scene) -> list[str]:
    """How drafts fare and where that is known from, and what was switched off for them."""
    spec = next((options.speculative for options in scene.resolved if options.speculative), None)
    if spec is None:
        return []
    rates = ", ".join(f"{rate:.3g}" for rate in spec.rates)
    found = [
        f"speculative decoding: {spec.method}, {spec.num_tokens} drafts, accepted by position {rates} (mean "
        f"{spec.acceptance_length:.2f} tokens a verification); source: {spec.source}",
        *spec.notes,
    ]
    if not spec.on_gpu and scene.options.async_scheduling and not scene.resolved[0].async_scheduling:
        found.append("async_scheduling is off: vLLM before 0.33 has none with n-gram drafts on the CPU")
    return found


def _twins(scene: Scene) -> Iterator[str]:
    for asked, model in scene.models.items():
        if asked != model.name and shape_twin(asked) == model.name:
            yield (
                f"{asked}: simulated with the config of {model.name}, which has the same shape; its context "
                f"length of {model.max_position_embeddings} tokens may differ"
            )


def _asked_for(options: RuntimeOptions) -> list[str]:
    """Options that the user set, without those set to what switches them off anyway."""
    fields = type(options).model_fields
    return [
        name
        for name in fields
        if name in options.model_fields_set
        and (getattr(options, name) or getattr(options, name) != fields[name].default)
    ]


def _told(name: str, value: object) -> str:
    """An option as one types it: ``--seed 7``, ``--no-itl``."""
    flag = flag_name(name)
    if isinstance(value, bool):
        return flag if value else "--no-" + flag.removeprefix("--")
    return f"{flag} {value}"


def _notes_of_flags(scene: Scene) -> Iterator[str]:
    options = scene.options
    for name in _asked_for(options):
        field = type(options).model_fields[name]
        flag, value = flag_of(field), getattr(options, name)
        if flag is None:
            continue
        reason = flag.acts(scene) if flag.acts else ""
        told = _told(name, value)
        noted = flag.noted or value == field.default
        shared = name not in EngineOptions.model_fields
        own = [None] if shared else [getattr(instance, name) for instance in scene.instances]
        if None not in own:
            reason = f"every instance of {scene.cluster.source} sets {name} for itself"
            noted = noted or all(theirs == value for theirs in own)
        if reason and not noted:
            raise InputError(f"{told}: has no effect here: {reason}; leave it out")
        if reason:
            yield f"{told} has no effect here: {reason}"
        elif flag.except_for and (rest := flag.except_for(scene)):
            yield f"{told}: {rest}"


def _notes_of_instances(scene: Scene) -> Iterator[str]:
    """Keys of instances that do not act, each told once."""
    for name, field in EngineOptions.model_fields.items():
        flag = flag_of(field)
        if flag is None:
            continue
        holders = [
            index
            for index, instance in enumerate(scene.instances)
            if (value := getattr(instance, name)) is not None and (value or value != field.default)
        ]
        reason = flag.acts(scene) if holders and flag.acts else ""
        rest = flag.except_for(scene) if holders and flag.except_for and not reason else ""
        where = f"{name} of instance {', '.join(map(str, holders))}"
        if reason:
            yield f"{where} has no effect here: {reason}"
        elif rest and name not in scene.options.model_fields_set:
            yield f"{where}: {rest}"


def _notes_of_pipelines(scene: Scene) -> Iterator[str]:
    """Where asynchronous scheduling, the default, is switched off."""
    version = scene.options.vllm_version
    if any(one.pp_size > 1 for one in scene.instances) and not AWAITS_BATCHES.holds(version):
        yield (
            f"vLLM {version} may admit a preempted request again while a batch of a pipeline still computes "
            f"for it; simulated as in {AWAITS_BATCHES.since}, which waits for that batch"
        )
    asked = "async_scheduling" in scene.options.model_fields_set
    held = [
        index
        for index in first_runners(scene)
        if not asked and scene.instances[index].async_scheduling is None and scene.options.async_scheduling
    ]
    if held:
        yield f"async_scheduling of instance {', '.join(map(str, held))} is off: {FIRST_RUNNER}"
