"""The system calls that lock a sandbox process in: namespaces, a new root, limits, privileges, seccomp, Landlock.

Used by tools/sandbox/worker.py inside the worker process only. Linux on x86_64 and aarch64; every step raises OSError
if the kernel refuses it, so that no code runs in a jail with a hole. Nothing here keeps state.
"""

import ctypes
import errno
import os
import resource
import struct
import subprocess

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NEW_ANYTHING = 0x7E020000  # every CLONE_NEW… flag, cgroup included
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 1, 2, 4, 4096, 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x8000, 1, 4
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
LIBRARIES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ld.so.cache",
             "/etc/localtime")  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

MACHINE = os.uname().machine
SYSCALLS = {  # number on x86_64, on aarch64
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "fcntl": (72, 25), "ioctl": (16, 29), "prlimit64": (302, 261), "pivot_root": (155, 41), "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}  # fmt: skip
DENIED = {  # answered with EPERM in every call
    # the network, other processes
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    # mounts and namespaces
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "fspick": (433, 433),
    # memory that the address-space limit does not see
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180),
    # wide doors into the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
DENIED_WITHOUT_NAMESPACES = {  # what Landlock does not cover: attributes of files of the same user
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
REFUSED_ARGUMENTS = (  # (call, index of the argument, values): F_SETOWN, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP send signals
    ("fcntl", 1, (8, 15)), ("ioctl", 1, (0x8901, 0x8902)),
)  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Raise OSError if a libc call failed, else hand its result on."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def number_of(name: str) -> int | None:
    """A system call's number, None if this machine has no such call; OSError on machines this file does not know."""
    column = {"x86_64": 0, "aarch64": 1}.get(MACHINE)
    if column is None:
        raise OSError(errno.ENOSYS, f"no system call numbers for {MACHINE}")
    return (SYSCALLS | DENIED | DENIED_WITHOUT_NAMESPACES)[name][column]


def syscall(name: str, *arguments) -> int:
    """A system call that libc has no function for."""
    return check(libc.syscall(number_of(name), *arguments), name)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    encoded = [value.encode() if value is not None else None for value in (source, target, kind)]
    check(libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def enter_namespaces() -> None:
    """New mount, process, network, IPC and host-name namespaces; on return this process is number 1 in them.

    An ordinary user gets them through a user namespace in which it is root; real root needs none.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    check(libc.unshare(flags if uid == 0 else flags | NEWUSER), "unshare")
    if uid != 0:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    pid = os.fork()
    if pid:  # the outer half only waits: it dies with the process group, or when the inner half does
        os.closerange(0, 3)
        os.waitpid(pid, 0)
        os._exit(0)


def change_root(view: list[str]) -> None:
    """Replace the file system by an empty one that holds the paths of `view`, read-only, and an empty /tmp."""
    sources = {path: os.path.realpath(path) for path in [*view, *DEVICES]}  # while symbolic links still lead there
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.mkdir("/tmp/old")
    syscall("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    for path, source in sources.items():
        if os.path.isdir("/old" + source):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "w").close()
        mount("/old" + source, path, None, MS_BIND | MS_REC)
    os.makedirs("/tmp", exist_ok=True)
    check(libc.umount2(b"/old", MNT_DETACH), "umount")
    os.rmdir("/old")
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    syscall("mount_setattr", AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))


def hide_proc() -> None:
    """Cover /proc: nothing in a call has to know about processes."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/proc", "tmpfs", MS_RDONLY)


def new_process_namespace() -> None:
    """The next fork becomes number 1 of a new process namespace, which ends with it; setns undoes the last one."""
    own = os.pidfd_open(os.getpid())
    try:
        check(libc.setns(own, NEWPID), "setns")
    finally:
        os.close(own)
    check(libc.unshare(NEWPID), "unshare")


def private_tmp(megabytes: int, view: list[str]) -> None:
    """New mount and IPC namespaces for one call, an empty /tmp of limited size in them.

    What `view` has below /tmp (a virtual environment, say) stays there, read-only.
    """
    check(libc.unshare(NEWNS | NEWIPC), "unshare")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    kept = {path: syscall("open_tree", AT_FDCWD, path.encode(), OPEN_TREE_CLONE | AT_RECURSIVE)
            for path in view if path.startswith("/tmp/")}  # fmt: skip
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={megabytes}m,nr_inodes=10000,mode=1777")
    for path, tree in kept.items():
        os.makedirs(path)
        syscall("move_mount", tree, b"", AT_FDCWD, path.encode(), MOVE_MOUNT_F_EMPTY_PATH)
        os.close(tree)


def set_limits(memory_bytes: int, seconds: int, file_bytes: int, processes: int) -> None:
    """Resource limits of one call, soft and hard, never above the limits in force."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_privileges(uid: int | None) -> None:
    """Give up every capability for good and, where a uid is given, become that user."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    for capability in range(41):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused for an ordinary user, who has none to lose
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(libc.capset(header, nothing), "capset")


def landlock_works() -> bool:
    """Whether the kernel can confine an ordinary process to some folders (Linux 5.13, unless switched off)."""
    return libc.syscall(number_of("landlock_create_ruleset"), None, 0, 1) >= 1


def allow_only_paths(readable: list[str], folder: str) -> None:
    """Landlock: read and execute below `readable`, everything below `folder`, the null devices; no other file.

    Covers /proc too, and keeps the process from tracing any outside its domain. Call it while the paths can be opened.
    """
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")  # without it only root may restrict itself
    version = check(libc.syscall(number_of("landlock_create_ruleset"), None, 0, 1), "landlock")
    execute, write, read, read_folder, truncate = 1, 2, 4, 8, 1 << 14
    handled = (1 << 13) - 1 | (truncate if version >= 3 else 0)
    of_files = handled & (execute | write | read | truncate)
    ruleset = syscall("landlock_create_ruleset", struct.pack("Q", handled), 8, 0)
    rules = [(path, execute | read | read_folder) for path in readable] + [(folder, handled)]
    for path, rights in rules + [(path, read | write) for path in DEVICES]:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            rights = rights if os.path.isdir(path) else rights & of_files
            syscall("landlock_add_rule", ruleset, 1, struct.pack("=Qi", rights, fd), 0)
            os.close(fd)
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def filter_system_calls(namespaces: bool) -> None:
    """Seccomp: DENIED calls fail with EPERM, new namespaces too; clone3 (which hides its flags) looks unimplemented.

    Without namespaces around it, signals and prlimit reach this process alone and file attributes stay as they are.
    """
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: (operation, if true, if false, value)
    allow, kill = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x80000000)
    refuse, unimplemented = (answer, 0, 0, 0x50000 | errno.EPERM), (answer, 0, 0, 0x50000 | errno.ENOSYS)
    number, architecture = (load, 0, 0, 0), (load, 0, 0, 4)
    argument = [(load, 0, 0, 16 + 8 * index) for index in range(2)]  # low half of the first two
    known = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[MACHINE]
    program = [architecture, (equal, 1, 0, known), kill, number, (at_least, 0, 1, 0x40000000), refuse]  # x32 calls
    for name in DENIED if namespaces else DENIED | DENIED_WITHOUT_NAMESPACES:
        if number_of(name) is not None:
            program += [(equal, 0, 1, number_of(name)), refuse]
    program += [(equal, 0, 1, number_of("clone3")), unimplemented]
    program += [(equal, 0, 4, number_of("clone")), argument[0], (has_bits, 0, 1, NEW_ANYTHING), refuse, allow]
    if not namespaces:
        for name in ("kill", "tkill", "tgkill", "prlimit64"):
            program += [
                (equal, 0, 5, number_of(name)),
                argument[0],
                (equal, 2, 0, os.getpid()),
                (equal, 1, 0, 0),
                refuse,
                allow,
            ]
        for name, index, (one, other) in REFUSED_ARGUMENTS:
            program += [
                (equal, 0, 5, number_of(name)),
                argument[index],
                (equal, 1, 0, one),
                (equal, 0, 1, other),
                refuse,
                allow,
            ]
    program.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HP", len(program), ctypes.addressof(code))
    check(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def remove(folder: str) -> None:
    """Delete a temporary folder, however deep or unreadable a call made it."""
    try:
        os.rmdir(folder)  # the usual case: nothing in it
    except OSError:
        subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
