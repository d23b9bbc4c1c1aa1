"""``python -m meta_train.strangers``: ``python -m meta_train.benchmark`` by an earlier name."""

import sys

from meta_train.benchmarks.optimizers import main

if __name__ == "__main__":
    sys.exit(main())
