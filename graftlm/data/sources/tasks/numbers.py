"""Tasks with numbers."""

from random import Random

from graftlm.data.sources.tasks.task import Task

ROMAN = ((90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
CHAPTERS = ("Chapter", "Part", "Section", "Volume", "Lesson", "Book")
UNITS = {
    ("km", "m"): 1000,
    ("m", "cm"): 100,
    ("kg", "g"): 1000,
    ("liters", "ml"): 1000,
    ("cm", "mm"): 10,
    ("tons", "kg"): 1000,
    ("euros", "cents"): 100,
    ("minutes", "seconds"): 60,
}
"""(from, to) -> how many of the second are one of the first."""


def add(draw: Random) -> tuple[str, str]:
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    return f"{a} + {b}", str(a + b)


def units(draw: Random) -> tuple[str, str]:
    (one, other), factor = draw.choice(list(UNITS.items()))
    count = draw.randint(2, 99)
    return f"{count} {one} in {other}", f"{count * factor} {other}"


def roman(draw: Random) -> tuple[str, str]:
    what, number = draw.choice(CHAPTERS), draw.randint(1, 99)
    rest, letters = number, ""
    for value, sign in ROMAN:
        letters += sign * (rest // value)
        rest %= value
    return f"{what} {number}", f"{what} {letters}"


TASKS = {
    "add": Task(
        (
            ("Compute", "Calculate", "Work out", "Find"),
            ("this sum", "the sum", "the total", "the result"),
            ("and give the number alone", "and write only the result", "with no other words", "as one number"),
        ),
        add,
    ),
    "units": Task(
        (
            ("Convert", "Express", "Compute", "Give"),
            ("this amount", "the quantity", "the measure", "the value"),
            ("in the other unit", "in the unit that is asked for", "with its new unit", "in the second unit"),
        ),
        units,
    ),
    "roman": Task(
        (
            ("Write", "Rewrite", "Give", "Set"),
            ("the number", "this number", "the numeral", "the number of this heading"),
            ("in Roman numerals", "as a Roman numeral", "the Roman way", "with Roman letters"),
        ),
        roman,
    ),
}
