"""Sweeps over a setting: its cost and its gain."""
