"""The static binary: how large it is, that it is static, and that it starts."""

import os
import subprocess
import sys

BYTES_MAX = 4 * 1024 * 1024


def has_interpreter(path):
    """True when an ELF file names a dynamic loader."""
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            sys.exit(f"{path} is not a 64-bit ELF file")
        offset = int.from_bytes(head[32:40], "little")
        size = int.from_bytes(head[54:56], "little")
        count = int.from_bytes(head[56:58], "little")
        for index in range(count):
            file.seek(offset + index * size)
            if int.from_bytes(file.read(4), "little") == 3:  # PT_INTERP
                return True
    return False


def main():
    path = sys.argv[1]
    size = os.path.getsize(path)
    print(f"{path}: {size:,} bytes = {size / 1024 / 1024:.2f} MiB, at most {BYTES_MAX:,}")
    if has_interpreter(path):
        sys.exit("it needs a dynamic loader: not static")
    version = subprocess.run([path, "--version"], check=True, capture_output=True, text=True, timeout=10)
    print(version.stdout.strip())
    if size > BYTES_MAX:
        sys.exit(f"too large by {size - BYTES_MAX:,} bytes")


main()
