"""Lock-step mode: every translation of a booting kernel against the interpreter."""

import subprocess

from cases import case
from machine import busybox, check

LOCKSTEP = ("--translate", "lockstep=on", "--log-level", "info")


def no_difference(m):
    check("differs from the interpreter" not in m.errors, f"a translation is wrong:\n{m.errors[-4000:]}")


@case(120)
def lockstep_begins(folder):
    """Half a minute of a boot: what is translated by then is right."""
    with busybox(folder, *LOCKSTEP, command="true", engine="translate") as m:
        m.expect(r"Linux version", 30)
        try:
            status = m.process.wait(30)
        except subprocess.TimeoutExpired:
            status = 0
        no_difference(m)
        check(status == 0, f"exit status {status}; ringfort said:\n{m.errors[-2000:]}")


@case(900, wanted=True)
def lockstep_boot(folder):
    """The whole boot, a command in it, and power-off."""
    with busybox(folder, *LOCKSTEP, command="ls -lR / | md5sum; gzip -c /bin/busybox | md5sum", engine="translate") as m:
        m.expect(r"^RF: command ends with status 0", 600)
        m.powered_off(60)
        no_difference(m)
        check("translations compared" in m.errors, f"nothing was compared:\n{m.errors[-2000:]}")
