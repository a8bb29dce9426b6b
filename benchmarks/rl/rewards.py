"""What a summary line should look like: a reward that can be checked."""

from graftlm.rl.rewards import Completion


def form(completion: Completion) -> float:
    """From 0 to 1, a quarter for each: it is over, on one line, at most ten words, one sentence with its full stop."""
    text = completion.answer
    points = [not completion.cut, bool(text) and "\n" not in text, 0 < len(text.split()) <= 10]
    points.append(text.endswith(".") and ". " not in text)
    return sum(points) / len(points)
