"""``python -m meta_train.transfer``: see ``meta_train.benchmarks.transfer``."""

import sys

from meta_train.benchmarks.transfer import main

if __name__ == "__main__":
    sys.exit(main())
