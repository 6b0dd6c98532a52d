"""Locks the calling process in for good: what a decoder that has been taken over cannot do.

It may compute, use the memory it has a right to, and talk over the sockets it already holds.
It may not open a file, make a socket, start a program or a process, signal or inspect another
process, or change any path: those system calls answer EPERM.

| measure | keeps it from |
|---|---|
| death signal | outliving its parent |
| seccomp, default EPERM | files (also /proc/<parent>), network, programs, other processes |
| RLIMIT_NOFILE = 0 | getting any further descriptor, should a kernel know a new call for it |
| RLIMIT_FSIZE = 0 | growing a file through a descriptor it might hold |
| RLIMIT_CORE = 0 | leaving the bytes of a video, or of ours, in a core file |
| RLIMIT_AS | taking the node's memory |
| oom_score_adj = 1000 | the kernel choosing another process than this one when memory is short |

The CPU limit is the parent's (it is renewed for every clip). Linux on x86-64 or arm64 only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
# TSYNC: threads that an import started are locked too. SPEC_ALLOW: kernels before 5.16 would
# else slow the whole process against side channels inside it, where there is nothing to steal.
_SECCOMP_FLAGS = 1 | 4
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000

# machine → (audit architecture, column of the tables below)
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_SECCOMP_CALL = (317, 277)
_TGKILL, _CLONE, _CLONE3 = (234, 131), (56, 220), (435, 435)
_ALLOWED = """
futex 202 98, recvfrom 45 207, sendto 44 206, madvise 28 233, mmap 9 222, munmap 11 215,
mremap 25 216, mprotect 10 226, brk 12 214, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, read 0 63, write 1 64,
writev 20 66, close 3 57, fstat 5 80, lseek 8 62, recvmsg 47 212, sendmsg 46 211,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
restart_syscall 219 128, sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168,
getpid 39 172, getppid 110 173, gettid 186 178, getrusage 98 165, sysinfo 99 179,
getrandom 318 278, membarrier 324 283, rseq 334 293, set_robust_list 273 99, exit 60 93,
exit_group 231 94
"""
"""What an interpreter and codecs call: name, number on x86-64, on arm64; the frequent first."""


def die_with(parent_pid: int) -> None:
    """Ends this process when the thread that started it ends; at once if that happened before."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def lock(memory_bytes: int) -> None:
    """Confines the whole process; there is no way back. Call when all imports are done.

    `memory_bytes` is what it may allocate beyond the address space it has now.

    Raises:
        OSError: the kernel or an outer sandbox refuses a measure.
        RuntimeError: no table of system calls for this machine.
    """
    if platform.machine() not in _MACHINES:
        raise RuntimeError(f"no system call table for {platform.machine()}")
    Path("/proc/self/oom_score_adj").write_text("1000")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space_bytes = pages * resource.getpagesize() + memory_bytes
    for limit, value in (
        (resource.RLIMIT_AS, space_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _filter_calls(*_MACHINES[platform.machine()])


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(value), *(ctypes.c_ulong(0) for _ in range(3))]
    if libc.prctl(option, *words) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _filter_calls(architecture: int, column: int) -> None:
    code = _program(architecture, column)
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.syscall(
        ctypes.c_long(_SECCOMP_CALL[column]),
        ctypes.c_long(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_long(_SECCOMP_FLAGS),
        ctypes.byref(program),
    )
    if answer != 0:
        raise OSError(ctypes.get_errno(), "seccomp filter")


def _program(architecture: int, column: int) -> bytes:
    """The classic BPF program: struct sock_filter {u16 code; u8 jt, jf; u32 k} each."""
    load, equal, has_bit, give = 0x20, 0x15, 0x45, 0x06
    number, machine, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    allow, kill = 0x7FFF0000, 0x80000000
    errno = 0x00050000

    steps = [(load, 0, 0, machine), (equal, 1, 0, architecture), (give, 0, 0, kill)]
    steps.append((load, 0, 0, number))
    for allowed in _ALLOWED.split(","):
        steps += [(equal, 0, 1, int(allowed.split()[1 + column])), (give, 0, 0, allow)]
    # glibc asks clone3 first, whose flags lie out of a filter's sight, and falls back on ENOSYS
    steps += [(equal, 0, 1, _CLONE3[column]), (give, 0, 0, errno | _ENOSYS)]
    for call, test, operand in (
        (_CLONE[column], has_bit, _CLONE_THREAD),  # threads yes, processes no
        (_TGKILL[column], equal, os.getpid()),  # abort() yes, signals to others no
    ):
        steps += [(equal, 0, 4, call), (load, 0, 0, first_argument), (test, 0, 1, operand)]
        steps += [(give, 0, 0, allow), (give, 0, 0, errno | _EPERM)]
    steps.append((give, 0, 0, errno | _EPERM))
    return b"".join(struct.pack("<HBBI", code, jt, jf, k) for code, jt, jf, k in steps)
