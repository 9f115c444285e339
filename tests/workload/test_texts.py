"""ShareGPT conversations become requests by a tokenizer."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from servesim.__main__ import main
from servesim.errors import InputError
from servesim.workload.description import describe
from servesim.workload.entries import EntryError
from servesim.workload.formats import load_workload
from servesim.workload.texts import first_exchange

needs_tokenizers = pytest.mark.skipif(
    find_spec("tokenizers") is None, reason="needs the package tokenizers: pip install 'servesim[tokenizer]'"
)
WORDS = ("?", "<s>", "who", "wrote", "the", "iliad", "odyssey", "homer", "did")
"""Token ids are the places in this list."""


def turns(*said: str, names: tuple[str, str] = ("human", "gpt")) -> dict[str, Any]:
    """A conversation in which the two speak by turns."""
    return {"id": "x", "conversations": [{"from": names[i % 2], "value": s} for i, s in enumerate(said)]}


ILIAD = turns("who wrote the iliad", "homer did")
ODYSSEY = turns("who wrote the odyssey", "homer wrote the odyssey", "who", "homer")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder with a tokenizer of whole words that puts <s> before a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)  # as published files have it; lengths are lengths nevertheless
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def written(folder: Path, *conversations: object, form: str = "list") -> Path:
    path = folder / "ShareGPT_V3.json"
    texts = [json.dumps(conversation) for conversation in conversations]
    wholes = {
        "list": f"[{', '.join(texts)}]",
        "pretty": json.dumps(list(conversations), indent=2),
        "lines": "\n".join(texts),
    }
    path.write_text(wholes[form], encoding="utf-8")
    return path


@needs_tokenizers
@pytest.mark.parametrize("form", ["list", "pretty", "lines"])
def test_the_first_question_is_the_prompt(form: str, tmp_path: Path, words: Path) -> None:
    path = written(tmp_path, ILIAD, ODYSSEY, form=form)
    first, second = load_workload(path, tokenizer=words)
    assert first.input_ids is not None
    assert first.input_ids.tolist() == [1, 2, 3, 4, 5]  # <s> who wrote the iliad
    assert first.output_ids is not None
    assert first.output_ids.tolist() == [7, 8]
    assert (second.input_tokens, second.output_tokens, second.arrival_ns) == (5, 4, 0)


@needs_tokenizers
def test_a_tokenizer_is_a_file_or_a_folder_with_one(tmp_path: Path, words: Path) -> None:
    path = written(tmp_path, ILIAD)
    lengths = [len(load_workload(path, tokenizer=place)) for place in (words, words / "tokenizer.json")]
    assert lengths == [1, 1]


@needs_tokenizers
def test_prompts_that_begin_alike_share_their_prefix(tmp_path: Path, words: Path) -> None:
    workload = load_workload(written(tmp_path, ILIAD, ODYSSEY), tokenizer=words)
    assert describe(workload, block_size=4)["reusable_prompt_tokens"] == 4


@needs_tokenizers
def test_conversations_without_an_answer_are_left_out_and_counted(tmp_path: Path, words: Path) -> None:
    one = turns("who")
    empty = turns("who", "")
    path = written(tmp_path, one, empty, ILIAD, {"conversations": []}, ODYSSEY)
    workload = load_workload(path, tokenizer=words)
    assert (len(workload), workload.skipped) == (2, 3)
    assert [request.index for request in workload] == [0, 1]
    taken = load_workload(path, tokenizer=words, num_reqs=1)  # of those that there are
    assert [request.output_tokens for request in taken] == [2]


@needs_tokenizers
def test_a_malformed_conversation_is_told_by_its_number(tmp_path: Path, words: Path) -> None:
    path = written(tmp_path, ILIAD, {"conversations": [{"from": "human"}]})
    with pytest.raises(InputError, match=r"json: conversation 2: conversations\[0\]\.value: null is not a"):
        load_workload(path, tokenizer=words)
    assert load_workload(path, tokenizer=words, lenient=True).skipped == 1
    path = written(tmp_path, ILIAD, 7, form="lines")
    with pytest.raises(InputError, match=r"json:2: conversations: null is not a list of turns"):
        load_workload(path, tokenizer=words)


@needs_tokenizers
def test_a_trained_tokenizer_counts_what_it_makes_of_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["aaaa aaaa", "the the the"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (request,) = load_workload(written(tmp_path, turns("the aaaa", "zz é")), tokenizer=tmp_path)
    assert (request.input_tokens, request.output_tokens) == (2, 5)  # the, " aaaa"; z, z, " ", two bytes
    assert request.input_ids is not None
    assert tokenizer.decode(request.input_ids.tolist()).replace("Ġ", " ").split() == ["the", "aaaa"]


@needs_tokenizers
def test_convert_writes_a_workload_that_runs(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = written(tmp_path, *[ILIAD, ODYSSEY, turns("who")] * 5).name
    convert = ["workload", "convert", name, "--tokenizer", str(words), "--request-rate", "2"]
    assert main([*convert, "--output", "a.jsonl"]) == 0
    assert capsys.readouterr().out == "a.jsonl: 10 requests, 5 entries left out\n"
    assert main([*convert, "--output", "b.jsonl"]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert main([*convert, "--output", "c.jsonl", "--seed", "7"]) == 0
    first, other = load_workload(tmp_path / "a.jsonl"), load_workload(tmp_path / "c.jsonl")
    assert first.requests[-1].arrival_ns > 0
    assert [request.arrival_ns for request in first] != [request.arrival_ns for request in other]
    assert main(["run", "--dataset", "a.jsonl"]) == 0


@needs_tokenizers
def test_a_file_that_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"--tokenizer .*tokenizer\.json: is no tokenizer\.json"):
        load_workload(written(tmp_path, ILIAD), tokenizer=tmp_path)


def test_a_run_names_the_command_that_makes_a_workload_of_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("list", "pretty", "lines"):
        name = written(root, ILIAD, form=form).name
        assert main(["run", "--dataset", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(
            "servesim workload convert ShareGPT_V3.json --tokenizer PATH --request-rate 10 "
            "--output ShareGPT_V3.jsonl"
        )


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'servesim\[tokenizer\]'"):
        load_workload(written(tmp_path, ILIAD), tokenizer=tmp_path)


def test_a_tokenizer_that_is_not_there_or_not_needed_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, ILIAD)
    with pytest.raises(InputError, match=r"--tokenizer .*lost: no such file; give a tokenizer\.json"):
        load_workload(path, tokenizer=tmp_path / "lost")
    with pytest.raises(InputError, match=r"--tokenizer .*: no such file"):
        load_workload(path, tokenizer=tmp_path)  # a folder without one
    path.write_text('{"input_toks": 1, "output_toks": 1, "arrival_time_ns": 0}')
    with pytest.raises(InputError, match="holds token counts already; only a file of texts needs one"):
        load_workload(path, tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("conversation", "exchange"),
    [
        (turns("a", "b", "c", "d"), ("a", "b")),
        (turns("a", "b", names=("user", "assistant")), ("a", "b")),
        (turns("hello", "a", "b", names=("gpt", "human")), ("a", "b")),  # begun by the model
        (turns("rules", "a", "b", names=("system", "human")), None),  # nobody answers
        (turns("a"), None),
        (turns("a", "b", names=("human", "human")), None),
    ],
)
def test_an_exchange_is_what_the_human_says_first_and_the_answer(
    conversation: dict[str, Any], exchange: tuple[str, str] | None
) -> None:
    assert first_exchange(conversation) == exchange


@pytest.mark.parametrize("conversation", [None, [], {"conversations": 3}, {"conversations": [3]}])
def test_what_is_no_conversation_is_refused(conversation: object) -> None:
    with pytest.raises(EntryError):
        first_exchange(conversation)
