"""A task of classification: which department a customer's message belongs to, by what it complains of."""

from random import Random

from graftlm.data.sources.tasks.task import Task
from graftlm.data.sources.tasks.words import ITEMS

MESSAGES = {
    "billing": (
        "I was charged twice for the {item}.",
        "The invoice for my {item} is wrong.",
        "I want my money back for the {item}.",
        "The price of the {item} on my card is too high.",
        "Please refund the {item}.",
    ),
    "delivery": (
        "My {item} has not arrived.",
        "Where is the {item} that I ordered?",
        "The {item} was sent to the wrong street.",
        "The parcel with the {item} is a week late.",
        "When will you ship my {item}?",
    ),
    "account": (
        "I cannot log in to order a {item}.",
        "I forgot my password and need a {item}.",
        "Change my email before I buy the {item}.",
        "Delete my profile, I only bought a {item}.",
        "My login fails when I look at the {item}.",
    ),
    "product": (
        "The {item} is broken.",
        "My new {item} has a crack.",
        "The {item} stopped working.",
        "A part of the {item} is missing.",
        "The {item} makes a strange noise.",
    ),
}
ENDINGS = ("", " Please help.", " Thank you.")


def department(draw: Random) -> tuple[str, str]:
    name = draw.choice(list(MESSAGES))
    return draw.choice(MESSAGES[name]).format(item=draw.choice(ITEMS)) + draw.choice(ENDINGS), name


TASKS = {
    "department": Task(
        (
            ("Name", "Choose", "Give", "Find"),
            ("the department", "the team", "the category", "the desk"),
            (
                "for this message (billing, delivery, account, product)",
                "among account, billing, delivery and product",
                "that should answer: product, delivery, billing or account",
                "of this mail: delivery, account, product, billing",
            ),
        ),
        department,
    )
}
