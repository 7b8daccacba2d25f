/* Vectors of VL floats, and the one loop that costs. Part of ops.h. */

#undef VL
#undef FMA
#undef MAXV
#undef MINV
#undef DOT
#undef TILE_ROWS
#if LEVEL >= 2
#define VL 16
#define TILE_ROWS 12
#define FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define MAXV(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define MINV(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#if LEVEL == 3
#define DOT(acc, x, w) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(x), (__m512i)(w)))
#else
#define DOT(acc, x, w)                                                                                                       \
    ((acc) + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)(x), (__m512i)(w)), _mm512_set1_epi16(1)))
#endif
#elif LEVEL == 1
#define VL 8
#define TILE_ROWS 6
#define FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define MAXV(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define MINV(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define DOT(acc, x, w)                                                                                                       \
    ((acc) + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)(x), (__m256i)(w)), _mm256_set1_epi16(1)))
#else
#define VL 4
#define TILE_ROWS 6
#ifdef __aarch64__
#define FMA(a, b, c) ((vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#define MAXV(a, b) FN(select)((a) > (b), a, b)
#define MINV(a, b) FN(select)((a) < (b), a, b)
#define DOT(acc, x, w) FN(dot)(acc, x, w)
#endif

#define FN(name) CAT(name##_, LEVEL)
#define PANEL (2 * VL)
#define vf FN(vf)
#define vi FN(vi)
typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float FN(vfu) __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t FN(viu) __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t FN(half) __attribute__((vector_size(2 * VL), aligned(2), may_alias));
typedef uint8_t FN(bytes) __attribute__((vector_size(VL), aligned(1), may_alias));

INLINE vf FN(load)(const float *p) { return *(const FN(vfu) *)p; }
INLINE void FN(store)(float *p, vf v) { *(FN(vfu) *)p = v; }
INLINE vf FN(set)(float x) { return x - (vf){0}; }
INLINE vi FN(seti)(int32_t x) { return x - (vi){0}; }
INLINE vf FN(select)(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

#if LEVEL == 0
INLINE vi FN(dot)(vi acc, vi x, vi w)
{
    for (int i = 0; i < 32; i += 8)
        acc += (x >> i & 255) * (w << (24 - i) >> 24);
    return acc;
}
#endif

INLINE vf FN(load_half)(const uint16_t *p)
{
#if LEVEL >= 2
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif LEVEL == 1
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else /* shift the exponent into place, then put its bias right; exact, subnormals too */
    vi h = __builtin_convertvector(*(const FN(half) *)p, vi);
    return (vf)((vi)((vf)((h & 0x7fff) << 13) * 0x1p112f) | (h & 0x8000) << 16);
#endif
}

/* Round to nearest even; what lies outside fp16 becomes its largest number. n values. */
static void FN(store_half)(uint16_t *p, const float *x, int64_t n, int64_t stride)
{
    for (int64_t i = 0; i < n; i++) {
        float scaled = MAX(-65504.f, MIN(65504.f, x[i])) * 0x1p-112f; /* its exponent is fp16's now, its fraction too long */
        uint32_t bits;
        memcpy(&bits, &scaled, 4);
        uint32_t sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        p[i * stride] = (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
    }
}

/* n < VL floats, then zeros. */
INLINE vf FN(load_some)(const float *p, int64_t n)
{
    float padded[VL] = {0};
    memcpy(padded, p, n * sizeof *p);
    return FN(load)(padded);
}

INLINE vi FN(first)(int64_t n) /* true in the first n lanes */
{
    vi lane;
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    return lane < (int32_t)n;
}

INLINE float FN(sum)(vf v)
{
    float total = 0;
    for (int i = 0; i < VL; i++)
        total += v[i];
    return total;
}

INLINE float FN(largest)(vf v)
{
    float most = v[0];
    for (int i = 1; i < VL; i++)
        most = MAX(most, v[i]);
    return most;
}

/* After Cephes' expf: 2 ulp on [-87, 88], clamped outside. */
INLINE vf FN(exp)(vf x)
{
    x = MINV(MAXV(x, FN(set)(-87.f)), FN(set)(88.f));
    vf shifted = FMA(x, FN(set)(1.44269504f), FN(set)(0x1.8p23f)); /* the integer nearest x / ln 2, in the low bits */
    vf n = shifted - 0x1.8p23f;
    vf r = FMA(n, FN(set)(-0.693359375f), x);
    r = FMA(n, FN(set)(2.12194440e-4f), r);
    vf p = FN(set)(1.9875691500e-4f);
    p = FMA(p, r, FN(set)(1.3981999507e-3f));
    p = FMA(p, r, FN(set)(8.3334519073e-3f));
    p = FMA(p, r, FN(set)(4.1665795894e-2f));
    p = FMA(p, r, FN(set)(1.6666665459e-1f));
    p = FMA(p, r, FN(set)(5.0000001201e-1f));
    vf y = FMA(p, r * r, r) + 1.f;
    return (vf)((vi)y + ((vi)shifted << 23));
}

INLINE vf FN(activate)(vf x, int act)
{
    switch (act) {
    case ACT_GELU_TANH: { /* x (1 + tanh u) / 2 = x / (1 + exp(-2 u)) */
        vf u = x * FMA(x * x, FN(set)(0.044715f), FN(set)(1.f)) * -1.5957691216f;
        return x / (1.f + FN(exp)(u));
    }
    case ACT_GELU_ERF: { /* Abramowitz and Stegun 7.1.26: |error| < 1.5e-7 */
        vf z = MAXV(x, -x) * 0.70710678f;
        vf t = 1.f / FMA(z, FN(set)(0.3275911f), FN(set)(1.f));
        vf p = FN(set)(1.061405429f);
        p = FMA(p, t, FN(set)(-1.453152027f));
        p = FMA(p, t, FN(set)(1.421413741f));
        p = FMA(p, t, FN(set)(-0.284496736f));
        p = FMA(p, t, FN(set)(0.254829592f));
        vf tail = p * t * FN(exp)(-z * z) * 0.5f; /* of the normal distribution, beyond |x| */
        return x * FN(select)(x < 0.f, tail, 1.f - tail);
    }
    case ACT_RELU: return MAXV(x, FN(set)(0.f));
    case ACT_SILU: return x / (1.f + FN(exp)(-x));
    default: return x;
    }
}

/* === The one loop that costs: acc[r][v] += sum over i < k of x[r * ldx + i] * w[i * ldw + v * VL] ===
 * mr, nv and half are constants wherever it is inlined, so acc lives in registers. `ahead`, unless NULL, will be wanted soon:
 * for each i, `lines` cache lines of it, `stride` bytes further each time. */
INLINE void FN(multiply)(const int mr, const int nv, const int half, vf (*acc)[4], const float *x, int ldx, const void *w,
                         int64_t ldw, int64_t k, const char *ahead, int64_t stride, int lines)
{
    for (int64_t i = 0; i < k; i++) {
        vf wv[4];
        for (int line = 0; ahead && line < lines; line++)
            __builtin_prefetch(ahead + i * stride + line * LINE, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            wv[v] = half ? FN(load_half)((const uint16_t *)w + i * ldw + v * VL)
                         : FN(load)((const float *)w + i * ldw + v * VL);
#pragma GCC unroll 12
        for (int r = 0; r < mr; r++) {
            vf xr = FN(set)(x[r * ldx + i]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[r][v] = FMA(xr, wv[v], acc[r][v]);
        }
    }
}

/* CALL(n) with n a constant equal to rows, 1 to TILE_ROWS. */
#undef WITH_ROWS
#if TILE_ROWS == 12
#define WITH_ROWS(rows, CALL)                                                                                                \
    switch (rows) {                                                                                                          \
    case 1: CALL(1); break;                                                                                                  \
    case 2: CALL(2); break;                                                                                                  \
    case 3: CALL(3); break;                                                                                                  \
    case 4: CALL(4); break;                                                                                                  \
    case 5: CALL(5); break;                                                                                                  \
    case 6: CALL(6); break;                                                                                                  \
    case 7: CALL(7); break;                                                                                                  \
    case 8: CALL(8); break;                                                                                                  \
    case 9: CALL(9); break;                                                                                                  \
    case 10: CALL(10); break;                                                                                                \
    case 11: CALL(11); break;                                                                                                \
    default: CALL(12);                                                                                                       \
    }
#else
#define WITH_ROWS(rows, CALL)                                                                                                \
    switch (rows) {                                                                                                          \
    case 1: CALL(1); break;                                                                                                  \
    case 2: CALL(2); break;                                                                                                  \
    case 3: CALL(3); break;                                                                                                  \
    case 4: CALL(4); break;                                                                                                  \
    case 5: CALL(5); break;                                                                                                  \
    default: CALL(6);                                                                                                        \
    }
#endif
