"""A real VirtualBox starts a TPM with a state that came from swtpm, and keeps it. Run by hand, as root.

    python tests/machine/vbox/tpm_with_virtualbox.py CHROOT

CHROOT is the root directory of a Debian sid with the package virtualbox (contrib), with /proc and /dev mounted. No
kernel module is needed: VirtualBox interprets the guest ("driverless"). Its hardened program does not allow that, so
that a small program of ours loads it. The guest does not have to start: the TPM is there before.

Result with VirtualBox 7.2.22 and swtpm 0.7.1: VirtualBox reads the tar that vmconv makes. After it has run, swtpm finds
the same endorsement key and the same secret in what VirtualBox has written, carried back by vmconv.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import vmconv
from support.tpm_states import SECRET, running
from vmconv.machine.nvram import tpm

CONF = """\
name: tpm-test
bios: ovmf
memory: 128
scsi0: local:100/vm-100-disk-0.raw,size=4M
tpmstate0: local:100/vm-100-disk-1.raw,size=4M,version=v2.0
"""

LOADER = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
int main(int argc, char **argv, char **envp) {
    void *runtime = dlopen("/usr/lib/virtualbox/VBoxRT.so", RTLD_NOW | RTLD_GLOBAL), *session = 0;
    int (*init)(int, char ***, uint32_t) = dlsym(runtime, "RTR3InitExe");
    int (*support)(uint32_t, void **) = dlsym(runtime, "SUPR3InitEx");
    /* SUPR3INIT_F_DRIVERLESS, with interpretation allowed */
    if (init(argc, &argv, 0) || support(0x1c, &session)) return 2;
    void *headless = dlopen("/usr/lib/virtualbox/VBoxHeadless.so", RTLD_NOW | RTLD_GLOBAL);
    if (!headless) return puts(dlerror()), 3;
    return ((int (*)(int, char **, char **))dlsym(headless, "TrustedMain"))(argc, argv, envp);
}
"""
"""VirtualBox's own program of this kind, without its check of the kernel module."""


def run(chroot: Path, *words: str) -> str:
    # VirtualBox's daemon inherits the output and stays, so that a pipe would not end.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(["chroot", str(chroot), *words], stdout=output, stderr=output, check=False, timeout=120)
        output.seek(0)
        said = output.read()
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {said}")
    return said


def started(chroot: Path, name: str) -> None:
    """Runs the machine until VirtualBox has made its TPM, and switches it off."""
    source = chroot / "tmp" / "loader.c"
    source.write_text(LOADER)
    loader = "/usr/lib/virtualbox/driverless"
    subprocess.run(["gcc", "-o", f"{chroot}{loader}", str(source), "-ldl"], check=True)
    with subprocess.Popen(["chroot", str(chroot), loader, "--startvm", name], stdout=subprocess.DEVNULL) as process:
        try:
            while 'VMState="running"' not in run(chroot, "VBoxManage", "-q", "showvminfo", name, "--machinereadable"):
                if process.poll() is not None:
                    sys.exit("VirtualBox did not start")
                time.sleep(0.5)
            time.sleep(5)
            run(chroot, "VBoxManage", "-q", "controlvm", name, "poweroff")
            process.wait(60)
        finally:
            process.kill()


def main() -> None:
    chroot = Path(sys.argv[1]).resolve()
    place = chroot / "tmp" / f"tpm-{time.time_ns()}"
    source = place / "source"
    source.mkdir(parents=True)
    (source / "100.conf").write_text(CONF)
    (source / "vm-100-disk-0.raw").write_bytes(bytes(4 << 20))
    state = source / "vm-100-disk-1.raw"
    state.write_bytes(bytes(tpm.LINEAR_SIZE))
    with running(place / "before", f"backend-uri=file://{state}") as one:
        one.keep_secret()
        key = one.endorsement_key()
    there = vmconv.machine_convert(source / "100.conf", place / "there", target_format="vbox")
    config = Path(there.target)
    (store,) = config.parent.glob("*.nvram")
    before = store.read_bytes()
    run(chroot, "VBoxManage", "-q", "registervm", f"/{config.relative_to(chroot)}")
    try:
        run(chroot, "VBoxManage", "-q", "modifyvm", "tpm-test", "--vm-execution-engine=interpreter")
        started(chroot, "tpm-test")
        time.sleep(2)
    finally:
        run(chroot, "VBoxManage", "-q", "unregistervm", "tpm-test")
    if store.read_bytes() == before:
        sys.exit("VirtualBox has not written the store")
    vmconv.machine_convert(config, place / "back", target_format="proxmox")
    (made,) = (place / "back").glob("**/vm-100-disk-2.raw")
    with running(place / "after", f"backend-uri=file://{made}") as one:
        if (one.secret(), one.endorsement_key()) != (SECRET, key):
            sys.exit("the TPM has other secrets")
    print("VirtualBox has used the TPM of swtpm, and swtpm that of VirtualBox: the same key and the same secret")


if __name__ == "__main__":
    main()
