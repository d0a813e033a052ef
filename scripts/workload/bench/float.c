/* float N: N million steps of scalar double arithmetic: additions, multiplications, divisions, square roots. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    long n = (argc > 1 ? atol(argv[1]) : 1) * 1000000;
    double x = 0.5, sum = 0;
    for (long i = 1; i <= n; i++) {
        x = 3.9 * x * (1 - x);
        sum += x / (double)i;
        if ((i & 15) == 0)
            sum = __builtin_sqrt(sum * sum + x);
    }
    printf("%.17g %.17g\n", x, sum);
    return 0;
}
