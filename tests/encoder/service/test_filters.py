"""Filters as Lance gets them: what is allowed means the same there, and nothing else gets there."""

import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError
from kalm_encoder.service.filters import MAX_LENGTH, check_filter

COLUMNS = ("id", "num_tokens", "truncated")


@pytest.fixture(scope="module")
def table(small_table):
    return PassageTable.open(str(small_table))


@pytest.fixture(scope="module")
def lengths(table):
    return {i: tokens for i, (tokens, _) in table.lengths([f"p{i}" for i in range(60)]).items()}


@pytest.mark.parametrize(
    ("predicate", "holds"),
    [
        ("id = 'p1' OR id = \t 'p3'", lambda i, n: i in ("p1", "p3")),
        ("id in ('p1', 'it''s')", lambda i, n: i == "p1"),
        ("id NOT IN ('p1', 'p2')", lambda i, n: i not in ("p1", "p2")),
        ("id LIKE 'p1%' AND id NOT LIKE '%2'", lambda i, n: i[:2] == "p1" and i[-1] != "2"),
        ("num_tokens BETWEEN 10 AND 20", lambda i, n: 10 <= n <= 20),
        ("num_tokens NOT BETWEEN -10 AND 20.5", lambda i, n: not -10 <= n <= 20.5),
        ("NOT (num_tokens < 10 OR num_tokens >= 30)", lambda i, n: not (n < 10 or n >= 30)),
        ("num_tokens <> 7 AND num_tokens != 8 AND 9 <= num_tokens", lambda i, n: n >= 9),
        ("num_tokens > 10 OR num_tokens < 9 AND id = 'p1'", lambda i, n: n > 10 or i == "p1"),
        ("id IS NULL", lambda i, n: False),
        ("id IS NOT NULL AND truncated = FALSE", lambda i, n: True),
        ("truncated IS NOT TRUE AND num_tokens = num_tokens", lambda i, n: True),
        (r"id = 'p1\' OR id = 'p2'", lambda i, n: i == "p2"),
        ("id = 'p1 -- p2' OR id = 'p2 /* p3 */' OR id = 'p3'", lambda i, n: i == "p3"),
    ],
)
def test_an_allowed_filter_means_in_lance_what_it_says(table, lengths, predicate, holds):
    where = check_filter(predicate, COLUMNS)
    right = {i for i, tokens in lengths.items() if holds(i, tokens)}
    assert table.known(list(lengths), where=where) == right


@pytest.mark.parametrize(
    "predicate",
    [
        *("text = 'x'", '"text" = 1', "`text` = 1", "t.id = 1", "id.text = 1", "id[0] = 'p'", "*"),
        *("lower(id) = 'p1'", "id('x')", "current_date = id", "random() < 1", "count(*) = 1"),
        *("CAST(id AS INT) = 1", "id::int = 1", "DATE '2020-01-01' = id", "INTERVAL '1' day = id"),
        *("id IN (SELECT id FROM t)", "EXISTS(SELECT 1)", "(SELECT 1) = 1", "id = ANY(SELECT 1)"),
        *("id = 'p1' --", "--\nid = 'p1'", "id = /**/ 'p1'", "id = 'p1' /* ' OR '1'='1 */", "--"),
        *("id = 'p1'; DROP TABLE x", "id = 'p1'; id = 'p2'", ";", "", "   ", "DROP TABLE x"),
        *("id || 'x' = 'p1x'", "num_tokens + 1 = 2", "-num_tokens = 1", "num_tokens & 1 = 1"),
        *("- - 1 = num_tokens", "-'1' = id", "id = 'p' '1'", "id ~ 'p'", "id SIMILAR TO 'p'"),
        *("id = E'p1'", "id = N'p1'", "id = X'70'", "id = $1", "id = ?", "id = :id", "id = @id"),
        *("id = 'p1' AS x", "id = 'p1' LIMIT 1", "(id, id) = ('p1', 'p1')", "id", "'p1'"),
        *("CASE WHEN id = 'p1' THEN TRUE END", "id LIKE 'p' ESCAPE 'x'", "id = 'p1' OVER ()"),
        *("(" * 400 + "id = 'p1'" + ")" * 400, "id = 'p1'" + " " * MAX_LENGTH, "id = 'p1')"),
    ],
)
def test_everything_else_is_refused(table, predicate):
    with pytest.raises(InputError, match="filter"):
        table.known(["p1"], where=check_filter(predicate, COLUMNS))


def test_a_service_without_filter_columns_takes_none():
    with pytest.raises(InputError, match="takes no filters"):
        check_filter("id = 'p1'", ())
