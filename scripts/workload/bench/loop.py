"""loop.py N: N rounds of what Python programs do all day: integers, a dictionary, a function call."""

import sys


def mix(a, i):
    return (a * 31 + i) % 1000003


def main():
    counts = {}
    a = 1
    for i in range(int(sys.argv[1])):
        a = mix(a, i)
        counts[a % 5003] = counts.get(a % 4999, 0) + 1
    print(a, sum(counts.values()), len(counts))


main()
