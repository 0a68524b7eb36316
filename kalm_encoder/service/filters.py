"""Which SQL predicates a request may send: comparisons of allowed columns with literals."""

from __future__ import annotations

import re
from collections.abc import Collection

from kalm_encoder.errors import InputError

MAX_LENGTH = 1000
KEYWORDS = {"AND", "OR", "NOT", "IN", "IS", "NULL", "LIKE", "BETWEEN", "TRUE", "FALSE"}
TOKEN = re.compile(
    r"\s*(?:(?P<string>'(?:[^']|'')*')|(?P<number>-?\d+(?:\.\d+)?)(?![\w.])"
    r"|(?P<operator><=|>=|<>|!=|=|<|>|\(|\)|,)|(?P<word>[A-Za-z_]\w*))"
)


def check_filter(predicate: str, columns: Collection[str]) -> str:
    """Return a predicate that names nothing but allowed columns, keywords and literals.

    No functions, no comments, no other columns: what a request cannot name it cannot learn.

    Args:
        predicate: such as `lang = 'en' AND year >= 2020`.
        columns: what the server allows.

    Raises:
        InputError: filters are off, or the place where the predicate leaves this grammar.
    """
    if not columns:
        raise InputError("this server takes no filters")
    if len(predicate) > MAX_LENGTH:
        raise InputError(f"the filter has {len(predicate)} characters, at most {MAX_LENGTH}")
    at, before, depth = 0, "", 0
    end = len(predicate.rstrip())
    while at < end:
        token = TOKEN.match(predicate, at)
        word = token["word"] if token else None
        unknown = word and word.upper() not in KEYWORDS and word not in columns
        call = token and token["operator"] == "(" and before in columns
        if token:
            depth += (token["operator"] == "(") - (token["operator"] == ")")
        if token is None or unknown or call or depth < 0:
            raise InputError(
                f"filter, character {at + 1}: expected one of the columns "
                f"{', '.join(sorted(columns))}, a comparison, AND, OR, NOT, IN, IS NULL, LIKE, "
                "BETWEEN, or a literal"
            )
        at, before = token.end(), word or ""
    if not at or depth:
        raise InputError("the filter is empty, or a parenthesis is not closed")
    return predicate
