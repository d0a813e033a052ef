"""The KVM engine with hardware assistance, also where the host has none: in QEMU, whose TCG emulates AMD-V with nested paging.

Debian's cloud kernel with its own kvm_amd runs in QEMU, `ringfort run --engine kvm` in that, and the same kernel in that.

QEMU has one processor. Its emulated VMRUN leaves the vector of an injected interrupt marked as an exception to deliver, and
when anything but an interrupt of that processor makes it leave its loop just then, it delivers the vector a second time: to a handler
that has not swapped GS yet, and the second guest's kernel dies. Other processors' interrupts do that, dozens of times a second.
"""

import hashlib
import shutil
import time
from pathlib import Path

from cases import case
from machine import Machine, Skipped, check, ringfort, script

# What the second guest does: writes its disk, reads random numbers, works on both processors.
COMMAND = ("seq 1 100000 | dd of=/dev/vda bs=64k conv=notrunc,fsync 2>/dev/null; dd if=/dev/hwrng bs=64 count=2 2>/dev/null | wc -c; "
           "for i in 1 2; do taskset $i md5sum /bin/busybox & done; wait; "
           "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; grep -c processor /proc/cpuinfo")
# What the first one does; in a file, as there are quotes.
SCRIPT = f"""
if [ -x /bin/test_switch ]; then test_switch kvm interp; echo "switch: status $?"; fi
if [ -x /bin/test_dirty ]; then test_dirty kvm 4 1; echo "dirty: status $?"; fi
ringfort host | grep -E '  kvm|auto'
dd if=/dev/zero of=/disk bs=1M count=1 2>/dev/null
ringfort run --engine auto --cpus 2 --memory 128M --kernel /kernel --initrd /initrd --stats /stats \\
    --disk path=/disk --device virtio-rng --cmdline 'console=ttyS0 quiet rf.cmd="{COMMAND}"' </dev/null
echo "run: status $?"
cat /stats
md5sum /disk
"""
# A kernel that is saved while it writes, and goes on in another process.
TICKS = "n=0; while :; do n=$((n + 1)); dd if=/dev/urandom of=/a bs=64k count=16 2>/dev/null; cp /a /b; cmp /a /b && echo tick $n; done"
SNAPSHOT = f"""
mkdir -p /run /data
export XDG_DATA_HOME=/data XDG_RUNTIME_DIR=/run
ringfort run --detach --name first --engine kvm --memory 96M --kernel /kernel --initrd /initrd \\
    --cmdline 'console=ttyS0 quiet rf.cmd="{TICKS}"' </dev/null
until ringfort logs first | grep -q '^tick 2[^0-9]'; do ringfort ls | grep -q first || break; sleep 1; done
ringfort snapshot save first one -o json
ringfort stop --force first
ringfort snapshot restore one --name second --detach
until ringfort logs second | grep -q '^tick'; do ringfort ls | grep -q second || break; sleep 1; done
ringfort logs second | grep -m 1 '^tick' | sed 's/^/second: /'
ringfort info second -o json
ringfort stop --force second
echo "snapshot: done"
"""


def first_guest(folder, commands):
    """The guest of QEMU, which has ringfort, and runs these commands."""
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        raise Skipped("this needs the package qemu-system-x86")
    kernel = script("kernel", "cloud")
    (folder / "script").write_text(commands)
    program = ringfort()
    tests = [t for t in (Path(program).parent / "tests/cpu" / name for name in ("test_switch", "test_dirty")) if t.exists()]
    image = folder / "image.cpio"
    script("initramfs", "--kernel", "cloud-kvm", "--program", program, *(word for t in tests for word in ("--program", str(t))),
           "--add", f"kernel={kernel}/vmlinuz", "--add", f"initrd={script('initramfs', '--kernel', 'cloud')}",
           "--add", f"script={folder}/script", "--output", str(image))
    return Machine(folder, command=[qemu, "-accel", "tcg,thread=single", "-cpu", "max", "-machine", "q35", "-smp", "1", "-m", "512M",
                                  "-kernel", str(kernel / "vmlinuz"), "-initrd", str(image), "-nodefaults", "-no-user-config",
                                  "-display", "none", "-serial", "stdio", "-no-reboot",
                                  "-append", 'console=ttyS0 quiet mitigations=off rf.cmd="sh /script"'])


@case(900, kvm="only")
def nested(folder):
    """Engines that change in the middle of work, and a kernel's boot to power-off, by AMD-V at the speed of an emulator."""
    test = Path(ringfort()).parent / "tests/cpu/test_switch"
    numbers = "".join(f"{i}\n" for i in range(1, 100001)).encode()
    start = time.monotonic()
    with first_guest(folder, SCRIPT) as m:
        m.expect(r"^RF: command begins", 200)
        begun = time.monotonic()
        if test.exists():
            m.expect(r"^switch: status 0\s", 240)
            # Written pages, by the rings that this kernel has.
            m.expect(r"pages in \d+ rounds, by rings\s+dirty: status 0\s", 240)
        m.expect(r"auto takes kvm\b", 100)
        m.expect(r"^  kvm +yes .*natively", 30)
        switched = time.monotonic()
        m.expect(r"^128\s", 240)
        m.expect(r"^kvm-clock\s+2\s", 180)
        m.expect(r"^run: status 0\s", 100)
        m.expect(r'"engine": "kvm"', 10)
        # Notices to virtio devices reach the bus without an exit.
        exits, reads, writes = (int(n) for n in m.expect(
            r'"mmio": (\d+),(?s:.*)"mmio": \{\s*"reads": (\d+),\s*"writes": (\d+)', 10).groups())
        check(0 < exits < reads + writes, f"{exits} exits for {reads} reads and {writes} writes of devices' memory")
        m.expect(hashlib.md5(numbers + bytes((1 << 20) - len(numbers))).hexdigest(), 10)
        ended = time.monotonic()
        m.powered_off(30)
    print(f"    | first guest up in {begun - start:.1f} s, tests in {switched - begun:.1f} s, second guest's boot and work in "
          f"{ended - switched:.1f} s", flush=True)


@case(1800, kvm="only", wanted=True)
def nested_snapshot(folder):
    """A kernel under KVM is saved while it writes its memory, and restored."""
    with first_guest(folder, SNAPSHOT) as m:
        m.expect(r"^RF: command begins", 300)
        pause = float(m.expect(r'"pause_ms": ([0-9.]+)', 600).group(1))
        check(int(m.expect(r"^second: tick (\d+)\s", 300).group(1)) > 2, "the restored machine begins anew")
        m.expect(r'"engine": "kvm"', 60)
        m.expect(r"^snapshot: done", 60)
        m.powered_off(60)
    print(f"    | stood still for {pause:.1f} ms, as QEMU emulates it", flush=True)
