"""Clusters of embeddings: how they are found, how good they are, what they look like."""
