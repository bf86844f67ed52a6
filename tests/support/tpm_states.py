"""States of TPMs: one that VirtualBox wrote, and those of running swtpm processes."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from .requirements import oracle_program

_VIRTUALBOX = (
    "eNpjYF5t5q7MwMzAfPJViiEDIwMDQwUQM5KAYYCR+pgHZO4BqDUNUExAD1MdkGaBYgkoFoS6kRWImYHYAUrDMDtCP1cFRCsHwhim"
    "TQegAgJQvSDMxgBxICNUrgEizgQSQQsfkDkKDFB9LEjhxogWdgxoYcqAI6wpAiCDWIQUTZxBThEAQ2TgsPPks9r6ztcrfn34/Ohu"
    "+ftvopVuEs2R/I0VbWmzjU8cjVro+1CPn23P+rv/An1NPE6em9Jz8BzD2eVPJ0rdKpnEJ1XB4HDa9VG1nvj3Jonkizzu3I+1vjtK"
    "aTxWkMi86SevO1+ozSU+dl9f80sh2VDFdKZXlf3nDzCuvfexNTckfLLLL79Eo6cMDmd3WVywKXLI23Fk/+r919uuFuxTZTPh7W6P"
    "7mxeUPU0bk/vqtlfHroHvLyZ7WTVs3a9g12r2zXdYA65Z+5yGyLLz8oxODyviwlv5LmTosJtG9D7g+OYrqZIzCTrpfNUVrRIO5mt"
    "u7KH725t8kbZvWkLPZ/XOAcnSe+ZsN1RfVvHDOPkLsa0WC0Gh4fBM0u4tGY13eGskn80bS9L6wS7TM4bO0IYL6V+7JmrbHJjOsNC"
    "lw2v//N7Lt15adkFRwH1F+KLjc9s5t8s9zjjGHcAg4OIBMuX2c4cSbUJfE//9poIXSkrNAwUbP1XVOOxlttG2vbn2jj7PfNmcRT8"
    "ve79bO6ebe6ML5NbDfr8H+S//3mX95ARaqwJMjCJZz9TAycvAVh6YGFgYf7//z8DN5jkAZO8YJIPkuTQADC1M78AYZB2PmiyhQFe"
    "ZJUKKoyqDEKQ9Aq0TBWfZYwMbIxAAFTCFJZa0Y5Iq4wMTPkv7BbCBTjcnYJcGAxWBvx7fnTW8x9tGjNfTnjFP3GO4YToFypZL8zc"
    "jExedbi3z9YIWfmDL7pGJn2/pIJ1RTnEEWiJmBGctXEmcaZgt3+rwSUCQojTX+kw1C1Mcw5gmMcAKgwBxU4GpA=="
)

VIRTUALBOX = zlib.decompress(base64.b64decode(_VIRTUALBOX))
"""`TpmEmuTpms/permall` of a machine of VirtualBox 7.2.22 (libtpms 0.10.2) with `--tpm-type 2.0`, started once.

Made by `machine/vbox/tpm_with_virtualbox.py`. Nobody has used the TPM.
"""

NV = "0x1500016"
SECRET = b"0123456789abcdef0123456789abcdef"


class RunningTpm:
    """A TPM of swtpm, asked by tpm2-tools."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._environment = {**os.environ, "TPM2TOOLS_TCTI": f"swtpm:path={directory}/tpm"}

    def run(self, *words: str) -> bytes:
        command = [oracle_program(words[0]), *words[1:]]
        done = subprocess.run(command, env=self._environment, cwd=self._directory, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def endorsement_key(self) -> bytes:
        """Returns the public part of the key that the TPM derives from its seed."""
        public = self._directory / "ek.pub"
        self.run("tpm2_createek", "-Q", "-G", "ecc", "-c", "ek.ctx", "-u", str(public))
        return public.read_bytes()

    def keep_secret(self) -> None:
        (self._directory / "secret").write_bytes(SECRET)
        self.run("tpm2_nvdefine", "-Q", NV, "-C", "o", "-s", str(len(SECRET)), "-a", "ownerread|ownerwrite")
        self.run("tpm2_nvwrite", "-Q", NV, "-C", "o", "-i", "secret")

    def secret(self) -> bytes:
        return self.run("tpm2_nvread", NV, "-C", "o", "-s", str(len(SECRET)))


@contextlib.contextmanager
def running(directory: Path, backend: str) -> Iterator[RunningTpm]:
    """Runs swtpm with the state at `backend`: `dir=DIRECTORY`, or `backend-uri=file://FILE` for a linear file."""
    directory.mkdir()
    command = [oracle_program("swtpm"), "socket", "--tpm2", "--tpmstate", backend]
    command += ["--ctrl", f"type=unixio,path={directory}/tpm.ctrl", "--server", f"type=unixio,path={directory}/tpm"]
    with subprocess.Popen([*command, "--flags", "not-need-init,startup-clear"]) as process:
        try:
            until = time.monotonic() + 60
            while not (directory / "tpm").exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            yield RunningTpm(directory)
        finally:
            process.terminate()
