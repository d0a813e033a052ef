import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Random;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicLong;
import java.util.function.LongUnaryOperator;

/** Programs whose output must be the same with the compilers of the Java machine and without (-Xint): Check ROUNDS. */
public class Check {
    static void expect(String what, Object got, Object wanted) {
        if (!got.equals(wanted)) {
            System.err.println(what + ": " + got + " instead of " + wanted);
            System.exit(1);
        }
    }

    static long vectors(Random r) {
        int[] a = new int[10000], b = new int[10000];
        double[] d = new double[10000];
        long sum = 0;
        for (int i = 0; i < a.length; i++) {
            a[i] = r.nextInt();
            d[i] = r.nextDouble();
        }
        for (int round = 0; round < 200; round++) {
            for (int i = 0; i < a.length; i++)
                b[i] = a[i] * 31 + (b[i] >>> 3) ^ round;
            for (int i = 0; i < d.length; i++)
                d[i] = d[i] * 0.75 + b[i] / 4e9;
        }
        for (int i = 0; i < b.length; i++)
            sum = sum * 31 + b[i] + Double.doubleToLongBits(d[i]);
        return sum;
    }

    static long objects(Random r) {
        HashMap<String, List<Integer>> map = new HashMap<>();
        for (int i = 0; i < 60000; i++) {
            map.computeIfAbsent("key " + r.nextInt(5000), k -> new ArrayList<>()).add(i);
            if (i % 1000 == 999)
                map.keySet().removeIf(k -> k.hashCode() % 7 == 0);
        }
        return map.entrySet().stream().mapToLong(e -> e.getKey().hashCode() * 31L + e.getValue().hashCode()).sum();
    }

    /* Implicit null checks and array bounds: the machine's own SIGSEGV handler and its traps. */
    static int exceptions() {
        int caught = 0;
        int[][] arrays = {new int[4], null, new int[8]};
        for (int i = 0; i < 20000; i++) {
            try {
                arrays[i % 3][i % 10]++;
            } catch (NullPointerException e) {
                caught += 3;
            } catch (ArrayIndexOutOfBoundsException e) {
                caught += 1;
            }
        }
        try {
            caught += down(0);
        } catch (StackOverflowError e) {
            caught += 100;
        }
        return caught;
    }

    static int down(int n) {
        return n < 0 ? n : down(n + 1) + 1;
    }

    static long lambdas() {
        LongUnaryOperator f = x -> x;
        for (int i = 0; i < 20; i++) {
            LongUnaryOperator g = f;
            int k = i;
            f = x -> g.applyAsLong(x * 3 + k) ^ k;
        }
        long s = 0;
        for (int i = 0; i < 20000; i++)
            s += f.applyAsLong(i);
        return s;
    }

    static long threads() throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        AtomicLong total = new AtomicLong();
        long[] guarded = {0};
        List<Future<Long>> results = new ArrayList<>();
        for (int t = 0; t < 8; t++) {
            int id = t;
            results.add(pool.submit((Callable<Long>) () -> {
                long own = 0;
                for (int i = 0; i < 5000; i++) {
                    own += id * i;
                    total.addAndGet(i);
                    synchronized (guarded) {
                        guarded[0] += i;
                    }
                }
                return own;
            }));
        }
        long sum = 0;
        for (Future<Long> r : results)
            sum += r.get();
        pool.shutdown();
        expect("atomic", total.get(), 8L * 5000 * 4999 / 2);
        expect("synchronized", guarded[0], 8L * 5000 * 4999 / 2);
        return sum;
    }

    static BigInteger numbers() {
        BigInteger p = BigInteger.ONE.shiftLeft(521).subtract(BigInteger.ONE), x = BigInteger.valueOf(3);
        for (int i = 0; i < 20; i++)
            x = x.multiply(x).add(BigInteger.valueOf(i)).mod(p);
        expect("Fermat", x.modPow(p.subtract(BigInteger.ONE), p), BigInteger.ONE);
        expect("inverse", x.modInverse(p).multiply(x).mod(p), BigInteger.ONE);
        return x;
    }

    public static void main(String[] args) throws Exception {
        int rounds = args.length > 0 ? Integer.parseInt(args[0]) : 1;
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        Random r = new Random(1);
        for (int i = 0; i < rounds; i++) {
            long[] sums = {vectors(r), objects(r), exceptions(), lambdas(), threads(), numbers().hashCode()};
            digest.update(Arrays.toString(sums).getBytes());
            digest.update(ByteBuffer.allocate(8).putLong(r.nextLong()).array());
            System.gc();
        }
        System.out.println(String.format("%064x", new BigInteger(1, digest.digest())));
    }
}
