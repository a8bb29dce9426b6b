"""A guess at the language of a text: its script, and for scripts of many languages a few words that stand everywhere.

A guess it is: code reads as English or as its script alone, and short texts say little.
"""

import unicodedata
from collections import Counter
from functools import cache

LOOKED_AT = 400
"""Characters of a text that are looked at."""

_OTHER_NAMES = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}
_SCRIPTS = {
    "GREEK": "Greek",
    "HEBREW": "Hebrew",
    "THAI": "Thai",
    "GEORGIAN": "Georgian",
    "ARMENIAN": "Armenian",
    "TAMIL": "Tamil",
    "TELUGU": "Telugu",
    "BENGALI": "Bengali",
    **_OTHER_NAMES,
}
# Words of one Latin letter are left out: code is full of them.
_WORDS = {
    "English": "the of and to is that it for with are this was be as you have not what",
    "German": "der die und das ist nicht ein eine zu mit den von auf sich wie auch wird",
    "French": "le les et des est une dans que pour qui pas sur vous avec ce sont au",
    "Spanish": "el los que es una por con para las del se como su lo pero est\u00e1",
    "Italian": "il che di un per non una sono con della gli come anche questo nel",
    "Portuguese": "os que n\u00e3o uma com para do da em como mais por s\u00e3o voc\u00ea ao",
    "Dutch": "de het een en van is dat niet op te zijn voor met aan ook naar bij",
    "Polish": "nie na si\u0119 jest \u017ce jak co czy przez jego od ale",
    "Turkish": "bir ve bu i\u00e7in ile de da ne olarak daha gibi olan \u00e7ok kadar var en",
    "Swedish": "och att det som en \u00e4r av f\u00f6r inte den till med ett har om jag",
    "Vietnamese": "l\u00e0 c\u1ee7a v\u00e0 c\u00f3 kh\u00f4ng trong cho m\u1ed9t c\u00e1c v\u1edbi",
    "Indonesian": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga adalah",
    "Russian": "\u0438 \u0432 \u043d\u0435 \u043d\u0430 \u0441 \u043a\u0430\u043a \u0447\u0442\u043e",
    "Ukrainian": "\u0456 \u0432 \u043d\u0435 \u043d\u0430 \u0437 \u044f\u043a \u0449\u043e \u0446\u0435 \u0442\u0430",
    "Arabic": "\u0641\u064a \u0645\u0646 \u0639\u0644\u0649 \u0623\u0646 \u0625\u0644\u0649 \u0645\u0627",
    "Persian": "\u062f\u0631 \u0648 \u0627\u0632 \u0628\u0647 \u06a9\u0647 \u0631\u0627 \u0628\u0627",
    "Hindi": "\u0939\u0948 \u0915\u0947 \u0915\u0940 \u0914\u0930 \u0938\u0947 \u0915\u093e \u092a\u0930",
}
_STOP_WORDS = {language: frozenset(words.split()) for language, words in _WORDS.items()}


@cache
def _script(character: str) -> str:
    """The first word of a letter's Unicode name: its script."""
    return unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]


def language(text: str) -> str:
    """The name of a language, or of a script where its language is not clear; `none` without letters."""
    text = text[:LOOKED_AT]
    scripts = Counter(_script(character) for character in text if character.isalpha())
    if not scripts:
        return "none"
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * scripts.total():
        return "Japanese"  # it is written with Chinese characters too
    script = scripts.most_common(1)[0][0]
    if script in _SCRIPTS:
        return _SCRIPTS[script]
    words = text.lower().split()
    scores = {name: sum(word.strip(".,;:!?()\"'") in known for word in words) for name, known in _STOP_WORDS.items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= max(2, 0.05 * len(words)) else f"{script.capitalize()} script"
