"""Attacks on the sandbox, in every mechanism of this machine: how many are tried, and how many get through.

    python benchmarks/sandbox.py

The attacks are those of tests/attacks.py; each runs in a process of its own, with limits of 128 MiB, 8 MiB of files,
32 threads and 5 s. An attack that a mechanism does not claim to withstand counts as not claimed.
"""

import asyncio
import os
import platform
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from attacks import ATTACKS, CALL, Attack

from trimtab.rewards.sandbox import MECHANISMS, Limits, Mechanism, run, scratch, works

LIMITS = Limits(cpu_seconds=20, memory_mb=128, processes=32, file_mb=8, output_bytes=2**20, wall_seconds=5.0)


async def gets_through(attack: Attack, within: Mechanism, secret: Path, port: int, name: str) -> bool:
    async with scratch() as folder:
        words = [str(secret), str(port), name, str(os.getpid())]
        argv = [sys.executable, "-I", "-c", CALL + attack.code, *words]
        result = await run(argv, folder=folder, limits=LIMITS, within=within)
    if "outlives" in attack.name:
        time.sleep(4.5)
    return "THROUGH" in result.stdout or secret.with_suffix(".left").exists()


def main() -> int:
    os.environ["OPENAI_API_KEY"] = "sk-secret"
    print(f"{platform.machine()}, Linux {platform.release().partition('-')[0]}\n")
    print("| mechanism | attacks | not claimed | got through |\n| --- | --- | --- | --- |")
    failed = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        name = f"trimtab-{os.getpid()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        for within in MECHANISMS:
            if not works(within):
                print(f"| {within.name} | does not work here | | |")
                continue
            tried = [attack for attack in ATTACKS if within.namespaces or not attack.enclosed]
            port = server.getsockname()[1]
            with asyncio.Runner() as runner:
                through = [a.name for a in tried if runner.run(gets_through(a, within, secret, port, name))]
            failed += len(through)
            names = f": {', '.join(through)}" if through else ""
            print(f"| {within.name} | {len(tried)} | {len(ATTACKS) - len(tried)} | {len(through)}{names} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
