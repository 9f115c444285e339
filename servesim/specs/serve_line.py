"""Reads a deployment's own command line, ``vllm serve MODEL --tensor-parallel-size 4 ...``.

Every argument ends in one of four ways: it sets an option, it has no influence on a simulation, what it asks
for is not simulated, or it is unknown. The last two are refused, all of them in one message.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError, MissingFileError
from servesim.slotted import dataclass
from servesim.specs.reading import read_yaml_object
from servesim.specs.serve_arguments import (
    ELSEWHERE,
    HARMLESS,
    KERNEL_SWITCHES,
    KERNELS,
    KNOWN,
    LISTS,
    NOT_SIMULATED,
    OWN,
    OWN_SWITCHES,
    SWITCHES,
    canonical,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NEAR = 0.75
"""Share of like letters from which on a name is offered for one that is unknown."""
_DTYPES = {"half": "float16", "float": "float32"}
_WHOLE = frozenset(
    {
        *("tp", "pp", "dp", "block_size", "max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks"),
        *("long_prefill_token_threshold", "max_num_active_seqs", "max_num_scheduled_tokens"),
        *("prefill_schedule_interval", "max_loras", "max_num_queued_reqs", "max_num_queued_tokens"),
        "decode_context_parallel_size",
    }
)
_SAYS_NOTHING = frozenset({("--dtype", "auto"), ("--max-model-len", "None")})


@dataclass(slots=True)
class ServeLine:
    """What a command line of ``vllm serve`` comes to."""

    options: dict[str, Any] = field(default_factory=dict)
    """Run option -> value."""
    used: list[str] = field(default_factory=list)
    """Arguments that set an option, as they were written."""
    without_influence: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    """Arguments that choose kernels or graphs, which are the bundle's all the same."""

    @property
    def notes(self) -> list[str]:
        """What became of every argument, a line for each way."""
        lines = [
            ("used", self.used),
            ("without influence", self.without_influence),
            ("not followed, as kernel times and captured graphs are the bundle's", self.kernels),
        ]
        return [f"vllm serve: {told}: {', '.join(words)}" for told, words in lines if words]


def read_serve_line(text: str) -> ServeLine:
    """Read a command line, or the YAML file (``.yaml``, ``.yml``) of its arguments.

    Raises:
        InputError: an argument is unknown or asks for what is not simulated, or a value is missing.
        MissingFileError: there is no such file.
    """
    line = ServeLine()
    refused: list[str] = []
    for name, value in _arguments(text):
        reason = _take(line, name, value)
        if reason:
            refused.append(f"{name}: {reason}")
    if refused:
        raise InputError(
            "--vllm-serve: " + "; ".join(refused) + "; leave out what is refused to simulate the rest"
        )
    return line


def write_serve_line(options: Mapping[str, Any]) -> str:
    """The command line that :func:`read_serve_line` reads as ``options``, which hold a ``model``.

    Options that vLLM has no argument for are left out.
    """
    words = ["vllm", "serve", str(options["model"])]
    flags = {option: flag for flag, option in reversed(OWN.items()) if flag.startswith("--")}
    switches = {option: (flag, says) for flag, (option, says) in reversed(OWN_SWITCHES.items())}
    for option, value in options.items():
        if option in ("model", "preset") or value is None:
            continue
        if option == "dtype":
            words += ["--quantization" if value == "fp8" else "--dtype", str(value)]
        elif option in flags:
            several = flags[option] in LISTS  # vLLM takes no commas
            words += [flags[option], *(str(value).split(",") if several else [str(value)])]
        elif option in switches:
            flag, says = switches[option]
            if value is says:
                words.append(flag)
            elif says:
                words.append(f"--no-{flag.removeprefix('--')}")
    return shlex.join(words)


def _arguments(text: str) -> Iterator[tuple[str, str | None]]:
    """(name as written, value or None) of every argument; a later one wins, and the line over its file."""
    if text.strip().endswith((".yaml", ".yml")) and len(text.split()) == 1:
        yield from _of_file(text.strip())
        return
    try:
        words = [word for word in shlex.split(text) if word.strip()]
    except ValueError as error:
        raise InputError(f"--vllm-serve: cannot be split into words: {error}") from None
    while words and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", words[0], re.DOTALL):
        yield words.pop(0).partition("=")[0], None
    if words[:2] == ["vllm", "serve"]:
        words = words[2:]
    elif words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]:
        words = words[3:]
    else:
        raise InputError(
            "--vllm-serve: must begin with `vllm serve`, or be the path of a .yaml file with its arguments; "
            f"found {' '.join(words[:2]) or 'nothing'!r}"
        )
    pairs = list(_pairs(words))
    for name, value in pairs:
        if name == "--config":
            yield from _of_file(value or "")
    yield from (pair for pair in pairs if pair[0] != "--config")


def _of_file(path: str) -> Iterator[tuple[str, str | None]]:
    if not Path(path).is_file():
        raise MissingFileError(f"--vllm-serve: {path} does not exist")
    for key, value in read_yaml_object(Path(path)).items():
        name = "--" + str(key).lstrip("-")
        if isinstance(value, bool):
            known, opposite = canonical(name)
            if value or known in SWITCHES:
                yield (name, None) if value else (known if opposite else "--no-" + known[2:], None)
        elif isinstance(value, list):
            yield name, " ".join(map(str, value))
        else:
            yield name, json.dumps(value) if isinstance(value, dict) else str(value)


def _pairs(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Words of a line as (name, value); the model, which stands alone, as ``--model``."""
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not _is_name(word):
            yield "--model", word
            continue
        name, equals, value = word.partition("=")
        if re.fullmatch(r"-O.+", word):
            name, equals, value = "-O", "=", word[2:]
        known = canonical(name.partition(".")[0])[0]
        if equals:
            yield name, value
        elif known in SWITCHES:
            yield name, None
        else:
            values: list[str] = []
            while place < len(words) and not _is_name(words[place]) and (not values or known in LISTS):
                values.append(words[place])
                place += 1
            yield name, " ".join(values) if values else None


def _is_name(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-\d.*", word)


def _take(line: ServeLine, name: str, value: str | None) -> str:
    """Put one argument where it belongs; returns why it is refused, or an empty text."""
    told = name if value is None else f"{name} {value}"
    if not name.startswith("-"):  # an environment variable
        line.without_influence.append(name)
        return ""
    known, opposite = canonical(name.partition(".")[0])
    if known not in KNOWN:
        near = get_close_matches(known, sorted(KNOWN), n=2, cutoff=_NEAR)
        return "unknown" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if known in SWITCHES and value is not None:
        return f"{value!r} is not allowed; it takes no value"
    if known not in SWITCHES and value is None:
        return "its value is missing"
    if known in OWN_SWITCHES:
        option, says = OWN_SWITCHES[known]
        line.options[option] = says is not opposite
        line.used.append(told)
    elif known in OWN:
        return _take_value(line, known, value or "", told)
    elif known in KERNELS or known in KERNEL_SWITCHES:
        line.kernels.append(told)
    elif known in ELSEWHERE or known in NOT_SIMULATED:
        if not opposite and value not in HARMLESS.get(known, ()):
            return ELSEWHERE.get(known) or f"not simulated: {NOT_SIMULATED[known]}"
        line.without_influence.append(told)
    else:
        line.without_influence.append(told)
    return ""


def _take_value(line: ServeLine, known: str, value: str, told: str) -> str:
    option = OWN[known]
    line.used.append(told)
    if (known, value) in _SAYS_NOTHING:
        return ""
    if known in ("--quantization", "-q"):
        if value != "fp8":
            return f"{value} is not allowed; only fp8 is, as the checkpoint says every other format itself"
        line.options[option] = "fp8"
        return ""
    if known == "--dtype":
        if "dtype" not in line.options:  # of the activations, where weights are quantised
            line.options["dtype"] = _DTYPES.get(value, value)
        return ""
    if option in _WHOLE:
        from servesim.specs.engine_options import human_number

        number = human_number(value)
        if number is None:
            return f"{value!r} is not allowed; must be a whole number"
        line.options[option] = number
    elif option in ("npu_memory_utilization", "watermark"):
        try:
            line.options[option] = float(value)
        except ValueError:
            return f"{value!r} is not allowed; must be a number"
    else:
        line.options[option] = value
    return ""
