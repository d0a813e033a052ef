"""Kernels of a few bytes, written here: Multiboot entry and modules, isa-debug-exit, triple fault, reset."""

import re
import signal
import struct
import subprocess

import machine
from cases import case
from machine import Machine, check

LOAD = 0x100000

# Each is 32-bit code, entered with EAX = the Multiboot magic and EBX = the information structure.
EXIT_WITH = {
    # mov dx, 0x501; mov al, 0x21; out dx, al; hlt
    "value": b"\x66\xba\x01\x05\xb0\x21\xee\xf4",
    # cmp eax, 0x2badb002; setne al (0 when entered as specified); out
    "magic": b"\x3d\x02\xb0\xad\x2b\x0f\x95\xc0\x66\xba\x01\x05\xee\xf4",
    # mov eax, [ebx+20] (mods_count); out
    "modules": b"\x8b\x43\x14\x66\xba\x01\x05\xee\xf4",
    # mov ecx, [ebx+24] (mods_addr); mov ecx, [ecx+8] (2nd field of the 1st is its end, 3rd its string);
    # mov ecx, [ebx+24]; mov ecx, [ecx+16] (start of the second module); mov al, [ecx]; out
    "second module": b"\x8b\x4b\x18\x8b\x49\x10\x8a\x01\x66\xba\x01\x05\xee\xf4",
    # mov ecx, [ebx+16] (command line); the second of its last two letters: scan to the 0; mov al, [ecx-1]
    # l: cmp byte [ecx], 0; je d; inc ecx; jmp l; d: mov al, [ecx-1]; sub al, '0'; out
    "command line": b"\x8b\x4b\x10\x80\x39\x00\x74\x03\x41\xeb\xf8\x8a\x41\xff\x2c\x30\x66\xba\x01\x05\xee\xf4",
}
# lidt [esp] with a limit of 0 from two pushed zeroes; int3: no handler, no double fault handler.
TRIPLE_FAULT = b"\xbc\x00\x00\x20\x00\x6a\x00\x6a\x00\x0f\x01\x1c\x24\xcc\xf4"
# A reset through port 0xCF9; on the second start, a byte of memory would survive: nothing is asked of it.
# The clock's NVRAM byte 0x70 survives a reset: 0 at first, then 1: leave.
RESET_ONCE = (b"\xb0\x70\xe6\x70\xe4\x71\x84\xc0\x75\x0c"             # read it; jnz: leave
              b"\xb0\x01\xe6\x71\x66\xba\xf9\x0c\xb0\x06\xee\xf4"     # set it; out 0xcf9, 6; hlt
              b"\xb0\x05\x66\xba\x01\x05\xee\xf4")                    # leave with 5


def kernel(folder, code):
    """An ELF32 executable with a Multiboot header (specification 0.6.96 §3.1) in front of the code."""
    header = struct.pack("<III", 0x1badb002, 0x2, -(0x1badb002 + 0x2) & 0xffffffff)
    body = header + code
    at = 52 + 32
    size = at + len(body)
    head = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, 3, 1, LOAD + at + len(header), 52, 0, 0, 52, 32, 1, 0, 0, 0)
    program = struct.pack("<IIIIIIII", 1, 0, LOAD, LOAD, size, size, 7, 0x1000)
    path = folder / "kernel.elf"
    path.write_bytes(head + program + body)
    return path


def status_of(folder, code, *args):
    with Machine(folder, "--kernel", kernel(folder, code), "--device", "isa-debug-exit", *args, memory="64M") as m:
        return m.wait(30), m.errors


def exits(folder, code, value, *args):
    status, errors = status_of(folder, code, *args)
    check(status == value << 1 | 1, f"exit status {status} instead of {value << 1 | 1}: {errors}")


@case(120, parts=True, kvm="small")
def tiny_kernels(report, folder):
    first, second = folder / "first", folder / "second"
    first.write_bytes(b"\x11" * 100)
    second.write_bytes(b"\x2a" * 5000)
    modules = ("--initrd", first, "--initrd", second)

    report.part("tiny-debug-exit", exits, folder, EXIT_WITH["value"], 0x21)
    report.part("tiny-multiboot-entry", exits, folder, EXIT_WITH["magic"], 0)
    report.part("tiny-multiboot-no-modules", exits, folder, EXIT_WITH["modules"], 0)
    report.part("tiny-multiboot-modules", exits, folder, EXIT_WITH["modules"], 2, *modules)
    report.part("tiny-multiboot-module-content", exits, folder, EXIT_WITH["second module"], 0x2a, *modules)
    report.part("tiny-multiboot-command-line", exits, folder, EXIT_WITH["command line"], 7, "--cmdline", "a b number=7")
    report.part("tiny-reset", exits, folder, RESET_ONCE, 5)

    def crash():
        status, errors = status_of(folder, TRIPLE_FAULT, "--on-crash", "exit")
        check(status == 4, f"exit status {status} instead of 4 after a triple fault: {errors}")
        # A /dev/kvm that emulates guest kernels may not be able to go on to it.
        said = ("triple fault", "its engine cannot go on") if machine.ENGINE == "kvm" else ("triple fault",)
        check(any(f"the guest crashed ({s})" in errors for s in said), f"nothing is said about the triple fault: {errors!r}")

    report.part("tiny-triple-fault", crash)

    def crash_loop():
        """Resets do not help this guest, so they come to an end."""
        status, errors = status_of(folder, TRIPLE_FAULT, "--on-crash", "reset")
        check(status == 4, f"exit status {status} instead of 4 after five triple faults: {errors}")
        check(errors.count("resetting it") == 4, f"not four resets: {errors!r}")

    report.part("tiny-crash-loop", crash_loop)

    def no_progress():
        """A guest that halts for ever is ended by the second signal, not before, and not by itself."""
        with Machine(folder, "--kernel", kernel(folder, b"\xfa\xf4\xeb\xfd"), memory="64M") as m:
            try:
                m.process.wait(1)
            except subprocess.TimeoutExpired:
                pass
            else:
                raise machine.Failure(f"a halted guest ended with status {m.process.returncode}: {m.errors}")
            # Two kinds, because a signal that is still pending is not there twice.
            m.process.send_signal(signal.SIGTERM)
            m.process.send_signal(signal.SIGINT)
            status = m.wait(20)
            check(status == 1, f"exit status {status} instead of 1: {m.errors}")

    report.part("tiny-halted-for-ever", no_progress)

    def traces():
        """--trace-exec keeps the last instructions, in files of bounded size."""
        # mov ecx, 20000; l: dec ecx; jnz l; mov dx, 0x501; mov al, 3; out dx, al
        code = b"\xb9\x20\x4e\x00\x00\x49\x75\xfd\x66\xba\x01\x05\xb0\x03\xee\xf4"
        trace = folder / "trace.txt"
        status, errors = status_of(folder, code, "--trace-exec", f"{trace},size=64K,files=3")
        check(status == 7, f"exit status {status} instead of 7: {errors}")
        files = sorted(f.name for f in folder.glob("trace.txt*"))
        check(files == ["trace.txt", "trace.txt.1", "trace.txt.2"], f"there are {files}")
        for name in files[1:]:
            size = (folder / name).stat().st_size
            check(65536 <= size < 65536 + 4096, f"{name} has {size} bytes")
        lines = trace.read_text().splitlines()
        check(re.fullmatch(r"0 k [0-9a-f]{16}  out dx, al", lines[-1]), f"it ends with {lines[-3:]}")
        # What is in the files follows one after the other, without a line lost in between.
        both = (folder / "trace.txt.1").read_text() + trace.read_text()
        loop = re.findall(r"(?:dec|sub|jnz)\b", both)
        check(len(loop) > 1000 and all(a != b for a, b in zip(loop, loop[1:])), "lines are missing, or twice there")

        status, errors = status_of(folder, code, "--trace-exec", f"{folder}/once.txt,size=64K,files=1")
        check(status == 7, f"exit status {status} instead of 7: {errors}")
        size = (folder / "once.txt").stat().st_size
        check(size < 65536 + 4096 and "the trace ends" in errors, f"{size} bytes, and it says {errors!r}")
        check(not (folder / "once.txt.1").exists(), "files=1 made a second file")

    if machine.ENGINE != "kvm":
        report.part("tiny-trace", traces)
