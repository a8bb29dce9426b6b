"""The words that tasks are made of: common, and mostly one or two tokens of a tokenizer of English."""


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = words(
    "apple river stone lamp table garden window bottle mountain paper button basket bridge candle engine feather "
    "hammer island jacket kitchen ladder mirror needle orange pocket rabbit saddle ticket village wagon yellow zebra "
    "anchor blanket camera desert eagle forest guitar harbor ice jungle kettle lemon market north ocean pencil queen "
    "rocket silver tower uncle valley winter"
)
LABELS = words(
    "total order count user name first last price item date start end time file size page number stock level team "
    "score account balance city code max speed min value unit cost road length net weight tax rate room report "
    "status event type"
)
"""Words of names in programs."""
FIRST_NAMES = words(
    "Anna Ben Clara David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nora Oscar Paul Rosa Sam Tina Victor"
)
LAST_NAMES = words(
    "Adams Baker Carter Davis Evans Fisher Garcia Hill Irwin Jones King Lopez Miller Nelson Owens Parker Reed Smith "
    "Turner Young"
)
ITEMS = words("lamp chair table phone camera jacket mirror kettle guitar bottle pencil basket ladder")
CITIES = words("Rome Paris Oslo Berlin Madrid Lisbon Vienna Dublin")
