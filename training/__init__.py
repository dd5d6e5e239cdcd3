"""How a model learns and is judged: configuration, loop, optimisers, metrics, soft targets, tagging."""
