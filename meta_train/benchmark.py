"""``python -m meta_train.benchmark``: see ``meta_train.benchmarks.optimizers``."""

import sys

from meta_train.benchmarks.optimizers import main

if __name__ == "__main__":
    sys.exit(main())
