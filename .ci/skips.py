#!/usr/bin/env python3
"""What the test runs skipped, from their JUnit files, and whether any for want of something.

``skips.py --files FIRST.xml``: the test files with such skips, to run again where nothing is wanting.
``skips.py FIRST.xml SECOND.xml …``: lists what no run executed, and fails where the reason is a missing
package, or missing recorded data although ``SERVESIM_RECORDED`` says where they are.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

_PACKAGE = re.compile(r"(^|Skipped: )needs\b|not installed|could not import|pip install")
_RECORDED = re.compile(r"no recorded data")


def read(paths: list[str]) -> tuple[dict[str, str], set[str]]:
    """(skipped test or module -> reason, tests and modules of which something ran) of several runs."""
    skipped: dict[str, str] = {}
    ran: set[str] = set()
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            module, name = case.get("classname", ""), case.get("name", "")
            found = case.find("skipped")
            if found is None:
                ran |= {f"{module}::{name}", f"::{module}"}
            elif found.get("type") != "pytest.xfail":
                reason = found.get("message") or ""
                if reason == "collection skipped":  # a module that skips itself has its reason in the text
                    reason = " ".join((found.text or "").split())
                skipped.setdefault(f"{module}::{name}", reason)
    return {test: reason for test, reason in skipped.items() if test not in ran}, ran


def is_want(reason: str) -> bool:
    """Whether the reason is something that this place should have."""
    return bool(_PACKAGE.search(reason) or (os.environ.get("SERVESIM_RECORDED") and _RECORDED.search(reason)))


def file_of(test: str) -> str:
    """The file of ``tests.a.test_b::test_c``, or of the module ``::tests.a.test_b``."""
    module = test.partition("::")[0] or test.removeprefix("::")
    parts = module.split(".")
    while parts and not Path(*parts).with_suffix(".py").is_file():
        parts.pop()
    return Path(*parts).with_suffix(".py").as_posix()


def main(arguments: list[str]) -> int:
    """Exit status 1 when a test was skipped for want of something."""
    files = arguments[:1] == ["--files"]
    skipped, ran = read(arguments[1:] if files else arguments)
    wanting = {test: reason for test, reason in skipped.items() if is_want(reason)}
    if files:
        print("\n".join(sorted({file_of(test) for test in wanting})))
        return 0
    print(f"{len(ran)} tests and modules ran, {len(skipped)} were skipped everywhere:")
    for test, reason in sorted(skipped.items()):
        print(f"  {'WANTING ' if test in wanting else ''}{test}: {reason}")
    if wanting:
        print(f"{len(wanting)} of them for want of a package or of data that should be here", file=sys.stderr)
    return 1 if wanting else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
