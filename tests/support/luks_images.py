"""LUKS containers of cryptsetup and QEMU, quick to open, and their payload encrypted sector by sector."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from support.requirements import oracle_program

PASSPHRASE = b"correct horse"
QUICK1 = ("--type", "luks1", "--pbkdf-force-iterations", "1000")
QUICK2 = ("--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "512")
QUICK_ARGON = ("--type", "luks2", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "1")
JSON = slice(4096, 16384)


def secret(folder: Path, passphrase: bytes = PASSPHRASE, name: str = "secret") -> Path:
    """Returns a file with the passphrase."""
    path = folder / name
    path.write_bytes(passphrase)
    path.chmod(0o600)
    return path


def cryptsetup(*arguments: object) -> str:
    command = [oracle_program("cryptsetup"), "-q", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def container(folder: Path, *options: str, key: bytes, size: int = 0, name: str = "disk.luks") -> Path:
    """Makes an empty container with this key and the passphrase, and a payload of `size` bytes."""
    path, master = folder / name, secret(folder, key, "master")
    path.write_bytes(b"")
    os.truncate(path, 24 << 20)
    given = ("--volume-key-file", master, "-s", len(key) * 8, "--key-file", secret(folder))
    cryptsetup("luksFormat", *options, *given, path)
    os.truncate(path, payload_of(path) + size)
    return path


def payload_of(path: Path) -> int:
    """Returns the offset of the payload, as cryptsetup says."""
    dump = cryptsetup("luksDump", path)
    one = next((line.split()[-1] for line in dump.splitlines() if line.startswith("Payload offset:")), None)
    if one is not None:
        return int(one) * 512
    return int(next(line.split()[1] for line in dump.splitlines() if line.strip().startswith("offset:")))


def encrypted(data: bytes, key: bytes, mode: str, sector: int = 512) -> bytes:
    """Returns cipher text, each sector by a cipher of its own: IVs count 512 bytes, as dm-crypt does."""
    found = bytearray()
    for at in range(0, len(data), sector):
        number = (at // 512).to_bytes(16, "little")
        if mode == "aes-xts-plain64":
            cipher: Cipher[modes.XTS | modes.CBC] = Cipher(algorithms.AES(key), modes.XTS(number))
        elif mode == "aes-cbc-plain64":
            cipher = Cipher(algorithms.AES(key), modes.CBC(number))
        else:
            assert mode == "aes-cbc-essiv:sha256"
            salt = Cipher(algorithms.AES(sha256(key).digest()), modes.ECB()).encryptor()
            cipher = Cipher(algorithms.AES(key), modes.CBC(salt.update(number)))
        found += cipher.encryptor().update(data[at : at + sector])
    return bytes(found)


def filled(path: Path, data: bytes, key: bytes, mode: str = "aes-xts-plain64", sector: int = 512) -> Path:
    """Writes an encrypted disk into a container."""
    with path.open("r+b") as file:
        file.seek(payload_of(path))
        file.write(encrypted(data, key, mode, sector))
    return path


def key_of(length: int = 64) -> bytes:
    return random.Random(length).randbytes(length)


def seal(data: bytearray) -> None:
    """Makes the checksums of both headers of LUKS 2 right."""
    for at in (0, 16384):
        if data[at + 6 : at + 8] != b"\0\2" or len(data) < at + 16384:
            continue
        (size,) = struct.unpack_from(">Q", data, at + 8)
        if size == 16384:
            data[at + 448 : at + 512] = bytes(64)
            data[at + 448 : at + 480] = sha256(data[at : at + size]).digest()


def changed(path: Path, change: object) -> None:
    """Calls `change` with the JSON area of a container of LUKS 2, as an object, and stores it in both headers."""
    data = bytearray(path.read_bytes())
    area = json.loads(data[JSON].split(b"\0", 1)[0])
    assert callable(change)
    change(area)
    text = json.dumps(area).encode()
    for at in (0, 16384):
        data[at + 4096 : at + 16384] = text.ljust(12288, b"\0")
    seal(data)
    path.write_bytes(data)
