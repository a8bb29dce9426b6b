"""What the metrics of others are on a few answers: values to compare with.

    make peers NAME=metrics        runs this in an environment with lm-eval 0.4.13, nltk, pycocoevalcap and others

It imports nothing of graftlm. Each file of the folder `metrics` holds the versions, the inputs and the outputs.
`tool_calls.json` is made where bfcl-eval can be imported too: `pip install --no-deps bfcl-eval==2026.3.23`, for it
pins what cannot be installed with the others, and its checker needs none of that.
"""

import json
import random
import sys
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

TEXTS = [
    ("The cat sat on the mat.", ["The cat is sitting on the mat.", "A cat sat on a mat"]),
    ("It is a guide to action which ensures that the military always obeys the commands of the party",
     ["It is a guide to action that ensures that the military will forever heed Party commands",
      "It is the guiding principle which guarantees the military forces always being under the command of the Party"]),
    ("Paris", ["Paris", "paris, France"]),
    ("an  Answer, with Punctuation!", ["answer with punctuation"]),
    ("running dogs happily jumped over fences", ["the dog runs and happily jumps over the fence"]),
    ("completely different", ["nothing in common here"]),
    ("", ["an answer was expected"]),
    ("to be or not to be that is the question", ["that is the question whether to be or not to be"]),
    ("\u00dcber den Wolken mu\u00df die Freiheit wohl grenzenlos sein",
     ["\u00dcber den Wolken ist die Freiheit grenzenlos"]),
    ("42", ["42"]),
    ("b a b a b", ["a b a b a", "b b b"]),
    ("the the the the", ["the cat"]),
]  # fmt: skip
ANSWERS, REFERENCES = [answer for answer, _ in TEXTS], [refs for _, refs in TEXTS]
WORDS = """
relational conditional rational valenci hesitanci digitizer conformabli radicalli differentli vileli analogousli
vietnamization predication operator feudalism decisiveness hopefulness callousness formaliti sensitiviti sensibiliti
triplicate formative formalize electriciti electrical hopeful goodness revival allowance inference airliner
gyroscopic adjustable defensible irritant replacement adjustment dependent adoption homologou communism activate
angulariti homologous effective bowdlerize probate rate cease controll roll caresses ponies ties caress cats feed
agreed plastered bled motoring sing conflated troubled sized hopping tanned falling hissing fizzed failing filing
happy sky running dogs dog jumps jumped fences fence happily generalizations oscillators a by us say dying flies
mules denied died owned humbled meeting stating itemization sensational traditional reference colonizer plotted
"""


def texts():
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import single_meteor_score
    from nltk.translate.nist_score import corpus_nist
    from pycocoevalcap.cider.cider import Cider
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF, TER

    most = max(map(len, REFERENCES))
    streams = [[refs[n] if n < len(refs) else None for refs in REFERENCES] for n in range(most)]
    made = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2), "ter": TER()}
    corpus = {name: metric.corpus_score(ANSWERS, streams).score for name, metric in made.items()}
    one = [refs[:1] for refs in REFERENCES]
    corpus |= {
        f"{name}, one reference": each.corpus_score(ANSWERS, [[r[0] for r in one]]).score for name, each in made.items()
    }

    # the words are given, so that the scores are compared and not the tokenizers
    split = [[answer.lower().split()] + [ref.lower().split() for ref in refs] for answer, refs in TEXTS]
    stemmer = PorterStemmer(mode=PorterStemmer.ORIGINAL_ALGORITHM)
    no_words = types.SimpleNamespace(synsets=lambda word: [])
    meteor = [
        max(single_meteor_score(ref, answer, stemmer=stemmer, wordnet=no_words) for ref in refs)
        for answer, *refs in split
    ]
    _, cider = Cider().compute_score(
        {n: [" ".join(ref) for ref in refs] for n, (_, *refs) in enumerate(split)},
        {n: [" ".join(answer)] for n, (answer, *_) in enumerate(split)},
    )
    switches = ("ignore_case", "ignore_punctuation", "ignore_numbers")
    exact = {}
    for number in range(8):
        given = {name: bool(number >> place & 1) for place, name in enumerate(switches)}
        for regexes in (None, [r"\s+", "mat"]):
            found = [
                max(float(exact_match_hf_evaluate([answer], [ref], regexes_to_ignore=regexes, **given)["exact_match"])
                    for ref in refs)
                for answer, refs in TEXTS
            ]  # fmt: skip
            exact[json.dumps(given | {"regexes_to_ignore": regexes or []})] = found
    rouge = RougeScorer(["rougeL"])
    return {
        "inputs": TEXTS,
        "corpus": corpus,
        "nist": corpus_nist([refs for _, *refs in split], [answer for answer, *_ in split]),
        "meteor": meteor,
        "cider": list(map(float, cider)),
        "stems": {word: stemmer.stem(word, to_lowercase=False) for word in WORDS.split()},
        "token_f1": [max(f1_abstractive([answer], [ref]) for ref in refs) for answer, refs in TEXTS],
        "squad_exact": [
            float(normalize_answer(answer) in [normalize_answer(ref) for ref in refs]) for answer, refs in TEXTS
        ],
        "rouge_l": [max(rouge.score(ref, answer)["rougeL"].fmeasure for ref in refs) for answer, refs in TEXTS],
        "exact_match": exact,
    }


def choices():
    from lm_eval.api import metrics, task
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import matthews_corrcoef

    draw = random.Random(3)
    texts = ["yes", "no", "perhaps not", "\u00e9t\u00e9 \u65e5\u672c", "a much longer choice than the others"]
    items = []
    for _ in range(40):
        items.append(
            {
                "choices": texts,
                "gold": draw.randrange(5),
                "lls": [-draw.uniform(0.5, 6) * (1 + len(text) / 8) for text in texts],
                "unconditional": [-draw.uniform(0.5, 6) * (1 + len(text) / 8) for text in texts],
            }
        )
    names = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier_score", "mcc")
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(process_results=None),
        _metric_fn_list=dict.fromkeys(names),
        OUTPUT_TYPE="multiple_choice",
        multiple_input=0,
        multiple_target=0,
        doc_to_choice=lambda doc: doc["choices"],
        doc_to_target=lambda doc: doc["gold"],
    )
    found = [
        task.ConfigurableTask.process_results(fake, doc, [(ll, False) for ll in [*doc["lls"], *doc["unconditional"]]])
        for doc in items
    ]
    values = {name: [float(each[name]) for each in found] for name in names[:4]}
    totals = {
        "brier_score": float(metrics.brier_score([each["brier_score"] for each in found])),
        "mcc": float(metrics.matthews_corrcoef([each["mcc"] for each in found])),
    }
    lines = [(draw.choice("abc"), draw.choice("abc")) for _ in range(50)]
    x, y = [round(draw.gauss(0, 2)) for _ in range(30)], [draw.gauss(0, 1) for _ in range(30)]
    rolling = [("two words", -7.25), ("\u00e9t\u00e9 and more words here", -31.5), (" edges count ", -12.0)]
    weighted = {
        name: [(ll, metrics_size(name, text)) for text, ll in rolling]
        for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    }
    return {
        "items": items,
        "per item": values,
        "totals": totals,
        "labels": {"pairs": lines, "mcc": float(matthews_corrcoef([b for _, b in lines], [a for a, _ in lines]))},
        "numbers": {"x": x, "y": y, "pearson": float(pearsonr(x, y)[0]), "spearman": float(spearmanr(x, y)[0])},
        "rolling": {
            "texts": rolling,
            "word_perplexity": metrics.weighted_perplexity(weighted["word_perplexity"]),
            "byte_perplexity": metrics.weighted_perplexity(weighted["byte_perplexity"]),
            "bits_per_byte": metrics.bits_per_byte(weighted["bits_per_byte"]),
            "perplexity": metrics.perplexity([ll for _, ll in rolling]),
        },
    }


def metrics_size(name, text):
    from lm_eval.api.task import PerplexityTask

    return PerplexityTask.count_words(text) if name == "word_perplexity" else PerplexityTask.count_bytes(text)


RESPONSES = [
    "The quick brown fox jumps. It is happy, very happy! Is it? Yes.",
    "First paragraph here.\n***\nSecond paragraph, with words.\n***\nThird.",
    "* one\n* two\n- three\nText with *highlight* and **strong words** in it.",
    '```json\n{"a": [1, 2, {"b": null}]}\n```',
    '"All of this is wrapped in quotation marks."',
    "<<A title>>\n\nDear [name],\n\nplease write to [address] at [time]. Best wishes\n\nP.S. Do not forget the fox",
    "one answer ****** another answer",
    "same ****** same",
    "THE WHOLE ANSWER IS WRITTEN IN CAPITAL LETTERS AND IN ENGLISH BECAUSE IT WAS ASKED FOR",
    "the whole answer is written in small letters and in english because it was asked for",
    "Section 1\nFirst part.\nSection 2\nSecond part.\nP.P.S we are done. Any more questions?",
    "My answer is maybe.",
    "Tell me about foxes. Foxes are animals that live in woods and NASA never sent one to space",
    "Intro line that should be dropped\n{\"a\": 1}\nOutro line",
    "***\nleading and trailing dividers\n***",
    "",
    "Word.\n\nfox is the first word here.\n\n'Fox' again, Mr. Fox and Dr. Wolf went to the U.S. today. They came back.",
    "<<>>\n**\n[]\nfoxfox Fox fox-like",
    "- the only one\nwith *a b*, *c*, **d** and **e f**",
    "*one* and *two* and *three*",
]  # fmt: skip
CHECKS = [
    ("keywords:existence", {"keywords": ["fox", "happy"]}),
    ("keywords:existence", {"keywords": ["answer"]}),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, "relation": "at least"}),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, "relation": "less than"}),
    ("keywords:forbidden_words", {"forbidden_words": ["fox", "wolf"]}),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 5, "let_relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "t", "let_frequency": 3, "let_relation": "less than"}),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}),
    ("length_constraints:number_words", {"num_words": 10, "relation": "at least"}),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "fox"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 3, "nth_paragraph": 3, "first_word": "Fox"}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "the"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 3}),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 4}),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "tell me about Foxes."}),
    ("startend:end_checker", {"end_phrase": "Any more questions?"}),
    ("startend:quotation", {}),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "at least"}),
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "less than"}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("punctuation:no_comma", {}),
]


def instructions():
    """Strict and loose. Sentences are those of instructions_util's rules, since Punkt is a download, and every text
    counts as English."""
    import langdetect
    import nltk

    nltk.data.find = lambda *given: None
    langdetect.detect = lambda text: "en"
    from lm_eval.tasks.ifeval import instructions_util, utils

    instructions_util.count_sentences = lambda text: len(instructions_util.split_into_sentences(text))
    instructions_util.nltk.word_tokenize = nltk.tokenize.NLTKWordTokenizer().tokenize
    found = []
    for name, arguments in CHECKS:
        example = utils.InputExample(0, [name], "", [arguments])
        strict = [utils.test_instruction_following_strict(example, each).follow_all_instructions for each in RESPONSES]
        loose = [utils.test_instruction_following_loose(example, each).follow_all_instructions for each in RESPONSES]
        found.append({"name": name, "arguments": arguments, "strict": strict, "loose": loose})
    return {"responses": RESPONSES, "checks": found}


TOOL = {
    "name": "geo.find",
    "description": "",
    "parameters": {
        "type": "dict",
        "properties": {
            "place": {"type": "string"},
            "radius": {"type": "float"},
            "limit": {"type": "integer"},
            "open": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["place"],
    },
}
POSSIBLE = {
    "geo.find": {
        "place": ["San Francisco, CA", "SF"],
        "radius": [2.0, ""],
        "limit": [5, 10, ""],
        "open": [True, ""],
        "tags": [["food", "late night"], ""],
    }
}
CALLS = [
    [{"geo.find": {"place": "san francisco CA"}}],
    [{"geo.find": {"place": "SF", "radius": 2, "limit": 10, "open": True, "tags": ["Food", "late-night"]}}],
    [{"geo.find": {"place": "SF", "limit": 7}}],
    [{"geo.find": {"place": "SF", "open": False}}],
    [{"geo.find": {"place": "Oakland"}}],
    [{"geo.find": {"radius": 2.0}}],
    [{"geo.find": {"place": "SF", "unknown": 1}}],
    [{"geo.seek": {"place": "SF"}}],
    [{"geo.find": {"place": "SF", "tags": ["late night", "food"]}}],
    [{"geo.find": {"place": "SF"}}, {"geo.find": {"place": "SF"}}],
]
PARALLEL = [{"geo.find": {"place": ["SF"]}}, {"geo.find": {"place": ["Oakland"], "limit": [5, ""]}}]
PARALLEL_CALLS = [
    [{"geo.find": {"place": "SF"}}, {"geo.find": {"place": "Oakland"}}],
    [{"geo.find": {"place": "oakland", "limit": 5}}, {"geo.find": {"place": "sf"}}],
    [{"geo.find": {"place": "SF"}}, {"geo.find": {"place": "SF"}}],
    [{"geo.find": {"place": "SF"}}],
]


def tool_calls():
    plain = types.SimpleNamespace(underscore_to_dot=False)
    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = {"model": plain}  # the real one imports every vendor's client
    sys.modules[stub.__name__] = stub
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(calls, possible, category):
        return ast_checker([TOOL], calls, possible, Language.PYTHON, category, "model")["valid"]

    return {
        "cases": [
            *({"calls": c, "wanted": [POSSIBLE], "valid": check(c, [POSSIBLE], "simple")} for c in CALLS),
            *({"calls": c, "wanted": PARALLEL, "valid": check(c, PARALLEL, "parallel")} for c in PARALLEL_CALLS),
        ]
    }


def schemas():
    from jsonschema.validators import validator_for

    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1}, "s": {"enum": ["a", "b"]}, "r": {"$ref": "#/$defs/x"}},
        "required": ["n"],
        "additionalProperties": False,
        "$defs": {"x": {"type": "array", "items": {"type": "string"}, "maxItems": 2}},
    }
    answers = ['{"n": 1}', '{"n": 0}', '{"n": 1.0, "s": "b", "r": ["x"]}', '{"n": 1, "t": 2}', '{"n": 1, "r": [1]}',
               '{"s": "a"}', "[]", '{"n": true}', '{"n": 3, "r": ["a", "b", "c"]}']  # fmt: skip
    check = validator_for(schema)(schema)
    return {"schema": schema, "answers": answers, "valid": [check.is_valid(json.loads(each)) for each in answers]}


MADE = {
    "texts": (texts, ("lm-eval", "nltk", "pycocoevalcap", "rouge-score", "sacrebleu")),
    "choices": (choices, ("lm-eval", "scikit-learn", "scipy")),
    "instructions": (instructions, ("lm-eval", "nltk")),
    "schemas": (schemas, ("jsonschema",)),
    "tool_calls": (tool_calls, ("bfcl-eval",)),
}


def main(folder):
    np.random.seed(0)
    folder.mkdir(exist_ok=True)
    for name, (make, packages) in MADE.items():
        if name == "tool_calls" and find_spec("bfcl_eval") is None:
            print("tool_calls.json stays as it is: bfcl-eval is not installed")
            continue
        found = {"versions": {package: version(package) for package in packages}, **make()}
        text = json.dumps(found, indent=1)
        assert "NaN" not in text
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{folder / name}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
