/* The filters of a sampler: each shortens the list of the tokens that may still be picked. Part of ops.h. */

INLINE int32_t FN(bits)(float x)
{
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* The largest v, to within 2^(31 - steps) of its bits from below, that at least k of n weights reach. */
static float FN(kth_largest)(const float *weights, int64_t n, int64_t k, int steps)
{
    int32_t low = 0, high = 0x3f800001; /* one more than the bits of 1 */
    for (int step = 0; step < steps && high - low > 1; step++) {
        const int32_t middle = low + (high - low) / 2;
        vi reach = {0};
        int64_t i = 0, count = 0;
        for (; i + VL <= n; i += VL)
            reach -= *(const FN(viu) *)(weights + i) >= middle;
        for (int lane = 0; lane < VL; lane++)
            count += reach[lane];
        for (; i < n; i++)
            count += FN(bits)(weights[i]) >= middle;
        *(count >= k ? &low : &high) = middle;
    }
    float v;
    memcpy(&v, &low, 4);
    return v;
}

/* Write the lanes of v where mask is true to `to`, one after the other, and then up to a whole vector of anything. */
INLINE void FN(squeeze)(void *to, vi v, vi mask)
{
#if LEVEL >= 2
    *(FN(viu) *)to = (vi)_mm512_maskz_compress_epi32(_mm512_movepi32_mask((__m512i)mask), (__m512i)v);
#elif LEVEL == 1
    const int lanes = _mm256_movemask_ps((__m256)mask);
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(squeeze_orders + lanes)));
    *(FN(viu) *)to = (vi)_mm256_permutevar8x32_epi32((__m256i)v, order);
#else
    int32_t *next = to;
    for (int i = 0; i < VL; i++) {
        *next = v[i];
        next -= mask[i];
    }
#endif
}

INLINE int FN(lanes)(vi mask) /* how many are true */
{
#if LEVEL >= 2
    return __builtin_popcount(_mm512_movepi32_mask((__m512i)mask));
#elif LEVEL == 1
    return __builtin_popcount(_mm256_movemask_ps((__m256)mask));
#else
    int count = 0;
    for (int i = 0; i < VL; i++)
        count -= mask[i];
    return count;
#endif
}

INLINE vi FN(load_ints)(const void *p) { return *(const FN(viu) *)p; }

INLINE vi FN(numbers)(int64_t start)
{
    vi lane;
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    return lane + (int32_t)start;
}

INLINE vf FN(gather)(const float *from, vi at)
{
#if LEVEL >= 2
    return (vf)_mm512_i32gather_ps((__m512i)at, from, 4);
#elif LEVEL == 1
    return (vf)_mm256_i32gather_ps(from, (__m256i)at, 4);
#else
    vf v;
    for (int i = 0; i < VL; i++)
        v[i] = from[at[i]];
    return v;
#endif
}

/* The list of the tokens whose weight is at least `least`, which is above 0. */
static void FN(collect)(struct FN(draft) *d, float least)
{
    int64_t count = 0;
    for (int64_t start = 0, block = 0; start < d->width; start += SPREAD, block++) {
        if (d->most[block] < least)
            continue;
        for (int64_t i = start; i < MIN(start + SPREAD, d->width); i += VL) { /* weights are zeros beyond the last token */
            const vf w = FN(load)(d->weights + i);
            const vi keep = w >= least;
            FN(squeeze)(d->ids + count, FN(numbers)(i), keep);
            FN(squeeze)(d->kept + count, (vi)w, keep);
            count += FN(lanes)(keep);
        }
    }
    d->count = count;
}

/* The exact sum, in grains, of the masses whose keys reach v. */
static double FN(mass_reaching)(const int32_t *keys, const float *masses, int64_t n, int32_t v, double coarse)
{
    vd totals[2] = {{0}, {0}};
    double rest = 0;
    int64_t i = 0;
    float chosen[VL];
    for (; i + VL <= n; i += VL) {
        FN(store)(chosen, FN(select)(*(const FN(viu) *)(keys + i) >= v, FN(load)(masses + i), (vf){0}));
        totals[0] += FN(grains)(chosen, coarse);
        totals[1] += FN(grains)(chosen + VL / 2, coarse);
    }
    for (; i < n; i++)
        rest += keys[i] >= v ? masses[i] + coarse - coarse : 0;
    return FN(sum_doubles)(totals[0] + totals[1]) + rest;
}

/* The largest key v for which the masses of keys >= v sum to `goal` at least, where all of them do. *above: the sum of those
 * beyond v. Halves the range of the keys, and looks no more at those outside of it. */
static int32_t FN(threshold)(struct FN(draft) *d, const float *masses, double goal, double *above)
{
    const int32_t *keys = d->keys;
    int64_t n = d->count;
    int32_t low = INT32_MAX, high = 0;
    for (int64_t i = 0; i < n; i++)
        low = MIN(low, keys[i]), high = MAX(high, keys[i]);
    high++;
    *above = 0;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        const double upper = FN(mass_reaching)(keys, masses, n, middle, d->coarse);
        const int up = *above + upper >= goal;
        int64_t left = 0;
        for (int64_t i = 0; i < n; i += VL) {
            const vi key = FN(load_ints)(keys + i), mass = FN(load_ints)(masses + i);
            const vi keep = ((key >= middle) == -up) & FN(first)(n - i);
            FN(squeeze)(d->some_keys + left, key, keep);
            FN(squeeze)(d->some_masses + left, mass, keep);
            left += FN(lanes)(keep);
        }
        n = left, keys = d->some_keys, masses = d->some_masses;
        if (up)
            low = middle;
        else
            *above += upper, high = middle;
    }
    return low;
}

/* Keep the tokens of the largest keys until their masses sum to `goal`, of equal keys the earlier tokens. Returns the smallest
 * key that is kept. */
static int32_t FN(keep_best)(struct FN(draft) *d, const float *masses, double goal)
{
    double sum;
    const int32_t v = FN(threshold)(d, masses, goal, &sum);
    int64_t count = 0;
    for (int64_t i = 0; i < d->count; i += VL) {
        const vi key = FN(load_ints)(d->keys + i), here = FN(first)(d->count - i);
        vi keep = (key > v) & here;
        if (FN(any)((key == v) & here))
            for (int k = 0; k < MIN(VL, d->count - i); k++)
                if (key[k] == v && sum < goal) {
                    keep[k] = -1;
                    sum += masses[i + k] + d->coarse - d->coarse;
                }
        FN(squeeze)(d->ids + count, FN(load_ints)(d->ids + i), keep);
        FN(squeeze)(d->kept + count, FN(load_ints)(d->kept + i), keep);
        count += FN(lanes)(keep);
    }
    d->count = count;
    return v;
}

static void FN(keep_top_k)(struct FN(draft) *d, int64_t k)
{
    if (k >= d->count)
        return;
    for (int64_t i = 0; i < d->count; i++)
        d->ones[i] = 1;
    memcpy(d->keys, d->kept, d->count * sizeof *d->keys);
    FN(keep_best)(d, d->ones, (double)k);
}

static void FN(keep_min_p)(struct FN(draft) *d, float min_p)
{
    int64_t count = 0;
    for (int64_t i = 0; i < d->count; i += VL) {
        const vf w = FN(load)(d->kept + i);
        const vi id = FN(load_ints)(d->ids + i), keep = (w >= min_p) & FN(first)(d->count - i);
        FN(squeeze)(d->ids + count, id, keep);
        FN(squeeze)(d->kept + count, (vi)w, keep);
        count += FN(lanes)(keep);
    }
    d->count = count;
}

static void FN(keep_top_p)(struct FN(draft) *d, double goal)
{
    memcpy(d->keys, d->kept, d->count * sizeof *d->keys);
    FN(keep_best)(d, d->kept, goal);
}

/* The exact sum of weight * t in grains, t the tempered logits of tokens: ids, or the first n where it is NULL. t goes to
 * d->tempered. |weight * t| < 1, so that this sum is exact too. */
static double FN(sum_tempered)(struct FN(draft) *d, const float *weights, const int32_t *ids, int64_t n)
{
    vd sums[2] = {{0}, {0}};
    for (int64_t i = 0; i < n; i += VL) {
        const vi here = FN(first)(n - i);
        const vf logits = ids ? FN(gather)(d->logits, FN(load_ints)(ids + i) & here) : FN(load)(d->logits + i);
        const vf t = MAXV((logits - d->peak) * d->inverse, FN(set)(-87.f)); /* what is lighter has no mass */
        float w[VL];
        FN(store)(w, FN(select)(here, FN(load)(weights + i), (vf){0}));
        FN(store)(d->tempered + i, FN(select)(here, t, (vf){0}));
        for (int half = 0; half < 2; half++) {
            const vd wide = __builtin_convertvector(*(const hf *)(d->tempered + i + half * VL / 2), vd);
            sums[half] += FN(grains)(w + half * VL / 2, d->coarse) * wide + d->coarse - d->coarse;
        }
    }
    return FN(sum_doubles)(sums[0] + sums[1]);
}

/* Meister et al. 2022. A token's surprise is the log of the total minus its tempered logit t, so that its distance from the
 * mean surprise is |t - mean of t|, whatever the total. all: the mass of the tokens that the mean is of. Returns the largest
 * distance that is kept. */
static float FN(keep_typical)(struct FN(draft) *d, double typical_p, double all, float mean)
{
    FN(sum_tempered)(d, d->kept, d->ids, d->count);
    for (int64_t i = 0; i < d->count; i += VL) /* the nearest first: the bits of a float that is not negative are in its order */
        *(FN(viu) *)(d->keys + i) = 0x7f800000 - ((vi)(FN(load)(d->tempered + i) - mean) & 0x7fffffff);
    const int32_t bits = 0x7f800000 - FN(keep_best)(d, d->kept, typical_p * all);
    float distance;
    memcpy(&distance, &bits, 4);
    return distance;
}

/* typical_p of the whole vocabulary. First it looks at the tokens that make up most of the mass; where the distance that it
 * keeps is below that of any other token, which is lighter, these are all that it would keep. */
static void FN(keep_typical_of_all)(struct FN(draft) *d, double typical_p, double total)
{
    const float mean = FN(sum_tempered)(d, d->weights, NULL, d->width) / total;
    const float least = MAX(d->smallest, (float)((1 - typical_p) / 2 * total / d->width));
    FN(collect)(d, least);
    if (FN(keep_typical)(d, typical_p, total, mean) > (mean - logf(least)) * 0.999f) {
        FN(collect)(d, d->smallest);
        FN(keep_typical)(d, typical_p, total, mean);
    }
}

/* llama.cpp's xtc: of the tokens that weigh `least` or more only the lightest one stays, of equals the last. */
static void FN(exclude_top_choices)(struct FN(draft) *d, float least)
{
    vf lightest = FN(set)(INFINITY);
    for (int64_t i = 0; i < d->count; i += VL) {
        const vf w = FN(load)(d->kept + i);
        lightest = MINV(lightest, FN(select)((w >= least) & FN(first)(d->count - i), w, FN(set)(INFINITY)));
    }
    const float spared = -FN(largest)(-lightest);
    int64_t last = -1;
    for (int64_t i = 0; i < d->count; i++)
        last = d->kept[i] == spared ? i : last;
    for (int64_t i = 0; i < d->count; i += VL) { /* what follows the list is not read as part of it */
        const vf w = FN(load)(d->kept + i);
        FN(store)(d->kept + i, FN(select)(w >= least, (vf){0}, w));
    }
    if (last >= 0)
        d->kept[last] = spared;
}

/* Weigh what is left anew, from weights of temperature 1; what xtc has excluded stays so. */
static void FN(temper)(struct FN(draft) *d, float inverse)
{
    FN(sum_tempered)(d, d->kept, d->ids, d->count);
    vf most = FN(set)(-INFINITY);
    for (int64_t i = 0; i < d->count; i += VL) {
        const vi left = (FN(load)(d->kept + i) > 0.f) & FN(first)(d->count - i);
        most = MAXV(most, FN(select)(left, FN(load)(d->tempered + i), FN(set)(-INFINITY)));
    }
    const float peak = FN(largest)(most);
    for (int64_t i = 0; i < d->count; i += VL) {
        const vf w = FN(exp)((FN(load)(d->tempered + i) - peak) * inverse);
        FN(store)(d->kept + i, FN(select)(FN(load)(d->kept + i) > 0.f, w, (vf){0}));
    }
}
