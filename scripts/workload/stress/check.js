// Programs whose results are known, for a JavaScript engine that compiles while it runs: node check.js [ROUNDS].
// Prints a digest of everything; exits with status 1 at the first result that is wrong.
'use strict';
const crypto = require('crypto');
const { execFileSync } = require('child_process');
const rounds = Number(process.argv[2] || 1);
const digest = crypto.createHash('sha256');
function expect(what, got, wanted) {
    if (got !== wanted) {
        console.error(`${what}: ${got} instead of ${wanted}`);
        process.exit(1);
    }
    digest.update(`${what} ${got}\n`);
}
let seed = 12345;
function random() {
    seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff;
    return seed;
}

// SHA-256 written out, against the library's.
const K = (() => {
    const k = [];
    for (let n = 2; k.length < 64; n++) {
        let prime = true;
        for (let d = 2; d * d <= n; d++)
            if (n % d === 0) { prime = false; break; }
        if (prime) { const r = Math.cbrt(n); k.push(Math.floor((r - Math.floor(r)) * 4294967296) | 0); }
    }
    return k;
})();
function sha256(bytes) {
    const h = [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19].map(x => x | 0);
    const blocks = (bytes.length + 9 + 63) >> 6, padded = new Uint8Array(blocks * 64), view = new DataView(padded.buffer);
    padded.set(bytes);
    padded[bytes.length] = 0x80;
    view.setUint32(padded.length - 4, bytes.length * 8);
    const w = new Int32Array(64), rotate = (x, n) => (x >>> n) | (x << (32 - n));
    for (let b = 0; b < blocks; b++) {
        for (let i = 0; i < 16; i++) w[i] = view.getInt32(b * 64 + i * 4);
        for (let i = 16; i < 64; i++) {
            const s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >>> 3);
            const s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >>> 10);
            w[i] = (w[i - 16] + s0 + w[i - 7] + s1) | 0;
        }
        let [a, c, d, e, f, g, p, q] = h;
        for (let i = 0; i < 64; i++) {
            const t1 = (q + (rotate(f, 6) ^ rotate(f, 11) ^ rotate(f, 25)) + ((f & g) ^ (~f & p)) + K[i] + w[i]) | 0;
            const t2 = ((rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & c) ^ (a & d) ^ (c & d))) | 0;
            q = p; p = g; g = f; f = (e + t1) | 0; e = d; d = c; c = a; a = (t1 + t2) | 0;
        }
        [a, c, d, e, f, g, p, q].forEach((x, i) => { h[i] = (h[i] + x) | 0; });
    }
    return h.map(x => (x >>> 0).toString(16).padStart(8, '0')).join('');
}

function hashes() {
    for (let n = 0; n < 60; n++) {
        const bytes = Uint8Array.from({ length: n * 37 }, () => random() >> 8);
        expect('sha256', sha256(bytes), crypto.createHash('sha256').update(bytes).digest('hex'));
    }
}

// Functions made at run time, so that there is always new code, and old code is thrown away.
function generated() {
    let sum = 0;
    for (let n = 0; n < 300; n++) {
        const a = random() % 1000, b = random() % 1000 + 1;
        const f = new Function('x', `let s = 0; for (let i = 0; i < x; i++) s = (s * ${b} + ${a} + i) % 1000003; return s;`);
        let s = 0;
        for (let i = 0; i < 200 + n; i++) s = (s * b + a + i) % 1000003;
        expect('generated', f(200 + n), s);
        sum += s;
    }
    return sum;
}

// A function whose arguments change their types after it was compiled for the first ones.
function types() {
    const add = (x, y) => x + y;
    let n = 0;
    for (let i = 0; i < 20000; i++) n = add(n, i) | 0;
    expect('small integers', n, 199990000);
    let f = 0;
    for (let i = 0; i < 20000; i++) f = add(f, 0.5);
    expect('doubles', f, 10000);
    let t = '';
    for (let i = 0; i < 5000; i++) t = add(t, i % 10);
    expect('strings', t.length, 5000);
    let big = 1n;
    for (let i = 1; i <= 300; i++) big = big * BigInt(i);
    for (let i = 300; i >= 1; i--) {
        expect('remainder', big % BigInt(i), 0n);
        big = big / BigInt(i);
    }
    expect('big integers', big, 1n);
    class A { get() { return 1; } } class B { get() { return 2; } } class C extends A { get() { return super.get() + 3; } }
    const objects = [new A(), new B(), new C(), { get: () => 7, x: 1 }, { y: 1, get() { return this.y + 8; } }];
    let s = 0;
    for (let i = 0; i < 100000; i++) s += objects[(i < 50000 ? 0 : i) % 5].get();
    expect('call sites', s, 50000 + 10000 * (1 + 2 + 4 + 7 + 9));
}

function memory() {
    const map = new Map(), tree = [];
    for (let i = 0; i < 60000; i++) {
        map.set(`key ${i}`, { i, a: [i, i + 1], s: 'x'.repeat(i % 50) });
        if (i % 3 === 0) map.delete(`key ${i / 3}`);
        tree.push(random());
    }
    const sorted = Float64Array.from(tree).sort(), other = [...tree].sort((a, b) => a - b);
    for (let i = 0; i < tree.length; i++)
        if (sorted[i] !== other[i]) expect('sort', other[i], sorted[i]);
    let sum = 0;
    for (const [k, v] of map) sum += v.i + v.a[1] + v.s.length + k.length;
    const again = JSON.parse(JSON.stringify([...map]));
    for (const [k, v] of again) sum -= v.i + v.a[1] + v.s.length + k.length;
    expect('memory', sum, 0);
}

function exceptions() {
    let caught = 0;
    function deep(n) { return n === 0 ? (() => { throw new RangeError('bottom'); })() : deep(n - 1) + 1; }
    for (let i = 0; i < 2000; i++) {
        try { deep(i % 60); } catch (e) { if (e instanceof RangeError && e.message === 'bottom') caught++; }
    }
    expect('exceptions', caught, 2000);
    let overflow = 0;
    (function down() { overflow++; try { down(); } catch { return; } })();
    expect('stack overflow', overflow > 1000, true);
    function* numbers(n) { for (let i = 0; i < n; i++) yield i * i; }
    let s = 0;
    for (const x of numbers(20000)) s += x % 7;
    let direct = 0;
    for (let i = 0; i < 20000; i++) direct += i * i % 7;
    expect('generators', s, direct);
    const text = 'the quick brown fox 123 jumps 45.6 over '.repeat(300);
    expect('regular expressions', [...text.matchAll(/(\d+)(\.\d+)?/g)].reduce((a, m) => a + Number(m[0]), 0).toFixed(1), '50580.0');
}

// (func (export "f") (param i32) (result i32)): the sum of i * i for i below the parameter, modulo 2^32.
const WASM = Uint8Array.from([0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0, 10, 40, 1, 38,
    1, 2, 127, 2, 64, 3, 64, 32, 1, 32, 0, 78, 13, 1, 32, 2, 32, 1, 32, 1, 108, 106, 33, 2, 32, 1, 65, 1, 106, 33, 1, 12, 0, 11, 11,
    32, 2, 11]);
function wasm() {
    const { f } = new WebAssembly.Instance(new WebAssembly.Module(WASM)).exports;
    let s = 0;
    for (let i = 0; i < 100000; i++) s = (s + Math.imul(i, i)) | 0;
    for (let i = 0; i < 20; i++) expect('wasm', f(100000), s);
}

for (let r = 0; r < rounds; r++) {
    for (const part of [hashes, generated, types, memory, exceptions, wasm]) part();
    expect('child', execFileSync('/bin/echo', [`round ${r}`]).toString(), `round ${r}\n`);
}
console.log(digest.digest('hex'));
