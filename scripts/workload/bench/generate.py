"""Prints a C program of as many functions as its argument says: always the same one, with arithmetic, loops, switches,
structures, tables and calls, for a compiler to work on."""

import random
import sys


def expression(r, depth, names):
    if depth == 0:
        return r.choice([*names, str(r.randrange(1, 1000))])
    a, b = expression(r, depth - 1, names), expression(r, r.randrange(depth), names)
    return r.choice([f"({a} + {b})", f"({a} * {b})", f"({a} ^ ({b} >> {r.randrange(1, 9)}))", f"({a} - {b})",
                     f"({a} < {b} ? {a} : {b})", f"({a} / ({b} | 1))", f"t{r.randrange(4)}[({a}) & 63]"])


def function(r, i):
    yield f"unsigned f{i}(struct s *p, unsigned x, unsigned n)\n{{"
    yield "    unsigned y = p->a, z = x;\n    for (unsigned i = 0; i < n; i++) {\n        switch ((x ^ i) & 7) {"
    for k in range(6):
        yield f"        case {k}:"
        yield f"            {r.choice('xyz')} {r.choice(['+', '^', '-', '|'])}= {expression(r, 3, ['x', 'y', 'z', 'i', 'p->b'])};"
        if i and r.random() < 0.4:
            yield f"            z += f{r.randrange(max(0, i - 20), i)}(p, y, n >> 1);"
        yield "            break;"
    yield f"        default:\n            p->c[i & 15] += {expression(r, 2, ['x', 'y', 'p->c[n & 15]'])};\n        }}\n    }}"
    yield f"    while (z > {r.randrange(100, 9999)})\n        z = z / 3 + (p->d->b & 15);"
    yield f"    p->b = (unsigned short)({expression(r, 2, ['y', 'z'])});\n    return {expression(r, 3, ['x', 'y', 'z'])};\n}}\n"


def main():
    r = random.Random(1)
    print("struct s { unsigned a; unsigned short b; unsigned c[16]; struct s *d; };")
    for t in range(4):
        print(f"static const unsigned t{t}[64] = {{ {', '.join(str(r.randrange(1 << 32)) + 'u' for _ in range(64))} }};")
    for i in range(int(sys.argv[1])):
        print("\n".join(function(r, i)))


main()
