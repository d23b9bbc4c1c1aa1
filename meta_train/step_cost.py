"""``python -m meta_train.step_cost``: see ``meta_train.benchmarks.step_cost``."""

from meta_train.benchmarks.step_cost import main

if __name__ == "__main__":
    raise SystemExit(main())
