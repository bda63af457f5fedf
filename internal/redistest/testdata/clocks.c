/* Prints every clock the shim replaces, then the monotonic one, which it must
 * not touch; all in microseconds. With an argument it instead reads the clock
 * that many times from four threads, and prints how many readings were neither
 * of the two instants (seconds) that follow, give or take a minute. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long rounds, one, two, bad;

static long micros(clockid_t id) {
    struct timespec ts;
    clock_gettime(id, &ts);
    return ts.tv_sec * 1000000L + ts.tv_nsec / 1000;
}

static int near(long sec, long want) { return sec >= want - 60 && sec <= want + 60; }

static void *hammer(void *unused) {
    for (long i = 0; i < rounds; i++) {
        long sec = micros(CLOCK_REALTIME) / 1000000;
        if (!near(sec, one) && !near(sec, two)) __atomic_add_fetch(&bad, 1, __ATOMIC_RELAXED);
    }
    return unused;
}

int main(int argc, char **argv) {
    if (argc == 4) {
        rounds = atol(argv[1]), one = atol(argv[2]), two = atol(argv[3]);
        pthread_t t[4];
        for (int i = 0; i < 4; i++) pthread_create(&t[i], NULL, hammer, NULL);
        for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
        printf("%ld\n", bad);
        return 0;
    }
    struct timeval tv;
    gettimeofday(&tv, NULL);
    printf("%ld %ld %ld %ld %ld\n", tv.tv_sec * 1000000L + tv.tv_usec, micros(CLOCK_REALTIME),
           micros(CLOCK_REALTIME_COARSE), time(NULL) * 1000000L, micros(CLOCK_MONOTONIC));
    return 0;
}
