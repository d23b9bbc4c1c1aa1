"""Training of models that read the weights of networks, by labels."""
