"""Speculative decoding as a user describes it: vLLM's ``--speculative-config``, and how drafts fare.

The JSON is vLLM's (0.24 to 0.33): ``method``, ``num_speculative_tokens``, ``model`` and so on. How many
drafts are accepted depends on model, drafter and text, which no simulation knows; it is stated as *rates by
position* (the share of verifications that accept at least that many drafts, as vLLM counts), taken from

1. ``synthetic_acceptance_rates`` or ``synthetic_acceptance_length`` of the JSON, vLLM's own keys for it,
2. ``--speculative-acceptance``: rates, ``decay=0.7``, or a file with either,
3. else a published measurement for the method (:data:`PUBLISHED`).
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from servesim.errors import InputError
from servesim.slotted import dataclass
from servesim.specs.reading import parse_json_object, read_json_object

OPTION = "--speculative-config"
ACCEPTANCE_OPTION = "--speculative-acceptance"
MOST_TOKENS = 64
"""Drafts of a request; more than any drafter in use proposes."""
METHODS = {
    "ngram": "ngram",
    "ngram_gpu": "ngram",
    "eagle": "eagle",
    "eagle3": "eagle3",
    "draft_model": "draft_model",
    "mtp": "mtp",
    "deepseek_mtp": "mtp",
    "glm4_moe_mtp": "mtp",
    "mimo_mtp": "mtp",
    "ernie_mtp": "mtp",
    "qwen3_next_mtp": "mtp",
}
"""vLLM's name of a method -> what is simulated."""
_UNSIMULATED = {
    "medusa": "heads that draft in parallel",
    "mlp_speculator": "a drafter of stacked MLPs",
    "suffix": "drafts from a tree of earlier answers",
    "dflash": "drafts that are filled in by one pass",
    "dspark": "drafts that are filled in by one pass",
    "extract_hidden_states": "an output of hidden states",
    "custom_class": "a drafter of your own",
}
_WITHOUT_INFLUENCE = frozenset(
    {
        *(
            "revision",
            "code_revision",
            "quantization",
            "moe_backend",
            "attention_backend",
            "draft_load_config",
        ),
        *("enforce_eager", "disable_padded_drafter_batch", "use_local_argmax_reduction"),
        *("draft_sample_method", "rejection_sample_method", "prompt_lookup_max", "prompt_lookup_min"),
    }
)
"""Keys that no simulated time depends on: noted."""


@dataclass(frozen=True, slots=True)
class Published:
    """A measured acceptance."""

    rates: tuple[float, ...]
    """By position, as far as measured; behind them each is the one before times ``decay``."""
    decay: float
    source: str


PUBLISHED = {
    "eagle3": Published(
        (0.7296, 0.5208, 0.3545),
        0.3545 / 0.5208,
        "vLLM's test of EAGLE-3 (tests/v1/spec_decode/test_acceptance_length.py): Llama-3.1-8B-Instruct with "
        "RedHatAI's speculator on MT-bench, 3 drafts",
    ),
    "eagle": Published(
        (0.76, 0.76 * 0.69, 0.76 * 0.69 * 0.67, 0.76 * 0.69 * 0.67 * 0.68, 0.76 * 0.69 * 0.67 * 0.68**2),
        0.68,
        "the EAGLE paper (Li et al., 2024, arXiv 2401.15077), table of n-alpha: Llama-2-Chat 7B on MT-bench, "
        "greedy chains",
    ),
    "mtp": Published(
        (0.85,),
        0.85,
        "the DeepSeek-V3 report (2024, arXiv 2412.19437, section 5.4.3): 85 to 90 % of the second tokens; "
        "further drafts of the same layer are not published and taken alike",
    ),
    "draft_model": Published(
        (0.65,),
        0.65,
        "Leviathan et al. (2023, arXiv 2211.17192): alpha 0.65, T5 XXL with T5 small on CNN/DailyMail",
    ),
    "ngram": Published(
        (0.43,),
        0.43,
        "Spec-Bench (Xia et al., 2024, arXiv 2401.07851): prompt lookup with Vicuna 7B accepts 0.75 drafts a "
        "step, spread as a constant chance of 0.43",
    ),
}
"""Method -> its acceptance where none is given."""


@dataclass(frozen=True, slots=True)
class SpeculativeSpec:
    """What to speculate with."""

    method: str
    """One of the values of :data:`METHODS`."""
    num_tokens: int
    """Drafts of a request in a step."""
    rates: tuple[float, ...]
    """Of verifications, those that accept at least 1, 2, … drafts."""
    source: str
    """Where the rates come from, for people."""
    model: str | None = None
    """The drafter, where it is a model of its own."""
    draft_tp: int | None = None
    """Its tensor-parallel degree; None: the target's."""
    on_gpu: bool = True
    """Whether drafting needs no host: anything but n-gram lookups on the CPU."""
    notes: tuple[str, ...] = ()
    """What was given and does not act."""

    @property
    def has_layers(self) -> bool:
        """Whether drafts come from a network, which has weights and KV of its own."""
        return self.method != "ngram"

    @property
    def reads_hidden_states(self) -> bool:
        """Whether the drafter goes on from the target's hidden states."""
        return self.method in ("eagle", "eagle3", "mtp")

    @property
    def acceptance_length(self) -> float:
        """Mean tokens of a verification, the one that is not a draft among them."""
        return 1.0 + sum(self.rates)


def speculative_spec(config: str | None, acceptance: str | None = None) -> SpeculativeSpec | None:
    """The meaning of both options; None where nothing is to be speculated.

    Raises:
        InputError: a key or value is not allowed, or its method is not simulated.
    """
    if config is None:
        return None
    entries = parse_json_object(config, OPTION)
    method = _method(entries)
    tokens = _tokens(entries)
    known = {
        "method",
        "model",
        "num_speculative_tokens",
        "draft_tensor_parallel_size",
        "tensor_parallel_size",
    }
    known |= {"synthetic_acceptance_rates", "synthetic_acceptance_length"}
    for key in entries:
        if key not in known | _WITHOUT_INFLUENCE:
            raise InputError(
                f"{OPTION}: {key} is not simulated; leave it out (keys that act: {', '.join(sorted(known))})"
            )
    if method in ("draft_model", "eagle", "eagle3") and not isinstance(entries.get("model"), str):
        raise InputError(f'{OPTION}: method {method} needs the drafter\'s name: "model": "..."')
    rates, source = _rates(entries, acceptance, METHODS[method], tokens)
    inert = [key for key in entries if key in _WITHOUT_INFLUENCE and key != "rejection_sample_method"]
    degree = entries.get("draft_tensor_parallel_size", entries.get("tensor_parallel_size"))
    if degree is not None and (type(degree) is not int or degree < 1):
        raise InputError(f"{OPTION}: draft_tensor_parallel_size {degree!r} is not allowed; must be >= 1")
    return SpeculativeSpec(
        METHODS[method],
        tokens,
        rates,
        source,
        model=entries.get("model") if METHODS[method] in ("draft_model", "eagle", "eagle3") else None,
        draft_tp=degree,
        on_gpu=method != "ngram",
        notes=(f"{OPTION}: {', '.join(inert)}: without influence",) if inert else (),
    )


def _method(entries: dict[str, Any]) -> str:
    """The method that the JSON names or implies, as vLLM finds it."""
    method, model = entries.get("method"), entries.get("model")
    if method is None and isinstance(model, str):
        name = model.lower()
        if name in ("ngram", "[ngram]"):
            method = "ngram"
        else:
            method = "eagle3" if "eagle3" in name else "eagle" if "eagle" in name else "draft_model"
    if method in _UNSIMULATED:
        raise InputError(
            f"{OPTION}: method {method} is not simulated ({_UNSIMULATED[method]}); "
            f"simulated: {', '.join(dict.fromkeys(METHODS.values()))}"
        )
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(
            f"{OPTION}: method {json.dumps(method)} is not allowed; must be one of {', '.join(METHODS)}"
        )
    return method


def _tokens(entries: dict[str, Any]) -> int:
    tokens = entries.get("num_speculative_tokens")
    if type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS:
        raise InputError(
            f"{OPTION}: num_speculative_tokens {json.dumps(tokens)} is not allowed; must be a number from 1 "
            f"to {MOST_TOKENS}"
        )
    return tokens


def _rates(
    entries: dict[str, Any], acceptance: str | None, method: str, tokens: int
) -> tuple[tuple[float, ...], str]:
    """(rates by position, where they come from)."""
    stated, length = entries.get("synthetic_acceptance_rates"), entries.get("synthetic_acceptance_length")
    if stated is not None or length is not None:
        if acceptance is not None:
            raise InputError(f"{ACCEPTANCE_OPTION}: {OPTION} states the acceptance already; leave one out")
        if stated is not None and length is not None:
            raise InputError(f"{OPTION}: give synthetic_acceptance_rates or _length, not both")
        if stated is not None:
            return _checked(
                stated, tokens, f"{OPTION}: synthetic_acceptance_rates"
            ), "synthetic_acceptance_rates"
        return _of_length(length, tokens), f"synthetic_acceptance_length {length}"
    if acceptance is None:
        published = PUBLISHED[method]
        source, known = published.source, len(published.rates)
        if tokens > known > 1:
            source += (
                f" (beyond {known} drafts each rate is taken as {published.decay:.2f} of the one before)"
            )
        return _extended(published.rates, published.decay, tokens), source
    text, where = acceptance.strip(), ACCEPTANCE_OPTION
    if not text.startswith("decay=") and any(letter.isalpha() or letter == "/" for letter in text):
        return _of_file(text, tokens)
    if text.startswith("decay="):
        return _extended((), _number(text.removeprefix("decay="), where), tokens), f"{where} {text}"
    rates = [_number(word, where) for word in text.split(",")]
    return _checked(rates, tokens, where), where


def _of_file(path: str, tokens: int) -> tuple[tuple[float, ...], str]:
    """Rates of a file: ``{"rates": [...]}``, ``{"decay": 0.7}`` or both, and the ``source`` if it has one."""
    content = read_json_object(Path(path))
    unknown = set(content) - {"rates", "decay", "source"}
    if unknown or not ({"rates", "decay"} & set(content)):
        raise InputError(
            f"{path}: {', '.join(sorted(unknown)) or 'no rates'}: not allowed; must be an object with rates "
            "(a list by position), decay (what each further rate is multiplied with), and source (text)"
        )
    rates = content.get("rates", [])
    if not isinstance(rates, list):
        raise InputError(f"{path}: rates: must be a list of numbers")
    source = str(content.get("source", path))
    if "decay" in content:
        decay = _number(content["decay"], path)
        given = _checked(rates, len(rates), f"{path}: rates") if rates else ()
        return _extended(given, decay, tokens), source
    return _checked(rates, tokens, f"{path}: rates"), source


def _extended(rates: tuple[float, ...], decay: float, tokens: int) -> tuple[float, ...]:
    found = list(rates[:tokens])
    while len(found) < tokens:
        found.append((found[-1] if found else 1.0) * decay)
    return tuple(round(rate, 6) for rate in found)


def _of_length(length: object, tokens: int) -> tuple[float, ...]:
    """Rates of a mean acceptance length: as many drafts as fit always, one more sometimes (as vLLM does)."""
    if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length <= tokens + 1:
        raise InputError(
            f"{OPTION}: synthetic_acceptance_length {json.dumps(length, default=str)} is not allowed; must "
            f"be 1 to {tokens + 1}"
        )
    whole = int(length - 1)
    rates = [1.0] * whole + [length - 1 - whole] + [0.0] * tokens
    return tuple(rates[:tokens])


def _checked(rates: object, tokens: int, where: str) -> tuple[float, ...]:
    if not isinstance(rates, list) or len(rates) < tokens:
        raise InputError(f"{where}: {rates!r} is not allowed; must be {tokens} numbers, one a position")
    numbers = [_number(rate, where) for rate in rates[:tokens]]
    if any(later > earlier for earlier, later in pairwise(numbers)):
        raise InputError(
            f"{where}: {rates!r} is not allowed; a rate must not be above the one before, since a draft is "
            "only accepted if those before it are"
        )
    return tuple(numbers)


def _number(value: object, where: str) -> float:
    try:
        number = (
            float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
        )
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise InputError(f"{where}: {value!r} is not allowed; a rate must be a number from 0 to 1")
    return number
