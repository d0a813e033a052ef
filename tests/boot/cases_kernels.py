"""Debian's kernels boot to user space with a small initramfs, use the machine's devices, and power off."""

import hashlib
import os
import socket
import subprocess
import threading

import machine
from cases import case
from machine import Skipped, busybox, check, script


def boots(kernel):
    def run(folder):
        version = (script("kernel", kernel) / "version").read_text().strip()
        with busybox(folder, kernel=kernel, command="uname -r; echo sum $((6 * 7)); grep -c ^processor /proc/cpuinfo") as m:
            m.expect(r"^RF: user space on " + version.replace(".", r"\.").replace("+", r"\+"), 150)
            m.expect(r"^sum 42\s+1\s+RF: command ends with status 0", 60)
            m.powered_off(30)
            stats = m.stats()
        check(stats["engine"] == machine.ENGINE, f"--stats names the engine {stats['engine']}, not {machine.ENGINE}")
        text = m.console
        for bad in ("Call Trace:", "Kernel panic", "does not load", "BUG:"):
            check(bad not in text, f"the console shows {bad!r}:\n{text[-3000:]}")
    return run


for NAME in ("cloud", "standard", "rt", "trixie"):
    case(300, name=f"kernel-{NAME}")(boots(NAME))


@case(300)
def programs_32_bit(folder):
    """Debian's i386 busybox in the 64-bit guest computes what the host computes."""
    script("initramfs", "--kernel", "cloud", "--i386")
    program = (machine.cache() / "busybox-i386").read_bytes()
    check(program[:5] == b"\x7fELF\x01", "the 32-bit busybox is no 32-bit ELF file")
    # awk: x87 and SSE arithmetic, sha256sum: integer, gzip: memory, the pipe: processes and signals.
    # No quotes fit into a kernel command line; awk takes its program from a file made with echo -e.
    command = ("b=/bin32/busybox; $b sha256sum $b; $b gzip -c $b | $b gunzip | $b md5sum; "
               "echo -e 'BEGIN { printf(\\x22%.9f %.6e\\x22, 355 / 113, 1e10 * 1e11 / 7) }' > /p; $b awk -f /p; echo; "
               "$b sh -c 'kill -9 $$'; echo killed $?")
    with busybox(folder, command=command, i386=True) as m:
        m.expect(r"^RF: command begins", 150)
        m.expect(hashlib.sha256(program).hexdigest(), 90)
        m.expect(hashlib.md5(program).hexdigest(), 90)
        m.expect(r"^3\.141592920 1\.428571e\+20\s", 30)
        m.expect(r"^killed 137\s", 30)
        m.powered_off(30)


@case(300)
def disk_and_rng(folder):
    """What the guest writes is in the file; what is read-only stays as it is; the rng gives bytes."""
    disk, fixed = folder / "disk.img", folder / "fixed.img"
    pattern = os.urandom(1 << 20)
    disk.write_bytes(pattern + bytes(3 << 20))
    fixed.write_bytes(pattern)
    command = ("cat /dev/vdb | md5sum; dd if=/dev/vda of=/dev/vda bs=64k count=16 seek=32 conv=notrunc,fsync 2>/dev/null; "
               "echo copy $?; dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync 2>/dev/null; echo fixed $?; "
               "cat /sys/block/vda/size /sys/block/vda/serial; echo; dd if=/dev/hwrng bs=64 count=2 2>/dev/null | wc -c")
    with busybox(folder, "--disk", f"path={disk},serial=ABC-123", "--disk", f"path={fixed},readonly=on",
                 "--device", "virtio-rng", command=command) as m:
        m.expect(hashlib.md5(pattern).hexdigest(), 200)
        m.expect(r"^copy 0\s+fixed 1\s+8192\s+ABC-123\s+128\s", 60)
        m.powered_off(30)
    check(disk.read_bytes() == pattern + bytes(1 << 20) + pattern + bytes(1 << 20), "the disk does not hold what was written")
    check(fixed.read_bytes() == pattern, "a read-only disk was changed")


@case(300)
def network(folder):
    """DHCP, TCP to the host, checksums and segmentation over 8 MiB each way."""
    content = os.urandom(8 << 20)
    received = bytearray()
    # The first connection is for fetching the content, the second for sending it back.
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listener:
            with listener.accept()[0] as first:
                first.sendall(content)
            with listener.accept()[0] as second:
                while chunk := second.recv(65536):
                    received.extend(chunk)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    host = f"10.0.2.2 {listener.getsockname()[1]}"
    # udhcpc only asks; what it was given is set by hand, as its script would.
    command = (f"ip link set eth0 up; udhcpc -i eth0 -n -q -t 20 -s /bin/true; ip addr add 10.0.2.15/24 dev eth0; "
               f"nc {host} </dev/null >/f; md5sum /f; nc {host} </f; echo sent $?")
    with busybox(folder, "--net", "user", command=command) as m:
        m.expect(r"lease of 10\.0\.2\.15 obtained", 200)
        m.expect(hashlib.md5(content).hexdigest(), 120)
        m.expect(r"^sent 0\s", 120)
        m.powered_off(30)
    server.join(10)
    check(received == content, f"the host got {len(received)} bytes that are not those sent")


@case(300)
def reset(folder):
    """A reboot from inside starts the same machine anew, with its disk as it was left."""
    disk = folder / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    command = ("n=$(dd if=/dev/vda bs=1 count=1 2>/dev/null); echo round [$n]; if [ _$n = _A ]; then poweroff -f; fi; "
               "echo A | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; reboot -f")
    with busybox(folder, "--disk", f"path={disk}", command=command) as m:
        m.expect(r"^round \[\]\s", 200)
        m.expect(r"^round \[A\]\s", 200)
        m.powered_off(30)


@case(300)
def disk_full(folder):
    """The file system under a disk is full: the guest sees I/O errors, the machine lives."""
    small = folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], check=False, stderr=subprocess.PIPE)
    if mounted.returncode != 0:
        raise Skipped("a full file system needs the right to mount a tmpfs")
    try:
        with open(small / "disk.img", "wb") as disk:
            disk.truncate(32 << 20)
        command = ("dd if=/dev/urandom of=/dev/vda bs=64k count=256 conv=fsync; echo full $?; dmesg | grep vda; "
                   "dd if=/dev/vda of=/dev/null bs=64k count=16 2>/dev/null; echo read $?")
        with busybox(folder, "--disk", f"path={small}/disk.img", command=command) as m:
            m.expect(r"^full 1\s", 200)
            m.expect(r"error, dev vda, sector", 60)
            m.expect(r"^read 0\s", 60)
            m.powered_off(30)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@case(300)
def cpu_models(folder):
    """A smaller CPU model hides from the guest what the host has."""
    with busybox(folder, "--cpu-model", "x86-64-v2", command="grep -m 1 ^flags /proc/cpuinfo") as m:
        flags = m.expect(r"^flags\s*:(.*)\n", 200).group(1).split()
        m.powered_off(30)
    for flag in ("sse4_2", "popcnt", "cx16", "lm", "nx", "hypervisor"):
        check(flag in flags, f"x86-64-v2 lacks {flag}")
    for flag in ("avx", "avx2", "bmi2", "avx512f"):
        check(flag not in flags, f"x86-64-v2 shows {flag}")


@case(300)
def stats_of_a_boot(folder):
    """--stats: what the contract names is there and plausible; memory beyond the guest's RAM is bounded."""
    counting = ["--translate", "count=on"] if machine.ENGINE == "translate" else []
    with busybox(folder, *counting, command="true") as m:
        m.expect(r"^RF: command ends with status 0", 200)
        m.powered_off(30)
        wall = m.seconds()
        stats = m.stats()
    print(f"    | {stats}", flush=True)
    check(stats["guest_instructions"] > 100_000_000, "fewer guest instructions than any boot needs")
    check(0 < stats["seconds_to_first_user_instruction"] <= stats["wall_seconds"] <= wall + 0.5, "times do not fit")
    check(stats["exits"], "no exits counted")
    check(stats["peak_rss_beyond_ram_bytes"] <= 64 << 20,
          f"{stats['peak_rss_beyond_ram_bytes'] >> 20} MiB resident beyond guest RAM, 64 allowed")
