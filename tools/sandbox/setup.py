"""What the trainer works out for a sandbox worker: its command line, environment, files, user and process limit.

Used by tools/sandbox/__init__.py. bubblewrap's jail is described here; the one of level "namespaces" is in tools/sandbox/jail.py.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from tools.sandbox.jail import LIBRARIES

FOLDER = Path(__file__).parent
PROGRAM = ("worker.py", "jail.py")
PROCESSES = 16  # processes and threads of one call
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # or every thread would reserve 64 MB of its address-space limit
}


def environment() -> dict[str, str]:
    """The worker's whole environment; a Python that needs LD_LIBRARY_PATH to start keeps it."""
    return ENVIRONMENT | {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}


def libraries() -> dict[str, list[str]]:
    """What a call may read: `view`, system libraries, this Python and its packages, and nothing else of any home.

    `path`: where the trainer imports numpy and sympy from, which may not be on the worker's own import path.
    """
    found = [importlib.util.find_spec(name) for name in ("numpy", "sympy")]
    packages = sorted({str(Path(spec.origin).parent.parent) for spec in found if spec and spec.origin})
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *packages}
    wanted = {*LIBRARIES, *prefixes, *map(os.path.realpath, prefixes)}
    wanted |= {folder for folder in environment().get("LD_LIBRARY_PATH", "").split(":") if folder.startswith("/")}
    view: list[str] = []
    for path in sorted(wanted):
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in view):
            view.append(path)
    return {"path": packages, "view": view}


def spare_user(number: int) -> int | None:
    """A user id nobody has, for the calls of a root trainer's worker: limits count for it and it owns nothing.

    None for an ordinary trainer, and for a root that has no other user ids (a container with only itself mapped).
    """
    if os.getuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        ranges = [(int(first), int(count)) for first, _, count in map(str.split, file)]
    unique = os.getpid() * 256 + number
    for uid in (2_000_000_000 + unique, 62_000 + unique % 3000):
        if any(first <= uid < first + count for first, count in ranges):
            return uid
    return None


def process_limit(level: str, uid: int | None) -> int:
    """RLIMIT_NPROC of a call, which counts the threads of a user.

    Linux counts them per user namespace since 5.14; elsewhere, unless the call has a user of its own, those that the
    trainer's user has at present are added.
    """
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if uid is not None or (level != "rlimits" and release >= (5, 14)):
        return PROCESSES
    threads = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{process}").st_uid == os.getuid():
                threads += len(os.listdir(f"/proc/{process}/task"))
        except OSError:  # it ended meanwhile
            continue
    return threads + PROCESSES


def rlimits_warning(landlock: bool, reasons: list[str]) -> str:
    """What a user has to know who gets the last resort."""
    files = "files are protected by Landlock only" if landlock else "this user's FILES ARE NOT PROTECTED (no Landlock)"
    return (
        "Python sandbox: LAST RESORT, resource limits and a system call filter without namespaces; "
        f"{files}. Install bubblewrap for real isolation. Tried: {'; '.join(reasons) or 'nothing else'}"
    )


def command_line(config: dict) -> list[str]:
    """The command that starts one worker."""
    python, argument = [sys.executable, "-s", "-B"], json.dumps(config)
    if config["level"] == "bubblewrap":
        return [*bubblewrap(config["view"]), *python, f"/worker/{PROGRAM[0]}", argument]
    return [*python, str(FOLDER / PROGRAM[0]), argument]


def bubblewrap(view: list[str]) -> list[str]:
    """The bwrap command line of one worker: root in its own namespaces, so that it can jail each call once more."""
    program = shutil.which("bwrap") or "bwrap"  # on our PATH, the worker gets another
    command = [program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--as-pid-1"]
    if os.getuid() != 0:
        command += ["--unshare-user", "--uid", "0", "--gid", "0"]
    command += ["--cap-add", "ALL"]
    for folder in sorted({str(parent) for path in view for parent in Path(path).parents if parent != Path("/")}):
        command += ["--perms", "0755", "--dir", folder]  # bwrap would make them for its own user only
    for path in view:
        command += ["--ro-bind", os.path.realpath(path), path]
    command += ["--perms", "0755", "--dir", "/worker"]
    for name in PROGRAM:
        command += ["--ro-bind", str(FOLDER / name), f"/worker/{name}"]
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc"]
    return [*command, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/", "--"]
