"""Bad files and a host that lacks something: the documented exit status and one line that names the cause.

(Flags and configuration values are tests/cli's.) Real kernels are damaged here in every way that a
half-finished download or a mix-up of architectures does.
"""

import gzip
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from pathlib import Path

import machine
from cases import case
from machine import Skipped, check, script


def refuse(folder, statuses, naming, *args):
    """ringfort run must end at once with one of the statuses and say why in one line that has naming in it."""
    argv = [machine.ringfort(), "run", "--engine", machine.ENGINE, "--console", "none", *map(str, args)]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              errors="replace", timeout=60 * machine.patience(), check=False, cwd=folder)
    except subprocess.TimeoutExpired:
        raise machine.Failure(f"still running after 60 s: {args}") from None
    check(done.returncode in statuses, f"exit status {done.returncode}, not {statuses}: {args}\n{done.stderr[-800:]}")
    lines = done.stderr.splitlines()
    check(len(lines) == 1, f"{len(lines)} lines instead of one:\n{done.stderr[-800:]}")
    check(str(naming) in lines[0], f"the line does not name {naming}: {lines[0]}")
    check(len(lines[0]) > len(str(naming)) + 20, f"the line does not say what is wrong: {lines[0]}")


def elf(machine_type, bits):
    """The start of an ELF executable of some architecture."""
    if bits == 64:
        head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine_type, 1, 0x100000, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        return head + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x100000, 0x100000, 0x1000, 0x1000, 0x1000) + bytes(0x1000)
    head = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, machine_type, 1, 0x100000, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    return head + struct.pack("<IIIIIIII", 1, 0, 0x100000, 0x100000, 0x1000, 0x1000, 5, 0x1000) + bytes(0x1000)


def damaged(data, at, count=64):
    """The data with some bytes turned over."""
    return data[:at] + bytes(b ^ 0xff for b in data[at:at + count]) + data[at + count:]


@case(600, parts=True)
def bad_kernel(report, folder):
    good = (script("kernel", "cloud") / "vmlinuz").read_bytes()
    payload = (good[0x1f1] + 1) * 512 + struct.unpack_from("<I", good, 0x248)[0]
    length = struct.unpack_from("<I", good, 0x24c)[0]
    kinds = {
        "empty": b"",
        "text": b"<html><body>404 Not Found</body></html>\n" * 50,
        "random": os.urandom(1 << 20),
        "zeroes": bytes(1 << 20),
        "truncated-in-header": good[:600],
        "truncated-in-setup": good[:10000],
        "truncated-in-payload": good[:payload + length // 2],
        "truncated-by-one-page": good[:payload + length - 4096],
        "corrupt-payload-magic": damaged(good, payload, 4),
        "corrupt-payload-middle": damaged(good, payload + length // 2, 4096),
        "arm64-image": struct.pack("<IIQQQQQQ4sI", 0x91005a4d, 0x14000000, 0, 0x100000, 0xa, 0, 0, 0, b"ARM\x64", 0) + bytes(65536),
        "arm64-image-gzip": gzip.compress(struct.pack("<IIQQQQQQ4sI", 0x91005a4d, 0x14000000, 0, 0x100000, 0xa, 0, 0, 0, b"ARM\x64", 0) + bytes(65536)),
        "arm64-elf": elf(183, 64),
        "arm-elf": elf(40, 32),
        "riscv-elf": elf(243, 64),
        "ppc64-elf-big-endian": struct.pack(">16sHHIQQQIHHHHHH", b"\x7fELF\x02\x02\x01", 2, 21, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0) + bytes(4096),
        "truncated-elf": elf(62, 64)[:100],
        "program-not-kernel": open("/bin/busybox", "rb").read(),
    }

    def one(kind, content):
        path = folder / f"kernel-{kind}"
        path.write_bytes(content)
        refuse(folder, (2,), path, "--kernel", path)
        path.unlink()

    for kind, content in kinds.items():
        report.part(f"bad-kernel-{kind}", one, kind, content)
    report.part("bad-kernel-missing", lambda: refuse(folder, (2,), "no-such-kernel", "--kernel", "no-such-kernel"))
    report.part("bad-kernel-folder", lambda: refuse(folder, (2,), folder, "--kernel", folder))
    # What cannot fit: a kernel that needs more than the machine has.
    report.part("bad-kernel-too-big", lambda: refuse(
        folder, (2,), "vmlinuz", "--kernel", script("kernel", "cloud") / "vmlinuz", "--memory", "32M"))


@case(600, parts=True)
def bad_initrd(report, folder):
    kernel = script("kernel", "cloud") / "vmlinuz"
    good = script("initramfs").read_bytes()
    zipped = gzip.compress(good, 1)
    zstd = subprocess.run(["zstd", "-q", "-c"], input=good, stdout=subprocess.PIPE, check=True).stdout
    xz = subprocess.run(["xz", "-0", "--check=crc32"], input=good, stdout=subprocess.PIPE, check=True).stdout
    kinds = {
        "random": os.urandom(1 << 20),
        "text": b"<html>404</html>\n" * 100,
        "truncated": good[:len(good) // 2],
        "truncated-gzip": zipped[:len(zipped) // 2],
        "truncated-zstd": zstd[:len(zstd) // 2],
        "truncated-xz": xz[:len(xz) // 2],
        "corrupt-gzip": damaged(zipped, len(zipped) // 2),
        "corrupt-zstd": damaged(zstd, len(zstd) // 2, 4096),
    }

    def one(kind, content):
        path = folder / f"initrd-{kind}"
        path.write_bytes(content)
        refuse(folder, (2,), path, "--kernel", kernel, "--initrd", path)
        path.unlink()

    for kind, content in kinds.items():
        report.part(f"bad-initrd-{kind}", one, kind, content)
    report.part("bad-initrd-missing", lambda: refuse(folder, (2,), "no-such-initrd", "--kernel", kernel, "--initrd", "no-such-initrd"))
    report.part("bad-initrd-folder", lambda: refuse(folder, (2,), folder, "--kernel", kernel, "--initrd", folder))


@case(300, parts=True)
def bad_disk(report, folder):
    kernel = script("kernel", "cloud") / "vmlinuz"
    qcow2 = b"QFI\xfb" + struct.pack(">I", 3) + bytes(65536 - 8)

    def one(content):
        path = folder / "disk.img"
        path.write_bytes(content)
        refuse(folder, (2,), path, "--kernel", kernel, "--disk", f"path={path}")

    report.part("bad-disk-empty", one, b"")
    report.part("bad-disk-part-of-a-sector", one, bytes(1000))
    report.part("bad-disk-qcow2", one, qcow2)
    report.part("bad-disk-missing", lambda: refuse(folder, (2,), "no-such-disk", "--kernel", kernel, "--disk", "path=no-such-disk"))
    report.part("bad-disk-folder", lambda: refuse(folder, (2,), folder, "--kernel", kernel, "--disk", f"path={folder}"))
    report.part("bad-disk-dev-null", lambda: refuse(folder, (2,), "/dev/null", "--kernel", kernel, "--disk", "path=/dev/null"))


@case(300, parts=True)
def host_lacks(report, folder):
    kernel = script("kernel", "cloud") / "vmlinuz"

    def port_taken():
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
            refuse(folder, (3, 5), port, "--kernel", kernel, "--net", f"user,hostfwd=tcp:127.0.0.1:{port}-:22")

    def foreign_address():
        refuse(folder, (2, 3), "203.0.113.77", "--kernel", kernel, "--net", "user,hostfwd=tcp:203.0.113.77:2222-:22")

    def no_tap():
        """Root's tap interface would be made; somebody else's has to exist."""
        done = as_nobody("--kernel", kernel, "--net", "tap,ifname=rf-none0")
        check(done.returncode == 3, f"exit status {done.returncode}, not 3: {done.stderr}")
        check(re.fullmatch(r"[^\n]*rf-none0[^\n]*\n", done.stderr), f"not one clear line: {done.stderr}")

    def disk_in_use():
        disk = folder / "used.img"
        disk.write_bytes(bytes(1 << 20))
        with machine.busybox(folder, "--disk", f"path={disk}", command="echo up; sleep 600") as m:
            m.expect(r"^up\s", 200)
            refuse(folder, (2, 3), disk, "--kernel", kernel, "--disk", f"path={disk}")

    def as_nobody(*args):
        """The same program as a user to whom nothing here belongs."""
        if os.geteuid() != 0:
            raise Skipped("needs root, to become somebody else")
        drop = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        # Build and cache may lie where nobody else may look.
        place = Path(tempfile.mkdtemp(prefix="ringfort-nobody."))
        try:
            place.chmod(0o755)
            program = shutil.copy(machine.ringfort(), place)
            local = [shutil.copy(a, place) if isinstance(a, Path) else a for a in args]
            return subprocess.run([*drop, program, "run", *local], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True, timeout=60, check=False, cwd="/")
        finally:
            shutil.rmtree(place)

    def not_allowed():
        with tempfile.NamedTemporaryFile(prefix="ringfort-secret.") as secret:
            secret.truncate(1 << 20)
            done = as_nobody("--kernel", secret.name)
            check(done.returncode == 3, f"exit status {done.returncode}, not 3: {done.stderr}")
            check(re.fullmatch(r"[^\n]*ringfort-secret\.[^\n]*[Pp]ermission[^\n]*\n", done.stderr),
                  f"not one clear line: {done.stderr}")

    report.part("host-port-taken", port_taken)
    report.part("host-foreign-address", foreign_address)
    report.part("host-no-such-tap", no_tap)
    report.part("host-disk-in-use", disk_in_use)
    report.part("host-not-allowed", not_allowed)
    # VM sizes that no host has: the contract's "absurd sizes" that only the host can judge.
    report.part("host-too-little-memory", lambda: refuse(folder, (2, 3), "memory", "--kernel", kernel, "--memory", "1T"))
