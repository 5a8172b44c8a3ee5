"""tools/sandbox/__init__.py for honest code: what a call shows, errors, determinism, many threads, load.

python -m pytest tests/test_sandbox.py            (-m slow -s: the load tests of results/sandbox.md, minutes)
"""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tools.sandbox
from tools.sandbox import LEVELS, PythonSandbox, ToolResult, WorkerError


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout=20.0, workers=2) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    "code, text",
    [
        ("1 + 1", "2"),
        ("print('a')\n'b'", "a\n'b'"),
        ("x = 1", ""),
        ("None", ""),
        ("", ""),
        ("print('no newline', end='')", "no newline"),
        ("if True:\n    3", ""),  # only the last statement counts, and this one is no expression
        ("import sympy\nsympy.sqrt(8)", "2*sqrt(2)"),
        ("import numpy as np\nfloat(np.linalg.norm([3, 4]))", "5.0"),
        ("import sys\nprint('to stderr', file=sys.stderr)", "to stderr"),
        ("def f(): pass\nf", "<function f at 0x0>"),
        ("print('ä☃\\ud800')", "ä☃\\ud800"),
        ("import sys\nsys.exit()", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)", "A(x=1)"),
        (
            "import os\nos.environ['HOME'], os.environ.get('PATH', '') != '', len(os.environ) < 20",
            "('/tmp', True, True)",
        ),
        ("open('a', 'w').write('b')\nopen('a').read()", "'b'"),
        ("import subprocess\nsubprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout", "'hi\\n'"),
        ("from concurrent.futures import ThreadPoolExecutor\nsum(ThreadPoolExecutor(4).map(abs, range(5)))", "10"),
        ("import os\npid = os.fork()\nos.wait() if pid else 1 / 0\n'parent'", "'parent'"),
        ("x = 0\n" + ("x += 1" + " " * 94 + "\n") * 10_000 + "x", "10000"),  # 1 MB
    ],
)
def test_shows_what_is_printed_and_the_last_value(sandbox, code, text):
    result = sandbox.run(code)
    assert (result.text, result.ok, result.error) == (text, True, None)


@pytest.mark.parametrize(
    "code, error",
    [
        ("x = 1\n1 / 0", "ZeroDivisionError: division by zero (line 2)"),
        ("def f():\n    return g()\nf()", "NameError: name 'g' is not defined (line 2)"),
        ("x = (", "SyntaxError: '(' was never closed (line 1)"),
        (
            "import json\njson.loads('{')",
            "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1) (line 2)",
        ),
        ("import sys\nsys.exit('bad input')", "SystemExit: bad input"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt (line 1)"),
        ("raise ValueError('x' * 10_000)", "ValueError: " + "x" * 300 + " (line 1)"),
        ("input()", "EOFError: EOF when reading a line (line 1)"),
        ("x = bytearray(10**10)", "MemoryError: the memory limit was reached"),
        ("open('a', 'wb').write(bytes(10**8))", "OSError: [Errno 27] File too large (line 1)"),
        (
            "import threading, time\nfor i in range(20): threading.Thread(target=time.sleep, args=(9,)).start()",
            "RuntimeError: can't start new thread (line 2)",
        ),
        ("import os\nos._exit(0)", "the code ended the interpreter (exit code 0)"),
        ("import os\nos.abort()", "the interpreter was killed (SIGSEGV)"),
        ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E", "the interpreter broke down"),
    ],
)
def test_errors_are_one_short_line(sandbox, code, error):
    result = sandbox.run(code)
    if "SIGSEGV" in error:  # process 1 of a namespace cannot send itself SIGABRT
        error = result.error if result.error in (error, error.replace("SEGV", "ABRT")) else error
    assert result == ToolResult(error, False, error, result.seconds)


def test_output_before_an_error_is_kept(sandbox):
    assert sandbox.run("print('a')\n1/0").text == "a\nZeroDivisionError: division by zero (line 2)"


def test_time_limit(monkeypatch):
    monkeypatch.setattr(tools.sandbox, "PRELOADED", ())
    with PythonSandbox(timeout=0.5, workers=1) as sandbox:
        result = sandbox.run("print('so far')\nwhile True: pass")
        assert (result.text, result.error) == ("so far\ntimed out after 0.5 s", "timed out after 0.5 s")
        assert 0.5 <= result.seconds < 3


def test_long_output_keeps_both_ends(sandbox):
    text = sandbox.run("for i in range(10**5): print(i)").text
    lines = text.splitlines()
    assert lines[:2] == ["0", "1"] and lines[-1] == "99999" and len(text) < 4100
    total = sum(len(str(i)) + 1 for i in range(10**5))
    assert f"… [{total - 4000} bytes cut] …" in lines


def test_calls_share_nothing_and_repeat_exactly(sandbox):
    code = (
        "import random, numpy, os\nfirst = 'state' not in globals() and not os.path.exists('state')\nstate = 1\n"
        "open('state', 'w')\nnumpy.array = None\n"
        "print(first, random.random(), numpy.random.rand(), {'a', 'b', 'c', 'd'}, hash('x'), object())"
    )
    texts = {sandbox.run(code).text for _ in range(6)}
    with PythonSandbox(timeout=20.0, workers=1) as other:
        texts.add(other.run(code).text)
    assert len(texts) == 1 and texts.pop().startswith("True ")


def test_many_threads(sandbox):
    """Each caller gets its own answer, and no more calls run at once than there are workers."""
    code = "import time\nstart = time.monotonic()\ntime.sleep(0.1)\nprint({}, start, time.monotonic())"
    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(sandbox.run, [code.format(i) for i in range(12)]))
    answers = [result.text.split() for result in results]
    assert [answer[0] for answer in answers] == [str(i) for i in range(12)]
    times = [(float(start), float(end)) for _, start, end in answers]  # this clock is the same for all processes
    assert max(sum(start <= at < end for start, end in times) for at, _ in times) == 2


def test_a_killed_worker_costs_no_call(monkeypatch):
    monkeypatch.setattr(tools.sandbox, "PRELOADED", ())
    with PythonSandbox(timeout=20.0, workers=1) as sandbox:
        for worker in list(sandbox._idle.queue):
            os.killpg(worker._process.pid, signal.SIGKILL)
        assert sandbox.run("1 + 1").text == sandbox.run("1 + 1").text == "2"
        with ThreadPoolExecutor(1) as pool:
            running = sandbox._idle.queue[0]
            answer = pool.submit(sandbox.run, "import time\ntime.sleep(0.5)\n7")
            time.sleep(0.2)
            os.killpg(running._process.pid, signal.SIGKILL)
            assert answer.result().text == "7"


def test_no_process_to_be_had_costs_one_call_only(monkeypatch):
    monkeypatch.setattr(tools.sandbox, "PRELOADED", ())
    with PythonSandbox(workers=1) as sandbox:
        sandbox.run("1"), sandbox.run("1")
        with monkeypatch.context() as patch:
            patch.setattr(tools.sandbox, "command_line", lambda config: ["/nowhere"])
            assert "No such file or directory: '/nowhere'" in sandbox.run("import os\nos._exit(1)").error
            assert sandbox.run("1 + 1").text == "2"  # the other worker
            assert "/nowhere" in sandbox.run("1 + 1").error
        assert [sandbox.run("1 + 1").text for _ in range(3)] == ["2"] * 3


def test_workers_end_with_their_trainer():
    program = """
import os, signal, threading, time
import tools.sandbox
tools.sandbox.PRELOADED = ()
sandbox = tools.sandbox.PythonSandbox(60, workers=1)
print(*[worker._process.pid for worker in sandbox._idle.queue], flush=True)
threading.Thread(target=sandbox.run, args=("while True: pass",)).start()
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    alive = [int(pid) for pid in subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.split()]
    assert len(alive) == 2
    deadline = time.monotonic() + 20
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if runs(pid)]
        time.sleep(0.02)
    assert not alive


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_closed_and_oversized(monkeypatch):
    monkeypatch.setattr(tools.sandbox, "PRELOADED", ())
    with PythonSandbox(workers=1) as sandbox:
        assert sandbox.run("#" * (5 << 20)).error == "the code is longer than 4194304 bytes"
    assert sandbox.run("1").error == "the Python tool is closed"


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'docker' is not one of"):
        PythonSandbox(isolation="docker")
    with pytest.raises(ValueError, match="timeout 0"):
        PythonSandbox(timeout=0)


def test_without_bubblewrap_the_next_level_is_chosen(monkeypatch):
    monkeypatch.setattr(tools.sandbox, "PRELOADED", ())
    monkeypatch.setattr(tools.sandbox.shutil, "which", lambda name: None)
    with pytest.raises(WorkerError, match="no program bwrap"):
        PythonSandbox(workers=1, isolation="bubblewrap")
    with PythonSandbox(workers=1) as sandbox:
        assert sandbox.isolation in LEVELS[1:]


def test_last_resort_warns_loudly(monkeypatch):
    monkeypatch.setattr(tools.sandbox, "PRELOADED", ())
    with pytest.warns(RuntimeWarning, match="LAST RESORT"):
        PythonSandbox(workers=1, isolation="rlimits").close()


HONEST = [
    lambda a, b: (f"{a} * {b}", f"{a * b}"),
    lambda a, b: (f"print(sum(i * i for i in range({a})))", f"{sum(i * i for i in range(a))}"),
    lambda a, b: (f"from math import gcd\ngcd({a}, {b})", f"{math.gcd(a, b)}"),
    lambda a, b: (f"import numpy as np\nint(np.arange({a}).sum())", f"{a * (a - 1) // 2}"),
    lambda a, b: (
        f"from sympy import symbols, expand\nx = symbols('x')\nexpand((x + {a}) ** 2)",
        f"x**2 + {2 * a}*x + {a * a}",
    ),
    lambda a, b: (f"x = {a}\nx / 0", "ZeroDivisionError: division by zero (line 2)"),
]
HOSTILE = [
    "while True: pass",
    "while True: print('x')",
    "import os\nos._exit(1)",
    "import ctypes\nctypes.string_at(0)",
    "x = []\nwhile True: x.append(bytearray(10**7))",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["bubblewrap", "namespaces"])
@pytest.mark.parametrize("hostile", [0.0, 0.01])
def test_ten_thousand_mixed_calls(level, hostile):
    """Nothing lost, nothing wrong; prints the service times of honest calls for results/sandbox.md."""
    rng, jobs = random.Random(0), []
    for _ in range(10_000):
        if rng.random() < hostile:
            jobs.append((rng.choice(HOSTILE), None))
        else:
            jobs.append(rng.choice(HONEST)(rng.randrange(1, 1000), rng.randrange(1, 1000)))
    try:
        sandbox = PythonSandbox(workers=2, isolation=level)
    except WorkerError as e:
        pytest.skip(str(e))
    with sandbox, ThreadPoolExecutor(2) as pool:
        sandbox.run("1")
        start = time.monotonic()
        results = list(pool.map(sandbox.run, [code for code, _ in jobs]))
        seconds = time.monotonic() - start
    done = [(code, expected, result) for (code, expected), result in zip(jobs, results, strict=True)]
    wrong = [row for row in done if row[1] is not None and row[2].text != row[1]]
    assert not wrong, wrong[:3]
    assert all(not result.ok for _, expected, result in done if expected is None)
    times = sorted(result.seconds * 1000 for _, expected, result in done if expected is not None)
    p50, p99, worst = (times[int(len(times) * q)] for q in (0.5, 0.99, 0.99999))
    print(
        f"| {level} | {hostile:.0%} | {seconds:.0f} | {len(jobs) / seconds:.0f} | {p50:.1f} | {p99:.1f} | {worst:.0f} |"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("level", LEVELS)
def test_calls_per_second_against_a_fresh_interpreter(level):
    """One after the other, short code: at least ten times the rate of an interpreter that imports the same."""
    command = [sys.executable, "-c", f"import {', '.join(tools.sandbox.PRELOADED)}\nprint(1 + 1)"]
    try:
        sandbox = PythonSandbox(workers=1, isolation=level)
    except WorkerError as e:
        pytest.skip(str(e))
    with sandbox:
        sandbox.run("1"), sandbox.run("1")
        fresh = ours = 0.0
        for _ in range(20):  # in turns, so that whatever else the machine does hits both
            start = time.monotonic()
            assert subprocess.run(command, stdout=subprocess.PIPE).stdout == b"2\n"
            fresh += time.monotonic() - start
            start = time.monotonic()
            for _ in range(20):
                assert sandbox.run("1 + 1").text == "2"
            ours += (time.monotonic() - start) / 20
    print(f"| {level} | {20 / ours:.0f} | {20 / fresh:.1f} | {fresh / ours:.0f} |")
    assert fresh >= 10 * ours


@pytest.mark.parametrize("isolation", LEVELS)
def test_an_environment_below_tmp_can_be_imported_and_not_written(isolation):
    """Not only what the worker has imported before the call's own /tmp covers it."""
    if isolation == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("no bwrap")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True)
        packages = Path(folder, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
        (packages / "lately.py").write_text("value = 7")
        script = (
            "import sys, warnings\nwarnings.simplefilter('ignore')\nfrom tools.sandbox import PythonSandbox\n"
            f"with PythonSandbox(workers=1, isolation={isolation!r}) as sandbox:\n"
            "    print(sandbox.run('import lately\\nlately.value').text)\n"
            "    print(sandbox.run('import lately\\nopen(lately.__file__, \"a\")').ok)\n"
            "    print(sandbox.run('open(\"a\", \"w\").write(\"b\")').text)"
        )
        os.chmod(folder, 0o755)
        command = [f"{folder}/bin/python", "-c", script]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        assert done.stdout.split() == ["7", "False", "1"], done.stderr
