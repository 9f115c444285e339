"""``python -m bench`` is LLMServingSim's command; here it is refused with those that compare with vLLM.

Nothing else is in this folder: the code is in ``servesim/bench``, measurements of ours are in ``benchmarks``.
"""

import sys

if __name__ == "__main__":
    sys.stderr.write(
        "error: python -m bench is no command here; to compare the simulator with a real vLLM:\n"
        "  servesim bench replay      send a workload to a server and record it\n"
        "  servesim bench validate    simulate a recording and compare the two\n"
        "servesim bench --help lists the others\n"
    )
    sys.exit(2)
