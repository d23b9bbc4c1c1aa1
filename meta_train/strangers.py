"""``python -m meta_train.strangers``: ``python -m meta_train.benchmark`` by an earlier name."""

from meta_train.benchmarks.optimizers import main

if __name__ == "__main__":
    raise SystemExit(main())
