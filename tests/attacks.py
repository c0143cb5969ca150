"""Attacks on the sandbox: programs that print THROUGH where they get what they should not."""

from dataclasses import dataclass

CALL = """
import ctypes, mmap, os, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(x86, arm, *arguments): return libc.syscall(x86 if os.uname().machine == "x86_64" else arm, *arguments)
def through(done):
    if done: print("THROUGH", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Attack:
    """code runs inside; arguments of the program are: a file outside, a port and an abstract name that listen outside,
    and the pid of the trainer. enclosed: only a mechanism with namespaces withstands it."""

    name: str
    code: str
    enclosed: bool = False


ATTACKS = (
    Attack("a further user namespace", "through(libc.unshare(0x10000000) == 0)"),
    Attack(
        "a further user namespace by clone",
        "pid = call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\nthrough(pid > 0)",
    ),
    Attack("a further user namespace by clone3", "through(libc.syscall(435, b'\\0' * 64, 64) > 0)"),
    Attack("joining a namespace", "through(libc.setns(os.open('/proc/self/ns/net', 0), 0) == 0)"),
    Attack("mounting cgroup2", "os.mkdir('c'); through(libc.mount(b'none', b'c', b'cgroup2', 0, None) == 0)"),
    Attack("mounting by the new calls", "through(libc.syscall(430, b'tmpfs', 0) >= 0)"),
    Attack(
        "the session keyring", "through(libc.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 0) >= 0)"
    ),
    Attack("AF_VSOCK", "try: socket.socket(40, 1); through(True)\nexcept OSError: pass"),
    Attack("netfilter's netlink", "try: socket.socket(16, 3, 12); through(True)\nexcept OSError: pass"),
    Attack("AF_PACKET", "try: socket.socket(17, 3); through(True)\nexcept OSError: pass"),
    Attack("AF_ALG", "try: socket.socket(38, 5); through(True)\nexcept OSError: pass"),
    Attack("io_uring", "through(libc.syscall(425, 4, bytes(256)) >= 0)"),
    Attack("BPF", "through(call(321, 280, 0, bytes(128), 128) >= 0)"),
    Attack("perf", "through(call(298, 241, bytes(128), 0, -1, -1, 0) >= 0)"),
    Attack("tracing the parent", "through(libc.ptrace(16, os.getppid(), 0, 0) == 0)"),
    Attack(
        "the x32 calls",
        "if os.uname().machine == 'x86_64': through(libc.syscall(0x40000000 + 39) > 0)",
    ),
    Attack(
        "420 MiB in a memfd",
        "fd = os.memfd_create('m')\nfor _ in range(420): os.write(fd, b'x' * 2**20)\ntime.sleep(1); through(True)",
    ),
    Attack(
        "400 MiB in System V segments",
        "ids = [libc.shmget(0, 2**20, 0o1600) for _ in range(400)]\n"
        "libc.shmat.restype = ctypes.c_void_p\n"
        "for i in ids:\n    if i < 0: sys.exit()\n    ctypes.memset(libc.shmat(i, None, 0), 1, 2**20)\n"
        "time.sleep(1); through(True)",
    ),
    Attack(
        "140 MiB in files without a name",
        "keep = [open(f'f{i}', 'wb', 0) for i in range(140)]\n"
        "for i, f in enumerate(keep): os.unlink(f'f{i}'); f.write(os.urandom(2**20)); time.sleep(0.01)\n"
        "time.sleep(1); through(True)",
    ),
    Attack(
        "400 threads",
        "for _ in range(400): threading.Thread(target=time.sleep, args=(3,), daemon=True).start()\n"
        "time.sleep(1); through(True)",
    ),
    Attack(
        "100 processes",
        "for _ in range(100):\n    if not os.fork(): time.sleep(3); os._exit(0)\ntime.sleep(1); through(True)",
    ),
    Attack("200 MiB of memory", "x = bytearray(200 * 2**20)\ntime.sleep(1); through(True)"),
    Attack(
        "200 MiB in a mapping that is shared",
        "m = mmap.mmap(-1, 200 * 2**20)\nfor i in range(0, len(m), 4096): m[i] = 1\ntime.sleep(1); through(True)",
    ),
    Attack(
        "a file of 200 MiB",
        "f = open('big', 'wb')\nfor _ in range(200): f.write(bytes(2**20))\ntime.sleep(1); through(True)",
    ),
    Attack("output without end", "while True: sys.stdout.write('x' * 65536)"),
    Attack("time without end", "time.sleep(60); through(True)"),
    Attack("a key in the environment", "through('OPENAI_API_KEY' in os.environ)"),
    Attack(
        "a key in the environment of those around",
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try: through(b'OPENAI_API_KEY' in open(f'/proc/{pid}/environ', 'rb').read())\n    except OSError: pass",
        enclosed=True,
    ),
    Attack("a file of the user", "try: open(sys.argv[1]).read(); through(True)\nexcept OSError: pass", enclosed=True),
    Attack(
        "a socket of this machine",
        "for address in (('127.0.0.1', int(sys.argv[2])), ('192.0.2.1', 53)):\n"
        "    try: socket.create_connection(address, 2); through(True)\n    except OSError: pass",
    ),
    Attack(
        "an abstract socket of this machine",
        "try: socket.socket(socket.AF_UNIX).connect('\\0' + sys.argv[3]); through(True)\nexcept OSError: pass",
        enclosed=True,
    ),
    Attack(
        "a signal to the trainer",
        "try: os.kill(int(sys.argv[4]), 0); through(True)\nexcept OSError: pass",
        enclosed=True,
    ),
    Attack(
        "a process that outlives the run",
        "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(4)\n"
        "        open(sys.argv[1] + '.left', 'w').write('THROUGH')\n    os._exit(0)\nos.wait()",
        enclosed=True,
    ),
    Attack("1,500 nested folders", "for _ in range(1500):\n    os.mkdir('d'); os.chdir('d')"),
    Attack("folders that cannot be removed", "os.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)"),
    Attack(
        "writing to the system", "try: open('/usr/through', 'w'); through(True)\nexcept OSError: pass", enclosed=True
    ),
    Attack("setting the clock", "through(call(227, 112, 0, bytes(16)) == 0)"),
)
