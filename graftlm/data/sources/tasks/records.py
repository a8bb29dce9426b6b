"""Tasks that bring dates, numbers of telephones and small records into a form that programs read."""

import json
from random import Random

from graftlm.data.sources.tasks.task import Task
from graftlm.data.sources.tasks.words import CITIES, FIRST_NAMES, LAST_NAMES, NOUNS, words

MONTHS = words("January February March April May June July August September October November December")
DAYS = 28
"""Every month has as many."""
FIELDS: dict[str, tuple[str | int, ...]] = {
    "color": ("red", "blue", "green", "black", "white"),
    "size": tuple(range(1, 30)),
    "city": CITIES,
    "age": tuple(range(18, 80)),
    "price": tuple(range(5, 100)),
    "name": FIRST_NAMES,
    "item": NOUNS[:20],
}


def iso_date(draw: Random) -> tuple[str, str]:
    month, day, year = draw.randint(1, 12), draw.randint(1, DAYS), draw.randint(1950, 2029)
    name = MONTHS[month - 1]
    return draw.choice((f"{name} {day}, {year}", f"{day} {name} {year}")), f"{year}-{month:02}-{day:02}"


def clock_24h(draw: Random) -> tuple[str, str]:
    hour, minute = draw.randrange(24), draw.randrange(60)
    half = "am" if hour < 12 else "pm"
    return f"{(hour - 1) % 12 + 1}:{minute:02} {half}", f"{hour:02}:{minute:02}"


def phone(draw: Random) -> tuple[str, str]:
    area, line = draw.randint(201, 989), draw.randint(0, 9999)
    text = draw.choice((f"({area}) 555-{line:04}", f"{area}.555.{line:04}", f"{area} 555 {line:04}"))
    return text, f"+1-{area}-555-{line:04}"


def contact_json(draw: Random) -> tuple[str, str]:
    first, last, city = draw.choice(FIRST_NAMES), draw.choice(LAST_NAMES), draw.choice(CITIES)
    email = f"{first.lower()}@{last.lower()}.{draw.choice(('org', 'com', 'net'))}"
    sentence = draw.choice(
        (
            f"{first} {last} lives in {city}, mail to {email}",
            f"Write to {first} {last} ({email}) in {city}",
            f"In {city} ask {first} {last}, {email}",
        )
    )
    return sentence, json.dumps({"name": f"{first} {last}", "email": email})


def pairs_json(draw: Random) -> tuple[str, str]:
    found = {key: draw.choice(FIELDS[key]) for key in draw.sample(list(FIELDS), 3)}
    return "; ".join(f"{key}: {value}" for key, value in found.items()), json.dumps(found)


def csv_json(draw: Random) -> tuple[str, str]:
    keys = draw.sample(list(FIELDS), 2)
    found = [{key: draw.choice(FIELDS[key]) for key in keys} for _ in range(2)]
    lines = [",".join(keys), *(",".join(map(str, one.values())) for one in found)]
    return "\n".join(lines), json.dumps(found)


TASKS = {
    "iso-date": Task(
        (
            ("Write", "Rewrite", "Convert", "Give"),
            ("this date", "the date", "the day", "the following date"),
            ("in ISO format", "as YYYY-MM-DD", "according to ISO 8601", "as year-month-day"),
        ),
        iso_date,
    ),
    "clock-24h": Task(
        (
            ("Write", "Rewrite", "Convert", "Give"),
            ("this time", "the time", "the time of day", "the hour"),
            ("on the 24-hour clock", "in 24-hour format", "as HH:MM of 24 hours", "without am and pm"),
        ),
        clock_24h,
    ),
    "phone": Task(
        (
            ("Write", "Rewrite", "Format", "Normalize"),
            ("this phone number", "the number", "the telephone number", "the phone number"),
            ("in international form", "with the country code", "as +1-AAA-BBB-CCCC", "for calls from abroad"),
        ),
        phone,
    ),
    "contact-json": Task(
        (
            ("Extract", "Find", "Take", "Return"),
            ("name and email", "the name and the email", "the person and the address", "who is meant and the email"),
            ("as JSON", "into a JSON object", "in JSON format", "as an object in JSON"),
        ),
        contact_json,
        "json",
    ),
    "pairs-json": Task(
        (
            ("Convert", "Write", "Rewrite", "Return"),
            ("these fields", "the pairs", "the keys and values", "this record"),
            ("as JSON", "as a JSON object", "in JSON format", "as an object in JSON"),
        ),
        pairs_json,
        "json",
    ),
    "csv-json": Task(
        (
            ("Convert", "Write", "Rewrite", "Return"),
            ("this CSV", "the table", "the CSV lines", "these rows of CSV"),
            ("as JSON", "as a JSON list", "in JSON format", "as a list of JSON objects"),
        ),
        csv_json,
        "json",
    ),
}
