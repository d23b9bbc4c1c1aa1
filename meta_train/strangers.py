"""``python -m meta_train.strangers``: see ``meta_train.benchmarks.strangers``."""

import sys

from meta_train.benchmarks.strangers.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
