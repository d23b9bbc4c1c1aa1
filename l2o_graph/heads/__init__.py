"""States of nodes and edges -> answers."""
