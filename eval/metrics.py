"""Correctness of answers and the behaviour-aware metrics of ET-Agent (PAPERS A6), as pure functions.

Text in, numbers out; what a whole trajectory is worth is in eval/grader.py, what it did wrong in eval/behaviour.py.
`math_equal` asks a second process (eval/math_worker.py), started at the first pair that needs it.
"""

import atexit
import json
import math
import re
import select
import string
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

MATH_SECONDS = 5.0  # per pair; a later answer counts as "not equal" and the process is replaced
START_SECONDS = 120.0  # importing math-verify on a busy machine
MAX_ANSWER_CHARS = 500  # a longer prediction is wrong unless identical: no gold answer comes near

NUMBER = re.compile(r"[-+]?\$?(?=\.?\d)(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?(\.|[eE][-+]?\d{1,3})?")
PUNCTUATION = str.maketrans("", "", string.punctuation)
CLOSED_WORDS = {"yes", "no", "noanswer"}  # partial overlap with these is no answer at all


# ---- the answer in a response ----------------------------------------------------------------------------------------


def extract_answer(text: str) -> str:
    """The final answer of a response: inside the last closed <answer>, else the last \\boxed, else "".

    A \\boxed inside <answer> is unwrapped. Tool results are skipped: what a tool printed is not the model's answer.
    """
    text = re.sub(r"<(result|tool_response)>.*?</\1>", "", text, flags=re.DOTALL)
    answers = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if answers:
        boxed = last_boxed(answers[-1])
        return answers[-1].strip() if boxed is None else boxed
    return last_boxed(text) or ""


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{…} with balanced braces (or `\\boxed x`), stripped; None if there is none."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$<{}\\]+", rest)
        return bare[0] if bare else None
    depth, i = 0, 0
    while i < len(rest):
        if rest[i] == "\\":
            i += 1  # an escaped brace is text
        elif rest[i] in "{}":
            depth += 1 if rest[i] == "{" else -1
            if depth == 0:
                return rest[1:i].strip()
        i += 1
    return None


# ---- math equivalence ------------------------------------------------------------------------------------------------


def math_equal(prediction: Any, gold: Any) -> bool:
    """Whether two answers are the same mathematical object (math-verify); gold: string, number or list of either.

    Identical text and plain numbers are decided here, everything else in a second process that is killed and replaced
    after MATH_SECONDS. An empty prediction is wrong. Raises RuntimeError only if that process cannot be started.
    """
    if isinstance(gold, (list, tuple)):
        return any(math_equal(prediction, one) for one in gold)
    prediction, gold = str(prediction).strip(), str(gold).strip()
    gold = last_boxed(gold) or gold  # a worked solution
    if not prediction or not gold:
        return False
    if prediction == gold:
        return True
    if len(prediction) > MAX_ANSWER_CHARS:
        return False
    numbers = _plain_number(prediction), _plain_number(gold)
    if None not in numbers:
        if all(isinstance(n, int) for n in numbers):
            return numbers[0] == numbers[1]
        return math.isclose(*numbers, rel_tol=1e-12, abs_tol=0.0)  # 0.1+0.2 as floats print it is 0.3
    return _ask_worker(gold, prediction)


def _plain_number(text: str) -> int | float | None:
    """Value of 1234, 1,234.50, $5, \\$5, 1{,}000, 10,\\!080, 2e-05; None for anything that needs a parser."""
    text = re.sub(r"\\!\s*", "", text).replace("\\$", "$").replace("{,}", ",").replace("−", "-")
    if len(text) > 300 or not NUMBER.fullmatch(text) or not any(c.isdigit() for c in text):
        return None
    digits = text.replace(",", "").replace("$", "").rstrip(".")
    if digits.lstrip("+-").isdigit():
        return int(digits)
    value = float(digits)
    return value if math.isfinite(value) and (value or not re.search("[1-9]", digits)) else None  # too large, too small


class _Worker:
    """The running math_worker process: `ask` never takes longer than MATH_SECONDS (plus a start after a kill)."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def ask(self, gold: str, prediction: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            try:
                self.process.stdin.write(json.dumps([gold, prediction]) + "\n")
                self.process.stdin.flush()
                reply = self._line(MATH_SECONDS)
            except BrokenPipeError:
                reply = ""
            if not reply:  # late, or the process died on the pair
                self.stop()
            return reply == "1\n"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def _start(self) -> None:
        self.stop()
        # A program of its own rather than multiprocessing: spawn would import the training script again.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line(START_SECONDS) != "ready\n":
            self.stop()
            raise RuntimeError("the math grader (eval/math_worker.py) did not start; is math-verify installed?")

    def _line(self, seconds: float) -> str:
        """One reply, or "" if none came in time or the process ended."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else ""


_worker = _Worker()
atexit.register(_worker.stop)


@lru_cache(maxsize=1 << 16)
def _ask_worker(gold: str, prediction: str) -> bool:
    return _worker.ask(gold, prediction)


# ---- exact match and F1 of short answers -----------------------------------------------------------------------------


def normalise_answer(text: Any, keep_punctuation: bool = False) -> str:
    """SQuAD normalisation: lower case, no punctuation, no articles, single spaces; a \\text{…} wrapper is dropped.

    A text of nothing else keeps its articles ("A"), or its punctuation ("+"): only an empty one becomes empty.
    """
    whole = re.sub(r"\\(?:text|mathrm|textbf|mbox)\{(.*)\}", r"\1", str(text)).lower()
    text = whole if keep_punctuation else whole.translate(PUNCTUATION)
    words = re.sub(r"\b(a|an|the)\b", " ", text).split() or text.split() or whole.split()
    return " ".join(words)


def exact_match(prediction: Any, golds: Any) -> float:
    """1.0 if the normalised prediction equals a normalised gold answer (a string, a number or a list of aliases).

    An empty prediction is wrong.
    """
    ours = normalise_answer(prediction)
    return float(bool(ours) and any(ours == normalise_answer(gold) for gold in _aliases(golds)))


def f1(prediction: Any, golds: Any) -> float:
    """SQuAD token F1, best over the aliases; yes, no and noanswer count only when they match exactly."""
    scores = []
    for gold in _aliases(golds):
        ours, theirs = normalise_answer(prediction), normalise_answer(gold)
        closed = ours != theirs and (ours in CLOSED_WORDS or theirs in CLOSED_WORDS)
        scores.append(0.0 if closed else _token_f1(ours, theirs))
    return max(scores, default=0.0)


def f1_et(prediction: Any, golds: Any) -> float:
    """Token F1 as ET-Agent's evaluation computes it: punctuation is kept, no rule for yes and no."""
    pairs = [(normalise_answer(prediction, True), normalise_answer(gold, True)) for gold in _aliases(golds)]
    return max((_token_f1(*pair) for pair in pairs), default=0.0)


def _aliases(golds: Any) -> Sequence:
    return golds if isinstance(golds, (list, tuple)) else [golds]


def _token_f1(prediction: str, gold: str) -> float:
    ours, theirs = prediction.split(), gold.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


# ---- metrics of PAPERS A6; P_i is the correctness of trajectory i ----------------------------------------------------


def efficiency(correctness: Sequence[float], calls: Sequence[int]) -> float:
    """mean(P_i / T_i), T_i tool calls; P_i itself where there is no call [2601.06860, sec. 5]."""
    return fmean(p / max(t, 1) for p, t in zip(correctness, calls, strict=True))


def successful_execution(correctness: Sequence[float], failures: Sequence[int]) -> float:
    """mean(P_i / max(failed_i, 1)) [2601.06860, sec. 5]; none and one failed call score alike: report the rate too."""
    return fmean(p / max(f, 1) for p, f in zip(correctness, failures, strict=True))


def acu(correctness: list[float], tokens: list[int], billion_parameters: float) -> float:
    """Accuracy per unit of computation [2603.13348; PAPERS B5]: accuracy in points of 100 / (parameters · mean tokens).

    Parameters in billions, model-written tokens in hundreds; 0 without tokens.
    """
    cost = billion_parameters * fmean(tokens) / 100
    return 100 * fmean(correctness) / cost if cost else 0.0


def reasoning_length(correctness: Sequence[float], tokens: Sequence[int]) -> float:
    """mean(P_i / max(L_i, 1)), L_i model-written tokens without tool results [2601.06860, sec. 5]; reported ×1000."""
    return fmean(p / max(n, 1) for p, n in zip(correctness, tokens, strict=True))
