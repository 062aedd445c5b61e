"""Data that ships with installed packages, generators with a known truth, loaders for your own files."""
