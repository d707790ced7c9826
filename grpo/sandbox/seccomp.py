"""The system calls that model-written code may make, as a BPF program for the kernel's seccomp filter.

Allowed is what pure computation needs. Calls that change files or reach for the network, other processes or privileges end the
process with SIGSYS, which tells its parent that it tried. All else fails with EPERM: a C library may probe for what is new, and
Python itself looks for the file of a code that has a syntax error.
Where libseccomp's Python binding is installed (Debian's python3-seccomp, or pyseccomp), it writes the program; else `assemble`
does, with the numbers below. Programs are classic BPF over `struct seccomp_data` (linux/seccomp.h, linux/filter.h).
"""

import contextlib
import errno
import importlib
import platform
import struct
import sys
import tempfile
from types import ModuleType

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_*: allow, fail with a number, end the process
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # opcodes: BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
NUMBER_OFFSET, ARCH_OFFSET = 0, 4  # in struct seccomp_data
X32_BIT = 0x40000000  # of numbers in x86_64's second interface
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name, number on x86_64, number on aarch64; "-" where there is none
ALLOWED = """
read 0 63, write 1 64, close 3 57, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, brk 12 214, madvise 28 233,
futex 202 98, sched_yield 24 124, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128,
exit 60 93, exit_group 231 94, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
gettimeofday 96 169, time 201 -, getrandom 318 278, getpid 39 172, gettid 186 178, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getrusage 98 165, times 100 153
"""
FORBIDDEN = """
creat 85 -, open_by_handle_at 304 265, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, mkdir 83 -, mkdirat 258 34, rmdir 84 -, mknod 133 -,
mknodat 259 33, truncate 76 45, chmod 90 -, fchmodat 268 53, chown 92 -, lchown 94 -, fchownat 260 54, utimensat 280 88,
setxattr 188 5, chdir 80 49, chroot 161 51, pivot_root 155 41, mount 165 40, umount2 166 39, socket 41 198,
socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242, sendto 44 206, sendmsg 46 211,
recvfrom 45 207, recvmsg 47 212, clone 56 220, clone3 435 435, fork 57 -, vfork 58 -, execve 59 221, execveat 322 281,
unshare 272 97, setns 308 268, kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138,
rt_tgsigqueueinfo 297 240, pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, ptrace 101 117,
process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, memfd_create 319 279, userfaultfd 323 282,
io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, bpf 321 280, perf_event_open 298 241,
seccomp 317 277, prctl 157 167, prlimit64 302 261, setrlimit 160 164, setpriority 141 140, sched_setaffinity 203 122,
setuid 105 146, setgid 106 144, setresuid 117 147, setresgid 119 149, setsid 112 157, capset 126 91, personality 135 92,
keyctl 250 219, add_key 248 217, request_key 249 218, init_module 175 105, finit_module 313 273, kexec_load 246 104,
reboot 169 142, shmget 29 194, shmat 30 196, mq_open 240 180
"""


def build_filter() -> bytes:
    """The program for this machine. Raises OSError where none is known: other processors, other systems than Linux."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {sys.platform} on {machine}")
    binding = find_binding()
    if binding is not None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a libseccomp that does not know all of the names
            return export(binding, machine)
    return assemble(machine)


def numbers_of(table: str, machine: str) -> dict[str, int]:
    """Name -> number of the calls that the machine has."""
    column = 1 + list(AUDIT_ARCH).index(machine)
    rows = [row.split() for row in table.replace("\n", " ").split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def assemble(machine: str) -> bytes:
    """The program from the tables above: foreign interfaces end the process, then a comparison for each call."""
    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    program = [instruction(LOAD, ARCH_OFFSET), instruction(JUMP_EQUAL, AUDIT_ARCH[machine], 1, 0), instruction(RETURN, KILL),
               instruction(LOAD, NUMBER_OFFSET)]
    if machine == "x86_64":
        program += [instruction(JUMP_AT_LEAST, X32_BIT, 0, 1), instruction(RETURN, KILL)]
    for table, action in ((ALLOWED, ALLOW), (FORBIDDEN, KILL)):
        for number in numbers_of(table, machine).values():
            program += [instruction(JUMP_EQUAL, number, 0, 1), instruction(RETURN, action)]
    return b"".join([*program, instruction(RETURN, ERRNO | errno.EPERM)])


def find_binding() -> ModuleType | None:
    """libseccomp's Python module, if it is installed and finds its library."""
    for name in ("seccomp", "pyseccomp"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            continue
    return None


def export(binding: ModuleType, machine: str) -> bytes:
    """The same program, written by libseccomp, which knows the numbers itself."""
    rules = binding.SyscallFilter(defaction=binding.ERRNO(errno.EPERM))
    rules.set_attr(binding.Attr.ACT_BADARCH, binding.KILL_PROCESS)
    for table, action in ((ALLOWED, binding.ALLOW), (FORBIDDEN, binding.KILL_PROCESS)):
        for name in numbers_of(table, machine):
            rules.add_rule(action, name)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
