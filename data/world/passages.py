"""What the world's texts look like, for those who only read them: its passages, queries and filler phrases."""

import re

PASSAGE = re.compile(r"(\w+) of (\w+) is (\w+)(?: or (\w+))?")
WORDY = (
    "let me see,", "hmm, well,", "ok, step by step,", "the question is clear,", "i want to be careful here,", "right,",
)  # fmt: skip


def passage(subject: str, relation: str, value: str) -> str:
    """The text of a search result."""
    return f"{relation} of {subject} is {value}"


def fact_of(query: str) -> frozenset[str]:
    """What a query asks for, whatever its wording."""
    return frozenset(query.lower().split()) - {"of", "the"}


def fits(query: str, result: str) -> bool | None:
    """Whether a result answers the query: one value of the subject asked for. None if it is no passage of the world."""
    found = PASSAGE.search(result)
    return found and found[4] is None and {found[1], found[2]} <= fact_of(query)
