"""Entry point of ``python -m l2o_graph.datasets.zoo``; see ``cnn.generate``."""

import sys

from l2o_graph.datasets.cnn.generate import main

if __name__ == "__main__":
    sys.exit(main())
