"""Random valid programs, and what must hold for every one of them.

`graph` grows one graph whose values are all known in float64, `families` and `motifs` say what may
be added to it, `strategy` draws whole graphs, `oracles` judge the exact passes, the executor and
ONNX Runtime on them, `batch` the C of many at once. `python -m tests.fuzz` runs as many as wanted.
"""
