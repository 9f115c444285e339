"""A router in thirty lines, tried on two emulated servers: by turns, or to where the prefix is."""

import itertools
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable

SERVER = [
    sys.executable,
    "-m",
    "servesim",
    "serve",
    "--hardware",
    "H100",
    "--model",
    "meta-llama/Llama-3.1-8B",
]
SERVER += ["--tp", "1", "--port", "0", "--virtual-time", "1"]


def start() -> tuple[subprocess.Popen[str], str]:
    """A server and its address; it picks a free port and says which."""
    process = subprocess.Popen(SERVER, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, re.findall(r"http://\S+", process.stdout.readline())[0]


def ask(server: str, said: list[dict[str, str]]) -> tuple[str, int, int]:
    """The answer of a server, and the tokens of the prompt that were cached, and all of them."""
    body = {"messages": said, "max_completion_tokens": 50}
    with urllib.request.urlopen(f"{server}/v1/chat/completions", json.dumps(body).encode()) as answer:
        got = json.load(answer)
    usage = got["usage"]
    text = got["choices"][0]["message"]["content"]
    return text, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def day(route: Callable[[int, int], int]) -> str:
    """Thirteen sessions of six turns, all under way at once; how much of their prompts was cached."""
    processes, servers = zip(*(start() for _ in range(2)), strict=True)
    said = {session: [{"role": "user", "content": f"user {session} asks " * 100}] for session in range(13)}
    cached = asked = 0
    for _, session in itertools.product(range(6), said):
        text, hit, prompt = ask(servers[route(session, len(servers))], said[session])
        cached, asked = cached + hit, asked + prompt
        said[session] += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on " * 40}]
    for process in processes:
        process.terminate()
    return f"{cached / asked:.1%} of {asked} prompt tokens were cached"


turns = itertools.count()
print("round robin ", day(lambda _, servers: next(turns) % servers))
print("by session  ", day(lambda session, servers: session % servers))
