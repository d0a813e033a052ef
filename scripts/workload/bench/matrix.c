/* matrix N: N products of 256 x 256 matrices of float; the compiler makes vector instructions (SSE2) of the inner loop. */
#include <stdio.h>
#include <stdlib.h>

#define SIZE 256

static float a[SIZE][SIZE], b[SIZE][SIZE], c[SIZE][SIZE];

int main(int argc, char **argv)
{
    int n = argc > 1 ? atoi(argv[1]) : 1;
    for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
            a[i][j] = (float)((i * 7 + j * 3) % 16) / 16;
            b[i][j] = (float)((i * 5 + j) % 32) / 32;
        }
    double sum = 0;
    for (int round = 0; round < n; round++) {
        for (int i = 0; i < SIZE; i++)
            for (int k = 0; k < SIZE; k++) {
                float f = a[i][k];
                for (int j = 0; j < SIZE; j++)
                    c[i][j] = (k ? c[i][j] : 0) + f * b[k][j];
            }
        /* Each round depends on the one before; values stay between 0 and 256. */
        a[round % SIZE][round / SIZE % SIZE] = c[0][round % SIZE] / SIZE;
        sum += c[round % SIZE][round * 7 % SIZE];
    }
    for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++)
            sum += c[i][j];
    printf("%.9g\n", sum);
    return 0;
}
