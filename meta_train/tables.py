"""``python -m meta_train.tables``: see ``meta_train.benchmarks.tables``."""

from meta_train.benchmarks.tables import main

if __name__ == "__main__":
    raise SystemExit(main())
