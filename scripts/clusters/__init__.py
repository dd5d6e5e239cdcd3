"""Clusters of embeddings: k-means, scores and figures."""
