"""A task on code: the docstring of a function of one line. (`builtin:docstrings` has those of real functions.)"""

from random import Random

from graftlm.data.sources.tasks.task import Task
from graftlm.data.sources.tasks.words import words

OPERATORS = {
    "+": "the sum of {a} and {b}",
    "-": "the difference of {a} and {b}",
    "*": "the product of {a} and {b}",
    "/": "{a} divided by {b}",
    "%": "the remainder of {a} divided by {b}",
    ">": "whether {a} is greater than {b}",
    "<": "whether {a} is less than {b}",
    "==": "whether {a} is equal to {b}",
}
CALLS = {
    "len({c})": "the number of {c}",
    "max({c})": "the largest of {c}",
    "min({c})": "the smallest of {c}",
    "sum({c})": "the sum of {c}",
    "sorted({c})": "{c} in sorted order",
    "{c}[0]": "the first of {c}",
    "{c}[-1]": "the last of {c}",
    "set({c})": "the distinct {c}",
    "list(reversed({c}))": "{c} in reverse order",
}
NUMBERS = words("width height price count speed weight length rate cost size")
LISTS = words("prices names lines words rows scores items values orders dates pages users files sizes")


def docstring(draw: Random) -> tuple[str, str]:
    if draw.random() < 0.5:
        (operator, meaning), (a, b) = draw.choice(list(OPERATORS.items())), draw.sample(NUMBERS, 2)
        code, description = f"def f({a}, {b}):\n    return {a} {operator} {b}", meaning.format(a=a, b=b)
    else:
        (call, meaning), c = draw.choice(list(CALLS.items())), draw.choice(LISTS)
        code, description = f"def f({c}):\n    return {call.format(c=c)}", meaning.format(c=c)
    return code, f"Return {description}."


TASKS = {
    "docstring": Task(
        (
            ("Write", "Give", "Add", "Suggest"),
            ("the docstring", "a docstring", "one sentence", "the documentation"),
            ("for this function", "of the function", "that says what the function does", "for this Python code"),
        ),
        docstring,
    )
}
