"""Shared by all packages: atomic files, user errors, command lines and options."""
