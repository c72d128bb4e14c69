"""`--where "width >= 512 and caption is not None"`: a condition on metadata columns, as an Arrow expression.

The text is parsed by Python's own parser and only what is listed here is taken from it; nothing of it is
run. Knows no index.

    column comparisons   ==  !=  <  <=  >  >=   with a number, a text, True or False
    membership           tag in ("a", "b")      tag not in (…)
    texts                "rose" in caption      caption.startswith("a ")   caption.endswith(".")
    null                 caption is None        caption is not None
    together             and  or  not  ( )
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

from llmvis.schema import UserError

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
_METHODS = {"startswith": pc.starts_with, "endswith": pc.ends_with}


LONGEST = 2_000
"""Characters: more could be nested so deeply that reading it would end the process."""


class WhereError(UserError):
    """A condition that cannot be read, or names a column that is not there."""


def parse_where(text: str, columns: Sequence[str]) -> pc.Expression:
    """The condition as an expression over `columns`; a null never fulfils one. Raises `WhereError`."""
    if len(text) > LONGEST:
        raise WhereError(f"--where has {len(text):,} characters; it may have {LONGEST:,}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WhereError(f"--where {text!r} cannot be read: {error}") from None
    try:
        return _Reader(columns).condition(tree)
    except RecursionError:
        raise WhereError("--where is nested too deeply") from None
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise WhereError(f"--where {text!r} holds a value that no column has: {error}") from None


def mask(table: pa.Table, condition: pc.Expression) -> npt.NDArray[np.bool_]:
    """bool `(N,)`: which rows fulfil it. Raises `WhereError` where kinds do not go together."""
    declared = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    project = acero.Declaration("project", acero.ProjectNodeOptions([condition], ["found"]), [declared])
    try:
        found = project.to_table(use_threads=False)["found"]
    except pa.ArrowException as error:
        raise WhereError(f"--where does not fit the columns: {error}") from None
    if found.type != pa.bool_():
        raise WhereError(f"--where gives {found.type}, not yes or no; compare it with something")
    whole: npt.NDArray[np.bool_] = found.fill_null(False).to_numpy()
    return whole


class _Reader:
    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns

    def condition(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            first, *rest = (self.condition(value) for value in node.values)
            for one in rest:
                first = first & one if isinstance(node.op, ast.And) else first | one
            return first
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            found = [self._compare(a, op, b) for a, op, b in zip(sides, node.ops, sides[1:], strict=False)]
            whole = found[0]
            for one in found[1:]:
                whole = whole & one
            return whole
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            (given,) = node.args if len(node.args) == 1 and not node.keywords else (None,)
            return _METHODS[node.func.attr](self._column(node.func.value), self._value(given, str))
        if isinstance(node, ast.Name):
            return self._column(node)
        raise self._wrong(node)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._wrong(right)
            return self._column(left).is_null() if isinstance(op, ast.Is) else self._column(left).is_valid()
        if isinstance(op, ast.In | ast.NotIn):
            if isinstance(right, ast.Tuple | ast.List):
                column = self._column(left)
                found = column.isin(pa.array([self._value(item) for item in right.elts]))
            else:
                column = self._column(right)
                found = pc.match_substring(column, self._value(left, str))
            return found if isinstance(op, ast.In) else ~found & column.is_valid()
        return _COMPARE[type(op)](self._side(left), self._side(right))

    def _side(self, node: ast.expr) -> Any:
        return self._column(node) if isinstance(node, ast.Name) else pc.scalar(self._value(node))

    def _column(self, node: ast.expr) -> Any:
        if not isinstance(node, ast.Name):
            raise self._wrong(node)
        if node.id not in self._columns:
            raise WhereError(
                f"--where: there is no column {node.id!r}; there are: {', '.join(self._columns)}"
            )
        return pc.field(node.id)

    def _value(self, node: ast.expr | None, kind: type | None = None) -> Any:
        try:
            value = None if node is None else ast.literal_eval(node)
        except ValueError:
            raise self._wrong(node) from None
        if not isinstance(value, kind or (bool, int, float, str)):
            raise self._wrong(node)
        return value

    @staticmethod
    def _wrong(node: ast.AST | None) -> WhereError:
        shown = ast.unparse(node) if isinstance(node, ast.expr) else "this"
        return WhereError(
            f"--where: {shown!r} is not understood; write for example: width >= 512 and 'rose' in caption"
        )
