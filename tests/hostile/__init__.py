"""Hostile input: a corpus made by script, and what the command line does with each item of it."""
