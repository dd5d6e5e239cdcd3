"""The floor every room stands on: files that are whole or absent, errors that are sentences."""
