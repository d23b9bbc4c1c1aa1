"""Entry point of ``python -m l2o_graph.datasets.inr``; see ``generate``."""

import sys

from l2o_graph.datasets.inr.generate import main

if __name__ == "__main__":
    sys.exit(main())
