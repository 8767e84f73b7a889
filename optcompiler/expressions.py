"""Expressions of sizes, as sympy spells them in files: told from code without evaluating them."""

from __future__ import annotations

import ast
import re

LONGEST = 4096
LARGEST = 1 << 64
LARGEST_EXPONENT = 64

_FUNCTIONS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod",
        "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan",
        "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "floor", "ceiling", "Piecewise",
        "ExprCondPair", "Tuple",
        "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt",
        "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
        "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
        "RoundDecimal", "ToFloat", "Identity",
    }
)  # fmt: skip
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_CONSTANTS = frozenset({"true", "false", "True", "False", "oo", "int_oo", "zoo", "nan"})
_TEXT = re.compile(r"[\w.+-]{0,64}", re.ASCII)
_OPERATORS = (
    ast.Expression, ast.Load, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop, ast.keyword, ast.Tuple,
)  # fmt: skip


def is_size_expression(text: str) -> bool:
    """Whether `text` is arithmetic over symbols: no attributes, no calls but of known functions,
    no number or power that is too large to work out."""
    if len(text) > LONGEST:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
        called = {n.func for n in ast.walk(tree) if isinstance(n, ast.Call)}
        return all(_is_harmless(node, called) for node in ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_harmless(node: ast.AST, called: set[ast.expr]) -> bool:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(_TEXT.fullmatch(node.value))
        return isinstance(node.value, (bool, int, float)) and abs(node.value) <= LARGEST
    if isinstance(node, ast.Name):
        # a bare name that sympy or Python knows would be that thing
        return node in called or node.id in _CONSTANTS or bool(re.search(r"\d$", node.id))
    if isinstance(node, ast.Call):
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function in _POWERS and not (len(node.args) == 2 and _is_small(node.args[1])):
            return False
        return function in _FUNCTIONS
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
        return _is_small(node.right)
    return isinstance(node, _OPERATORS)


def _is_small(exponent: ast.expr) -> bool:
    """Whether it is a number of at most two digits, or a symbol."""
    if isinstance(exponent, ast.UnaryOp):
        return _is_small(exponent.operand)
    if isinstance(exponent, ast.Constant):
        return isinstance(exponent.value, (int, float)) and abs(exponent.value) <= LARGEST_EXPONENT
    if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name):
        inner = exponent.func.id in ("Integer", "Rational", "Float")
        return exponent.func.id == "Symbol" or (inner and all(map(_is_small, exponent.args)))
    return isinstance(exponent, ast.Name)
