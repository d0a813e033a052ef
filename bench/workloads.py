"""What bench/vs-qemu measures. Each workload does a fixed amount of work and prints what depends on its result."""

from dataclasses import dataclass

COMPUTE, VECTOR, SYSTEM = "compute", "vector", "system"


@dataclass
class Workload:
    name: str
    kind: str           # COMPUTE: user-mode integer code; VECTOR: vector, floating point and crypto code; SYSTEM: the kernel
    command: str        # of the shell in the guest; {n} is the amount of work
    full: int
    quick: int
    warm: str = "true"  # run untimed before: gets into the page cache what the command reads


REDIS = ("cd /tmp; redis-server --port 16379 --save \"\" --appendonly no --daemonize no >/tmp/redis.log & "
         "until redis-cli -p 16379 ping >/dev/null 2>&1; do sleep 0.02; done; "
         "redis-benchmark -p 16379 -n {n} -c 20 -P 4 -r 10000 -d 100 -t set,get,lpush -q >/tmp/redis.out || exit 1; "
         "redis-cli -p 16379 llen mylist; redis-cli -p 16379 shutdown nosave; wait")

ALL = [
    Workload("gcc", COMPUTE, "gcc -O2 -c -o /tmp/p.o /workload/program-{n}.c && md5sum </tmp/p.o", 60, 20,
             "gcc -O2 -x c -c -o /tmp/e.o /dev/null"),
    Workload("python", COMPUTE, "python3 -S -E /workload/src/loop.py {n}", 3000000, 600000, "python3 -S -E -c 1"),
    Workload("sqlite", COMPUTE, "rm -f /tmp/t.db; sqlite3 -cmd '.param set :n {n}' /tmp/t.db </workload/src/load.sql", 300000, 60000, "sqlite3 :memory: 'select 1'"),
    Workload("7z-compress", COMPUTE, "head -c {n} /workload/mixed | 7z a -bd -txz -si -so -mx=3 -mmt=off x | md5sum", 6000000, 1500000,
             "cat /workload/mixed >/dev/null; 7z i"),
    Workload("7z-decompress", COMPUTE, "for i in $(seq {n}); do 7z x -bd -txz -si -so </workload/mixed.xz | md5sum; done", 4, 1,
             "cat /workload/mixed.xz >/dev/null; 7z i"),
    Workload("gzip", COMPUTE, "for i in $(seq {n}); do gzip -6 -n </workload/mixed | md5sum; done", 2, 1, "cat /workload/mixed | head -c 1000 | gzip"),
    Workload("fib", COMPUTE, "/workload/fib {n}", 40, 36),
    Workload("float", VECTOR, "/workload/float {n}", 150, 30),
    Workload("matrix", VECTOR, "/workload/matrix {n}", 400, 80),
    Workload("sha256", VECTOR, "/workload/crypto sha256 {n}", 60000, 12000, "/workload/crypto sha256 1"),
    Workload("rsa2048", VECTOR, "/workload/crypto rsa2048 {n}", 1200, 240, "/workload/crypto rsa2048 1"),
    Workload("aes-gcm", VECTOR, "/workload/crypto aes-gcm {n}", 120000, 24000, "/workload/crypto aes-gcm 1"),
    Workload("redis", SYSTEM, REDIS, 60000, 12000, "redis-server --version; redis-benchmark --help"),
    Workload("fork-exec", SYSTEM, "/workload/forkexec {n}", 500, 150, "/workload/forkexec 1"),
    Workload("syscalls", SYSTEM, "dd if=/dev/zero of=/dev/null bs=512 count={n} 2>/dev/null; echo $?", 1500000, 300000),
    Workload("switches", SYSTEM, "/workload/pingpong {n}", 100000, 20000),
    Workload("faults", SYSTEM, "/workload/faults {n}", 400, 80),
]

# Measured while the machines start; the host has nothing to compare them with.
KERNEL_BOOT = "kernel-boot"
SERVER_BOOT = "server-boot"
