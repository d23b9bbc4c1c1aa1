"""``python -m meta_train.benchmark``: see ``meta_train.benchmarks.optimizers``."""

from meta_train.benchmarks.optimizers import main

if __name__ == "__main__":
    raise SystemExit(main())
