/* fib N: calls and returns, by the recursive definition. */
#include <stdio.h>
#include <stdlib.h>

static __attribute__((noinline)) unsigned long fib(unsigned n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

int main(int argc, char **argv)
{
    printf("%lu\n", fib(argc > 1 ? (unsigned)atoi(argv[1]) : 30));
    return 0;
}
