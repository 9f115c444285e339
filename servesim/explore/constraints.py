"""Conditions over option names, such as ``tp * pp <= 8``: read as syntax, never run as Python."""

from __future__ import annotations

import ast
import operator
from typing import TYPE_CHECKING, Any

from servesim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}
_ALLOWED = (
    "may hold names of options, numbers, texts in quotes, lists, + - * / // %, comparisons, in, and, or, not"
)


class Constraint:
    """One condition that every configuration has to fulfil."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        """
        Args:
            text: the condition.
            names: what it may name.

        Raises:
            InputError: it is no condition of the kind allowed, or names something else.
        """
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise InputError(f"constraint {text!r}: is no expression; it {_ALLOWED}") from None
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and node.id not in names:
                from servesim.specs.validation import hint

                raise InputError(
                    f"constraint {text!r}: {node.id} is no option of a run; {hint(node.id, list(names))}"
                )

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the configuration with these ``values`` fulfils it.

        Raises:
            InputError: it cannot be worked out, for example because an option is not set.
        """
        try:
            return bool(self._value(self._tree, values))
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            unset = sorted(
                {
                    node.id
                    for node in ast.walk(self._tree)
                    if isinstance(node, ast.Name) and values[node.id] is None
                }
            )
            why = f"{', '.join(unset)} is not set; give it a value" if unset else str(error)
            raise InputError(f"constraint {self.text!r}: cannot be worked out: {why}") from None

    def _value(self, node: ast.AST, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value) if isinstance(value, str | int | float | None):
                return value
            case ast.Name(id=name):
                return values[name]
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return [self._value(part, values) for part in parts]
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return not self._value(inner, values)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._value(inner, values)
            case ast.BoolOp(op=kind, values=parts):
                test = all if isinstance(kind, ast.And) else any
                return test(self._value(part, values) for part in parts)
            case ast.BinOp(op=kind, left=left, right=right) if type(kind) in _ARITHMETIC:
                one, two = self._value(left, values), self._value(right, values)
                if not all(isinstance(each, int | float) for each in (one, two)):
                    raise TypeError("only numbers can be reckoned with")
                return _ARITHMETIC[type(kind)](one, two)
            case ast.Compare(left=left, ops=kinds, comparators=others):
                sides = [self._value(part, values) for part in (left, *others)]
                known = [_COMPARISONS.get(type(kind)) for kind in kinds]
                if None not in known:
                    return all(
                        compare(one, two)
                        for compare, one, two in zip(known, sides, sides[1:], strict=False)
                        if compare
                    )
        raise InputError(f"constraint {self.text!r}: {ast.unparse(node)!r} is not allowed; it {_ALLOWED}")
