"""GSM8K -> demonstrations with a Python tool, and plain question files.

    python -m data.prepare_gsm8k --input gsm8k_train.jsonl --output D.jsonl [--questions Q.jsonl]

GSM8K solutions carry calculator annotations: "She sold 48/2 = <<48/2=24>>24 clips." From each solution:
1. think: the solution up to its last annotation as a plan; what is yet to be computed has a name (48/2 = s1).
2. python: one program, a line `s1 = 48/2` per annotation, earlier results by name, every value printed. It is run in
   the sandbox of the rollout, and what it printed is the result.
3. think: the solution's end with its values, then answer: \\boxed{gold}.
One program per solution, not one call per step: a call should be worth its cost, and no thought states a value early.
A row is left out, with its reason in OUTPUT.report.json, if it has no annotation, one that is not plain arithmetic, or
a printed value that differs from its annotation.
"""

import json
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.args import arg, cli
from core.run import write_text
from core.trajectory import DataError, write_jsonl
from data.questions import read_rows
from tools.sandbox import PythonSandbox

ANNOTATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
SHOWN = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"  # the value as the sentence repeats it after the annotation
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w%]|\.\d)|(?<![\w.])\.\d+(?![\w%])")
WORDS = {word: i for i, word in enumerate("one two three four five six seven eight nine ten eleven twelve".split(), 1)}
WORDS |= {"twice": 2, "double": 2, "doubles": 2, "half": 2, "thrice": 3, "triple": 3, "quarter": 4, "dozen": 12}


@dataclass
class Args:
    """Flags of data.prepare_gsm8k."""

    input: str = arg("", "jsonl with question, solution (or answer with '#### 72'), or a dataset id: openai/gsm8k")
    dataset_config: str = arg("main", "configuration of a dataset id")
    split: str = arg("train", "split of a dataset id")
    output: str = arg("", "demonstrations (jsonl); skipped rows go to OUTPUT.report.json")
    questions: str = arg("", "plain questions for rollout and evaluation (jsonl)")
    limit: int = arg(0, "first N rows only, 0 = all")
    workers: int = arg(2, "programs run at once")

    def __post_init__(self):
        if not self.input:
            raise ValueError("--input is required")
        if not self.output and not self.questions:
            raise ValueError("nothing to write: give --output, --questions or both")


def main(args: Args) -> dict:
    """Write the files asked for; returns {rows, converted, calls, skipped: [{id, reason}]}."""
    rows = checked_rows(args)
    if args.questions:
        write_jsonl(args.questions, (plain(row) for row in rows))
        print(f"{args.questions}: {len(rows)} questions")
    if not args.output:
        return {"rows": len(rows)}
    with PythonSandbox(workers=args.workers) as sandbox, ThreadPoolExecutor(args.workers) as pool:
        done = pool.map(lambda row: demonstration(row, sandbox), rows)
        outcomes = list(tqdm(done, total=len(rows), desc="gsm8k", unit="row"))
    made = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    skipped = [{"id": row["id"], "reason": o} for row, o in zip(rows, outcomes) if isinstance(o, str)]
    report = {"rows": len(rows), "converted": len(made), "skipped": skipped}
    write_jsonl(args.output, made)
    write_text(Path(args.output).with_suffix(".report.json"), json.dumps(report, indent=1) + "\n")
    print(f"{args.output}: {len(made)} of {len(rows)} rows, {len(skipped)} skipped")
    return report


def checked_rows(args: Args) -> list[dict]:
    """Rows {id, question, answer, solution}; DataError names file, line and field of a bad one."""
    rows = []
    for number, (where, row) in enumerate(read_rows(args.input, args.split, args.dataset_config)):
        solution, _, final = str(row.get("solution") or row.get("answer") or "").partition("####")
        answer = final.strip() or str(row.get("answer", "")).strip()
        for name, value in (("question", row.get("question")), ("solution", solution.strip()), ("answer", answer)):
            if not value:
                raise DataError(f"{where}: missing or empty field {name!r}")
        identity = str(row.get("id") or f"gsm8k-{args.split}-{number:05d}")
        text = {"question": str(row["question"]).strip(), "solution": solution.strip()}
        rows.append({"id": identity, **text, "answer": answer.replace(",", "")})
        if len(rows) == args.limit:
            break
    if not rows:
        raise DataError(f"{args.input}: holds no rows")
    return rows


def plain(row: dict) -> dict:
    """The question as rollout and evaluation read it."""
    return {"id": row["id"], "question": row["question"], "answer": row["answer"], "task": "math"}


def demonstration(row: dict, sandbox: PythonSandbox) -> dict | str:
    """One demonstration, or the reason why the row gives none."""
    steps = ANNOTATION.findall(row["solution"])
    if not steps:
        return "no calculator annotation"
    if row["solution"].count("<<") != len(steps):
        return "a broken annotation"
    for expression, value in steps:
        if not re.fullmatch(r"[\d.+\-*/() ]+", expression) or _value(value) is None:
            return f"not plain arithmetic: <<{expression}={value}>>"
    expressions = name_operands(row["question"], steps)
    names = [f"s{i}" for i in range(1, len(steps) + 1)]
    code = "\n".join(f"{name} = {expression}" for name, expression in zip(names, expressions))
    code += f"\nprint({', '.join(names)}" + (', sep="\\n")' if len(names) > 1 else ")")
    result = sandbox.run(code)
    if not result.ok:
        return f"the program failed: {result.error}"
    printed = result.text.split()
    for i, (expression, value) in enumerate(steps):
        number = _value(printed[i]) if i < len(printed) else None
        if number is None or not math.isclose(number, _value(value), rel_tol=1e-9, abs_tol=1e-9):
            return f"<<{expression}={value}>> but the program printed {printed[i : i + 1]}"
    lines = row["solution"].split("\n")
    last = max(i for i, line in enumerate(lines) if ANNOTATION.search(line))
    plan = plan_of("\n".join(lines[: last + 1]), row["question"], steps, expressions)
    end = ANNOTATION.sub("", "\n".join(lines[last:]))
    response = [
        {"role": "model", "text": f"<think>{plan}</think>\n<python>\n{code}\n</python>"},
        {"role": "tool", "name": "python", "text": result.text},
        {"role": "model", "text": f"<think>{end}</think>\n<answer>The answer is \\boxed{{{row['answer']}}}.</answer>"},
    ]
    return {**plain(row), "response": response}


def name_operands(question: str, steps: list[tuple[str, str]]) -> list[str]:
    """The expressions of the steps with operands that are earlier results called by name: 48+24 becomes 48+s1.

    A number that is also given in the question is taken from there as often as it stands there, then from the results.
    """
    given, results, named = _given(question), [], []
    for expression, value in steps:

        def name(found: re.Match) -> str:
            number = _value(found[0])
            if given[number] > 0:
                given[number] -= 1
                return found[0]
            return f"s{_last(results, number)}" if number in results else found[0]

        named.append(NUMBER.sub(name, expression))
        results.append(_value(value))
    return named


def plan_of(text: str, question: str, steps: list[tuple[str, str]], expressions: list[str]) -> str:
    """The solution text without computed values: results by name, as the program calls them."""
    results, given, plan = [_value(value) for _, value in steps], _given(question), ""
    for k, piece in enumerate(re.split(rf"<<[^<>]*>>\s?{SHOWN}", text)):
        # Numbers of this step as the program has them; other numbers are results if the question does not give them.
        literal = set(map(_value, NUMBER.findall(expressions[k]))) if k < len(steps) else set()
        used = [int(n) for n in re.findall(r"s(\d+)", expressions[k])] if k < len(steps) else []

        def name(found: re.Match) -> str:
            number = _value(found[0])
            for i in used:
                if results[i - 1] == number:
                    return f"s{i}"
            if number in literal or given[number]:
                return found[0]
            if number in results[:k]:
                return f"s{_last(results[:k], number)}"
            # "She has 144 because 12 x 12 = <<12*12=144>>144"; a small number further on may be any other
            ahead = number in results[k:] and number > (2 if number == results[k] else 12)
            return f"s{k + 1 + results[k:].index(number)}" if ahead else found[0]

        plan += NUMBER.sub(name, piece) + (f"s{k + 1}" if k < len(steps) else "")
    return plan


def _given(question: str) -> Counter:
    """How often the question gives each number, in digits or in words."""
    words = re.findall(r"[a-z]+", question.lower())
    return Counter([_value(n) for n in NUMBER.findall(question)] + [float(WORDS[w]) for w in words if w in WORDS])


def _last(results: list[float], number: float) -> int:
    """1-based position of the latest equal result."""
    return len(results) - results[::-1].index(number)


def _value(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


if __name__ == "__main__":
    cli(main, Args)
