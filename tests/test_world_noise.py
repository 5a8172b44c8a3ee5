"""The noisy world: rates, determinism, what rewording does, needed calls by an oracle that tries all wordings.

    python -m pytest tests/test_world_noise.py
"""

import random
from itertools import permutations

import pytest

from core.trajectory import DataError, ToolCall, Trajectory, read_jsonl
from data.world import __main__ as world
from data.world.facts import FAMILIES, GRADED, World, questions
from data.world.noise import AMBIGUOUS, MIX, WRONG, NoisyIndex, worth_of_calls
from data.world.passages import fits
from data.world.text import QUERIES
from engines.toolbox import open_tools
from eval.behaviour import insufficient, needed_calls, redundant_calls
from rollout import RolloutArgs
from tools.search import SearchIndex

WORLD = World()
INDEX = SearchIndex.build(WORLD.passages(), progress=False)
NOISY = NoisyIndex(INDEX, 1.0, seed=3)
FACTS = [fact for group in WORLD.facts.values() for fact in group]


def ask(query, index=NOISY):
    return index.search(query, 1)[0]["text"]


def kind_of(fact, query, index=NOISY):
    text = ask(query, index)
    if fits(query, text):
        assert text == f"{fact.relation} of {fact.subject} is {fact.value}"
        return "fits"
    return "ambiguous" if " or " in text else "wrong"


def wordings(fact):
    return [query.format(r=fact.relation, s=fact.subject) for query in QUERIES]


def test_rates_of_every_wording():
    """n facts, each wording flawed with its rate: within four standard deviations of a binomial."""
    for index, scale in ((NOISY, 1.0), (NoisyIndex(INDEX, 0.5, seed=1), 0.5)):
        for k in range(len(QUERIES)):
            kinds = [kind_of(fact, wordings(fact)[k], index) for fact in FACTS]
            for kind, rate in (("wrong", WRONG * scale), ("ambiguous", AMBIGUOUS * scale)):
                n = len(FACTS)
                assert abs(kinds.count(kind) - n * rate) < 4 * (n * rate * (1 - rate)) ** 0.5, (k, kind)


def test_a_reworded_query_never_meets_the_same_flaw_and_a_repeated_one_always_does():
    for fact in FACTS:
        kinds = [kind_of(fact, query) for query in wordings(fact)]
        assert kinds.count("wrong") <= 1 and kinds.count("ambiguous") <= 1
        assert kinds == [kind_of(fact, query) for query in wordings(fact)]


def test_what_the_passages_say():
    values = {(f.relation, f.subject): f.value for f in FACTS}
    for fact in FACTS:
        for query in wordings(fact):
            text = ask(query)
            relation, _, subject, _, *said = text.split()
            assert relation == fact.relation
            if subject != fact.subject:  # a true passage about another subject, with another value
                assert said == [values[relation, subject]] and said != [fact.value]
            elif len(said) > 1:
                assert fact.value in said and said[1] == "or" and said[0] != said[2]


def test_noise_is_a_function_of_seed_fact_and_wording():
    rng, queries = random.Random(0), [query for fact in FACTS for query in wordings(fact)]
    first = {query: ask(query) for query in queries}
    rng.shuffle(queries)
    again = NoisyIndex(SearchIndex.build(WORLD.passages(), progress=False), 1.0, seed=3)
    assert {query: ask(query, again) for query in queries} == first
    other = NoisyIndex(INDEX, 1.0, seed=4)
    assert sum(ask(query, other) != first[query] for query in queries) > len(queries) / 3


def test_scale_zero_and_queries_about_nothing_are_answered_as_by_the_index():
    plain = NoisyIndex(INDEX, 0.0, seed=3)
    for fact in FACTS[:100]:
        assert [kind_of(fact, query, plain) for query in wordings(fact)] == ["fits"] * 4
    for query in ("river of nobody", "river", "zzz", FACTS[0].subject):
        assert NOISY.search(query, 1) == INDEX.search(query, 1)


def test_free_wording_is_answered_by_one_of_the_four():
    fact = next(f for f in FACTS if kind_of(f, wordings(f)[0]) == "wrong")
    extra = [f"{word} {fact.relation} of {fact.subject}" for word in ("please", "find", "now", "quick", "say", "show")]
    assert {ask(query) for query in extra} <= {ask(query) for query in wordings(fact)}


def test_only_an_index_of_the_world_can_be_noisy(tmp_path):
    SearchIndex.build([{"id": "1", "title": "", "text": "Paris is a town."}], progress=False).save(tmp_path / "other")
    INDEX.save(tmp_path / "world")
    flags = dict(noise=1.0, noise_seed=3, search_top_k=1)
    other = RolloutArgs(index=str(tmp_path / "other"), **flags)
    with pytest.raises(DataError, match="Paris is a town"), open_tools(other):
        pass
    with open_tools(RolloutArgs(index=str(tmp_path / "world"), **flags)) as tools:
        for query in (query for fact in FACTS[::40] for query in wordings(fact)):
            assert tools["search"](query).text == ask(query)


@pytest.mark.parametrize("flags", [dict(noise=-0.1), dict(noise=1.5), dict(index=""), dict(search_top_k=4)])
def test_flags_that_do_not_go_with_noise(flags):
    with pytest.raises(ValueError, match="--noise"):
        RolloutArgs(**{"noise": 1.0, "index": "x", "search_top_k": 1, **flags})


# ---------------------------------------------------------------------------------------------------- needed calls


def trajectory(searches, need, python=0):
    """A finished trajectory with these queries, answered by the noisy index, and some python calls."""
    calls = [ToolCall("search", query, ask(query)) for query in searches]
    calls += [ToolCall("python", f"{i}*2", str(2 * i)) for i in range(python)]
    meta = {"min_tool_calls": need}
    return Trajectory("q", 0, "think", [1, 1], 1, [0, 1], True, "", [], calls, "eos", "x", meta=meta)


def oracle(row, order):
    """Queries that find the answer of a lookup, bridge or lookup_compute row, wordings tried in this order."""
    words = row["question"].replace("?", "").split()
    subject = next(w for w in words if any(w == f.subject for f in FACTS))
    relations = [w for w in words if any(w == f.relation for f in FACTS)]
    asked = []
    for relation in reversed(relations):
        for k in order:
            asked.append(QUERIES[k].format(r=relation, s=subject))
            if fits(asked[-1], ask(asked[-1])):
                break
        subject = ask(asked[-1]).rsplit(" ", 1)[1]
    return asked, subject


def test_needed_calls_are_those_of_an_oracle_whatever_wording_it_tries_first():
    rows = questions(WORLD, 120, 5, ("lookup", "bridge", "lookup_compute"))
    lengths = []
    for row in rows:
        python = row["family"] == "lookup_compute"
        for order in permutations(range(4)):
            asked, value = oracle(row, order)
            t = trajectory(asked, row["min_tool_calls"], python)
            assert python or value == row["answer"]
            assert needed_calls(t) == len(asked) + python
            assert redundant_calls(t) == 0 and not insufficient(t, 0.0)
            lengths.append(len(asked) + python - row["min_tool_calls"])
            if len(asked) + python > row["min_tool_calls"]:
                cut = next(i for i, query in enumerate(asked) if not fits(query, ask(query)))
                assert insufficient(trajectory(asked[: cut + 1], row["min_tool_calls"]), 0.0)
    assert set(lengths) == {0, 1, 2, 3, 4}  # at most a wrong and an ambiguous passage per hop


def a_fact(*kinds):
    """A fact whose first wordings (in some order) are answered so, and the wordings in that order."""
    for fact in WORLD.facts["unknown"]:
        for order in permutations(wordings(fact)):
            if [kind_of(fact, query) for query in order[: len(kinds)]] == list(kinds):
                return order
    raise AssertionError(kinds)


WRONG_THEN = a_fact("wrong", "fits", "fits")
TWO_THEN = a_fact("ambiguous", "fits", "fits")
BOTH = a_fact("wrong", "ambiguous", "fits")


@pytest.mark.parametrize(
    "asked, need, redundant, lacking",
    [
        (WRONG_THEN[:1], 1, 0, True),  # stopped at a wrong passage
        (WRONG_THEN[:2], 1, 0, False),  # corrected it by rewording
        (WRONG_THEN[:3], 1, 1, False),  # … and asked once more, in vain
        ((WRONG_THEN[0], WRONG_THEN[0]), 1, 1, True),  # the same query once more: the same passage
        ((WRONG_THEN[0], WRONG_THEN[0], WRONG_THEN[1]), 1, 1, False),
        ((WRONG_THEN[1], WRONG_THEN[0]), 1, 1, True),  # a needless second search, left with a passage that does not fit
        (TWO_THEN[:1], 1, 0, True),  # guessed between two candidates
        (TWO_THEN[:2], 1, 0, False),
        (BOTH[:2], 1, 0, True),
        (BOTH[:3], 1, 0, False),
        (WRONG_THEN[1:3], 1, 1, False),  # a reworded search after a passage that fits
        (WRONG_THEN[:2], 0, 2, False),  # nothing was needed, so correcting was not either
        ((WRONG_THEN[1],), 2, 0, True),  # the second hop is missing
    ],
)
def test_redundant_and_insufficient(asked, need, redundant, lacking):
    t = trajectory(asked, need)
    assert redundant_calls(t) == redundant
    assert insufficient(t, 0.0) == lacking
    assert not insufficient(t, 1.0)


def test_without_noise_nothing_is_needed_beyond_the_question():
    assert needed_calls(trajectory((), 2)) == 2 and needed_calls(trajectory((), None)) is None
    asked = [wordings(fact)[k] for fact in FACTS[:3] for k in (0, 1)]
    calls = [ToolCall("search", query, INDEX.search(query, 1)[0]["text"]) for query in asked]
    t = trajectory((), 3)
    t.tool_calls = calls
    assert needed_calls(t) == 3 and redundant_calls(t) == 3


# ---------------------------------------------------------------------------------------------------- mix and worth


def test_noisy_question_files(tmp_path):
    world.main(["--questions", "240", "--seed", "2", "--families", "noisy", "--output", str(tmp_path / "q.jsonl")])
    families = [row["family"] for _, row in read_jsonl(tmp_path / "q.jsonl")]
    assert families == list(MIX) * 2 and len(MIX) == 120
    assert set(families) <= {*FAMILIES, *GRADED} and 10 * families.count("stale") <= families.count("graded")
    assert max(len(set(families[i : i + 12])) for i in range(0, 228, 12)) >= 5  # no long runs of one family


def test_worth_of_calls_by_hand():
    rows = worth_of_calls(WORLD, INDEX, 1.0, 3)
    assert rows["fits, reworded search"] == (1.0, 1.0)
    assert rows["wrong passage, same search again"][0] == rows["wrong passage, same search again"][1] < 0.1
    before, after = rows["two candidates, reworded search"]
    # another wording: wrong with p = .8/3 (still one of two), never ambiguous again; else it fits
    assert before == 0.5 and abs(after - (1 - 0.5 * 0.8 / 3)) < 0.03
    before, after = rows["wrong passage, reworded search"]
    assert abs(after - (1 - 0.5 * 0.6 / 3)) < 0.03  # ambiguous with p = .6/3
    before, after = rows["sure belief, verification"]
    assert 0.02 < after - before < 0.04
    plain = worth_of_calls(WORLD, INDEX, 0.0, 3)
    assert plain["unknown fact, first search"][1] == 1.0 and "wrong passage, reworded search" not in plain
