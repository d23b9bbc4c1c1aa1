"""Tasks that people train in practice and that no family of meta-training contains."""
