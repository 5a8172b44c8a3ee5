"""One warm worker of the Python sandbox: import once, then fork for every call, and let each call run in a jail.

A program of its own, started by tools/sandbox/__init__.py; the control socket is its standard input. Life of a call: fork → own
session, namespaces, empty temporary folder, limits, no privileges → run → one status record → everything the call
started is killed. The worker itself never runs model code, and ends when its socket does.
"""

import ast
import gc
import json
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import types

import jail

STATUS_FD, LIBRARY_FD = 3, 100
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
OK, ERROR, SETUP = b"ok", b"error:", b"setup:"  # how a status record begins


# ---------------------------------------------------------------------------------------- one call: the forked child


def confine(config: dict, folder: str) -> None:
    """Everything between the fork and the model's code; an exception here means that the code is not run."""
    plain = config["level"] == "rlimits"
    if not plain:
        jail.private_tmp(config["file_mb"], config["view"])
    elif config["landlock"]:
        jail.allow_only_paths(config["view"], folder)
    os.chdir(folder)
    jail.set_limits(
        memory_bytes=config["base_bytes"] + (config["memory_mb"] << 20),
        seconds=int(config["timeout"]) + 2,
        file_bytes=config["file_mb"] << 20,
        processes=config["processes"],
    )
    jail.drop_privileges(config["uid"])
    jail.filter_system_calls(namespaces=not plain)


def describe(error: BaseException) -> str:
    """`Type: message (line n)`, what a model can act on; n is the last line of its own code on the stack."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<python>":
            line = trace.tb_lineno
        trace = trace.tb_next
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    text = type(error).__name__ + (f": {message[:300]}" if message else "")
    return text + (f" (line {line})" if line else "")


def execute(code: str) -> str | None:
    """Run code as the module __main__ and show the value of a last expression; returns the error, None if fine."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    try:
        tree = ast.parse(code, "<python>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<python>", "exec"), main.__dict__)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<python>", "eval"), main.__dict__)
            if value is not None:
                print(repr(value))
        return None
    except SystemExit as e:
        return None if e.code in (None, 0) else f"SystemExit: {str(e.code)[:300]}"
    except MemoryError:
        return "MemoryError: the memory limit was reached"
    except BaseException as e:
        return describe(e)


def child(code: str, config: dict, folder: str, out: int, status: int) -> None:
    """The forked process of one call; never returns."""
    record, own = ERROR + b"the interpreter broke down", os.getpid()
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2), (status, STATUS_FD)):
            os.dup2(source, target)
        os.closerange(STATUS_FD + 1, LIBRARY_FD)
        try:
            confine(config, folder)
        except Exception as e:
            record = SETUP + f"{type(e).__name__}: {e}".encode()
            return
        streams = [
            open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False) for fd in (1, 2)
        ]
        sys.stdout, sys.stderr = streams
        error = execute(code)
        record = OK if error is None else ERROR + error[:1000].encode("utf-8", "backslashreplace")
        for stream in streams:
            if not stream.closed:
                stream.flush()
    finally:  # also when the code's own objects made the lines above fail
        if os.getpid() == own:  # not a process that the code forked
            os.write(STATUS_FD, record)
        os._exit(0)


# ---------------------------------------------------------------------------------------- one call: the worker's side


def serve(control: socket.socket, code: str, config: dict) -> dict:
    """Fork, watch, kill, clean up; the reply for the parent."""
    plain = config["level"] == "rlimits"
    if plain:
        folder = tempfile.mkdtemp(dir=config["folder"])
        if config["uid"] is not None:
            os.chown(folder, config["uid"], config["uid"])
    else:
        folder = "/tmp"
        jail.new_process_namespace()
    out_read, out_write = os.pipe()
    status_read, status_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(code, config, folder, out_write, status_write)
    os.close(out_write)
    os.close(status_write)
    output = Output(config["max_output"] // 2)
    end = watch(control, pid, out_read, output, config["timeout"])
    os.kill(pid, signal.SIGKILL)
    _, wait_status = os.waitpid(pid, 0)  # in a process namespace this waits for all of its processes
    if plain:
        kill_descendants(config["uid"])
    if end == "hung up":
        return {}
    output.drain(out_read)
    os.set_blocking(status_read, False)
    try:
        record = os.read(status_read, 4096)
    except BlockingIOError:
        record = b""
    os.close(out_read)
    os.close(status_read)
    reply = {"output": output.text(), "timed_out": end == "timed out", "wait_status": wait_status}
    return reply | {"record": record.decode("utf-8", "replace")}


def watch(control: socket.socket, pid: int, out: int, output: "Output", timeout: float) -> str:
    """Collect output until the call ended, "timed out", or the parent "hung up"."""
    os.set_blocking(out, False)
    process = os.pidfd_open(pid)
    poll = select.poll()
    for fd in (out, process, control.fileno()):
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout
    try:
        while True:
            left = deadline - time.monotonic()
            ready = dict(poll.poll(max(left, 0) * 1000))
            if control.fileno() in ready:  # nothing is sent during a call
                return "hung up"
            if process in ready:
                return "ended"
            if left <= 0:
                return "timed out"
            if ready.get(out, 0) & select.POLLIN:
                output.add(os.read(out, 1 << 16))
            elif out in ready:
                poll.unregister(out)  # the program closed it; wait for its end
    finally:
        os.close(process)


class Output:
    """The first and the last `limit` bytes of what a call printed; the middle is dropped while it runs."""

    def __init__(self, limit: int):
        self.limit, self.head, self.tail, self.total = limit, b"", b"", 0

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        self.total += len(data)
        room = self.limit - len(self.head)
        self.head += data[:room]
        self.tail = (self.tail + data[room:])[-self.limit :]

    def drain(self, fd: int) -> None:
        """Read what is left in a pipe that nobody writes to any more."""
        try:
            while data := os.read(fd, 1 << 16):
                self.add(data)
        except BlockingIOError:
            pass

    def text(self) -> str:
        """What was kept, with a note where something was cut; memory addresses, which differ by run, as 0x0."""
        cut = self.total - len(self.head) - len(self.tail)
        if cut:
            head, tail = (part.decode("utf-8", "ignore") for part in (self.head, self.tail))
            text = f"{head}\n… [{cut} bytes cut] …\n{tail}"
        else:
            text = (self.head + self.tail).decode("utf-8", "replace")
        return re.sub(r" at 0x[0-9a-f]+>", " at 0x0>", text)


def kill_descendants(uid: int | None) -> None:
    """Level rlimits: kill what the call left behind; as subreaper the worker inherits daemons too."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none left
            return
        if uid is not None:  # a user of the worker's own: everything at one stroke
            if os.fork() == 0:
                try:
                    os.setresuid(uid, uid, uid)
                    os.kill(-1, signal.SIGKILL)
                finally:  # never back into the worker's code
                    os._exit(0)
        else:  # stop all before killing any: a death would make room for the next fork of a bomb
            stopped: set[int] = set()
            while fresh := descendants() - stopped:
                send_signal(fresh, signal.SIGSTOP)
                stopped |= fresh
            send_signal(stopped, signal.SIGKILL)
        time.sleep(0.002)


def descendants() -> set[int]:
    """Processes below this one, at any depth."""
    children: dict[int, list[int]] = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/stat") as file:
                children.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(process))
        except OSError:  # it ended meanwhile
            continue
    found, todo = set(), [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found


def send_signal(processes: set[int], number: int) -> None:
    """Signal processes of which some may have ended."""
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


# ---------------------------------------------------------------------------------------- the worker


def import_through_descriptors() -> None:
    """Let a user without rights on a private home (/root/miniconda3, /root/.pyenv) still import this Python's modules.

    Every import path becomes /proc/self/fd/N of a folder opened here; nothing beside the libraries becomes readable.
    """
    moved: dict[str, str] = {}
    for path in filter(os.path.isdir, sys.path):
        moved[path] = f"/proc/self/fd/{os.dup2(os.open(path, os.O_PATH), LIBRARY_FD + len(moved))}"
    sys.path = list(moved.values())
    for module in list(sys.modules.values()):  # packages imported so far
        for i, path in enumerate(getattr(module, "__path__", [])):
            root = max((root for root in moved if path.startswith(root)), key=len, default="")
            module.__path__[i] = moved.get(root, "") + path[len(root) :]


def set_up(config: dict) -> None:
    """Enter the worker's own jail and import the libraries."""
    level = config["level"]
    sys.path = sys.path[1:] + config["path"]  # without the folder of this file
    os.environ.pop("PWD", None)
    if level == "namespaces":
        jail.enter_namespaces()
    elif level == "rlimits":
        config["landlock"] = jail.landlock_works()
        jail.check(jail.libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
        if config["uid"] is not None:
            import_through_descriptors()
    for name in config["preloaded"]:
        try:
            __import__(name)
        except ImportError:
            pass  # then it is the model's ImportError
    gc.freeze()  # a collection in a forked call must not touch, and so copy, the libraries' memory
    with open("/proc/self/statm") as file:
        config["base_bytes"] = int(file.read().split()[0]) * resource.getpagesize()
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, a call goes first and the trainer stays
    if level == "namespaces":
        jail.change_root(config["view"])
    elif level == "bubblewrap":
        jail.hide_proc()
    jail.check(jail.libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")  # no tracing, no /proc/N/fd


def receive(control: socket.socket) -> bytes:
    """One length-prefixed message, b"" at the end of the stream."""
    header = control.recv(4, socket.MSG_WAITALL)
    return control.recv(struct.unpack("!I", header)[0], socket.MSG_WAITALL) if len(header) == 4 else b""


def send(control: socket.socket, message: dict) -> None:
    """One length-prefixed JSON message."""
    data = json.dumps(message).encode()
    control.sendall(struct.pack("!I", len(data)) + data)


def main() -> None:
    """argv[1]: the configuration as JSON, see tools/sandbox/__init__.py."""
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    set_up(config)
    send(control, {"ready": True, "landlock": config.get("landlock", False)})
    while message := receive(control):
        (config["timeout"],) = struct.unpack("!d", message[:8])
        if reply := serve(control, message[8:].decode(), config):
            send(control, reply)
        if config["folder"]:
            for name in os.listdir(config["folder"]):
                jail.remove(os.path.join(config["folder"], name))
    if config["folder"]:  # the parent may have died without a chance to do this
        jail.remove(config["folder"])


if __name__ == "__main__":
    main()
