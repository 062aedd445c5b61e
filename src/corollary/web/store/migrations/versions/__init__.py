"""One module to each revision."""
