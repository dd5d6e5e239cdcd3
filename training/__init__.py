"""Training and evaluation: configuration, data, loop, optimisers, metrics, stores of targets and reports."""
