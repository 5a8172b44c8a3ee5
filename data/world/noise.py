"""The noisy calibration world: an index that misleads by the wording of a query, and what a call is worth there.

With `--noise 1` a search returns, in place of its passage, one about another subject (p = .2) or one that names two
candidates (p = .15). Which, is a pure function of (noise seed, fact, wording): the same query always finds the same
passage; of the four wordings of a fact at most one is answered wrongly and at most one ambiguously, so that a reworded
query never meets the same flaw twice. The pre-training text holds both flaws and both reactions (data/world/text.py).

    python -m data.world.noise          (prints what a call adds to the chance of being right, by situation)
"""

import argparse
import random
from itertools import permutations
from statistics import fmean

from core.trajectory import DataError
from data.world.facts import KNOWN_FROM, World
from data.world.passages import PASSAGE, fits, passage
from data.world.text import QUERIES

WRONG, AMBIGUOUS = 0.2, 0.15  # shares of the wordings of a fact, at --noise 1
SHAPES = [query.format(r="r", s="s") for query in QUERIES]

# The mix of a noisy question file (`data.world --families noisy`), in a fixed order without runs. Among what the base
# is sure of (recall, stale and often seen graded facts), stale facts are about 4 %: a verification is worth about 3 %.
_SHARES = {"recall": 22, "lookup": 28, "bridge": 20, "add": 6, "multiply": 13, "lookup_compute": 18, "graded": 12,
           "stale": 1}  # fmt: skip
_MIX = [family for family, count in _SHARES.items() for _ in range(count)]
MIX = tuple(random.Random("noisy mix").sample(_MIX, len(_MIX)))


class NoisyIndex:
    """A search index of the world whose answers may be flawed; answers `search(query, k)` as SearchIndex does.

    scale 0 … 1 multiplies both rates. DataError if a passage of the index is not a fact of the world.
    """

    def __init__(self, index, scale: float, seed: int):
        self.index, self.scale, self.seed = index, scale, seed
        self.values: dict[str, list[tuple[str, str]]] = {}  # relation -> (subject, value) of every fact
        for row in index.passages:
            fact = PASSAGE.fullmatch(row["text"])
            if not fact or fact[4]:
                raise DataError(f"--noise needs an index of the calibration world; it holds {row['text'][:60]!r}")
            self.values.setdefault(fact[1], []).append((fact[2], fact[3]))

    def search(self, query: str, k: int = 1) -> list[dict]:
        """The best passage, flawed or not; a query that names no fact of the world is answered as by the index."""
        found = self.index.search(query, k)
        if not found or fits(query, found[0]["text"]) is not True:
            return found
        relation, subject, value, _ = PASSAGE.fullmatch(found[0]["text"]).groups()
        kind, rng = flaw(self.scale, self.seed, relation, subject, query)
        others = [fact for fact in self.values[relation] if fact[1] != value]
        if not kind or not others:
            return found
        other_subject, other = rng.choice(others)
        if kind == "wrong":
            return [found[0] | {"text": passage(other_subject, relation, other)}]
        pair = rng.sample([value, other], 2)
        return [found[0] | {"text": passage(subject, relation, " or ".join(pair))}]


def flaw(scale: float, seed: int, relation: str, subject: str, query: str) -> tuple[str, random.Random]:
    """("wrong" | "ambiguous" | "", generator for the passage) of a query about a fact."""
    words = ["r" if word == relation else "s" if word == subject else word for word in query.lower().split()]
    shape = " ".join(words)
    wording = SHAPES.index(shape) if shape in SHAPES else random.Random(f"wording {shape}").randrange(len(SHAPES))
    rng = random.Random(f"noise {seed} {relation} {subject}")
    first, second = rng.sample(range(len(SHAPES)), 2)
    wrong, ambiguous = (rng.random() < len(SHAPES) * rate * scale for rate in (WRONG, AMBIGUOUS))
    return "wrong" if wrong and wording == first else "ambiguous" if ambiguous and wording == second else "", rng


# ---------------------------------------------------------------------------------------------------- worth of a call


def worth_of_calls(world: World, index, scale: float, seed: int) -> dict[str, tuple[float, float]]:
    """Situation -> (chance of being right without, with one more call), over all facts and pairs of wordings.

    The policy knows no unknown fact, believes what the pre-training text said often, takes a fitting passage at its
    word, guesses between two candidates, and never trusts a passage about something else.
    """
    noisy = NoisyIndex(index, scale, seed)
    seen: dict[str, list[tuple[float, float]]] = {}
    for fact in world.facts["unknown"]:
        guess = 1 / len({value for _, value in noisy.values[fact.relation]})
        asked = [query.format(r=fact.relation, s=fact.subject) for query in QUERIES]
        chance = {}  # of being right after this passage alone
        for query in asked:
            text = noisy.search(query)[0]["text"]
            state = "fits" if fits(query, text) else "two candidates" if " or " in text else "wrong passage"
            chance[query] = state, {"fits": 1.0, "two candidates": 0.5, "wrong passage": guess}[state]
            seen.setdefault("unknown fact, first search", []).append((guess, chance[query][1]))
        for first, second in permutations(asked, 2):
            state, before = chance[first]
            seen.setdefault(f"{state}, reworded search", []).append((before, max(before, chance[second][1])))
            seen.setdefault(f"{state}, same search again", []).append((before, before))
    sure = {name: _SHARES[name] for name in ("recall", "stale")}
    often = [fact.exposures >= KNOWN_FROM for fact in world.facts["graded"]]
    right = 1 - sure["stale"] / (sum(sure.values()) + _SHARES["graded"] * fmean(often))
    found = fmean(after for _, after in seen["unknown fact, first search"])
    seen["sure belief, verification"] = [(right, right + (1 - right) * found)]
    return {name: tuple(map(fmean, zip(*pairs))) for name, pairs in sorted(seen.items())}


def main(argv: list[str] | None = None) -> None:
    from core.run import table
    from tools.search import SearchIndex

    parser = argparse.ArgumentParser(prog="python -m data.world.noise", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("tiny", "small"), default="tiny", help="of the world")
    parser.add_argument("--noise", type=float, default=1.0, help="scale of the noise, 0 to 1")
    parser.add_argument("--noise_seed", type=int, default=0, help="draws which wordings are answered with a flaw")
    args = parser.parse_args(argv)
    if not 0 <= args.noise <= 1:
        parser.error(f"--noise must be from 0 to 1, not {args.noise}")
    world = World(args.preset)
    index = SearchIndex.build(world.passages(), progress=False)
    rows = worth_of_calls(world, index, args.noise, args.noise_seed)
    print(table(["situation, call", "without", "with", "worth"], [[k, a, b, b - a] for k, (a, b) in rows.items()]))


if __name__ == "__main__":
    main()
