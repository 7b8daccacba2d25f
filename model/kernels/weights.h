/* The weights of a row's tokens, their sums, and the draw, by the definition in model/picking.py. Part of ops.h.
 *
 * Every weight that is summed is first rounded to a multiple of the row's grain, a power of two so large that any sum of them
 * is exact in a double. So a sum has no order: vectors of any width, blocks and threads give the same bits. */

#define vd FN(vd)
#define hf FN(hf)
typedef double vd __attribute__((vector_size(4 * VL)));  /* VL / 2 of them */
typedef float hf __attribute__((vector_size(2 * VL), aligned(4), may_alias));

/* One row being sampled. Arrays have room for the vocabulary and VL more. */
struct FN(draft) {
    const float *logits; /* adjusted */
    int64_t width;
    float peak, inverse; /* the largest logit, 1 / temperature */
    double coarse;       /* adding and subtracting it rounds to a multiple of the grain, which is coarse / 2^52 */
    float smallest;      /* of all weights that round to a grain at least */
    float *weights;      /* (width,): exp((logit - peak) * inverse) */
    double *sums;        /* of SPREAD weights each */
    float *most;         /* of SPREAD weights each */
    /* What the filters have left, in token order: */
    int64_t count;
    int32_t *ids;
    float *kept;
    int32_t *keys; /* larger is better */
    /* Room for the filters' work, of the same size: */
    int32_t *some_keys;
    float *some_masses, *ones, *tempered;
};

INLINE vd FN(grains)(const float *weights, double coarse)
{
    return __builtin_convertvector(*(const hf *)weights, vd) + coarse - coarse;
}

INLINE double FN(sum_doubles)(vd v)
{
    double total = 0;
    for (int i = 0; i < VL / 2; i++)
        total += v[i];
    return total;
}

/* The exact sum of n weights in grains. */
static double FN(mass)(const float *weights, int64_t n, double coarse)
{
    const int64_t whole = n / VL * VL;
    vd totals[2] = {{0}, {0}};
    double rest = 0;
    for (int64_t i = 0; i < whole; i += VL) {
        totals[0] += FN(grains)(weights + i, coarse);
        totals[1] += FN(grains)(weights + i + VL / 2, coarse);
    }
    for (int64_t i = whole; i < n; i++)
        rest += weights[i] + coarse - coarse;
    return FN(sum_doubles)(totals[0] + totals[1]) + rest;
}

/* Copy x: (n,), minus infinity in place of what the bits do not allow. `to` may be x. */
static void FN(mask)(float *to, const float *x, int64_t n, const uint32_t *bits)
{
    vi own;
    for (int i = 0; i < VL; i++)
        own[i] = 1 << i;
    const int64_t whole = n / VL * VL;
    for (int64_t i = 0; i < whole; i += VL) {
        const vi allowed = (FN(seti)(bits[i / 32] >> i % 32) & own) != 0;
        FN(store)(to + i, FN(select)(allowed, FN(load)(x + i), FN(set)(-INFINITY)));
    }
    for (int64_t i = whole; i < n; i++)
        to[i] = bits[i / 32] >> i % 32 & 1 ? x[i] : -INFINITY;
}

static float FN(peak)(const float *x, int64_t n)
{
    vf most[4];
    for (int k = 0; k < 4; k++)
        most[k] = FN(set)(-INFINITY);
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int k = 0; k < 4; k++)
            most[k] = MAXV(most[k], FN(load)(x + i + k * VL));
    float peak = FN(largest)(MAXV(MAXV(most[0], most[1]), MAXV(most[2], most[3])));
    for (; i < n; i++)
        peak = MAX(peak, x[i]);
    return peak;
}

/* The first of the largest. */
static int64_t FN(best)(const float *x, int64_t n, float peak)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        if (FN(any)(FN(load)(x + i) == peak))
            break;
    while (i < n - 1 && x[i] != peak)
        i++;
    return i;
}

/* Fill in weights, sums and most. Returns the sum of all. */
static double FN(weigh)(struct FN(draft) *d)
{
    double total = 0;
    for (int64_t start = 0, block = 0; start < d->width; start += SPREAD, block++) {
        const int64_t n = MIN(SPREAD, d->width - start);
        vf most = {0};
        int64_t i = 0;
        for (; i + VL <= n; i += VL) {
            const vf w = FN(exp)((FN(load)(d->logits + start + i) - d->peak) * d->inverse);
            FN(store)(d->weights + start + i, w);
            most = MAXV(most, w);
        }
        if (i < n) {
            const vf x = FN(load_some)(d->logits + start + i, n - i);
            const vf w = FN(select)(FN(first)(n - i), FN(exp)((x - d->peak) * d->inverse), (vf){0});
            FN(store)(d->weights + start + i, w);
            most = MAXV(most, w);
        }
        d->most[block] = FN(largest)(most);
        d->sums[block] = FN(mass)(d->weights + start, n, d->coarse);
        total += d->sums[block];
    }
    return total;
}

/* The first place at which `sum` and the weights so far, in grains, exceed `goal`; the last that weighs anything, if none does. */
static int64_t FN(reach)(const float *weights, int64_t n, double coarse, double sum, double goal)
{
    int64_t last = 0;
    for (int64_t i = 0; i < n; i++) {
        const double grain = weights[i] + coarse - coarse;
        sum += grain;
        if (grain > 0)
            last = i;
        if (sum > goal)
            return i;
    }
    return last;
}

static int64_t FN(draw_any)(const struct FN(draft) *d, double total, double uniform)
{
    const double goal = uniform * total;
    double before = 0;
    int64_t block = 0, start = 0;
    while (start + SPREAD < d->width && before + d->sums[block] <= goal)
        before += d->sums[block++], start += SPREAD;
    return start + FN(reach)(d->weights + start, MIN(SPREAD, d->width - start), d->coarse, before, goal);
}

static int64_t FN(draw_kept)(const struct FN(draft) *d, double uniform)
{
    const double goal = uniform * FN(mass)(d->kept, d->count, d->coarse);
    double before = 0;
    int64_t start = 0;
    while (start + SPREAD < d->count) {
        const double next = before + FN(mass)(d->kept + start, SPREAD, d->coarse);
        if (next > goal)
            break;
        before = next, start += SPREAD;
    }
    return d->ids[start + FN(reach)(d->kept + start, MIN(SPREAD, d->count - start), d->coarse, before, goal)];
}
