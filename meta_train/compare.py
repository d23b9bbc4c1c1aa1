"""``python -m meta_train.compare``: see ``meta_train.benchmarks.compare``."""

from meta_train.benchmarks.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
