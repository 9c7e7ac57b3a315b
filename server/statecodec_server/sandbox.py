"""What a conversion may do, in case a hostile file gets code to run in it.

The library runs nothing that a file contains. If that fails, the kernel confines the process: by limits everywhere, and
on Linux by Landlock, seccomp and an empty network (docs/service.md says which holds where). An audit hook refuses the
same things to Python code with a sentence to read; native code passes it, so it protects nothing by itself.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import landlock, seccomp

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_ADDRESS_SLACK = 64 << 30  # mapped files and libraries are address space, not memory
_OF_THE_SYSTEM = (
    "/usr", "/lib", "/lib64", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/sys/devices/system",
    "/sys/fs/cgroup", "/dev/urandom", "/dev/zero", "/etc/localtime", "/etc/ld.so.cache",
)  # fmt: skip
_REFUSED = frozenset({
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.kill",
    "pickle.find_class", "os.chroot",
})  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit event -> (index of a path, index of the dir_fd it is relative to) for each path that changes.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.symlink": ((1, 2),),
    "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
    "os.truncate": ((0, None),), "shutil.rmtree": ((0, 1),),
}  # fmt: skip


def limit(memory: int, seconds: float, file_size: int, threads: int) -> None:
    """Set the limits of this process: bytes of memory, seconds a thread, bytes a file. Call it before large imports."""
    cpu = int(seconds * max(threads, 1)) + 10
    limits = {
        resource.RLIMIT_DATA: memory,
        resource.RLIMIT_AS: memory + _ADDRESS_SLACK,
        resource.RLIMIT_FSIZE: max(file_size, 1 << 20),
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_NOFILE: 1024,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    os.umask(0o077)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def detach() -> list[str]:
    """Die with the worker, gain no privileges, and leave the network if the kernel lets us.

    Returns:
        The walls that hold now.
    """
    if not sys.platform.startswith("linux"):
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    uid, gid = os.getuid(), os.getgid()
    isolated = bool(libc.unshare(_CLONE_NEWNET) == 0)
    if not isolated and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        isolated = True
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return ["network"] if isolated else []


def _readable(data: Path) -> Iterator[Path]:
    """Where Python, the library and what they load lie, and the files of the system that they read.

    Nothing of the service's own data is among them.
    """
    installed = [Path(path) for path in (*sys.path, sys.prefix, sys.base_prefix) if path]
    libraries = [Path(path) for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    for path in (*installed, *libraries):
        if path.exists():
            yield from landlock.without(path.resolve(), data)
    yield from map(Path, _OF_THE_SYSTEM)
    yield Path(os.environ["NUMBA_CACHE_DIR"])


def confine(folder: Path, data: Path) -> list[str]:
    """Let the kernel refuse what this job has no reason to do; must come before the first thread.

    Args:
        folder: this attempt's own folder, which it may change; its neighbours `input` and `other` it may read.
        data: the folder of the service, of which it sees nothing else.

    Returns:
        The walls that hold now.
    """
    read = [*_readable(data), folder.parent / "input", folder.parent / "other"]
    walls = []
    if version := landlock.confine(read, [folder, Path(os.devnull)]):
        walls.append(f"landlock {version}")
    if seccomp.confine():
        walls.append("seccomp")
    return walls


def _is_code_cache() -> bool:
    """Whether numba itself is unpickling the index of its cache of compiled kernels."""
    caller = sys._getframe(2)  # 0 here, 1 the hook, 2 whoever called pickle.loads
    return str(caller.f_globals.get("__name__", "")).startswith("numba.")


def lock_down(writable: Sequence[Path]) -> None:
    """From now on refuse what a conversion has no reason to do. Cannot be undone in this process."""
    roots = tuple(str(path.resolve()) for path in writable)

    def inside(path: Any, folder: int | None = None) -> bool:
        if isinstance(path, int) or path is None:
            return True
        text = os.fsdecode(path)
        if folder is not None and folder >= 0:
            text = os.path.join(f"/proc/self/fd/{folder}", text)
        text = str(os.path.realpath(text))
        return text == os.devnull or any(text == root or text.startswith(root + os.sep) for root in roots)

    def refuse(reason: str) -> None:
        raise PermissionError(1, f"a conversion may not do this: {reason}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITES and not inside(path):
                refuse("write outside its folder")
        elif event in _CHANGES:
            places = [(arguments[at], None if fd is None else arguments[fd]) for at, fd in _CHANGES[event]]
            if not all(inside(path, folder) for path, folder in places):
                refuse(f"{event} outside its folder")
        elif event in _REFUSED and not (event == "pickle.find_class" and _is_code_cache()):
            refuse(event)

    sys.addaudithook(hook)
