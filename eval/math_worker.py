"""The process that compares two mathematical expressions with math-verify; `eval.metrics.math_equal` talks to it.

It is a process of its own because the text to compare is written by a model: sympy may be driven into hours of work or
gigabytes of memory, and math-verify's own time limit needs the main thread and does not interrupt C code. The parent
kills this process when an answer is late. One JSON line [gold, prediction] comes in, one line "1" or "0" goes out.
Imports nothing of this project, so starting it costs the import of math-verify alone.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

MEMORY_BYTES = 2 << 30  # address space; a bigger intermediate result is a MemoryError, answered with "0"
PERCENT = re.compile(r"([^%]*?)\s*(?:\\?%|\\text\{\s*(?:\\?%|percent)\s*\}|\bpercent)\s*")
CPU_SECONDS = 20  # per pair; ends an orphan whose parent was killed while it computed


def serve() -> None:
    """Answer pairs until stdin closes. The first line out is "ready", after the slow imports."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    import math_verify

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # the parsers print warnings
    os.dup2(nowhere, 2)
    replies.write("ready\n")
    for line in sys.stdin:
        gold, prediction = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # no handler: the kernel ends the process, even inside C code
        replies.write("1\n" if equal(math_verify, gold, prediction) else "0\n")
        signal.setitimer(signal.ITIMER_PROF, 0)


def equal(math_verify, gold: str, prediction: str) -> bool:
    """math-verify's verdict on any reading of the two, after repairs of what it misreads.

    Spaced complex numbers, unequal number bases, 2e-05, percent (12.5 % is 12.5 and 0.125, as a question means it) and
    numbers near 0, which it rounds to six decimals.
    """
    bases = {found[1] for text in (gold, prediction) if (found := re.fullmatch(r"\s*\w+\s*_\s*\{?(\d+)\}?\s*", text))}
    if len(bases) == 2:
        return False  # math-verify drops the subscript
    first, second = bare(gold), bare(prediction)
    rates = [PERCENT.fullmatch(text) for text in (first, second)]
    if all(rates):  # both are rates: their numbers tell
        first, second = rates[0][1], rates[1][1]
    return any(_same(math_verify, a, b) for a in readings(first) for b in readings(second))


def readings(text: str) -> list[str]:
    """What the text may mean, as math-verify can read it: 12.5 % is 12.5 or 0.125, 2e-5 a power or 2·e − 5."""
    rate = PERCENT.fullmatch(text)
    texts = [rate[1], rf"\frac{{{rate[1]}}}{{100}}"] if rate else [text]
    powers = [re.sub(r"(?<![\w.])(\d+\.?\d*)[eE]([-+]?\d+)\b", r"\1 \\times 10^{\2}", text) for text in texts]
    return list(dict.fromkeys(powers + texts))


def _same(math_verify, first: str, second: str) -> bool:
    try:
        # Without $…$ it would search the text for the last number; the parent limits the time.
        parsed = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in (first, second)]
        return bool(math_verify.verify(*parsed, timeout_seconds=None)) and not _apart(*(p[0] for p in parsed))
    except Exception:  # parsers and sympy raise anything; what cannot be compared is not equal
        return False


def _apart(first, second) -> bool:
    """Whether two numbers below a thousandth differ by more than a millionth of the larger."""
    if not (getattr(first, "is_number", False) and getattr(second, "is_number", False)):
        return False
    first, second = first.evalf(), second.evalf()
    size = max(abs(first), abs(second))
    return bool(size < 1e-3 and abs(first - second) > 1e-6 * size)


def bare(text: str) -> str:
    """One line without math delimiters; "2 i" becomes "2i", which math-verify reads as a complex number."""
    text = re.sub(r"(?<!\\)(\\[\[\]()]|\$)", " ", text)
    return re.sub(r"(?<=\d)\s+i\b", "i", " ".join(text.split()))


if __name__ == "__main__":
    serve()
