/*
 * Gives one redis-server a wall clock that a test can step and freeze.
 *
 * Loaded by LD_PRELOAD, it replaces gettimeofday(), time() and, for
 * CLOCK_REALTIME and CLOCK_REALTIME_COARSE only, clock_gettime(). All other
 * clocks pass through: timeouts inside Redis that use the monotonic clock go on
 * as always.
 *
 * No malloc, no stdio, no dlsym: jemalloc reads the clock while it starts, and
 * a shim that allocates (or asks the loader, which allocates) calls itself
 * without end. Everything below is a raw system call.
 *
 * The control file, named by RINGFENCE_CLOCK, is mapped shared, 16 bytes:
 *
 *   word 0  the setting, written by the test:
 *             even: real time + (word >> 1) microseconds
 *             odd:  frozen at   (word >> 1) microseconds since 1970
 *   word 1  written here once the file is mapped, so that the test can tell a
 *           shim that works from one that the loader ignored
 *
 * Mode and value share one aligned word, so that one atomic load reads both:
 * no lock is needed, and no reader ever sees the mode of one setting with the
 * value of another. 63 bits of microseconds are 146,000 years each way.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(long) == 8, "the clock shim needs a 64-bit system");

#define FILE_BYTES 16
#define ATTACHED INT64_C(0x72696e6766656e63) /* "ringfenc" */
#define NO_FILE ((int64_t *)-1)

static int64_t *control; /* NULL: not tried yet; NO_FILE: run on real time */

static int64_t *open_control(void) {
    const char *path = getenv("RINGFENCE_CLOCK");
    if (path == NULL) return NO_FILE;
    long fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return NO_FILE;
    long at = syscall(SYS_mmap, NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (at == -1) return NO_FILE;
    int64_t *words = (int64_t *)at;
    __atomic_store_n(&words[1], ATTACHED, __ATOMIC_RELEASE);
    return words;
}

static int64_t *get_control(void) {
    int64_t *now = __atomic_load_n(&control, __ATOMIC_ACQUIRE);
    if (now != NULL) return now;
    int64_t *mine = open_control(), *theirs = NULL;
    if (__atomic_compare_exchange_n(&control, &theirs, mine, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return mine;
    if (mine != NO_FILE) syscall(SYS_munmap, mine, FILE_BYTES); /* another thread was first */
    return theirs;
}

static void set_micros(struct timespec *ts, int64_t us, long extra_ns) {
    int64_t sec = us / 1000000, rest = us % 1000000;
    if (rest < 0) {
        rest += 1000000;
        sec -= 1;
    }
    ts->tv_sec = sec;
    ts->tv_nsec = rest * 1000 + extra_ns;
}

/* Turns a reading of the real wall clock into the one to show. */
static void adjust(struct timespec *ts) {
    int64_t *words = get_control();
    if (words == NO_FILE) return;
    int64_t word = __atomic_load_n(&words[0], __ATOMIC_ACQUIRE);
    int64_t value = word >> 1;
    if (word & 1) {
        set_micros(ts, value, 0);
    } else if (value != 0) {
        int64_t real_us = (int64_t)ts->tv_sec * 1000000 + ts->tv_nsec / 1000;
        set_micros(ts, real_us + value, ts->tv_nsec % 1000);
    }
}

int clock_gettime(clockid_t id, struct timespec *ts) {
    long rc = syscall(SYS_clock_gettime, id, ts);
    if (rc == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) adjust(ts);
    return (int)rc;
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone) {
    (void)zone; /* obsolete, and Redis passes NULL */
    struct timespec ts;
    if (clock_gettime(CLOCK_REALTIME, &ts) != 0) return -1;
    tv->tv_sec = ts.tv_sec;
    tv->tv_usec = ts.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec ts;
    if (clock_gettime(CLOCK_REALTIME, &ts) != 0) return (time_t)-1;
    if (out != NULL) *out = ts.tv_sec;
    return ts.tv_sec;
}
