"""Runs a static program on a PC with AVX-512 that Bochs emulates, under Debian's Linux kernel.

``python tests/kernels/emulated_pc.py PROGRAM [ARGUMENT...]``; see ``make emulate``. QEMU has no
AVX-512. A PC needs an operating system, which has to save the wide registers: the kernel and the
program start from a CD, and what they print on the serial port is read while they run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from native import CXX, run
from repository import REPOSITORY

FOLDER = Path("build/kernel_tests/emulated_pc")
SERIAL = FOLDER / "serial.txt"

BOCHS = "/usr/bin/bochs"
SCREEN = "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so"
LOADER = ("/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32")

# Debian's packages, each with one of its files.
PACKAGES = {
    "apt": "/usr/bin/apt-get",
    "bochs": BOCHS,
    "bochs-term": SCREEN,
    "isolinux": LOADER[0],
    "syslinux-common": LOADER[1],
    "xorriso": "/usr/bin/xorriso",
}

# Debian's smallest kernel: it is downloaded, not installed.
KERNEL = "linux-image-cloud-amd64"

# Linux leaves AVX off where the CPU misstates the size of its compacted registers, as Bochs 2.7
# does: without xsavec and xsaves it takes the plain format. The others save time.
KERNEL_OPTIONS = (
    "console=ttyS0 loglevel=1 clearcpuid=xsavec,xsaves mitigations=off acpi=off tsc=reliable"
)

# The screen isn't shown. Emulated time counts instructions: the more per second, the fewer timer
# interrupts.
SETTINGS = """
cpu: model=corei7_skylake_x, ips=100000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=pc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
display_library: term
sound: driver=dummy
log: log.txt
panic: action=fatal
"""

TIME_LIMIT = 3600  # seconds; the kernels' tests take some 500


def archive(files: dict[str, Path]) -> bytes:
    """The files as Linux's initial file system: cpio's "newc". /dev/console exists anyway."""
    entries = [(name, 0o100755, path.read_bytes()) for name, path in files.items()]
    return b"".join(archived(*entry) for entry in [*entries, ("TRAILER!!!", 0, b"")])


def archived(name: str, mode: int, content: bytes) -> bytes:
    numbers = [0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    return padded(header + name.encode() + b"\0") + padded(content)


def padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 4)


def kernel() -> Path:
    """Debian's newest kernel, downloaded unless there is one already."""
    if not list(FOLDER.glob("boot/vmlinuz-*")):
        depends = ["apt-cache", "depends", "--important", KERNEL]
        listed = subprocess.run(depends, capture_output=True, text=True, check=True).stdout
        name = re.findall(r"Depends: (linux-image-\S+)", listed)[0]
        subprocess.run(["apt-get", "download", name], cwd=FOLDER, check=True)
        for package in FOLDER.glob("linux-image-*.deb"):
            run(["dpkg-deb", "-x", str(package), str(FOLDER)])
    return max(FOLDER.glob("boot/vmlinuz-*"))


def make_disc(files: dict[str, Path], arguments: list[str]) -> None:
    """pc.iso, which starts Linux with these files; its first process gets the arguments."""
    disc = FOLDER / "disc"
    disc.mkdir(exist_ok=True)
    for file in LOADER:
        shutil.copy(file, disc)
    shutil.copy(kernel(), disc / "linux")
    (disc / "files").write_bytes(archive(files))
    options = " ".join(["initrd=files", KERNEL_OPTIONS, "--", *arguments])
    (disc / "isolinux.cfg").write_text(f"default pc\nlabel pc\nkernel linux\nappend {options}\n")
    boot = ["-b", "isolinux.bin", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    command = ["xorriso", "-as", "mkisofs", "-quiet", *boot, "-o", str(FOLDER / "pc.iso")]
    run([*command, str(disc)])


def start() -> subprocess.Popen[bytes]:
    SERIAL.unlink(missing_ok=True)
    (FOLDER / "settings").write_text(SETTINGS)
    (FOLDER / "debugger").write_text("continue\n")  # Debian's Bochs waits in its debugger at first
    command = [BOCHS, "-q", "-f", "settings", "-rc", "debugger"]
    with open(FOLDER / "screen.txt", "wb") as screen:
        return subprocess.Popen(
            command,
            cwd=FOLDER,
            env={**os.environ, "TERM": "vt100"},
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
        )


def follow(pc: subprocess.Popen[bytes]) -> int | None:
    """Prints what the PC prints until the program's end, and returns its status.

    None if the PC stops before that, or the time is up.
    """
    begin = time.monotonic()
    printed = ""
    while True:
        stopped = pc.poll() is not None
        text = SERIAL.read_text("latin-1") if SERIAL.exists() else ""
        print(text[len(printed) :], end="", flush=True)
        printed = text
        took = time.monotonic() - begin
        if end := re.search(r"^ended with status (\d+)$", printed, re.MULTILINE):
            print(f"{took:.0f} s on the emulated PC", flush=True)
            return int(end[1])
        if stopped or took > TIME_LIMIT:
            return None
        time.sleep(1)


def main() -> None:
    program, *arguments = sys.argv[1:]
    os.chdir(REPOSITORY)
    FOLDER.mkdir(parents=True, exist_ok=True)
    init = FOLDER / "init"
    run([*CXX, "-O2", "-static", "tests/kernels/pc/init.cpp", "-o", str(init)])
    make_disc({"init": init, "program": Path(program)}, arguments)
    pc = start()
    try:
        status = follow(pc)
    finally:
        pc.kill()
        pc.wait()
    if status != 0:
        sys.exit(f"emulated_pc.py: it did not end with status 0 (the PC's files are in {FOLDER})")


if __name__ == "__main__":
    main()
