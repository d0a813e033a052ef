#!/usr/bin/env python3
"""The command's surface: exit statuses, messages, help, and the configuration that --print-config shows.

Takes the program's path from $RINGFORT. No guest runs here: every run ends before or while the machine is made.
"""
import json
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import time
import unittest

RINGFORT = os.environ["RINGFORT"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
VERBS = ("run", "ls", "info", "console", "logs", "pause", "resume", "stop", "reset", "snapshot", "engine",
         "migrate", "receive", "top", "host", "version", "devtest")

SNAPSHOT_COMMANDS = ("save", "ls", "restore", "rm")


def ringfort(*args, cwd=None, stdout=subprocess.PIPE):
    return subprocess.run([RINGFORT, *args], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                          timeout=60, cwd=cwd, errors="replace")


class Surface(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="ringfort-cli-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def file(self, name, content=b""):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def refused(self, args, part, status=2):
        """The run ends with this status and says why in one line."""
        r = ringfort(*args, cwd=self.folder)
        self.assertEqual(r.returncode, status, f"{args}: {r.stderr}")
        self.assertEqual(r.stdout, "", args)
        self.assertRegex(r.stderr, r"\Aringfort: [^\n]*\n\Z", args)
        self.assertIn(part, r.stderr, args)

    def config(self, *args):
        r = ringfort("run", "--print-config", *args, cwd=self.folder)
        self.assertEqual((r.returncode, r.stderr), (0, ""), args)
        return r.stdout


class Usage(Surface):
    def test_verbs(self):
        self.refused([], "a verb is missing")
        self.refused(["rum"], "did you mean 'ringfort run'?")
        self.refused(["xyzzy"], "'ringfort --help' lists the verbs")
        self.refused(["--kernel", "x"], "did you mean 'ringfort run --kernel'?")

    def test_flags(self):
        for args, part in (
            (["--memroy", "1G"], "did you mean --memory?"),
            (["--memory"], "--memory needs a value: --memory SIZE"),
            (["--memory", "--cpus", "2"], "--memory needs a value"),
            (["-m", "1G"], "did you mean --memory?"),
            (["--append", "x"], "did you mean --cmdline?"),
            (["--smp", "2"], "did you mean --cpus?"),
            (["--xyzzy"], "'ringfort run --help'"),
            (["vmlinuz"], "did you mean --kernel 'vmlinuz'?"),
            (["--"], "'--'"),
            (["-"], "'-'"),
            ([""], "''"),
            (["--="], "'--='"),
            (["--print-config=yes"], "--print-config takes no value"),
            (["--cpus", "1", "--cpus", "2"], "--cpus: is given twice"),
            (["--config", "a", "--config", "b"], "--config: is given twice"),
            (["--config", ""], "--config: needs a value that is not empty"),
            ([], "--kernel is missing"),
        ):
            self.refused(["run", *args], part)
        self.refused(["version", "now"], "'now'")
        self.refused(["host", "-o"], "did you mean -o json?")
        self.refused(["host", "-o", "yaml"], "did you mean -o json?")
        self.refused(["host", "--outptu", "json"], "did you mean --output?")
        self.refused(["devtest", "--scoket", "x"], "did you mean --socket?")
        self.refused(["devtest", "--socket", ""], "--socket: needs a value that is not empty")
        self.refused(["logs", "x", "-n", "-5"], "did you mean --lines 1000?")
        self.refused(["top", "-n", "0"], "did you mean --count 1?")
        self.refused(["engine", "x", "translat"], "did you mean --engine translate?")

    def test_names(self):
        for name, meant in (("", "server1"), ("/", "server1"), ("-x", "x"), ("a/b", "a-b"), ("ä", "server1"), ("x" * 65, "x" * 64)):
            for args in (["run", "--kernel", "k", "--name", name], ["receive", name, "--listen", "unix:s"]):
                if args[0] == "run" or not name.startswith("-"):
                    self.refused(args, f"did you mean --name {meant}?")

    def test_snapshot(self):
        for args, part in (
            ([], "save, ls, restore or rm"),
            (["svae"], "did you mean 'ringfort snapshot save'?"),
            (["xyzzy"], "there are save, ls, restore and rm"),
            (["save", "a"], "ringfort snapshot save NAME SNAPSHOT"),
            (["save", "nothing-of-this-name", "s"], "nothing-of-this-name"),
            (["restore"], "SNAPSHOT"),
            (["restore", "nothing-of-this-name"], "'ringfort snapshot ls' shows"),
            (["restore", "../x"], "cannot be the name of a snapshot"),
            (["restore", "x", "--naem", "y"], "did you mean --name?"),
            (["rm", "nothing-of-this-name"], "'ringfort snapshot ls' shows"),
            (["save", "a", "b/c"], "'b/c' cannot be the name of a snapshot"),
        ):
            self.refused(["snapshot", *args], part)
        self.refused(["engine", "a"], "ringfort engine NAME ENGINE")

    def test_values(self):
        for args, part in (
            (["--memory", "512MB"], "did you mean --memory 512M?"),
            (["--memory", "99999T"], "did you mean --memory 1T?"),
            (["--memory", "1K"], "did you mean --memory 16M?"),
            (["--cpus", "1000"], "did you mean --cpus 64?"),
            (["--engine", "intrep"], "did you mean --engine interp?"),
            (["--cpu-model", "x86-64-v9"], "did you mean --cpu-model x86-64-v"),
            (["--disk", "a.img"], "did you mean path=a.img?"),
            (["--disk", "nbd://h/e,reconnect=9999"], "in 0...3600; did you mean reconnect=3600?"),
            (["--disk", "path=a.img,reconnect=3"], "'a.img' is on this host; tls and reconnect are for disks on an NBD server"),
            (["--disk", "path=a,readnoly=on"], "did you mean readonly?"),
            (["--net", "usr"], "did you mean --net user?"),
            (["--net", "user,hostfwd=2222:22"], "did you mean hostfwd=tcp:127.0.0.1:2222-:22?"),
            (["--device", "isa-debugexit"], "did you mean --device isa-debug-exit?"),
            (["--console", "stdoi"], "did you mean stdio?"),
            (["--on-crash", "exti"], "did you mean --on-crash exit?"),
            (["--translate", "tier=1,tier=2"], "tier takes one value"),
            (["--translate", "chain=on,chain=off"], "chain takes one value"),
            (["--translate", "tier"], "did you mean tier=...?"),
            (["--translate", "xyz=1"], "there are: tier, threshold,"),
        ):
            self.refused(["run", "--kernel", "k", *args], part)

    def test_addresses_and_folders(self):
        file = self.file("file")
        for args, part in (
            (["receive", "r"], "--listen is missing"),
            (["receive"], "ringfort receive NAME --listen ADDRESS"),
            (["receive", "r", "--listen", "x"], "tcp:HOST:PORT or unix:PATH"),
            (["receive", "r", "--listen", "unix:" + "x" * 108], "1 to 107 characters"),
            (["receive", "r", "--listen", "unix:s", "--disks", file], "Not a directory; give a folder"),
            (["receive", "r", "--listen", "unix:s", "--tls", "none"], "No such file or directory; give a folder"),
        ):
            self.refused(args, part)

    def test_two_users_of_one_resource(self):
        disk = self.file("d.img", bytes(512))
        os.symlink("d.img", self.folder / "same.img")
        os.link(disk, self.folder / "hard.img")
        for args, part in (
            (["--disk", f"path={disk}", "--disk", "path=d.img"], "did you mean path=d.img,readonly=on"),
            (["--disk", f"path={disk}", "--disk", "path=same.img,readonly=on"], "one of them writes"),
            (["--disk", f"path={disk}", "--disk", "path=hard.img"], "one of them writes"),
            (["--disk", f"path={disk}", "--console", "file:same.img"], "also used by --disk"),
            (["--disk", f"path={disk}", "--trace-exec", "hard.img"], "also used by --disk"),
            (["--config", self.file("vm.json", "{}"), "--stats", "vm.json"], "also used by --config"),
            (["--initrd", "d.img", "--trace-exec", "same.img"], "also used by --initrd"),
            (["--net", "user,hostfwd=tcp::2222-:22", "--net", "user,hostfwd=tcp:127.0.0.1:2222-:22"],
             "did you mean hostfwd=tcp:127.0.0.1:2223-:22?"),
            (["--device", "virtio-console,console=stdio"], "share the one terminal"),
            (["--device", "isa-debug-exit", "--device", "isa-debug-exit,iobase=0x501"], "iobase=0x501"),
        ):
            self.refused(["run", "--kernel", "k", *args], part)

    def test_standard_output_full(self):
        with open("/dev/full", "w") as full:
            for args in (["version"], ["run", "--help"], ["run", "--print-config"], ["host"], ["host", "-o", "json"]):
                r = ringfort(*args, stdout=full)
                self.assertEqual(r.returncode, 5, args)
                self.assertIn("No space left", r.stderr)


class Descriptors(Surface):
    """Who starts it may have closed any of the three standard descriptors: files do not get into their places."""

    def test_closed(self):
        disk, sock = self.file("d.img", bytes(4096)), self.folder / "s"
        for closed in ((0,), (1,), (2,), (0, 1, 2)):
            p = subprocess.Popen([RINGFORT, "devtest", "--socket", str(sock), "--disk", f"path={disk}"],
                                 preexec_fn=lambda: [os.close(fd) for fd in closed])
            try:
                with socket.socket(socket.AF_UNIX) as s:
                    end = time.monotonic() + 30
                    while s.connect_ex(str(sock)):
                        self.assertIsNone(p.poll())
                        self.assertLess(time.monotonic(), end)
                        time.sleep(0.01)
                    files = {int(f.name): os.readlink(f) for f in pathlib.Path(f"/proc/{p.pid}/fd").iterdir()}
                    self.assertIn(disk, files.values())
                    for fd in closed:
                        self.assertEqual(files[fd], "/dev/null", closed)
                    s.sendall(b"quit\n")
                    self.assertEqual(p.wait(30), 0)
            finally:
                p.kill()
                p.wait()

    def test_output_closed(self):
        r = subprocess.run(["sh", "-c", '"$0" version >&-', RINGFORT], stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(r.returncode, 5)
        self.assertRegex(r.stderr, r"\Aringfort: cannot write to standard output: [^\n]*\n\Z")


class Help(Surface):
    @staticmethod
    def flags(text):
        """The flags that a help text lists."""
        return set(re.findall(r"^[* ] (?:-\w, )?--([a-z-]+)", text, re.M))

    def test_each_verb(self):
        top = ringfort("--help")
        self.assertEqual((top.returncode, top.stderr), (0, ""))
        listed = re.findall(r"^  (\w+) ", top.stdout, re.M)
        self.assertEqual(sorted(listed), sorted(VERBS))
        for verb in VERBS:
            for flag in ("--help", "-h"):
                r = ringfort(verb, flag)
                self.assertEqual((r.returncode, r.stderr), (0, ""), verb)
                self.assertTrue(r.stdout.startswith(f"Usage: ringfort {verb}"), r.stdout)
                self.assertTrue("help" in self.flags(r.stdout) or verb == "snapshot", r.stdout)
                self.assertLessEqual(max(map(len, r.stdout.splitlines())), 100)

    def test_run_lists_what_it_takes(self):
        flags = self.flags(ringfort("run", "--help").stdout)
        contract = {"name", "config", "print-config", "kernel", "initrd", "cmdline", "cpus", "memory", "cpu-model",
                    "engine", "disk", "net", "device", "console", "stats", "on-crash", "help"}
        self.assertLessEqual(contract, flags)
        for flag in flags - {"help", "print-config", "detach"}:
            self.refused(["run", f"--{flag}"], f"--{flag} needs a value")

    def test_manual_page_agrees(self):
        page = (ROOT / "docs/ringfort.1").read_text().replace("\\-", "-").replace("\\&", "")
        # Font changes stand between the dashes of a flag and nothing else.
        page = re.sub(r"\\f[A-Z]|\\f\[[A-Z]*\]", "", page)
        described = set(re.findall(r"(?<![\w-])--([a-z][a-z-]*)", page))
        listed = set()
        for verb in VERBS:
            listed |= self.flags(ringfort(verb, "--help").stdout)
        for command in SNAPSHOT_COMMANDS:
            listed |= self.flags(ringfort("snapshot", command, "--help").stdout)
        self.assertEqual(described, listed)
        host = json.loads(ringfort("host", "-o", "json").stdout)
        switches = re.findall(r"^ {20,}([a-z]+)=\S+ .*\(default \S+\)$",
                              re.search(r"^  --translate .*?(?=^[* ] --)", ringfort("run", "--help").stdout, re.M | re.S)[0], re.M)
        self.assertGreater(len(switches), 8)
        for word in switches:
            self.assertRegex(page, rf"\n\.B[RI] {word}= ")
        for word in (*VERBS, *host["engines"], *(m["name"] for m in host["cpu"]["models"])):
            self.assertRegex(page, rf"(?<![\w-]){re.escape(word)}(?![\w-])")

    def test_defaults_in_help(self):
        """What --help calls the default is what --print-config shows."""
        text = ringfort("run", "--help").stdout
        effective = json.loads(self.config())
        for flag in ("cpus", "memory", "cpu-model", "engine", "console", "on-crash", "log-level"):
            entry = re.search(rf"^[* ] --{flag} (.*?)(?=^[* ] --|\Z)", text, re.M | re.S).group(1)
            self.assertIn(f"(default {effective[flag]})", entry)


class Version(Surface):
    def test_version(self):
        for args in (["version"], ["--version"]):
            r = ringfort(*args)
            self.assertEqual((r.returncode, r.stderr), (0, ""))
            self.assertRegex(r.stdout, r"\Aringfort \d+\.\d+\.\d+\n\Z")


class Host(Surface):
    def test_json(self):
        r = ringfort("host", "-o", "json")
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        host = json.loads(r.stdout)
        self.assertTrue(host["engines"]["interp"]["usable"])
        self.assertIn(host["auto"], host["engines"])
        for engine in host["engines"].values():
            self.assertTrue(engine["text"])
        models = {m["name"]: m for m in host["cpu"]["models"]}
        self.assertTrue(models["host"]["usable"])
        for model in models.values():
            self.assertTrue(model["usable"] or model["missing"])
        self.assertEqual(host["cpu"]["processors"], os.cpu_count())
        kvm = host["engines"]["kvm"]
        self.assertLessEqual(kvm["usable"], self.kvm_works())
        # auto goes by what was measured, not by what is there.
        self.assertLessEqual(kvm["fast"], kvm["usable"])
        best = "kvm" if kvm["fast"] else "translate" if host["engines"]["translate"]["usable"] else "interp"
        self.assertEqual(host["auto"], best)

    @staticmethod
    def kvm_works():
        import fcntl
        try:
            with open("/dev/kvm", "rb+", buffering=0) as kvm:
                os.close(fcntl.ioctl(kvm, 0xAE01, 0))   # KVM_CREATE_VM
            return True
        except OSError:
            return False

    def test_text(self):
        r = ringfort("host")
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        host = json.loads(ringfort("host", "-o", "json").stdout)
        for name in [*host["engines"], *host["facilities"], *(m["name"] for m in host["cpu"]["models"])]:
            self.assertRegex(r.stdout, rf"(?m)^  {re.escape(name)} +(yes|no) ")

    def test_models_and_engines_are_those_of_run(self):
        host = json.loads(ringfort("host", "-o", "json").stdout)
        text = ringfort("run", "--help").stdout
        for name in [*host["engines"], *(m["name"] for m in host["cpu"]["models"])]:
            self.assertRegex(text, rf"(?m)^  --(engine|cpu-model) .*\b{re.escape(name)}\b")
        for model in host["cpu"]["models"]:
            self.assertEqual(json.loads(self.config("--cpu-model", model["name"]))["cpu-model"], model["name"])
        for engine in [*host["engines"], "auto"]:
            self.assertEqual(json.loads(self.config("--engine", engine))["engine"], engine)


class Config(Surface):
    FLAGS = ["--name", "web", "--kernel", "k", "--initrd", "a", "--initrd", "b", "--cmdline", 'x="1 2" -- y',
             "--cpus", "2", "--memory=1G", "--cpu-model", "x86-64-v2", "--engine", "interp",
             "--disk", "path=d,,1.img,cache=none", "--disk", "path=e.img,readonly=on,serial=S",
             "--net", "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-:53", "--net", "tap,ifname=t0",
             "--device", "virtio-rng", "--device", "isa-debug-exit,iobase=0x502", "--device", "pc-testdev",
             "--device", "virtio-console,console=pty", "--console", "unix:c.sock", "--on-crash", "exit",
             "--stats", "s.json", "--log-level", "info"]

    def test_round_trip(self):
        for flags in ([], self.FLAGS):
            text = self.config(*flags)
            again = self.config("--config", self.file("vm.json", text))
            self.assertEqual(text, again)
        effective = json.loads(text)
        self.assertEqual(effective["disk"][0], {"path": "d,1.img", "readonly": False, "cache": "none"})
        self.assertEqual(effective["cmdline"], 'x="1 2" -- y')
        self.assertEqual(effective["memory"], "1G")

    def test_flags_override_the_file(self):
        path = self.file("vm.json", self.config(*self.FLAGS))
        for flags in (["--config", path, "--cpus", "3", "--disk", "path=only.img", "--net", "none"],
                      ["--cpus", "3", "--disk", "path=only.img", "--net", "none", f"--config={path}"]):
            effective = json.loads(self.config(*flags))
            self.assertEqual(effective["cpus"], 3)
            self.assertEqual([d["path"] for d in effective["disk"]], ["only.img"])
            self.assertEqual(effective["net"], [])
            self.assertEqual(effective["memory"], "1G")
            self.assertEqual(effective["initrd"], ["a", "b"])

    def test_bad_files(self):
        for text, part in (
            ("", "line 1"),
            ('{\n  "cpus": 1,\n  "memory": "1G",\n}\n', "vm.json: line 4"),
            ('{"cpus": 1, "cpus": 2}', "duplicate"),
            ('{"memry": "1G"}', "unknown key 'memry'; did you mean \"memory\"?"),
            ('{"cpus": 65}', '"cpus": 65 is not a number in 1...64; did you mean "cpus": "64"?'),
            ('{"disk": [{"pth": "x"}]}', "did you mean path?"),
            ('{"net": {"type": "user", "hostfwd": ["tcp::1-:1", "x"]}}', "hostfwd='x'"),
            ("[" * 5000, "vm.json"),
            (b"\xff\xfe{}", "vm.json"),
            (b"\x7fELF" + bytes(1000), "vm.json"),
        ):
            path = self.file("vm.json", text)
            self.refused(["run", "--config", path, "--kernel", "k"], part)
        self.refused(["run", "--config", "none.json"], "none.json: cannot read the configuration: No such file")
        self.refused(["run", "--config", "."], "is a directory")

    def test_no_permission(self):
        path = self.file("vm.json", "{}")
        os.chmod(path, 0)
        command = ["run", "--config", path]
        if os.geteuid() == 0:
            # Root reads everything, so be somebody else.
            os.chmod(self.folder, 0o755)
            r = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", RINGFORT, *command],
                               stderr=subprocess.PIPE, text=True, timeout=60)
            if "cannot execute" in r.stderr or r.returncode in (126, 127):
                self.skipTest("the program is in a folder that nobody else may enter")
        else:
            r = ringfort(*command)
        self.assertEqual(r.returncode, 3, r.stderr)
        self.assertIn("Permission denied", r.stderr)


class Machine(Surface):
    """What is found wrong when the machine is made; tests/boot has the many ways in which files can be bad."""

    def setUp(self):
        super().setUp()
        # Not a kernel, so that no run gets further than this.
        self.kernel = self.file("kernel", b"not a kernel" * 1000)

    def test_files(self):
        for args, part in (
            (["--kernel", "none"], "none"),
            (["--kernel", self.kernel], self.kernel),
            (["--kernel", self.kernel, "--disk", "path=none.img"], "none.img"),
            (["--kernel", self.kernel, "--stats", "none/s.json"], "none/s.json"),
            (["--kernel", self.kernel, "--stats", "s" * 300], "File name too long"),
            (["--kernel", self.kernel, "--disk", "path=http://host/disk.img"], "nbd://HOST/EXPORT"),
            (["--kernel", self.kernel, "--disk", "path=nbd+unix:///x?socket=none"], "No such file or directory"),
            (["--kernel", self.kernel, "--console", "file:none/log"], "none/log"),
        ):
            self.refused(["run", "--console", "none", *args] if "--console" not in args else ["run", *args], part)

    def test_what_the_host_lacks(self):
        for args, part in (
            (["--memory", "1023G"], "less memory than 1023G"),
            (["--net", "tap,ifname=nosuchtap0,mac=52:54:00:00:00:01"], "nosuchtap0"),
        ):
            if "tap" in args[1] and os.geteuid() == 0:
                continue                                # root makes the interface
            self.refused(["run", "--console", "none", "--kernel", self.kernel, *args], part, status=3)

    def test_no_kvm(self):
        """Where engine kvm is of no use, a run says so and why, as `host` does."""
        kvm = json.loads(ringfort("host", "-o", "json").stdout)["engines"]["kvm"]
        args = ["run", "--console", "none", "--kernel", self.kernel, "--engine", "kvm"]
        if kvm["usable"]:
            self.refused(args, self.kernel)
        else:
            self.refused(args, kvm["text"], status=3)

    def test_port_taken(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            port = s.getsockname()[1]
            self.refused(["run", "--console", "none", "--kernel", self.kernel,
                          "--net", f"user,hostfwd=tcp:127.0.0.1:{port}-:22"], str(port), status=3)


if __name__ == "__main__":
    unittest.main(verbosity=2)
