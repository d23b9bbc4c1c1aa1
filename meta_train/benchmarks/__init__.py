"""What optimizers reach and cost, and tables of models that read networks."""
