"""Weight-space models: classifiers and editors of INRs, and predictors of accuracy of CNNs."""
