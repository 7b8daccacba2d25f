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
#include <sys/mman.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#include <arm_neon.h>
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* === Threads ===
 * Our own, because two OpenMP pools (PyTorch's and ours) spin against each other. Waiting spins for a moment, then sleeps. */

enum { MAX_THREADS = 256, SPINS = 4000, SPINS_AT_BARRIER = 20000 };

static struct {
    pthread_mutex_t caller; /* held through a whole call: one at a time */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int threads; /* counting the caller */
    pthread_t workers[MAX_THREADS];
    void (*job)(void *); /* NULL: leave */
    void *argument;
    _Alignas(64) atomic_uint generation; /* one more for each job */
    _Alignas(64) atomic_int asleep;
    _Alignas(64) atomic_uint arrived, phase;
    _Alignas(64) atomic_llong item;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .threads = 1};

static int pool_threads(void) { return pool.threads; }

static int64_t next_item(void) { return atomic_fetch_add_explicit(&pool.item, 1, memory_order_relaxed); }

static void barrier(void)
{
    unsigned phase = atomic_load(&pool.phase);
    if (atomic_fetch_add(&pool.arrived, 1) + 1 == (unsigned)pool.threads) {
        atomic_store(&pool.arrived, 0);
        atomic_store(&pool.item, 0);
        atomic_store(&pool.phase, phase + 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool.phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS_AT_BARRIER)
            PAUSE();
        else
            sched_yield();
    }
}

static void *worker(void *argument)
{
    for (unsigned seen = (unsigned)(uintptr_t)argument;; seen++) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool.generation, memory_order_acquire) == seen; i++)
            PAUSE();
        if (atomic_load(&pool.generation) == seen) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.asleep, 1);
            while (atomic_load(&pool.generation) == seen)
                pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.asleep, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        if (!pool.job)
            return NULL;
        pool.job(pool.argument);
        barrier();
    }
}

static void post(void (*job)(void *), void *argument)
{
    pool.job = job;
    pool.argument = argument;
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.asleep) > 0) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* Called with pool.caller held. */
static void run(void (*job)(void *), void *argument)
{
    if (pool.threads > 1)
        post(job, argument);
    job(argument);
    barrier();
}

static void forget_workers(void) { pool.threads = 1; } /* a forked child has none */

/* Use `threads` threads, the caller's among them; returns how many there are. */
int kernels_set_threads(int threads)
{
    static int registered;
    pthread_mutex_lock(&pool.caller);
    if (!registered++)
        pthread_atfork(NULL, NULL, forget_workers);
    if (pool.threads > 1)
        post(NULL, NULL);
    for (int i = 1; i < pool.threads; i++)
        pthread_join(pool.workers[i], NULL);
    void *seen = (void *)(uintptr_t)atomic_load(&pool.generation);
    pool.threads = 1;
    while (pool.threads < MIN(threads, MAX_THREADS) && !pthread_create(&pool.workers[pool.threads], NULL, worker, seen))
        pool.threads++;
    int started = pool.threads;
    pthread_mutex_unlock(&pool.caller);
    return started;
}

static void *scratch(size_t bytes) /* called with pool.caller held */
{
    static void *memory;
    static size_t size;
    if (bytes > size) {
        free(memory);
        size = ROUND_UP(bytes, 1 << 21);
        memory = aligned_alloc(1 << 21, size); /* whole huge pages */
        if (!memory)
            abort();
#ifdef MADV_HUGEPAGE
        madvise(memory, size, MADV_HUGEPAGE);
#endif
    }
    return memory;
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

int kernels_best_level(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
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

const char *kernels_level_name(int level) { return levels[level]->name; }

size_t kernels_panels_bytes(const struct linear *w)
{
    const int64_t panel = levels[w->level]->panel;
    return DIV_UP(w->out, panel) * panel_bytes(w, panel);
}

static void locked(void (*job)(void *), void *call)
{
    pthread_mutex_lock(&pool.caller);
    run(job, call);
    pthread_mutex_unlock(&pool.caller);
}

void kernels_pack(struct pack_call *call) { locked(levels[call->w->level]->pack, call); }
void kernels_norm(int level, struct norm_call *call) { locked(levels[level]->norm, call); }
void kernels_embed(int level, struct embed_call *call) { locked(levels[level]->embed, call); }
void kernels_write_kv(int level, struct write_call *call) { locked(levels[level]->write_kv, call); }

void kernels_linear(struct linear_call *call)
{
    const struct level *level = levels[call->w->level];
    size_t rows = ROUND_UP(call->rows, level->tile_rows) + level->tile_rows, groups = DIV_UP(call->w->in, KB);
    pthread_mutex_lock(&pool.caller);
    call->packed = scratch(rows * groups * (KB * 4 + 8));
    run(level->linear, call);
    pthread_mutex_unlock(&pool.caller);
}

/* Cut each sequence's rows into tiles of `height` rows at most. tiles: (count, 3). */
static int64_t cut(const struct attention_call *call, int64_t sequences, int height, int32_t *tiles)
{
    int64_t count = 0;
    for (int32_t s = 0; s < sequences; s++)
        for (int32_t row = call->query_starts[s], end = call->query_starts[s + 1]; row < end; row += height, count++) {
            tiles[3 * count] = row;
            tiles[3 * count + 1] = MIN(height, end - row);
            tiles[3 * count + 2] = s;
        }
    return count;
}

void kernels_attention(int level, struct attention_call *call, int64_t sequences)
{
    pthread_mutex_lock(&pool.caller);
    int32_t *tiles = scratch((size_t)call->query_starts[sequences] * 3 * sizeof *tiles);
    call->tiles = tiles;
    call->tile_count = cut(call, sequences, levels[level]->tile_rows, tiles);
    run(levels[level]->attention, call);
    pthread_mutex_unlock(&pool.caller);
}
