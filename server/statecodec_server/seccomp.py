"""A seccomp filter (Linux, x86-64 and ARM64): system calls that no conversion needs fail with EPERM.

No program, no process, no socket, no signal to another process, no other process's memory, no mount, no change of
owner or mode by path, no way round the limits. It holds for all threads, and cannot be taken back.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from dataclasses import dataclass

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_DENY, _MISSING = 0x00050000 | 1, 0x00050000 | 38  # EPERM; ENOSYS, upon which glibc falls back to clone
_SET_FILTER, _ALL_THREADS = 1, 1
_CLONE_THREAD = 0x10000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

# name: (number on x86-64, number on ARM64); None where an architecture has no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "socket": (41, 198),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "setrlimit": (160, 164),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "acct": (163, 89),
    "personality": (135, 92), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145),
    "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149), "setfsuid": (122, 151),
    "setfsgid": (123, 152), "setgroups": (116, 159), "capset": (126, 91), "clock_settime": (227, 112),
    "settimeofday": (164, 170), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161),
    "setdomainname": (171, 162), "chmod": (90, None), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "mknod": (133, None), "mknodat": (259, 33), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip


@dataclass(frozen=True)
class _Machine:
    """What differs between architectures: where its numbers stand above, and the calls that are looked at closely."""

    column: int
    audit: int
    clone: int
    kill: int
    tgkill: int
    prctl: int
    prlimit: int
    clone3: int = 435


_MACHINES = {
    "x86_64": _Machine(0, 0xC000003E, clone=56, kill=62, tgkill=234, prctl=157, prlimit=302),
    "aarch64": _Machine(1, 0xC00000B7, clone=220, kill=129, tgkill=131, prctl=167, prlimit=261),
}


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value & 0xFFFFFFFF)


def _argument(index: int, *, high: bool = False) -> bytes:
    return _instruction(_LOAD, 16 + 8 * index + (4 if high else 0))


def _program(machine: _Machine, pid: int) -> bytes:
    """The filter as the kernel takes it; every block tests one number and falls through to the next when it differs."""
    number = _instruction(_LOAD, 0)
    parts = [_instruction(_LOAD, 4), _instruction(_EQUAL, machine.audit, 1, 0), _instruction(_RETURN, _KILL), number]
    if machine.column == 0:  # x32 calls carry other numbers
        parts += [_instruction(_AT_LEAST, 0x40000000, 0, 1), _instruction(_RETURN, _KILL)]
    for numbers in _REFUSED.values():
        if (call := numbers[machine.column]) is not None:
            parts += [_instruction(_EQUAL, call, 0, 1), _instruction(_RETURN, _DENY)]
    parts += [_instruction(_EQUAL, machine.clone3, 0, 1), _instruction(_RETURN, _MISSING)]
    # A thread is allowed, a process is not.
    parts += [_instruction(_EQUAL, machine.clone, 0, 4), _argument(0), _instruction(_ANY_BIT, _CLONE_THREAD, 0, 1)]
    parts += [_instruction(_RETURN, _ALLOW), _instruction(_RETURN, _DENY)]
    for call in (machine.kill, machine.tgkill):  # abort() and raise() are signals to oneself
        parts += [_instruction(_EQUAL, call, 0, 4), _argument(0), _instruction(_EQUAL, pid, 0, 1)]
        parts += [_instruction(_RETURN, _ALLOW), _instruction(_RETURN, _DENY)]
    # It must die with its worker.
    parts += [_instruction(_EQUAL, machine.prctl, 0, 4), _argument(0), _instruction(_EQUAL, _PR_SET_PDEATHSIG, 1, 0)]
    parts += [_instruction(_RETURN, _ALLOW), _instruction(_RETURN, _DENY)]
    # Limits may be read (no new ones given), not set.
    parts += [_instruction(_EQUAL, machine.prlimit, 0, 6), _argument(2), _instruction(_EQUAL, 0, 0, 3)]
    parts += [
        _argument(2, high=True),
        _instruction(_EQUAL, 0, 0, 1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _DENY),
    ]
    return b"".join([*parts, _instruction(_RETURN, _ALLOW)])


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine() -> bool:
    """Install the filter for all threads of this process; False where the kernel or the architecture has none."""
    machine = _MACHINES.get(platform.machine())
    if not sys.platform.startswith("linux") or machine is None or sys.byteorder != "little":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    instructions = _program(machine, os.getpid())
    program = _Program(len(instructions) // 8, instructions)
    seccomp = 317 if machine.column == 0 else 277
    return bool(libc.syscall(ctypes.c_long(seccomp), _SET_FILTER, _ALL_THREADS, ctypes.byref(program)) == 0)
