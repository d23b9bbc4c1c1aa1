"""Following a network's computation: which parameter joins which neurons."""
