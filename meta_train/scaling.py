"""``python -m meta_train.scaling``: see ``meta_train.benchmarks.scaling``."""

import sys

from meta_train.benchmarks.scaling import main

if __name__ == "__main__":
    sys.exit(main())
