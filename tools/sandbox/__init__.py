"""Python sandbox: run code a model wrote so that it cannot hang, slow, read, alter or kill the run.

    with PythonSandbox(timeout=5.0) as sandbox:
        sandbox.run("1 + 1").text   # "2"

A pool of warm workers (tools/sandbox/worker.py) with numpy and sympy imported; a worker forks for every call and is
replaced after any call that did not end by itself. `run` is safe to call from many threads; `workers` run at once.
Isolation, best first: `bubblewrap`, `namespaces` (the same, built with system calls), `rlimits` (last resort, warns).
results/sandbox.md says what each of them stops.
"""

import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass

from core.trajectory import writable
from tools.sandbox.jail import remove
from tools.sandbox.setup import command_line, environment, libraries, process_limit, rlimits_warning, spare_user

LEVELS = ("bubblewrap", "namespaces", "rlimits")
START_SECONDS = 60.0
GRACE = 3.0  # seconds beyond the time limit before a worker that does not answer is given up
MAX_CODE, MAX_REPLY = 4 << 20, 16 << 20  # bytes
FILE_MB = 64  # size of a file, and of a call's whole /tmp where that is private
PRELOADED = ("collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math", "statistics",
             "string", "numpy", "numpy.linalg", "numpy.random", "sympy")  # fmt: skip


@dataclass
class ToolResult:
    """What a tool gave back. `text` is what the model sees, on failure too; `error` is None where ok.

    A program's last newline is not part of the text.
    """

    text: str
    ok: bool
    error: str | None
    seconds: float

    def __post_init__(self):  # half a surrogate pair would end the run when the trajectory is written
        self.text, self.error = writable(self.text), self.error and writable(self.error)


class WorkerError(RuntimeError):
    """A worker did not start, or stopped answering."""


class PythonSandbox:
    """Pool of sandboxed Python workers; a context manager.

    timeout: wall-clock seconds per call. memory_mb: what each process of a call may map beyond the preloaded
    libraries. workers: calls that run at once. isolation: one of LEVELS, or "auto" for the best that works here
    (the attribute `isolation` says which). max_output: bytes kept of what a call prints, half from either end.
    Raises WorkerError if no worker starts.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        memory_mb: int = 512,
        workers: int = 2,
        *,
        isolation: str = "auto",
        max_output: int = 4000,
    ):
        if min(timeout, memory_mb, workers, max_output) <= 0:
            raise ValueError(
                f"timeout {timeout}, memory_mb {memory_mb}, workers {workers} and max_output {max_output} must be > 0"
            )
        if isolation not in ("auto", *LEVELS):
            raise ValueError(f"isolation {isolation!r} is not one of {('auto', *LEVELS)}")
        self.timeout, self.workers = timeout, workers
        self._config = {"memory_mb": memory_mb, "max_output": max_output, "file_mb": FILE_MB, "preloaded": PRELOADED}
        self._config |= libraries()
        self._slots = threading.Semaphore(workers)
        self._idle: queue.Queue[_Worker] = queue.Queue()  # first in, first out: a cold one waits
        self._closed = False
        self._idle.put(self._choose(LEVELS if isolation == "auto" else (isolation,)))
        for number in range(1, workers + 1):  # one more than run at once: a replacement warms up while others work
            self._idle.put(self._start(number))

    def __enter__(self) -> "PythonSandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let the calls in progress finish, then end all workers; later calls fail."""
        for _ in range(self.workers):
            self._slots.acquire()
        self._closed = True
        while not self._idle.empty():
            self._idle.get().kill()
        self._slots.release(self.workers)

    def run(self, code: str) -> ToolResult:
        """Run code in a fresh fork; whatever it does, the answer comes back as a result."""
        data = code.encode("utf-8", "replace")
        if len(data) > MAX_CODE:
            return _failure("", f"the code is longer than {MAX_CODE} bytes", 0.0)
        with self._slots:
            if self._closed:
                return _failure("", "the Python tool is closed", 0.0)
            worker, start = self._idle.get(), time.monotonic()
            try:
                reply = worker.call(data, self.timeout)
                if "lost" in reply and time.monotonic() - start < self.timeout:
                    worker.restart()  # its end was not the code's doing, except on level rlimits: once more
                    reply = worker.call(data, self.timeout)
                if not reply.get("record"):  # lost, timed out, crashed, or ended behind the interpreter's back
                    worker.restart()
            except OSError as e:  # no process can be started now; the next call tries again
                reply = {"lost": str(e)}
            finally:
                self._idle.put(worker)
            return _result(reply, self.timeout, time.monotonic() - start)

    def _start(self, number: int) -> "_Worker":
        uid = spare_user(number)
        limits = {"uid": uid, "processes": process_limit(self.isolation, uid)}
        return _Worker(self._config | {"level": self.isolation} | limits)

    def _choose(self, levels: tuple[str, ...]) -> "_Worker":
        """The first worker, on the best level whose worker starts and computes."""
        reasons = []
        for level in levels:
            self.isolation = level
            if level == "bubblewrap" and not shutil.which("bwrap"):
                reasons.append("bubblewrap: no program bwrap on the PATH")
                continue
            worker = self._start(0)
            reply = worker.call(b"1 + 1", 30.0)
            if reply.get("output") == "2\n":
                if level == "rlimits":
                    warnings.warn(rlimits_warning(worker.hello["landlock"], reasons), RuntimeWarning, stacklevel=3)
                return worker
            worker.kill()
            reasons.append(f"{level}: {reply.get('lost') or reply['record']}")
        raise WorkerError("the Python sandbox does not start: " + "; ".join(reasons))


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, config: dict):
        self._config = config
        self._start()

    def _start(self) -> None:
        self.hello: dict | None = None  # what the worker said when it was ready
        self._folder = None  # of its calls' temporary folders, where they are not in a jail
        if self._config["level"] == "rlimits":
            self._folder = tempfile.mkdtemp(prefix=f"sandbox-{os.getpid()}-")
            os.chmod(self._folder, 0o711)
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command_line(self._config | {"folder": self._folder}),
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment(),
                cwd="/",
                start_new_session=True,
            )

    def call(self, code: bytes, timeout: float) -> dict:
        """The worker's reply, {"lost": why} if none comes in time."""
        try:
            if self.hello is None:
                self.hello = self._receive(START_SECONDS)
            self._socket.settimeout(timeout + GRACE)
            self._socket.sendall(struct.pack("!Id", len(code) + 8, timeout) + code)
            return self._receive(timeout + GRACE)
        except (OSError, ValueError, EOFError) as e:
            return {"lost": f"{e or type(e).__name__}{self._complaint()}"}

    def restart(self) -> None:
        """A new process in place of this one; OSError if none can be started."""
        self.kill()
        self._start()

    def kill(self) -> None:
        """Kill the worker with its whole process group, and with it every process namespace below; reap it."""
        self._socket.close()
        if self._process.returncode is not None:  # done before
            return
        if self._folder:  # outside a namespace only the worker itself can find what its call started: let it
            self._ended(GRACE)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process.stderr.close()
        if self._folder:
            remove(self._folder)

    def _ended(self, seconds: float) -> bool:
        """Whether the process ends within some seconds; does not reap it, so that its number stays its own."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    return True
            except ChildProcessError:  # somebody in the trainer waits for all children
                return True
            time.sleep(0.005)
        return False

    def _receive(self, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
        (length,) = struct.unpack("!I", self._read(4, deadline))
        if length > MAX_REPLY:
            raise ValueError(f"a reply of {length} bytes")
        return json.loads(self._read(length, deadline))

    def _read(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            part = self._socket.recv(length - len(data))
            if not part:
                raise EOFError("the worker ended")
            data += part
        return bytes(data)

    def _complaint(self) -> str:
        """The last line a worker that ended wrote to its standard error."""
        if self._process.returncode is not None or not self._ended(0.2):
            return ""
        os.set_blocking(self._process.stderr.fileno(), False)
        lines = (self._process.stderr.read() or b"").decode("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1][:300]})" if lines else ""


def _result(reply: dict, timeout: float, seconds: float) -> ToolResult:
    """Turn a worker's reply into what the model sees."""
    if "lost" in reply:
        return _failure("", f"the Python tool failed: {reply['lost']}", seconds)
    output, record, status = reply["output"].removesuffix("\n"), reply["record"], reply["wait_status"]
    kind, _, message = record.partition(":")
    if reply["timed_out"]:
        return _failure(output, f"timed out after {timeout:g} s", seconds)
    if kind == "ok":
        return ToolResult(output, True, None, seconds)
    if kind == "error":
        return _failure(output, message, seconds)
    if kind == "setup":
        return _failure(output, f"the Python tool failed: {message}", seconds)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
        why = "out of memory or processor time" if number == signal.SIGKILL else name
        return _failure(output, f"the interpreter was killed ({why})", seconds)
    return _failure(output, f"the code ended the interpreter (exit code {os.WEXITSTATUS(status)})", seconds)


def _failure(output: str, error: str, seconds: float) -> ToolResult:
    return ToolResult(f"{output}\n{error}" if output else error, False, error, seconds)
