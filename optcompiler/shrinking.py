"""Delta debugging of programs: the smallest part of one that still shows something.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 28(2), 2002. A
part is any set of nodes: what it reads from elsewhere becomes an input, what is read elsewhere an
output, so every part is a valid program and names stay what they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from optcompiler.program import Program, consumed, node_fingerprint

SMALL = 64
"""Initializers of fewer elements are kept: a pass may look at their values."""

GROWTH = 3
"""A first guess is grown to its neighbours this many times."""


def extract(program: Program, keep: Iterable[str]) -> Program:
    """The part of the main graph made of the named nodes, as a program of its own."""
    names = set(keep)
    part = program.clone()
    graph = part.graph
    kept = [n for n in graph if n.name in names]
    gone = [n for n in graph if n.name not in names]
    read = dict.fromkeys(v for n in kept for v in consumed(n))
    wanted = {v for n in gone for v in consumed(n)} | set(graph.outputs)
    made = [v for n in kept for v in n.outputs if v.name]
    outputs = [v for v in made if v in wanted or v not in read]
    inputs = [v for v in graph.inputs if v in read]
    dropped = set(gone)
    graph.outputs.clear()
    for value in [v for v in read if v.producer() in dropped]:
        shape = None if value.shape is None else value.shape.copy()
        fresh = ir.Value(name=value.name, type=value.type, shape=shape)
        ir.convenience.replace_all_uses_with(value, fresh)
        inputs.append(fresh)
    for node in gone:
        _detach(node)
    graph.remove(gone)
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    graph.outputs.extend(outputs)
    for name in [n for n, v in graph.initializers.items() if v not in read]:
        del graph.initializers[name]
    part.sweep()
    return part


def put_back(program: Program, names: Iterable[str], part: Program) -> Program:
    """A copy of `program` with the named nodes replaced by those of `part`, to which what `extract`
    made of them was rewritten. Raises `ValueError` where names of functions clash."""
    wanted = set(names)
    copy, inner = program.clone(), part.clone()
    graph, source = copy.graph, inner.graph
    gone = [n for n in graph if n.name in wanted]
    made = {v.name: v for n in gone for v in n.outputs if v.name}
    known = {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
    known |= {v.name: v for n in graph if n.name not in wanted for v in n.outputs}
    for value in source.inputs:
        ir.convenience.replace_all_uses_with(value, known[value.name])
    for name, value in list(source.initializers.items()):
        old = graph.initializers.get(name)
        if old is not None and old.const_value is value.const_value:
            ir.convenience.replace_all_uses_with(value, old)
            continue
        del source.initializers[name]
        value.name = copy.fresh_name(name)
        graph.register_initializer(value)
    outputs, nodes = list(source.outputs), list(source)
    source.outputs.clear()
    source.remove(nodes)
    for value in outputs:
        ir.convenience.replace_all_uses_with(
            made[value.name or ""], value, replace_graph_outputs=True
        )
    read = {v for n in gone for v in consumed(n)}
    for node in gone:
        _detach(node)
    graph.remove(gone)
    graph.extend(nodes)
    graph.sort()
    for name, value in list(graph.initializers.items()):
        if value in read and not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    for domain, version in source.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    for key, function in inner.functions.items():
        mine = copy.functions.setdefault(key, function)
        if [*map(node_fingerprint, mine)] != [*map(node_fingerprint, function)]:
            raise ValueError(f"two functions are called {key}")
    return copy


def _detach(node: ir.Node) -> None:
    """Make the node, and all in its subgraphs, users of nothing."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            graph.outputs.clear()
            for inner in graph:
                _detach(inner)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)


def shrink(
    program: Program,
    shows: Callable[[Program], bool],
    *,
    focus: Sequence[str] = (),
    seconds: float = 20.0,
    tests: int = 400,
) -> tuple[Program, int]:
    """A part of `program` that still `shows`, as small as time and number of tests allow, and how
    many tests that took.

    `program` itself is known to show. `focus` names the nodes to begin with, where that is known.
    A test that raises counts as not showing.
    """
    search = _Search(shows, time.monotonic() + seconds, tests)
    best = _around(program, focus, search) or program
    best = _fewer_nodes(best, search)
    best = _fewer_outputs(best, search)
    best = _fewer_weights(best, search)
    return best, tests - search.left


class _Search:
    def __init__(self, shows: Callable[[Program], bool], deadline: float, tests: int) -> None:
        self._shows = shows
        self._deadline = deadline
        self.left = tests

    @property
    def over(self) -> bool:
        return self.left <= 0 or time.monotonic() > self._deadline

    def accepts(self, make: Callable[[], Program | None]) -> Program | None:
        """The program made, if it shows."""
        if self.over:
            return None
        self.left -= 1
        try:
            made = make()
            return made if made is not None and self._shows(made) else None
        except Exception:
            # A part may be nothing that anyone can compile: then it shows nothing.
            return None


def _around(program: Program, focus: Sequence[str], search: _Search) -> Program | None:
    """The focus, or the focus grown to its neighbours."""
    network = program.network()
    region = {n for n in focus if n in network}
    for _ in range(GROWTH + 1):
        if not region or search.over:
            return None
        found = search.accepts(lambda part=frozenset(region): extract(program, part))
        if found is not None:
            return found
        for node in list(region):
            region.update(n for n in network.predecessors(node) if isinstance(n, str))
            region.update(n for n in network.successors(node) if isinstance(n, str))
    return None


def _fewer_nodes(best: Program, search: _Search) -> Program:
    def shows(names: Sequence[str]) -> bool:
        nonlocal best
        found = search.accepts(lambda: extract(best, names))
        best = found or best
        return found is not None

    fewest([str(n.name) for n in best.graph], shows, over=lambda: search.over)
    return best


def fewest(
    items: Sequence[str],
    shows: Callable[[Sequence[str]], bool],
    *,
    over: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Items that together still show and of which none can be left out, or fewer tries were left.

    All of them are known to show. Chunks of half of them are left out, then smaller ones.
    """
    kept = list(items)
    size = max(1, len(kept) // 2)
    while True:
        chunks = [set(kept[i : i + size]) for i in range(0, len(kept), size)]
        smaller = False
        for chunk in chunks:
            if over():
                return kept
            rest = [item for item in kept if item not in chunk]
            if rest and shows(rest):
                kept, smaller = rest, True
        if size == 1 and not smaller:
            return kept
        size = max(1, min(size // 2, len(kept) // 2))


def _fewer_outputs(best: Program, search: _Search) -> Program:
    for name in [p.name for p in best.outputs]:
        if len(best.outputs) > 1:
            best = search.accepts(lambda b=best, n=name: _without_output(b, n)) or best
    return best


def _without_output(program: Program, name: str) -> Program:
    copy = program.clone()
    copy.graph.outputs.remove(next(v for v in copy.graph.outputs if v.name == name))
    return copy


def _fewer_weights(best: Program, search: _Search) -> Program:
    """Large initializers become inputs: all at once, else one by one."""
    large = [n for n, t in best.weights().items() if t.size > SMALL]
    found = search.accepts(lambda: weights_as_inputs(best, large)) if large else None
    if found is not None:
        return found
    for name in large:
        best = search.accepts(lambda b=best, n=name: weights_as_inputs(b, [n])) or best
    return best


def weights_as_inputs(program: Program, names: Iterable[str]) -> Program:
    """A copy in which the named initializers are inputs."""
    copy = program.clone()
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    return copy
