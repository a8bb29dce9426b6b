"""Tasks of English grammar, on words whose forms are listed."""

from random import Random

from graftlm.data.sources.tasks.task import Task
from graftlm.data.sources.tasks.words import FIRST_NAMES, words

PLURALS = dict(
    pair.split(":")
    for pair in words(
        "box:boxes dish:dishes watch:watches bus:buses glass:glasses fox:foxes brush:brushes bench:benches "
        "city:cities baby:babies story:stories party:parties lady:ladies berry:berries country:countries "
        "boy:boys toy:toys key:keys day:days book:books car:cars tree:trees house:houses bird:birds "
        "leaf:leaves knife:knives wolf:wolves shelf:shelves child:children man:men woman:women foot:feet "
        "tooth:teeth mouse:mice goose:geese person:people"
    )
)
VERBS = dict(
    pair.split(":")
    for pair in words(
        "walks:walked looks:looked opens:opened paints:painted cleans:cleaned plays:played carries:carried "
        "studies:studied stops:stopped plans:planned likes:liked closes:closed goes:went sees:saw takes:took "
        "gives:gave finds:found buys:bought brings:brought writes:wrote reads:read sells:sold makes:made "
        "breaks:broke keeps:kept loses:lost"
    )
)
"""Present, third person -> past."""
OBJECTS = ("the box", "a letter", "the door", "a picture", "the book", "a house", "the boat", "a song", "the car")
PARTICIPLES = words("watched followed helped called painted cleaned moved found seen taken chosen washed")
PAST = {"seen": "saw", "taken": "took", "chosen": "chose"}
"""Participle -> past tense, where the two differ."""
ACTORS = words("dog girl teacher farmer doctor king artist student baker singer driver nurse")


def plural(draw: Random) -> tuple[str, str]:
    noun, count = draw.choice(list(PLURALS)), draw.randint(2, 40)
    return f"{count} {noun}", f"{count} {PLURALS[noun]}"


def past_tense(draw: Random) -> tuple[str, str]:
    name, verb, what = draw.choice(FIRST_NAMES), draw.choice(list(VERBS)), draw.choice(OBJECTS)
    joint = {"goes": " to", "looks": " at", "walks": " to"}.get(verb, "")
    return f"{name} {verb}{joint} {what}.", f"{name} {VERBS[verb]}{joint} {what}."


def passive(draw: Random) -> tuple[str, str]:
    (one, other), verb = draw.sample(ACTORS, 2), draw.choice(PARTICIPLES)
    return f"The {one} {PAST.get(verb, verb)} the {other}.", f"The {other} was {verb} by the {one}."


REWRITE_SENTENCE = (
    ("Put", "Rewrite", "Change", "Turn"),
    ("this sentence", "the sentence", "the statement", "the following sentence"),
)

TASKS = {
    "plural": Task(
        (
            ("Write", "Give", "Correct", "State"),
            ("the plural", "this amount", "the number and its noun", "the count"),
            ("in correct English", "with the right plural", "with the noun in the plural", "in the plural form"),
        ),
        plural,
    ),
    "past-tense": Task(
        (
            *REWRITE_SENTENCE,
            ("into the past tense", "into the past", "so that it tells of yesterday", "to the simple past"),
        ),
        past_tense,
    ),
    "passive": Task(
        (
            *REWRITE_SENTENCE,
            ("into the passive voice", "in the passive", "from active to passive", "to passive voice"),
        ),
        passive,
    ),
}
