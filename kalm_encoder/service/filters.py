"""Which SQL predicates a request may send: comparisons of allowed columns with literals."""

from __future__ import annotations

from collections.abc import Collection

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from kalm_encoder.errors import InputError

MAX_LENGTH = 1000
"""Largest number of characters in a filter; it bounds the work of parsing."""
ALLOWED = {
    *(exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE, exp.In, exp.Between, exp.Like),
    exp.ArrayContains,
    *(exp.And, exp.Or, exp.Not, exp.Paren, exp.Is, exp.Null, exp.Boolean, exp.Literal),
}
"""Nodes that may stand anywhere; columns and minus signs are looked at more closely."""


def check_filter(predicate: str, columns: Collection[str]) -> str:
    """Return a predicate that names nothing but allowed columns, comparisons and literals.

    A request cannot learn what it cannot name. The predicate is written anew from the parsed tree,
    so Lance never sees text that this parser may have read in another way.

    Args:
        predicate: SQL such as `lang = 'en' AND year >= 2020`.
        columns: Names of the columns that the operator allows.

    Raises:
        InputError: The service takes no filters, or the predicate is not of this form.
    """
    if not columns:
        raise InputError("this server takes no filters")
    if len(predicate) > MAX_LENGTH:
        raise InputError(f"the filter has {len(predicate)} characters; at most {MAX_LENGTH} can be")
    try:
        trees = sqlglot.parse(predicate)
        if len(trees) == 1 and trees[0] and all(_is_allowed(n, columns) for n in trees[0].walk()):
            return trees[0].sql()
    except (SqlglotError, RecursionError):
        pass  # the message below says what can be read
    raise InputError(
        "the filter is not one SQL predicate made of the columns "
        f"{', '.join(sorted(columns))}, literals, comparisons, AND, OR, NOT, IN, BETWEEN, LIKE, "
        "IS NULL and array_contains; other functions, casts, subqueries, comments and other "
        "columns are not allowed"
    )


def _is_allowed(node: exp.Expr, columns: Collection[str]) -> bool:
    if node.comments:
        return False
    if isinstance(node, exp.Identifier):
        return not node.args.get("quoted")  # Lance reads "text" as a string, not as a column
    if isinstance(node, exp.Column):
        return len(node.parts) == 1 and node.name in columns
    if isinstance(node, exp.Neg):
        return isinstance(node.this, exp.Literal) and not node.this.is_string
    return type(node) in ALLOWED
