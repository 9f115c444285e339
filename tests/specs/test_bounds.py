"""Every number that a user can write has bounds, and no file of any size or depth takes much memory."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import pytest

from servesim.__main__ import main
from servesim.errors import InputError
from servesim.specs.annotated import Declared
from servesim.specs.architecture import Architecture
from servesim.specs.checked import Checked
from servesim.specs.cluster import ClusterSpec
from servesim.specs.families import read_layers
from servesim.specs.hardware import HardwareSpec
from servesim.specs.model import ModelSpec
from servesim.specs.options import RuntimeOptions
from servesim.specs.pim import PimSpec
from servesim.specs.reading import read_json_object, read_text, read_yaml_object
from servesim.specs.validation import shown, validated

if TYPE_CHECKING:
    from collections.abc import Iterator

SPECS = (Architecture, ClusterSpec, HardwareSpec, ModelSpec, PimSpec, RuntimeOptions)
MODELS = Path(__file__).parents[1] / "golden" / "models"
NO_UPPER_BOUND = {"RuntimeOptions.request_rate"}  # inf means that all requests arrive at once


Number = tuple[str, tuple[Any, ...]]


def numbers(
    annotation: Any, constraints: tuple[Any, ...], name: str
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(name, constraints) of every int and float inside a type."""
    if get_origin(annotation) is Annotated:
        yield from numbers(get_args(annotation)[0], (*constraints, *annotation.__metadata__), name)
    elif isinstance(annotation, type) and issubclass(annotation, Checked):
        for key, field in annotation.model_fields.items():
            yield from numbers(field.annotation, tuple(field.metadata), f"{annotation.__name__}.{key}")
    elif get_origin(annotation) is typing.Literal:
        return
    elif get_args(annotation):
        # What is said of a list or dict as a whole says nothing of its numbers; what is said of a union does.
        kept = () if get_origin(annotation) in (tuple, list, dict) else constraints
        for argument in get_args(annotation):
            yield from numbers(argument, kept, name)
    elif annotation in (int, float):
        yield name, constraints


def bounds(constraints: tuple[Any, ...]) -> tuple[float, float]:
    """The lowest and highest value that is allowed."""
    low, high = -math.inf, math.inf
    for entry in constraints:
        if isinstance(entry, Declared):
            low = low if entry.ge is None else max(low, entry.ge)
            high = high if entry.le is None else min(high, entry.le)
    return low, high


NUMBERS = sorted({item for spec in SPECS for item in numbers(spec, (), "")}, key=lambda item: item[0])


@pytest.mark.parametrize(("name", "constraints"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_every_number_has_sane_bounds(name: str, constraints: tuple[Any, ...]) -> None:
    low, high = bounds(constraints)
    assert math.isfinite(low), "no lower bound (ge)"
    assert math.isfinite(high) or name in NO_UPPER_BOUND, "no upper bound (le)"
    assert low <= 0 or low >= 1e-9, "so small a number overflows what it divides"
    assert high in (math.inf, 2**63 - 1) or high <= 1e12


def test_the_walk_over_the_specs_finds_their_numbers() -> None:
    names = {name for name, _ in NUMBERS}
    assert len(names) > 100
    assert {"ClusterSpec.link_bw", "RooflineSpec.link_share", "DramChannel.capacity_gb"} <= names


def test_a_bound_that_is_broken_is_told() -> None:
    data = {"dram": {"capacity_gb": 1e-308}, "attention": {"slope": 1, "intercept": 1}}
    with pytest.raises(InputError, match=r"dram\.capacity_gb: 1e-308 is not allowed; must be >= 1e-06 GB"):
        validated(PimSpec, data, "x")


def traced_peak(path: Path, read: Any, message: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_config_without_end_is_refused(tmp_path: Path) -> None:
    from pathlib import Path as AnyPath

    for read in (read_text, read_json_object, read_yaml_object):
        assert traced_peak(AnyPath("/dev/zero"), read, "holds zero bytes") < 200 << 20
    long = tmp_path / "long.json"
    with long.open("wb") as handle:
        handle.write(b'{"a": "' + b"x" * (65 << 20))
    assert traced_peak(long, read_json_object, "more than 64 MiB, which no configuration has") < 200 << 20


def test_the_limit_of_other_files_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"1\n" * (1 << 20))
    assert len(read_text(path)) == 2 << 20
    monkeypatch.setenv("SERVESIM_MAX_INPUT_MIB", "1")
    with pytest.raises(InputError, match=r"has more than 1 MiB; .* SERVESIM_MAX_INPUT_MIB"):
        read_text(path)


@pytest.mark.parametrize("text", ['{"a": ' * 100_000, "[" * 100_000, "a: [" * 20_000])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep"
    path.write_text(text)
    for read in (read_json_object, read_yaml_object):
        with pytest.raises(InputError):
            read(path)


def laughs(line: str) -> str:
    """Twenty lines, each of which repeats the one before ten times."""
    lines = ["a0: &a0 {k: 1, l: 2}"]
    lines += [line.format(n=n, uses=", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 20)]
    return "\n".join(lines)


def test_yaml_that_repeats_itself_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(laughs("a{n}: &a{n} [{uses}]"))
    found = read_yaml_object(path)
    assert len(shown(found["a19"])) <= 60
    with pytest.raises(InputError, match=re.escape("a0: unknown key")):
        validated(HardwareSpec, {"name": "x", **found}, "x.yaml")
    with pytest.raises(InputError, match=r"peak_tflops"):
        validated(HardwareSpec, {"name": "x", "peak_tflops": {"a": found["a19"]}}, "x.yaml")
    path.write_text(laughs("a{n}: &a{n} {{<<: [{uses}]}}"))
    with pytest.raises(InputError, match=r"line 2 column \d+: not valid YAML: merge keys \(<<\)"):
        read_yaml_object(path)


def test_an_argument_in_another_encoding_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (
        "--request-routing-policy",
        "--expert-routing-policy",
        "--dataset",
        "--hardware",
        "--run-id",
    ):
        assert main(["run", flag, "caf\udce9"]) == 2
        assert "caf" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^options: .*must be text in UTF-8"):
        RuntimeOptions(request_routing_policy="\udce9:f")


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"smile": "\\ud83d\\ude00",\n "path": "\\\\ud83d"}')
    assert read_json_object(path) == {"smile": "\U0001f600", "path": "\\ud83d"}
    for text in ("\\ud83d", "\\uD83D \\ude00", "\\ude00"):
        path.write_text('{"a": 1,\n "b": "' + text + '"}')
        with pytest.raises(InputError, match=r"line 2: \\u[dD][8eE][0-9a-fA-F]{2} is half a character"):
            read_json_object(path)


LAYER_COUNTS = re.compile(r"(vt_|mtp_)?num_hidden_layers|depth|n_layers?|num_layers|num_nextn_predict_layers")


def with_many_layers(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config once for each count of layers in it, with that count far too high."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ({**config, key: inner} for inner in with_many_layers(value))
        elif LAYER_COUNTS.fullmatch(key) and isinstance(value, int) and value:
            yield {**config, key: 26_999_999}


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.json")), ids=lambda path: path.stem)
def test_a_count_of_layers_is_bounded(path: Path) -> None:
    """Decoder, encoder, vision tower, drafting layers: each layer would take memory."""
    mutants = list(with_many_layers(json.loads(path.read_text())))
    assert mutants
    for config in mutants:
        with pytest.raises(InputError, match=r"(is|are) not allowed"):
            read_layers(config, path.name)
