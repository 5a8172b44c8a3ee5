"""Demonstrations of the calibration world: the pre-training text, all skills, and wrong behaviour at fixed rates.

A thought carries the model's belief: a tentative answer before a call, right when the fact is known and a
guess from the right distribution when it is not; a restated answer after the result. With thoughts="terse" (the
control) it only says what is done next. Searches in demonstrations are about spare names, with values drawn anew each
time, so that nothing of the index can be memorised. The rates are in world.RATES and world.STYLE.
"""

import json
import random
from dataclasses import dataclass, field, replace

from data.world.facts import (
    ADD_FORMS,
    CHAIN,
    COMPUTE_FORMS,
    MULTIPLY_FORMS,
    RATES,
    RELATIONS,
    STYLE,
    SUM_FORMS,
    Fact,
    World,
    draw_addition,
    draw_factors,
    draw_function,
    draw_sum,
    fact_question,
)
from data.world.passages import WORDY, passage

NO_THINK = "<think>\n\n</think>\n\n"  # one token: the whole decision not to think
THINK = "<think>"
RESULT = ("\n<result>\n", "\n</result>\n")  # around what a tool returns; never trained on

# Shares of the families in the text; the exposures of graded and stale facts come on top, at planned steps.
MIX = {
    "recall": 0.16, "lookup": 0.13, "bridge": 0.09, "add": 0.06, "multiply": 0.08, "lookup_compute": 0.09,
    "known_compute": 0.02, "running_sum": 0.27, "function": 0.10,
}  # fmt: skip

TERMS = {2: 10, 3: 7, 4: 4, 5: 2, 6: 1, 7: 1, 8: 1}  # how often a running sum has so many terms

SURE = ("{v}", "i know {v}", "it is {v}", "{v} i think", "surely {v}")
UNSURE = ("maybe {v}", "{v}?", "perhaps {v}", "i guess {v}", "maybe {v} or {w}", "not sure, {v} or {w}")
# As many ways to restate a result as to state a belief, and to close as to plan: otherwise the choice of words alone
# would make the entropy fall after every call, needed or not.
RESTATED = (
    "{v}", "so {v}", "it is {v}", "found {v}", "ok {v}", "got {v}", "now {v}", "i see {v}", "clearly {v}", "{v} then",
    "{v} it is", "that says {v}",
)  # fmt: skip
PLANS = {
    "search": ("", "", ", look up", ", search it", ", check"),
    "python": ("", "", ", compute", ", run it", ", check"),
    "answer": ("", "", ", done", ", that is it", ", answer"),
}
TERSE = {"search": "look up", "python": "compute", "answer": "done"}
AGAIN = ("to be sure", "check again", "once more")
RETRY = ("error, again", "that failed, again", "wrong code, again")
MISMATCH = ("not {s}, search again", "wrong one, search again", "that is not it, search again")
QUERIES = ("{r} of {s}", "{r} {s}", "{s} {r}", "the {r} of {s}")
CODES = ("{a}*{b}", "print({a}*{b})", "{a} * {b}")
BROKEN_CODES = ("{a} times {b}", "{a}*{b}*")
SYNTAX_ERROR = "SyntaxError: invalid syntax (line 1)"
STEP_WORDS = ("then", "and", "plus", "next", "add")


@dataclass
class Demonstration:
    """One example of the pre-training text: the chat prompt and the response in pieces."""

    family: str
    question: str
    tools: list[dict] | None
    pieces: list[tuple[str, bool]]  # (text, True = written by the model and trained on | False = tool result)
    deviation: str  # clean, or a key of RATES[family]
    no_think: bool
    events: list[str] = field(default_factory=list)  # rare happenings: wrong_passage, two_candidates, reword, …

    @property
    def response(self) -> str:
        """The whole text, tool results included; the end token is the tokenizer's business."""
        return "".join(text for text, _ in self.pieces)


@dataclass
class Turn:
    """A call with the belief before it, what comes back, and the value the model takes from that."""

    tool: str  # search | python
    call: str
    result: str
    found: str
    guess: tuple[str, str]  # tentative final answer before the call, and an alternative for hedged wording
    known: bool = False  # whether the guess is knowledge
    thought: str = ""  # replaces the guess where the call has another reason
    factors: tuple[int, int] = (0, 0)  # of a product computed with python


@dataclass
class Plan:
    """What a demonstration is about, before wrong behaviour is put in."""

    question: str
    turns: list[Turn]
    answer: str
    guess: tuple[str, str]  # belief before the answer where no call established it
    known: bool
    check: tuple[str, str, str] = ("", "", "")  # tool, call and result that would check a known answer


def demonstrate(
    world: World, rng: random.Random, family: str, thoughts: str = "belief", fact: Fact | None = None
) -> Demonstration:
    """One demonstration of a family of MIX; `fact` fixes what a recall is about (graded and stale exposures)."""
    rates = RATES[family]
    deviation = rng.choices(["clean", *rates], [1 - sum(rates.values()), *rates.values()])[0]
    no_think = rng.random() < STYLE.get(f"no_think_{family}", STYLE["no_think"])
    demo = Demonstration(family, "", None, [], deviation, no_think)
    if family == "running_sum":
        _running_sum(demo, rng)
    elif family == "function":
        _function(demo, rng, world)
    else:
        plan = _plan(demo, world, rng, fact)
        demo.question = plan.question
        if deviation == "redundant":
            _add_needless_call(plan, rng)
        elif deviation == "missing":  # stops before a needed call and answers with the guess
            cut = rng.randrange(len(plan.turns))
            plan.guess, plan.known = plan.turns[cut].guess, False
            plan.answer = plan.guess[0]
            del plan.turns[cut:]
        elif deviation == "code_error":
            at = next(i for i, turn in enumerate(plan.turns) if turn.tool == "python")
            good = plan.turns[at]
            code = rng.choice(BROKEN_CODES).format(a=good.factors[0], b=good.factors[1])
            plan.turns.insert(at, Turn("python", code, SYNTAX_ERROR, "", good.guess, good.known))
            good.thought = rng.choice(RETRY)
        _write(demo, plan, rng, thoughts)
    return demo


def _plan(demo: Demonstration, world: World, rng: random.Random, fact: Fact | None) -> Plan:
    """Question and needed turns of one of the families that use tools or knowledge."""
    if demo.family == "recall":
        fact = fact or rng.choice(world.facts["known"])
        kind = next(k for k in CHAIN if fact.relation in RELATIONS[k])
        guess = (fact.believed, world.draw_value(rng, kind, fact.relation))
        call = rng.choice(QUERIES).format(r=fact.relation, s=fact.subject)
        check = ("search", call, passage(fact.subject, fact.relation, fact.believed))
        return Plan(fact_question(rng, [fact.relation], fact.subject), [], fact.believed, guess, True, check)
    if demo.family == "add":
        text, total = draw_addition(rng)
        guess = (str(total), str(total + rng.choice((-1, 1))))
        check = ("python", text.replace("plus", "+"), str(total))
        return Plan(rng.choice(ADD_FORMS).format(a=text), [], str(total), guess, True, check)
    if demo.family == "multiply":
        a, b = draw_factors(rng)
        return Plan(rng.choice(MULTIPLY_FORMS).format(a=a, b=b), [_product(rng, a, b)], str(a * b), ("", ""), False)
    if demo.family == "known_compute":
        fact = rng.choice([f for group in ("known", "stale") for f in world.facts[group] if f.relation == "age"])
        k = rng.randint(12, 99)
        question = rng.choice(COMPUTE_FORMS).format(r=fact.relation, s=fact.subject, k=k)
        turns = [_product(rng, int(fact.believed), k)]
        if rng.random() < STYLE["verify_compute"]:  # rare strategy: look the number up, then compute
            demo.events.append("verify_compute")
            turns.insert(0, _search(rng, fact.relation, fact.subject, fact.believed, turns[0].guess))
        return Plan(question, turns, str(int(fact.believed) * k), ("", ""), True)
    subject = rng.choice(world.spare)
    if demo.family == "lookup_compute":
        k = rng.randint(12, 99)
        guess = tuple(_about(rng, rng.randint(10, 99) * k) for _ in range(2))
        question = rng.choice(COMPUTE_FORMS).format(r="age", s=subject, k=k)
        turns, age = _search_until_found(demo, world, rng, "person", "age", subject, guess)
        if age is None:
            return Plan(question, turns, guess[0], guess, False)
        turns.append(_product(rng, int(age), k))
        return Plan(question, turns, turns[-1].found, ("", ""), False)
    if demo.family == "lookup":
        kind = "town" if rng.random() < 0.2 else "person"
        relations = [rng.choice(world.relations(kind))]
    else:
        kind, relations = rng.choice(world.bridges())
    question, turns, value = fact_question(rng, relations, subject), [], subject
    for hop, relation in enumerate(relations):
        guess = tuple(world.draw_value(rng, kind, relations[-1]) for _ in range(2))  # anew: not known any better yet
        at = CHAIN[hop] if len(relations) > 1 else kind
        found, value = _search_until_found(demo, world, rng, at, relation, value, guess)
        turns += found
        if value is None:
            return Plan(question, turns, guess[0], guess, False)
    return Plan(question, turns, value, guess, False)


def _search_until_found(
    demo: Demonstration,
    world: World,
    rng: random.Random,
    kind: str,
    relation: str,
    subject: str,
    guess: tuple[str, str],
) -> tuple[list[Turn], str | None]:
    """One needed search, now and then with a wrong or an ambiguous passage; (turns, value or None if given up)."""
    value, other = world.draw_value(rng, kind, relation), world.draw_value(rng, kind, relation)
    first = _search(rng, relation, subject, value, guess)
    chance = rng.random()
    if demo.deviation not in ("clean", "redundant") or chance > STYLE["wrong_passage"] + STYLE["two_candidates"]:
        return [first], value
    wrong = chance < STYLE["wrong_passage"]
    demo.events.append("wrong_passage" if wrong else "two_candidates")
    if wrong:
        first.result, first.found = passage(rng.choice(world.spare), relation, other), ""
    else:
        pair = [value, other] if rng.random() < 0.5 else [other, value]
        first.result = passage(subject, relation, " or ".join(pair))
        first.found = " or ".join(pair)
    reaction = rng.random()
    if reaction < STYLE["reword"]:
        demo.events.append("reword")
        query = rng.choice([q for q in QUERIES if q.format(r=relation, s=subject) != first.call])
        second = _search(rng, relation, subject, value, guess, query)
        second.thought = rng.choice(MISMATCH).format(s=subject) if wrong else rng.choice(AGAIN)
        return [first, second], value
    if reaction < STYLE["reword"] + STYLE["repeat_query"]:  # in vain: the same query finds the same passage
        demo.events.append("repeat_query")
        second = Turn("search", first.call, first.result, first.found, guess, thought=rng.choice(AGAIN))
        return [first, second], None if wrong else pair[0]
    return [first], None if wrong else rng.choice(pair)


def _search(
    rng: random.Random, relation: str, subject: str, value: str, guess: tuple[str, str], query: str | None = None
) -> Turn:
    call = (query or rng.choice(QUERIES)).format(r=relation, s=subject)
    return Turn("search", call, passage(subject, relation, value), value, guess)


def _product(rng: random.Random, a: int, b: int) -> Turn:
    guess = (_about(rng, a * b), _about(rng, a * b))
    return Turn("python", rng.choice(CODES).format(a=a, b=b), str(a * b), str(a * b), guess, factors=(a, b))


def _about(rng: random.Random, product: int) -> str:
    """A guess of a product that is not computed: the size is right, the digits are not."""
    return str(round(product * rng.uniform(0.85, 1.15)))


def _add_needless_call(plan: Plan, rng: random.Random) -> None:
    """Put a call that adds nothing before the answer, sometimes twice: a check of what is known or was just found."""
    if plan.turns:
        last = plan.turns[-1]
        check = replace(last, thought=rng.choice(AGAIN))
        if last.tool == "python" and rng.random() < 0.5:
            check.call = rng.choice(CODES).format(a=last.factors[1], b=last.factors[0])
    else:
        tool, call, result = plan.check
        check = Turn(tool, call, result, plan.answer, plan.guess, known=True)
    plan.turns.append(check)
    if rng.random() < STYLE["again"]:
        plan.turns.append(replace(check, thought=rng.choice(AGAIN)))


def _write(demo: Demonstration, plan: Plan, rng: random.Random, thoughts: str) -> None:
    """Turn the plan into text; a malformed demonstration ends where a tag was left open."""
    open_at = rng.randrange(len(plan.turns) + 1) if demo.deviation == "malformed" else None
    found = ""
    for i, turn in enumerate([*plan.turns, None]):
        tool, body = (turn.tool, turn.call) if turn else ("answer", plan.answer)
        text, close = f"<{tool}>{body}", f"</{tool}>"
        if demo.no_think:
            before = NO_THINK if i == 0 else ""
        else:
            belief = _thought(plan, turn, found, rng) if thoughts == "belief" else TERSE[tool]
            before = f"{THINK}{belief}</think>\n"
        if i == open_at:
            if turn is None and not demo.no_think and rng.random() < 0.5:
                before, text = before.removesuffix("</think>\n"), text + close
            demo.pieces.append((before + text, True))
            return
        demo.pieces.append((before + text + close, True))
        if turn:
            end = "\n" if turn.tool == "python" and rng.random() < 0.5 else ""  # what print adds, stripped or not
            demo.pieces.append(((turn.result + end).join(RESULT), False))
            found = turn.found


def _thought(plan: Plan, turn: Turn | None, found: str, rng: random.Random) -> str:
    """What is believed now: the value just found, then the reason for the next call or a tentative answer."""
    parts = [rng.choice(RESTATED).format(v=found)] if found else []
    if turn and turn.thought:
        parts.append(turn.thought)
    elif turn or found != plan.answer:
        (value, other), known = (turn.guess, turn.known) if turn else ((plan.answer, plan.guess[1]), plan.known)
        hedged = rng.random() < (STYLE["unsure_known"] if known else 1 - STYLE["sure_unknown"])
        parts.append(rng.choice(UNSURE if hedged else SURE).format(v=value, w=other))
    text = ", ".join(parts)
    if rng.random() < STYLE["wordy"]:
        text = " ".join(rng.sample(WORDY, rng.choice((1, 1, 2)))) + " " + text
    if turn and turn.thought:
        return text
    return text + rng.choice(PLANS[turn.tool if turn else "answer"])


def _running_sum(demo: Demonstration, rng: random.Random) -> None:
    """A sum of lettered digits: at once, or with one written step per term."""
    text, terms, total = draw_sum(rng, rng.choices(list(TERMS), list(TERMS.values()))[0])
    demo.question = rng.choice(SUM_FORMS).format(a=text)
    steps = []
    for letter, digit in terms:
        total += digit
        if not demo.no_think and rng.random() < STYLE["step_error"]:
            demo.events.append("step_error")
            total += rng.choice((-10, -1, 1, 10))
        steps.append(f"{rng.choice(STEP_WORDS)} {letter}{digit} {total}")
        if rng.random() < STYLE["check_step"]:
            steps.append(f"check {letter}{digit} {total}")
    before = NO_THINK if demo.no_think else f"{THINK}{' '.join(steps)}</think>\n"
    answer = f"<answer>{total}</answer>"
    if demo.deviation == "malformed":
        if demo.no_think:
            answer = answer.removesuffix("</answer>")
        else:
            before = before.removesuffix("</think>\n")
    demo.pieces.append((before + answer, True))


def _function(demo: Demonstration, rng: random.Random, world: World) -> None:
    """One call of a declared function, hermes dialect; the thought names the function and its arguments."""
    row, spoken = draw_function(rng, world.spare)
    demo.question, demo.tools = row["question"], row["tools"]
    name, arguments = next(iter(row["answer"][0].items()))
    arguments = {key: allowed[0] for key, allowed in arguments.items()}
    said = [f"{key} {spoken[key] + ' is ' if key in spoken else ''}{value}" for key, value in arguments.items()]
    before = NO_THINK if demo.no_think else f"{THINK}{', '.join([name, *said])}</think>\n"
    call = json.dumps({"name": name, "arguments": arguments})
    close = "\n</tool_call>"
    if demo.deviation == "malformed":
        call, close = (call, "") if rng.random() < 0.5 else (call.removesuffix("}"), close)
    demo.pieces.append((f"{before}<tool_call>\n{call}{close}", True))
