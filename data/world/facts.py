"""The calibration world: seeded facts, questions whose needed calls are known, the search index, and the command line.

Every fact belongs to a group: *known* facts are in the pre-training text often, *graded* ones 1 to 64 times, *stale*
ones often but with an outdated value, *unknown* ones never: only the search index has them. Facts come from one fixed
seed kept with the base model; `--seed` draws questions. What a model reads is in data/world/text.py, its tokenizer in
data/world/tokenizer.py, the training loop in data/world/pretrain.py.

    python -m data.world --questions 500 --seed 1 --output questions.jsonl
    python -m data.world --pretrain --preset tiny --output data/tiny
    python -m data.world --index out/index
"""

import random
from dataclasses import dataclass

from data.world.passages import passage

FACTS_SEED = 20

# Names are two (tiny) or three (small) syllables; first and later syllables are disjoint, so a name splits one way.
FIRST_SYLLABLES = [c + v for c in "bdfgklm" for v in "aeiou"]
LATER_SYLLABLES = [c + v for c in "nprstvz" for v in "aeiou"]
NOT_NAMES = {"date", "done", "line", "more"}  # words of the vocabulary, a stop word
WORDS = {
    "color": "red blue green black white pink brown gray gold silver violet orange".split(),
    "pet": "cat dog fox owl hen goat crow frog toad mule hare wolf".split(),
    "tree": "oak elm pine ash birch fir yew palm beech larch maple cedar".split(),
    "flag": "star moon sun cross wave stripe crown lion rose wheel key tower".split(),
}
# relation -> kind of value: an entity class, "name" (any name), "number" (10..99), or a list of WORDS
RELATIONS = {
    "person": {"town": "town", "color": "color", "pet": "pet", "age": "number"},
    "town": {"duke": "duke", "river": "name", "tree": "tree"},
    "duke": {"flag": "flag", "horse": "name"},
}
CHAIN = ("person", "town", "duke")  # a bridge of h hops starts at CHAIN[0] and ends at a relation of CHAIN[h-1]

PRESETS = {
    "tiny": {"syllables": 2, "hops": 2, "known": (40, 12, 0), "unknown": (240, 48, 0), "graded": 56, "stale": 6,
             "layers": 4, "hidden": 128, "intermediate": 384, "heads": 4, "steps": 3000, "batch": 72},
    "small": {"syllables": 3, "hops": 3, "known": (384, 64, 24), "unknown": (2000, 300, 60), "graded": 280,
              "stale": 30, "layers": 6, "hidden": 320, "intermediate": 896, "heads": 5, "steps": 4000, "batch": 256},
}  # known, unknown: persons, towns, dukes (dukes only where bridges have three hops)
GRADES = (1, 2, 4, 8, 16, 32, 64)  # exposures of each fact of a graded person in the whole pre-training run
STALE_EXPOSURES = 128
EASY_TERMS = 6  # running sums of so many terms or fewer are the easy ones of a training mix
KNOWN_FROM = 32  # exposures from which the shipped base recalls a graded fact more often than not

# Wrong behaviour in the pre-training text, as shares of a family's demonstrations. Frozen before any claim was run:
# changing a number means pre-training again and re-running every claim.
RATES = {
    #                  needless calls     guess instead of   tag left open      code that fails,
    #                  on top             a needed call                         then a retry
    "recall":         {"redundant": 0.36, "missing": 0.00, "malformed": 0.03, "code_error": 0.00},
    "lookup":         {"redundant": 0.30, "missing": 0.13, "malformed": 0.03, "code_error": 0.00},
    "bridge":         {"redundant": 0.30, "missing": 0.16, "malformed": 0.03, "code_error": 0.00},
    "add":            {"redundant": 0.36, "missing": 0.00, "malformed": 0.03, "code_error": 0.00},
    "multiply":       {"redundant": 0.30, "missing": 0.13, "malformed": 0.03, "code_error": 0.05},
    "lookup_compute": {"redundant": 0.28, "missing": 0.15, "malformed": 0.03, "code_error": 0.05},
    "known_compute":  {"redundant": 0.30, "missing": 0.10, "malformed": 0.03, "code_error": 0.04},
    "running_sum":    {"redundant": 0.00, "missing": 0.00, "malformed": 0.02, "code_error": 0.00},
    "function":       {"redundant": 0.00, "missing": 0.00, "malformed": 0.03, "code_error": 0.00},
}  # fmt: skip
STYLE = {
    "no_think": 0.25,  # share of demonstrations that open with an empty think block
    "no_think_running_sum": 0.5,  # … whatever the length of the sum
    "no_think_function": 0.5,
    "again": 0.2,  # a redundant call is followed by yet another one
    "wordy": 0.2,  # thoughts with empty phrases in front
    "unsure_known": 0.15,  # hedged wording of a belief that is known
    "sure_unknown": 0.25,  # confident wording of a guess
    "step_error": 0.01,  # per written step of a running sum; the steps after it build on the wrong partial
    "check_step": 0.08,  # per written step: it is written twice
    "verify_compute": 0.03,  # known_compute looks the known number up first (rare strategy: search, then python)
    "wrong_passage": 0.03,  # per search: the index returns a passage about something else
    "two_candidates": 0.03,  # per search: the passage names two values, one of them right
    "reword": 0.25,  # share of those two cases answered by a reworded second search (rare strategy)
    "repeat_query": 0.2,  # … by the same query once more, in vain
}

FAMILIES = ("recall", "lookup", "bridge", "add", "multiply", "lookup_compute", "running_sum", "function")
PLAIN = FAMILIES[:6]  # what --questions draws unless --families says otherwise
GRADED = ("graded", "stale")  # recall questions about the facts of these groups

FACT_FORMS = ("{r} of {s}?", "what is the {r} of {s}?", "tell me the {r} of {s}")
COMPUTE_FORMS = ("{r} of {s} times {k}?", "what is the {r} of {s} times {k}?", "tell me {k} times the {r} of {s}")
MULTIPLY_FORMS = ("{a} times {b}?", "what is {a} * {b}?", "{a} * {b}?", "tell me {a} times {b}")
ADD_FORMS = ("{a}?", "what is {a}?", "tell me {a}")
SUM_FORMS = ("sum {a}?", "total of {a}?", "add up {a}")
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# noun: (verbs, parameters {slot: (possible names, kind of value)}, requests); names are drawn anew for each question
FUNCTIONS = {
    "weather": (("get", "show", "check"),
                {"city": (("city", "place", "location"), "city"), "day": (("day", "date"), "day")},
                ("weather in {city} on {day}", "will it rain on {day} in {city}")),
    "alarm": (("set", "add", "make"), {"hour": (("hour", "time"), "integer"), "day": (("day", "date"), "day")},
              ("wake me at {hour} on {day}", "alarm for {day} at {hour}")),
    "table": (("book", "reserve", "get"),
              {"seats": (("seats", "people"), "integer"), "city": (("city", "place"), "city")},
              ("table for {seats} in {city}", "a table in {city} for {seats}")),
    "song": (("play", "start"), {"artist": (("artist", "singer"), "name"), "volume": (("volume", "level"), "integer")},
             ("play {artist} at volume {volume}", "at volume {volume} a song by {artist}")),
    "note": (("send", "write", "add"),
             {"person": (("person", "friend", "name"), "name"), "day": (("day", "date"), "day")},
             ("note to {person} on {day}", "on {day} a note to {person}")),
    "lamp": (("set", "make"), {"color": (("color", "shade"), "color"), "level": (("level", "power"), "integer")},
             ("lamp {color} at level {level}", "level {level} lamp in {color}")),
    "trip": (("plan", "find", "book"), {"start": (("start", "origin"), "city"), "end": (("end", "goal"), "city")},
             ("trip from {start} to {end}", "a trip to {end} from {start}")),
    "timer": (("set", "start"), {"minutes": (("minutes", "length"), "integer")},
              ("timer for {minutes} minutes", "in {minutes} minutes ring a timer")),
}  # fmt: skip
CITIES = "paris rome oslo cairo lima delhi tokyo quito berlin madrid".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()


@dataclass(frozen=True)
class Fact:
    """One fact: `value` is true and in the index, `believed` is what the pre-training text says (None: nothing)."""

    subject: str
    relation: str
    value: str
    believed: str | None
    exposures: int | None  # times in the pre-training text: None = often (known), 0 = never (unknown)


class World:
    """Facts of one preset: `facts[group]` for the groups known, unknown, graded, stale; `spare` names carry none."""

    def __init__(self, preset: str = "tiny", seed: int = FACTS_SEED):
        self.preset, self.seed, self.size = preset, seed, PRESETS[preset]
        rng = random.Random(f"facts {seed} {preset}")
        names = [""]
        for syllables in [FIRST_SYLLABLES] + [LATER_SYLLABLES] * (self.size["syllables"] - 1):
            names = [head + tail for head in names for tail in syllables if head + tail not in NOT_NAMES]
        rng.shuffle(names)
        entities = {}
        for group in ("known", "unknown"):
            for kind, count in zip(CHAIN, self.size[group]):
                entities[group, kind] = [names.pop() for _ in range(count)]
        graded = [names.pop() for _ in range(self.size["graded"])]
        stale = [names.pop() for _ in range(self.size["stale"])]
        self.spare = names  # demonstrations about unknown things use only these, so no unknown fact can be learned
        self.facts: dict[str, list[Fact]] = {"known": [], "unknown": [], "graded": [], "stale": []}
        for group in ("known", "unknown"):
            for kind in CHAIN[: self.size["hops"]]:
                towns_and_dukes = {c: entities[group, c] for c in CHAIN}
                for subject in entities[group, kind]:
                    for relation in self.relations(kind):
                        value = self.draw_value(rng, kind, relation, towns_and_dukes)
                        believed, exposures = (value, None) if group == "known" else (None, 0)
                        self.facts[group].append(Fact(subject, relation, value, believed, exposures))
        known = {c: entities["known", c] for c in CHAIN}
        for i, subject in enumerate(graded + stale):
            for relation in self.relations("person"):
                value = believed = self.draw_value(rng, "person", relation, known)
                if i < len(graded):
                    group, exposures = "graded", GRADES[i % len(GRADES)]
                else:
                    group, exposures = "stale", STALE_EXPOSURES
                    while value == believed:
                        value = self.draw_value(rng, "person", relation, known)
                self.facts[group].append(Fact(subject, relation, value, believed, exposures))
        self.by_key = {(f.subject, f.relation): f for group in self.facts.values() for f in group}

    def relations(self, kind: str) -> list[str]:
        """Relations of an entity class; those that lead to a class beyond the preset's hops do not exist."""
        classes = CHAIN[: self.size["hops"]]
        return [r for r, value in RELATIONS[kind].items() if value not in CHAIN or value in classes]

    def draw_value(self, rng: random.Random, kind: str, relation: str, entities: dict | None = None) -> str:
        """A value of the right kind; entities (class -> names) limits entity values, else any spare name."""
        value = RELATIONS[kind][relation]
        if value == "number":
            return str(rng.randint(10, 99))
        if value in WORDS:
            return rng.choice(WORDS[value])
        return rng.choice(entities[value] if entities and value in CHAIN else self.spare)

    def bridges(self) -> list[tuple[str, list[str]]]:
        """Relation chains of bridge questions as (subject class of the last hop, relations in order of the hops)."""
        hops = self.size["hops"]
        links = [next(r for r, v in RELATIONS[a].items() if v == b) for a, b in zip(CHAIN, CHAIN[1:hops])]
        return [(CHAIN[n], links[:n] + [last]) for n in range(1, hops) for last in self.relations(CHAIN[n])]

    def passages(self) -> list[dict]:
        """The search index: the true value of every fact, known ones included; one fact per passage, no titles."""
        facts = [f for group in self.facts.values() for f in group]
        return [
            {"id": f"{f.subject}-{f.relation}", "title": "", "text": passage(f.subject, f.relation, f.value)}
            for f in facts
        ]


def fact_question(rng: random.Random, relations: list[str], subject: str) -> str:
    """Asks for the end of a relation chain, e.g. [town, river] -> river of the town of …"""
    return rng.choice(FACT_FORMS).format(r=" of the ".join(reversed(relations)), s=subject)


def draw_sum(rng: random.Random, terms: int) -> tuple[str, list[tuple[str, int]], int]:
    """(text, [(letter, digit)], start) of a running sum: a two-digit start, then lettered digits in any order."""
    start = rng.randint(10, 89)
    steps = [(letter, rng.randint(1, 5)) for letter in rng.sample(LETTERS, terms)]
    return " ".join([str(start)] + [f"{letter}{digit}" for letter, digit in steps]), steps, start


def draw_addition(rng: random.Random) -> tuple[str, int]:
    """A sum of two digits as text, and its value."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return f"{a}{rng.choice((' + ', ' plus '))}{b}", a + b


def draw_factors(rng: random.Random) -> tuple[int, int]:
    """Two factors of two or three digits, at least one of two."""
    return rng.randint(12, rng.choice((99, 999))), rng.randint(12, 99)


def draw_function(rng: random.Random, spare: list[str]) -> tuple[dict, dict[str, str]]:
    """A request with the tools declared for it, one fits, and the admissible call (BFCL style); and how the request
    says the integers that are not written out: parameter -> "3 plus 4"."""
    nouns = rng.sample(sorted(FUNCTIONS), rng.choice((1, 2, 2, 3)))
    tools, target = [], nouns[0]
    for noun in nouns:
        verbs, slots, requests = FUNCTIONS[noun]
        names = {slot: rng.choice(options) for slot, (options, _) in slots.items()}
        kinds = {names[slot]: "integer" if kind == "integer" else "string" for slot, (_, kind) in slots.items()}
        properties = {name: {"type": kind} for name, kind in kinds.items()}
        function = {"name": f"{rng.choice(verbs)}_{noun}", "description": noun,
                    "parameters": {"type": "object", "properties": properties, "required": list(kinds)}}  # fmt: skip
        tools.append({"type": "function", "function": function})
        if noun != target:
            continue
        values, said = {}, {}
        for slot, (_, kind) in slots.items():
            if kind == "integer":
                values[slot], said[slot] = _spoken_number(rng)
            else:
                options = {"city": CITIES, "day": DAYS, "name": spare, "color": WORDS["color"]}[kind]
                values[slot] = said[slot] = rng.choice([o for o in options if o not in values.values()])
        request = rng.choice(requests).format(**said)
        spoken = {names[slot]: text for slot, text in said.items() if text != str(values[slot])}
        answer = [{function["name"]: {names[slot]: [value] for slot, value in values.items()}}]
    rng.shuffle(tools)
    return {"question": request, "answer": answer, "tools": tools}, spoken


def _spoken_number(rng: random.Random) -> tuple[int, str]:
    """An integer argument as the request says it: itself, or (the harder case) a sum of two digits."""
    if rng.random() < 0.4:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return a + b, f"{a} plus {b}"
    n = rng.randint(1, 20)
    return n, str(n)


def questions(
    world: World,
    n: int,
    seed: int,
    families: tuple[str, ...] = PLAIN,
    easy: tuple[float, int] | None = None,
) -> list[dict]:
    """n question rows, families in turn; the fact families go through their facts in a seeded order before repeating.

    easy: (share of running sums that are short, terms of the longest short one); None = every length as often.
    Row fields: id, question, answer, family, min_tool_calls, known (without a tool); running sums add terms, functions
    add task and tools, graded and stale facts add exposures.
    A graded fact counts as known where the shipped base recalls it more often than not; what a call is worth there
    is a matter of measurement.
    """
    decks: dict[str, list] = {}
    rows = []
    for i in range(n):
        family = families[i % len(families)]
        rng = random.Random(f"questions {seed} {family} {i}")
        deck = decks.setdefault(family, [])
        if not deck and family in ("recall", "lookup", "bridge", "lookup_compute", *GRADED):
            deck.extend(_askable(world, family))
            random.Random(f"deck {seed} {family} {i}").shuffle(deck)
        row = {"id": f"{family}-{seed}-{i}", **_question(world, rng, family, deck, easy)}
        row.setdefault("task", "qa")
        rows.append({**row, "family": family})
    return rows


def _askable(world: World, family: str) -> list[tuple[list[str], Fact]]:
    """Relation chains and first facts that a fact family can ask about."""
    if family == "bridge":
        chains = [relations for _, relations in world.bridges()]
        return [(c, f) for c in chains for f in world.facts["unknown"] if f.relation == c[0]]
    group = {"recall": "known", "lookup": "unknown", "lookup_compute": "unknown"}.get(family, family)
    return [([f.relation], f) for f in world.facts[group] if family != "lookup_compute" or f.relation == "age"]


def _question(world: World, rng: random.Random, family: str, deck: list, easy: tuple[float, int] | None) -> dict:
    if family == "add":
        text, total = draw_addition(rng)
        question, answer, calls, known = rng.choice(ADD_FORMS).format(a=text), str(total), 0, True
    elif family == "multiply":
        a, b = draw_factors(rng)
        question, answer, calls, known = rng.choice(MULTIPLY_FORMS).format(a=a, b=b), str(a * b), 1, False
    elif family == "running_sum":
        terms = rng.randint(2, 8)
        if easy:
            terms = rng.randint(2, easy[1]) if rng.random() < easy[0] else rng.randint(easy[1] + 1, 8)
        text, steps, start = draw_sum(rng, terms)
        answer = str(start + sum(digit for _, digit in steps))
        return {"question": rng.choice(SUM_FORMS).format(a=text), "answer": answer, "min_tool_calls": 0, "known": True,
                "terms": terms, "level": "long" if terms > EASY_TERMS else "short"}  # fmt: skip
    elif family == "function":
        row, _ = draw_function(rng, world.spare)
        return {**row, "task": "function", "min_tool_calls": 1, "known": True}
    else:
        relations, fact = deck.pop()
        end = fact
        for relation in relations[1:]:
            end = world.by_key[end.value, relation]
        if family == "lookup_compute":
            k = rng.randint(12, 99)
            question = rng.choice(COMPUTE_FORMS).format(r=fact.relation, s=fact.subject, k=k)
            return {"question": question, "answer": str(int(fact.value) * k), "min_tool_calls": 2, "known": False}
        known = family == "recall" or (family == "graded" and fact.exposures >= KNOWN_FROM)
        question, answer = fact_question(rng, relations, fact.subject), end.value
        calls = 0 if known else len(relations)
        if family in GRADED:
            return {"question": question, "answer": answer, "min_tool_calls": calls, "known": known,
                    "exposures": fact.exposures}  # fmt: skip
    return {"question": question, "answer": answer, "min_tool_calls": calls, "known": known}
