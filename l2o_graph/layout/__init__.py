"""Layout of graphs: specifications of networks, and index structures of nodes and edges."""
