"""Attacks on tools/sandbox/__init__.py on every isolation level; the outcomes are the table of results/sandbox.md.

    python -m pytest tests/test_sandbox_attacks.py

not stopped: the attack reached something outside its call. contained: it reached nothing, but its worker was lost, or
it used more of the machine than its limits say. stopped: it ended within its limits and left nothing behind.
"""

import os
import shutil
import signal
import socket
import threading
import time
import warnings
from pathlib import Path
from string import Template

import pytest
from sandbox_attacks import ATTACKS

from tools.sandbox import LEVELS, PythonSandbox, WorkerError
from tools.sandbox.jail import landlock_works

TABLE = Path(__file__).parent.parent / "results" / "sandbox.md"
TIMEOUT = 0.8
MARK = f"sandbox-test-{os.getpid()}"
NEEDS_LANDLOCK = {
    "home folder",
    "writing to the home folder",
    "files of the run",
    "/proc/<parent>",
    "temporary files of another call",
    "writing to the worker's pipes",
}

OUTCOMES = ("stopped", "contained", "not stopped")


def table() -> dict[str, dict[str, str]]:
    """{attack: {level: outcome}} as committed."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in TABLE.read_text().splitlines()
        if line.startswith("|")
    ]
    head = next(row for row in rows if row[0] == "attack")
    return {
        row[0].replace("`", ""): dict(zip(head[1:], row[1:]))
        for row in rows
        if len(row) == len(head) and row[1] in OUTCOMES
    }


class Trainer:
    """What an attack could reach: secrets, files, a port, this process."""

    def __init__(self):
        self.secret = f"secret-{os.urandom(8).hex()}"
        self.home_file = Path.home() / MARK
        self.home_file.write_text(self.secret)
        self.home_file.chmod(0o600)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(0.01)
        self.signals = 0
        self.old_handler = signal.signal(signal.SIGUSR1, self.count)
        os.environ["TRAINER_TOKEN"] = self.secret
        self.before = self.state()

    def count(self, *_):
        self.signals += 1

    def state(self):
        process = os.getpid()
        limits = Path(f"/proc/{process}/limits").read_text()
        return (
            os.getpriority(os.PRIO_PROCESS, process),
            os.sched_getaffinity(process),
            limits,
            self.home_file.stat().st_mode,
        )

    def fill(self, program: str) -> str:
        """The attack with this trainer's process number, folders and port in it."""
        names = {"pid": os.getpid(), "home": Path.home(), "mark": MARK, "port": self.server.getsockname()[1]}
        return Template(program).safe_substitute(names, repository=TABLE.parent.parent, usr1=int(signal.SIGUSR1))

    def reached(self, result) -> bool:
        """Whether an attack had any effect here or brought anything home."""
        try:
            self.server.accept()
            connected = True
        except TimeoutError:
            connected = False
        written = Path(f"{self.home_file}-written")
        effects = [connected, written.exists(), self.signals > 0, self.state() != self.before]
        effects += [word in result.text for word in (self.secret, "LEAK", "FORGED")]
        written.unlink(missing_ok=True)
        self.signals = 0
        return any(effects)

    def close(self):
        self.server.close()
        signal.signal(signal.SIGUSR1, self.old_handler)
        del os.environ["TRAINER_TOKEN"]
        for path in Path.home().glob(MARK + "*"):
            path.unlink()


def processes(sandbox: PythonSandbox) -> int:
    """Processes of this pool, wherever they hide: their command line holds its configuration."""
    mark, count = f'"max_output": {sandbox._config["max_output"]}', 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += mark.encode() in path.read_bytes()
        except OSError:
            continue
    return count


def memory() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def traces(sandbox: PythonSandbox) -> dict:
    """What a call could leave behind."""
    files = list(Path("/tmp").glob(f"sandbox-{os.getpid()}-*/*")) + list(Path("/dev/shm").glob("sandbox-*"))
    return {"processes": processes(sandbox), "files": files, "descriptors": len(os.listdir("/proc/self/fd"))}


@pytest.fixture(scope="module")
def trainer():
    trainer = Trainer()
    yield trainer
    trainer.close()


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request, trainer):
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore", RuntimeWarning)
            patch.setattr("tools.sandbox.PRELOADED", ())  # workers are replaced all the time: start them fast
            sandbox = PythonSandbox(
                TIMEOUT, 128, workers=2, isolation=request.param, max_output=4000 + os.getpid() % 1000
            )
    except WorkerError as e:
        pytest.skip(str(e))
    with sandbox:
        sandbox.run("1")
        yield sandbox


def attack(sandbox: PythonSandbox, trainer: Trainer, name: str):
    """Run one attack; for the one that needs a victim, beside a call that owns a file."""
    if name != "temporary files of another call":
        return sandbox.run(trainer.fill(ATTACKS[name]))
    victim_code = f"import time\nopen('mine', 'w').write('{trainer.secret}')\ntime.sleep(0.7)"
    victim = threading.Thread(target=sandbox.run, args=(victim_code,))
    victim.start()
    time.sleep(0.1)
    result = sandbox.run(ATTACKS[name])
    victim.join()
    return result


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(sandbox, trainer, name):
    level = sandbox.isolation
    if level == "rlimits" and name in NEEDS_LANDLOCK and not landlock_works():
        pytest.skip("this kernel has no Landlock")
    if level == "rlimits" and name == "fork bomb" and sandbox.run("import os\nos.getuid()").text == "0":
        pytest.skip("calls would run as root, for whom the process limit does not count")
    descriptors, memory_before, start = len(os.listdir("/proc/self/fd")), memory(), time.monotonic()
    result = attack(sandbox, trainer, name)
    assert time.monotonic() - start < TIMEOUT + 4 and len(result.text) < 10_000
    reached = trainer.reached(result)
    assert sandbox.run("print(repr(1 + 1))").text == "2", "the pool does not answer any more"
    # Three workers, each with an outer half where it has namespaces; a replacement needs a moment to get there.
    clean = {"processes": 3 if level == "rlimits" else 6, "files": [], "descriptors": descriptors}
    deadline = time.monotonic() + 15
    while (left := traces(sandbox)) != clean and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == clean, "the call left something behind"
    assert memory() - memory_before < 8e6
    lost = (result.error or "").startswith("the Python tool failed")
    outcome = "not stopped" if reached else "contained" if lost or "EXCEEDED" in result.text else "stopped"
    assert outcome == table()[name][level], result


def test_table_and_attacks_have_the_same_rows():
    assert list(table()) == list(ATTACKS)


def test_bubblewrap_stops_everything():
    assert {row["bubblewrap"] for row in table().values()} == {"stopped"}
