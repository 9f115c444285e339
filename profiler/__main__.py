"""``python -m profiler`` is LLMServingSim's command; here it is refused with the one that makes bundles."""

import sys

if __name__ == "__main__":
    sys.stderr.write(
        "error: python -m profiler is no command here; profile bundles are made by\n"
        "  servesim profile MODEL --hardware NAME --tp 1,2      (servesim profile --help)\n"
        "or by ./profiler/profile.sh, which takes its settings from the environment\n"
    )
    sys.exit(2)
