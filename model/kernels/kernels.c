/* GPT-2 on a CPU: linear layers, attention over a paged cache, layer norm, embedding. Plain C, loaded through ctypes.
 *
 * The promise: a row's result is the same bits whatever rows are beside it, however they are chunked, whatever the number
 * of threads. Each output element is one chain of multiply-adds in a fixed order; threads share out elements, never sums.
 *
 * ops.h is compiled once for each instruction set (level 0: 128-bit vectors of any machine, 1: AVX2, 2: AVX-512, 3: AVX-512
 * with VNNI) and the caller picks one that `kernels_best_level` allows. Levels differ from each other in the last bits.
 *
 * Packed weights. A panel holds `panel` = two vectors of neighbouring outputs; the last one is padded with zeros.
 *   fp32  (panels, in, panel)
 *   fp16  (panels, in, panel), fp16; arithmetic stays fp32
 *   int8  (panels, groups of KB inputs, [panel int32 sums of weights | (inputs / 4, panel, 4) int8]); inputs are padded to
 *         fours. Weight = scale[output] * int8. Activations are quantised row by row, group by group, to unsigned integers
 *         with a zero point, so y = scale[output] * sum over groups of scale[row, group] * (sum q w - zero * sum w).
 * Packed x: (tiles, groups of KB inputs, rows of the tile, KB), so that one pointer and constant offsets reach a tile.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#include <arm_neon.h>
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* === Threads ===
 * Our own, because two OpenMP pools (PyTorch's and ours) spin against each other.
 *
 * A job is a number of items that threads take one by one. The caller takes items too, and when there are none left it
 * shuts the gate and waits for those inside: never for a thread that has not come in. So a helper that the system does
 * not run just now costs nothing, and on a busy machine a step is never slower than on one thread by more than two items: a
 * linear layer takes the next one early, to fetch its weights. */

enum { MAX_THREADS = 256, SPINS = 4000, SPINS_AT_GATE = 20000 };
#define GATE_JOB (1ull << 32)  /* the gate's high half numbers the job, */
#define GATE_SHUT (1ull << 31) /* a bit says that it is over, and the rest counts the helpers inside */
#define GATE_INSIDE (GATE_SHUT - 1)

static struct {
    pthread_mutex_t caller; /* held through a whole call: one at a time */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int threads; /* counting the caller */
    pthread_t helpers[MAX_THREADS];
    void (*job)(void *); /* NULL: leave */
    void *argument;
    atomic_int numbered; /* helpers that have a number, and the caller */
    _Alignas(64) atomic_ullong gate;
    _Alignas(64) atomic_int asleep;
    _Alignas(64) atomic_llong item;
} pool = {
    .caller = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .threads = 1,
    .gate = GATE_SHUT,
};

static _Thread_local int thread_number; /* 0 for whoever calls, then each helper's own */

static int pool_threads(void) { return pool.threads; }

static int64_t next_item(void) { return atomic_fetch_add_explicit(&pool.item, 1, memory_order_relaxed); }

static unsigned current_job(void) { return (unsigned)(atomic_load(&pool.gate) / GATE_JOB); }

/* Come in, unless the job is over. Whoever is inside may read pool.job: it stays until they are out. */
static int enter(unsigned job)
{
    unsigned long long gate = atomic_load(&pool.gate);
    do {
        if (gate / GATE_JOB != job || gate & GATE_SHUT)
            return 0;
    } while (!atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1));
    return 1;
}

static unsigned wait_for_job(unsigned seen)
{
    for (int i = 0; i < SPINS && current_job() == seen; i++)
        PAUSE();
    if (current_job() == seen) {
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.asleep, 1);
        while (current_job() == seen)
            pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.asleep, 1);
        pthread_mutex_unlock(&pool.lock);
    }
    return current_job();
}

static void *helper(void *argument)
{
    thread_number = atomic_fetch_add(&pool.numbered, 1);
    for (unsigned job = (unsigned)(uintptr_t)argument;;) {
        job = wait_for_job(job);
        if (!enter(job))
            continue;
        int leave = !pool.job;
        if (!leave)
            pool.job(pool.argument);
        atomic_fetch_sub(&pool.gate, 1);
        if (leave)
            return NULL;
    }
}

/* Open the gate to a job. It is shut and nobody is inside. */
static void post(void (*job)(void *), void *argument)
{
    pool.job = job;
    pool.argument = argument;
    atomic_store(&pool.item, 0);
    atomic_store(&pool.gate, (unsigned long long)(current_job() + 1u) * GATE_JOB);
    if (atomic_load(&pool.asleep) > 0) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* Called with pool.caller held. items: as many as the job has; a single one is not worth waking anybody. */
static void run(void (*job)(void *), void *argument, int64_t items)
{
    if (pool.threads == 1 || items < 2) {
        atomic_store(&pool.item, 0);
        job(argument);
        return;
    }
    post(job, argument);
    job(argument);
    atomic_fetch_or(&pool.gate, GATE_SHUT);
    for (int spins = 0; atomic_load_explicit(&pool.gate, memory_order_acquire) & GATE_INSIDE; spins++) {
        if (spins < SPINS_AT_GATE)
            PAUSE();
        else
            sched_yield();
    }
}

enum { SCRATCH_KEPT = 32 << 20, SCRATCH_CALLS = 256 };

static struct {
    void *memory;
    size_t size;
    int calls; /* in a row that needed little of it */
} scratch_memory;

/* In a forked child: it has no helpers, and whoever held a lock, was inside the gate or moved the scratch memory is not there
 * to go on. */
static void start_over(void)
{
    scratch_memory.memory = NULL; /* it may have been freed a moment before */
    scratch_memory.size = 0;
    pool.caller = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.threads = 1;
    atomic_store(&pool.asleep, 0);
    atomic_store(&pool.gate, GATE_SHUT);
}

/* Use `threads` threads, the caller's among them; returns how many there are. */
int kernels_set_threads(int threads)
{
    static int registered;
    pthread_mutex_lock(&pool.caller);
    if (!registered++)
        pthread_atfork(NULL, NULL, start_over);
    if (pool.threads > 1)
        post(NULL, NULL);
    for (int i = 1; i < pool.threads; i++)
        pthread_join(pool.helpers[i], NULL);
    atomic_fetch_or(&pool.gate, GATE_SHUT);
    void *seen = (void *)(uintptr_t)current_job();
    pool.threads = 1;
    atomic_store(&pool.numbered, 1);
    while (pool.threads < MIN(threads, MAX_THREADS) && !pthread_create(&pool.helpers[pool.threads], NULL, helper, seen))
        pool.threads++;
    int started = pool.threads;
    pthread_mutex_unlock(&pool.caller);
    return started;
}

/* Called with pool.caller held. What grew for one large batch is given back once so many calls in a row have needed less
 * than a quarter of it. */
static void *scratch(size_t bytes)
{
    const size_t size = scratch_memory.size;
    scratch_memory.calls = size > SCRATCH_KEPT && bytes < size / 4 ? scratch_memory.calls + 1 : 0;
    if (bytes > size || scratch_memory.calls == SCRATCH_CALLS) {
        free(scratch_memory.memory);
        scratch_memory.calls = 0;
        scratch_memory.size = ROUND_UP(bytes, 1 << 21);
        scratch_memory.memory = aligned_alloc(1 << 21, scratch_memory.size); /* whole huge pages */
        if (!scratch_memory.memory)
            abort();
#ifdef MADV_HUGEPAGE
        madvise(scratch_memory.memory, scratch_memory.size, MADV_HUGEPAGE);
#endif
    }
    return scratch_memory.memory;
}

/* Bytes of one packed panel. */
static size_t panel_bytes(const struct linear *w, size_t panel)
{
    switch (w->kind) {
    case KIND_F32: return w->in * panel * 4;
    case KIND_F16: return w->in * panel * 2;
    default: return ROUND_UP(w->in, 4) * panel + DIV_UP(w->in, KB) * panel * 4;
    }
}

#include "adjusting.h"

#if defined(__x86_64__)
/* For each set of 8 lanes, their numbers in rising order, a byte each. */
static uint64_t squeeze_orders[256];

__attribute__((constructor)) static void fill_squeeze_orders(void)
{
    for (int set = 0; set < 256; set++)
        for (int lane = 0, place = 0; lane < 8; lane++)
            if (set >> lane & 1)
                squeeze_orders[set] |= (uint64_t)lane << 8 * place++;
}
#endif

/* === One copy of ops.h for each instruction set === */

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed to inlined functions alone */

#define LEVEL_NAME_0 "portable"
#define LEVEL_NAME_1 "AVX2"
#define LEVEL_NAME_2 "AVX-512"
#define LEVEL_NAME_3 "AVX-512 VNNI"

#define LEVEL 0
#include "ops.h"
#undef LEVEL

#if defined(__x86_64__)
#ifdef __clang__
#define TARGET_BEGIN(isa) _Pragma(STRING(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(isa) _Pragma("GCC push_options") _Pragma(STRING(GCC target(isa)))
#define TARGET_END _Pragma("GCC pop_options")
#endif
#define STRING(text) STRING_(text)
#define STRING_(text) #text

TARGET_BEGIN("avx2,fma,f16c")
#define LEVEL 1
#include "ops.h"
#undef LEVEL
TARGET_END

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define LEVEL 2
#include "ops.h"
#undef LEVEL
TARGET_END

TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define LEVEL 3
#include "ops.h"
#undef LEVEL
TARGET_END

static const struct level *const levels[] = {&level_0, &level_1, &level_2, &level_3};

/* Older compilers' __builtin_cpu_supports does not know f16c. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

int kernels_best_level(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
        return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return 1;
    return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
}
#else
static const struct level *const levels[] = {&level_0};

int kernels_best_level(void) { return 0; }
#endif

/* === Entry points === */

int kernels_abi(void) { return ABI; }

const char *kernels_level_name(int level) { return levels[level]->name; }

size_t kernels_panels_bytes(int level, const struct linear *w)
{
    const int64_t panel = levels[level]->panel;
    return DIV_UP(w->out, panel) * panel_bytes(w, panel);
}

/* Cut each sequence's rows into tiles of `height` rows at most, for attention. */
static void cut(struct batch *batch, int height)
{
    int32_t *tile = batch->tiles;
    for (int32_t s = 0; s < batch->sequences; s++)
        for (int32_t row = batch->query_starts[s], end = batch->query_starts[s + 1]; row < end; row += height, tile += 3) {
            tile[0] = row;
            tile[1] = MIN(height, end - row);
            tile[2] = s;
        }
    batch->tile_count = (tile - batch->tiles) / 3;
}

/* One operation under way. */
struct work {
    void (*op)(const void *call, const struct batch *batch);
    const void *call;
    const struct batch *batch;
};

static void work_on(void *argument)
{
    const struct work *work = argument;
    work->op(work->call, work->batch);
}

/* Into how many items an operation falls, at least. */
static int64_t items_of(const struct level *level, const struct step *step, const struct batch *batch)
{
    switch (step->op) {
    case OP_PACK: return DIV_UP(((const struct pack_call *)step->call)->w->out, level->panel);
    case OP_LINEAR: return DIV_UP(((const struct linear_call *)step->call)->w->out, level->panel);
    case OP_ATTENTION:
    case OP_WRITE_KV: return ((const struct attention_call *)step->call)->kv.heads;
    default: return batch->rows;
    }
}

static int needs_packed_rows(const struct step *step, const struct batch *batch)
{
    return step->op == OP_LINEAR && (batch->rows > 1 || ((const struct linear_call *)step->call)->w->kind == KIND_I8);
}

static void run_step(const struct level *level, struct step step, const struct batch *batch)
{
    struct work work = {level->ops[step.op], step.call, batch};
    run(work_on, &work, items_of(level, &step, batch));
}

static double seconds[OPS]; /* spent in each operation since the start; written with pool.caller held */

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/* to: (OPS,). What was spent in each operation so far. */
void kernels_seconds(double *to)
{
    pthread_mutex_lock(&pool.caller);
    memcpy(to, seconds, sizeof seconds);
    pthread_mutex_unlock(&pool.caller);
}

/* Run the steps one after the other, each by all threads. batch->packed, tiles and tile_count are filled in
 * here. */
void kernels_run(int level_number, const struct step *steps, int64_t count, struct batch *batch)
{
    const struct level *level = levels[level_number];
    const size_t rows = ROUND_UP(batch->rows, level->tile_rows) + level->tile_rows;
    pthread_mutex_lock(&pool.caller);
    size_t packed = 0;
    for (int64_t i = 0; i < count; i++)
        if (steps[i].op == OP_LINEAR)
            packed = MAX(packed, rows * DIV_UP(((const struct linear_call *)steps[i].call)->w->in, KB) * (KB * 4 + 8));
        else if (steps[i].op == OP_SAMPLE)
            packed = MAX(packed, pool.threads * level->sample_room(steps[i].call));
    batch->packed = scratch(packed + rows * 3 * sizeof *batch->tiles);
    batch->tiles = (int32_t *)((char *)batch->packed + packed);
    if (batch->query_starts)
        cut(batch, level->tile_rows);
    double then = now();
    for (int64_t i = 0; i < count; i++) {
        if (needs_packed_rows(&steps[i], batch))
            run_step(level, (struct step){OP_PACK_ROWS, steps[i].call}, batch);
        run_step(level, steps[i], batch);
        const double done = now();
        seconds[steps[i].op] += done - then;
        then = done;
    }
    pthread_mutex_unlock(&pool.caller);
}
