"""How much of a run averaged weights are the mean of."""

# Averaged weights are those of about the last twentieth of the run so far: the weights after step
# t + 1 enter with the weight 1 / (1 + t / 20).
AVERAGED_PART = 0.05
