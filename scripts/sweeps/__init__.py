"""Sweeps: what a setting costs and gains, over its range."""
