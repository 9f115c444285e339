"""``python -m serving``: the same program as ``servesim``."""

import sys

from servesim.door import main

if __name__ == "__main__":
    sys.exit(main())
