"""Kills what writes files, or fills the disk, at every call that changes one.

`python -m tests.faults SCENARIO...` runs scenarios at every point and prints what was found.
"""
