"""A seccomp filter for code in the sandbox: system calls that reach the kernel's wider surface fail.

Everything is allowed but what leads out of the sandbox or past its limits: further namespaces, mounts, other processes'
memory, keyrings, BPF, io_uring, memory without an address space (memfd, System V), sockets of other families. The
filter is classic BPF, built here for x86_64 and aarch64, and loaded by LOADER in the process that then runs the code.
"""

import platform
import struct
from collections.abc import Sequence

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_NUMBERS = {  # x86_64, aarch64
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "syslog": (103, 116),
    "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "quotactl": (179, 60), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "landlock_create_ruleset": (444, 444),
}  # fmt: skip
_ONLY_X86 = (172, 173, 154, 156)  # iopl, ioperm, modify_ldt, _sysctl
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
_NEW_NAMESPACES = 0x7E020000
_UNIX, _INET, _INET6, _NETLINK, _NETLINK_ROUTE = 1, 2, 10, 16, 0

_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT, _THIRD_ARGUMENT = (
    0,
    4,
    16,
    32,
)  # of struct seccomp_data; both machines are little-endian

LOADER = """
import ctypes
def load(program):
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    program = bytes.fromhex(program)
    for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the seccomp filter cannot be loaded")
"""
"""Source of load(), for a process that imports nothing of ours: no new privileges, then the filter."""


def program(*, network: bool) -> str:
    """The filter, as hexadecimal digits for load().

    Args:
        network: sockets of IP may be made, as inside a network of the code's own.

    Raises:
        OSError: this machine's architecture has no table here.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES or struct.pack("=H", 1) != b"\1\0":
        raise OSError(f"there is no seccomp filter for {machine}; there are {', '.join(_ARCHITECTURES)}")
    column = list(_ARCHITECTURES).index(machine)
    families = (_UNIX, _INET, _INET6) if network else (_UNIX,)
    denied = [numbers[column] for numbers in _NUMBERS.values()] + [*_ONLY_X86] * (machine == "x86_64")
    code = [
        _step(_LOAD, _ARCH),
        _step(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        code += [_step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _KILL)]
    for number in denied:
        code += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _FAIL | _EPERM)]
    code += [_step(_EQUAL, _CLONE3[column], 0, 1), _step(_RETURN, _FAIL | _ENOSYS)]  # libc falls back to clone
    code += _if_called(_CLONE[column], [_step(_ANY_BIT, _NEW_NAMESPACES, 0, 1), _step(_RETURN, _FAIL | _EPERM)])
    route = [  # of netlink's protocols the one by which libraries list interfaces
        _step(_EQUAL, _NETLINK, 0, 2),
        _step(_LOAD, _THIRD_ARGUMENT),
        _step(_EQUAL, _NETLINK_ROUTE, 1, 0),
        _step(_RETURN, _FAIL | _EAFNOSUPPORT),
    ]
    known = [_step(_EQUAL, family, len(families) - i - 1 + len(route), 0) for i, family in enumerate(families)]
    for number in (_SOCKET[column], _SOCKETPAIR[column]):
        code += _if_called(number, [*known, *route])
    return b"".join([*code, _step(_RETURN, _ALLOW)]).hex()


def _if_called(number: int, then: Sequence[bytes]) -> list[bytes]:
    """Judge a system call by its first argument; what `then` does not return for is allowed."""
    return [
        _step(_EQUAL, number, 0, len(then) + 2),
        _step(_LOAD, _FIRST_ARGUMENT),
        *then,
        _step(_RETURN, _ALLOW),
    ]


def _step(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, value)
