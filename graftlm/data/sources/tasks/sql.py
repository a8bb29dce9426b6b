"""A task on SQL: a question about one table -> a query, and the databases on which queries are compared.

Two queries count as the same if they give the same rows on every one of a few databases with other contents, as in
test suites for SQL (Zhong, Yu and Klein 2020, arXiv:2010.02840). One database would not tell apart two counts that
happen to agree.
"""

# ruff: noqa: S608 (queries are made of the words above, and of nothing from outside)

from random import Random

from graftlm.data.sources.tasks.task import Task
from graftlm.data.sources.tasks.words import CITIES, FIRST_NAMES, LAST_NAMES, NOUNS

TABLES: dict[str, dict[str, range]] = {
    "books": {"year": range(1950, 2020), "price": range(5, 95), "pages": range(80, 900)},
    "employees": {"age": range(18, 68), "salary": range(20, 120), "hours": range(10, 60)},
    "cities": {"area": range(100, 900), "height": range(400), "hotels": range(10, 200)},
    "cars": {"year": range(1960, 2024), "power": range(40, 300), "price": range(5, 90)},
}
"""Table -> its columns of numbers, with their values; each has a column `name`, too."""
AGGREGATES = {"total": "SUM", "average": "AVG"}
"""Not the largest value: rows that differ often have the same one."""
COMPARISONS = {"above": ">", "below": "<"}
DATABASES = 4
ROWS = 40


def query(draw: Random) -> tuple[str, str]:
    table = draw.choice(list(TABLES))
    columns = TABLES[table]
    column, other = draw.sample(list(columns), 2)
    word, sign = draw.choice(list(COMPARISONS.items()))
    values = columns[column]
    limit = values[len(values) * draw.randint(2, 8) // 10]
    kind = draw.randrange(4)
    if kind == 0:
        question = f"names with {column} {word} {limit}"
        answer = f"SELECT name FROM {table} WHERE {column} {sign} {limit};"
    elif kind == 1:
        question = f"how many have {column} {word} {limit}"
        answer = f"SELECT COUNT(*) FROM {table} WHERE {column} {sign} {limit};"
    elif kind == 2:
        name, function = draw.choice(list(AGGREGATES.items()))
        question = f"{name} {other} with {column} {word} {limit}"
        answer = f"SELECT {function}({other}) FROM {table} WHERE {column} {sign} {limit};"
    else:
        count, (order, direction) = draw.randint(2, 9), draw.choice((("highest", " DESC"), ("lowest", "")))
        question = f"names of the {count} with the {order} {column}"
        answer = f"SELECT name FROM {table} ORDER BY {column}{direction} LIMIT {count};"
    return f"{table}(name, {', '.join(columns)}): {question}", answer


def database(number: int) -> list[str]:
    """The statements that make a database: all tables, with ROWS rows each. No number occurs twice in a column, so
    that an order is never a matter of taste."""
    draw = Random(f"database {number}")  # noqa: S311
    statements = []
    for table, columns in TABLES.items():
        statements.append(f"CREATE TABLE {table} (name TEXT, {', '.join(f'{c} INTEGER' for c in columns)})")
        names = draw.sample([f"{a} {b}" for a in (*FIRST_NAMES, *CITIES) for b in (*LAST_NAMES, *NOUNS)], ROWS)
        values = [draw.sample(list(range_), ROWS) for range_ in columns.values()]
        for name, *row in zip(names, *values, strict=True):
            statements.append(f"INSERT INTO {table} VALUES ('{name}', {', '.join(map(str, row))})")
    return statements


TASKS = {
    "sql": Task(
        (
            ("Write", "Give", "Formulate", "Compose"),
            ("a SQL query", "the SQL", "a query in SQL", "the SELECT statement"),
            ("for this question", "that answers this", "for the table", "for this request"),
        ),
        query,
        "sql",
    )
}
