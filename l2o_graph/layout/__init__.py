"""Where neurons and edges lie: sets of neurons, what joins them, and how to walk along it."""
