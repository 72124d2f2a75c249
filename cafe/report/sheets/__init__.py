"""The tables of reports as cells of text."""
