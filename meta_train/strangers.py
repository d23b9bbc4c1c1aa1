"""``python -m meta_train.strangers``: earlier name of ``python -m meta_train.benchmark``."""

from meta_train.benchmarks.optimizers import main

if __name__ == "__main__":
    raise SystemExit(main())
