/* The kernels, written once over vectors of VL floats and compiled by kernels.c for each LEVEL. No include guard. */

/* === Vectors === */

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
 * mr, nv and half are constants wherever it is inlined, so acc lives in registers. `ahead`, unless NULL, is laid out as w
 * is and will be wanted soon. */
INLINE void FN(multiply)(const int mr, const int nv, const int half, vf (*acc)[4], const float *x, int ldx, const void *w,
                         int64_t ldw, int64_t k, const char *ahead)
{
    const int64_t size = half ? 2 : 4;
    for (int64_t i = 0; i < k; i++) {
        vf wv[4];
        for (int64_t line = 0; ahead && line < nv * VL * size; line += 64)
            __builtin_prefetch(ahead + i * ldw * size + line, 0, 2);
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

/* === Linear layers === */

/* out: (mr, PANEL) = x w. x: one packed tile whose groups are `height` rows apart; w: one panel. */
INLINE void FN(tile_float)(const int mr, const int half, float *out, const float *x, int height, const void *w, int64_t in)
{
    vf acc[TILE_ROWS][4] = {0};
    for (int64_t k = 0; k < in; k += KB) {
        FN(multiply)(mr, 2, half, acc, x, KB, w, PANEL, MIN(KB, in - k), NULL);
        x += height * KB;
        w = (const char *)w + KB * PANEL * (half ? 2 : 4);
    }
#pragma GCC unroll 12
    for (int r = 0; r < mr; r++) {
        FN(store)(out + r * PANEL, acc[r][0]);
        FN(store)(out + r * PANEL + VL, acc[r][1]);
    }
}

static void FN(tile_f32)(int rows, float *out, const float *x, int height, const void *w, int64_t in)
{
#define CALL(n) FN(tile_float)(n, 0, out, x, height, w, in)
    WITH_ROWS(rows, CALL)
#undef CALL
}

static void FN(tile_f16)(int rows, float *out, const float *x, int height, const void *w, int64_t in)
{
#define CALL(n) FN(tile_float)(n, 1, out, x, height, w, in)
    WITH_ROWS(rows, CALL)
#undef CALL
}

/* The same for int8. scale and zero: (groups, height) of this tile. out is still to be scaled by the weights' scales. */
INLINE void FN(tile_int8)(const int mr, float *out, const struct quantised *x, int height, const char *w, int64_t in)
{
    const uint8_t *q = x->values;
    vf total[TILE_ROWS][2] = {0};
    for (int64_t k = 0, g = 0; k < in; k += KB, g += height, q += height * KB) {
        vi acc[TILE_ROWS][2];
#pragma GCC unroll 12
        for (int r = 0; r < mr; r++)
            for (int v = 0; v < 2; v++)
                acc[r][v] = *(const FN(viu) *)(w + v * VL * 4) * -x->zero[g + r];
        w += PANEL * 4;
        for (int64_t i = 0; i < MIN(KB, in - k); i += 4, w += PANEL * 4) {
            const vi w0 = *(const FN(viu) *)w, w1 = *(const FN(viu) *)(w + VL * 4);
#pragma GCC unroll 12
            for (int r = 0; r < mr; r++) {
                int32_t four;
                memcpy(&four, q + r * KB + i, 4);
                const vi xr = FN(seti)(four);
                acc[r][0] = DOT(acc[r][0], xr, w0);
                acc[r][1] = DOT(acc[r][1], xr, w1);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < mr; r++)
            for (int v = 0; v < 2; v++) {
                vf sum = __builtin_convertvector(acc[r][v], vf), scale = FN(set)(x->scale[g + r]);
                total[r][v] = FMA(sum, scale, total[r][v]);
            }
    }
#pragma GCC unroll 12
    for (int r = 0; r < mr; r++) {
        FN(store)(out + r * PANEL, total[r][0]);
        FN(store)(out + r * PANEL + VL, total[r][1]);
    }
}

static void FN(tile_i8)(int rows, float *out, const struct quantised *x, int height, const void *w, int64_t in)
{
#define CALL(n) FN(tile_int8)(n, out, x, height, w, in)
    WITH_ROWS(rows, CALL)
#undef CALL
}

/* acc: (rows, PANEL) of one panel to y: scale, bias, activation, residual. */
static void FN(finish)(const struct linear_call *c, const float *acc, int64_t row, int rows, int64_t column)
{
    const struct linear *w = c->w;
    const int n = (int)MIN(PANEL, w->out - column);
    for (int r = 0; r < rows; r++) {
        const int64_t at = (row + r) * w->out + column;
        float done[PANEL];
        float *to = n == PANEL ? c->y + at : done;
        for (int v = 0; v < PANEL; v += VL) {
            vf y = FN(load)(acc + r * PANEL + v);
            if (w->kind == KIND_I8)
                y *= FN(load)(w->scale + column + v);
            y = FN(activate)(y + FN(load)(w->bias + column + v), c->act);
            if (c->residual && n == PANEL)
                y += FN(load)(c->residual + at + v);
            FN(store)(to + v, y);
        }
        for (int i = 0; n < PANEL && i < n; i++)
            c->y[at + i] = c->residual ? done[i] + c->residual[at + i] : done[i];
    }
}

/* n values of one row to unsigned integers: x = scale * (q - zero). */
static void FN(quantise)(const float *x, int64_t n, uint8_t *q, float *scale, int32_t *zero)
{
    const float top = LEVEL == 3 ? 255 : 127; /* maddubs sums two products in 16 bits: seven bits never saturate it */
    vf low = {0}, high = {0};
    for (int64_t i = 0; i < n; i += VL) {
        const vf v = i + VL <= n ? FN(load)(x + i) : FN(load_some)(x + i, n - i);
        low = MINV(v, low);
        high = MAXV(v, high);
    }
    const float least = -FN(largest)(-low), range = FN(largest)(high) - least, per = range > 0 ? top / range : 0;
    const float offset = nearbyintf(-least * per);
    *scale = range > 0 ? range / top : 0;
    *zero = (int32_t)offset;
    for (int64_t i = 0; i < n; i += VL) {
        const vf v = i + VL <= n ? FN(load)(x + i) : FN(load_some)(x + i, n - i);
        const vf rounded = FMA(v, FN(set)(per), FN(set)(0x1.8p23f)) - 0x1.8p23f + offset;
        const vf kept = MINV(MAXV(rounded, FN(set)(0.f)), FN(set)(top));
        *(FN(bytes) *)(q + i) = __builtin_convertvector(__builtin_convertvector(kept, vi), FN(bytes));
    }
}

/* One packed tile of int8 x. */
INLINE struct quantised FN(tile_of)(const struct batch *b, int64_t tile, int height, int64_t groups)
{
    const int64_t cells = DIV_UP(b->rows, height) * height * groups, at = tile * height * groups;
    float *scale = (float *)((char *)b->packed + cells * KB);
    return (struct quantised){(uint8_t *)b->packed + at * KB, scale + at, (int32_t *)(scale + cells) + at};
}

/* How high tiles are: 32 rows are 11 + 11 + 10, not 12 + 12 + 8. */
INLINE int FN(tile_height)(int64_t rows) { return (int)DIV_UP(rows, DIV_UP(rows, TILE_ROWS)); }

/* Rows of x into tiles: see kernels.c. */
static void FN(pack_rows)(const void *call, const struct batch *b)
{
    const struct linear_call *c = call;
    const int64_t in = c->w->in, groups = DIV_UP(in, KB);
    const int height = FN(tile_height)(b->rows);
    for (int64_t row; (row = next_item()) < b->rows;) {
        const int64_t tile = row / height, r = row % height;
        const struct quantised x = FN(tile_of)(b, tile, height, groups);
        float *whole = (float *)b->packed + (tile * height * groups + r) * KB;
        for (int64_t k = 0, g = r; k < in; k += KB, g += height, whole += height * KB) {
            const int64_t n = MIN(KB, in - k);
            if (c->w->kind == KIND_I8)
                FN(quantise)(c->x + row * in + k, n, x.values + g * KB, x.scale + g, x.zero + g);
            else
                memcpy(whole, c->x + row * in + k, n * sizeof *whole);
        }
    }
}

static void FN(linear)(const void *call, const struct batch *b)
{
    const struct linear_call *c = call;
    const struct linear *w = c->w;
    const int64_t tiles = DIV_UP(b->rows, TILE_ROWS), panels = DIV_UP(w->out, PANEL), groups = DIV_UP(w->in, KB);
    const int height = FN(tile_height)(b->rows);
    const int as_is = b->rows == 1 && w->kind != KIND_I8;
    /* An item is one panel and a run of tiles: long, but enough of them for every thread. */
    const int64_t runs = MIN(tiles, DIV_UP(4 * pool_threads(), panels)), run = DIV_UP(tiles, runs);
    const size_t bytes = panel_bytes(w, PANEL);
    for (int64_t item; (item = next_item()) < panels * runs;) {
        const int64_t panel = item / runs, from = item % runs * run;
        const char *weights = (const char *)w->panels + panel * bytes;
        for (int64_t tile = from; tile < MIN(DIV_UP(b->rows, height), from + run); tile++) {
            float acc[TILE_ROWS * PANEL];
            const int rows = (int)MIN(height, b->rows - tile * height);
            const float *x = as_is ? c->x : (const float *)b->packed + tile * height * groups * KB;
            const struct quantised q = FN(tile_of)(b, tile, height, groups);
            switch (w->kind) {
            case KIND_F32: FN(tile_f32)(rows, acc, x, height, weights, w->in); break;
            case KIND_F16: FN(tile_f16)(rows, acc, x, height, weights, w->in); break;
            default: FN(tile_i8)(rows, acc, &q, height, weights, w->in);
            }
            FN(finish)(c, acc, tile * height, rows, panel * PANEL);
        }
    }
}

/* One panel of float weights. */
static void FN(pack_float)(const struct pack_call *c, const float *from, int64_t n, char *panel)
{
    const int half = c->w->kind == KIND_F16;
    for (int64_t i = 0; i < c->w->in; i++, panel += PANEL * (half ? 2 : 4)) {
        float row[PANEL] = {0};
        for (int64_t o = 0; o < n; o++)
            row[o] = from[o * c->stride_out + i * c->stride_in];
        if (half)
            FN(store_half)((uint16_t *)panel, row, PANEL, 1);
        else
            memcpy(panel, row, sizeof row);
    }
}

/* One panel of int8 weights, and the scales of its n outputs. */
static void FN(pack_int8)(const struct pack_call *c, const float *from, int64_t n, char *panel, float *scale)
{
    const int64_t in = c->w->in;
    memset(panel, 0, panel_bytes(c->w, PANEL));
    for (int64_t o = 0; o < n; o++) {
        const float *weight = from + o * c->stride_out;
        float most = 0;
        for (int64_t i = 0; i < in; i++)
            most = MAX(most, fabsf(weight[i * c->stride_in]));
        scale[o] = most / 127;
        for (int64_t i = 0; i < in; i++) {
            const int8_t q = most > 0 ? (int8_t)nearbyintf(weight[i * c->stride_in] / most * 127) : 0;
            char *group = panel + i / KB * PANEL * (KB + 4), *fours = group + PANEL * 4;
            int32_t sum;
            memcpy(&sum, group + o * 4, 4);
            sum += q;
            memcpy(group + o * 4, &sum, 4);
            fours[i % KB / 4 * PANEL * 4 + o * 4 + i % 4] = q;
        }
    }
}

static void FN(pack)(const void *call, const struct batch *b)
{
    (void)b;
    const struct pack_call *c = call;
    const struct linear *w = c->w;
    for (int64_t panel; (panel = next_item()) < DIV_UP(w->out, PANEL);) {
        const int64_t column = panel * PANEL, n = MIN(PANEL, w->out - column);
        const float *from = c->weight + column * c->stride_out;
        char *to = (char *)w->panels + panel * panel_bytes(w, PANEL);
        if (w->kind == KIND_I8)
            FN(pack_int8)(c, from, n, to, (float *)w->scale + column);
        else
            FN(pack_float)(c, from, n, to);
    }
}

/* === Layer norm and embedding === */

static void FN(norm)(const void *call, const struct batch *b)
{
    const struct norm_call *c = call;
    const int64_t whole = c->width / VL * VL, rest = c->width - whole;
    for (int64_t row; (row = next_item()) < b->rows;) {
        const float *x = c->x + row * c->width;
        float *y = c->y + row * c->width;
        vf last = FN(load_some)(x + whole, rest), sum = last, squares = {0};
        for (int64_t i = 0; i < whole; i += VL)
            sum += FN(load)(x + i);
        const vf mean = FN(set)(FN(sum)(sum) / (float)c->width);
        for (int64_t i = 0; i < whole; i += VL) {
            vf d = FN(load)(x + i) - mean;
            squares = FMA(d, d, squares);
        }
        last = FN(select)(FN(first)(rest), last - mean, (vf){0});
        squares = FMA(last, last, squares);
        const vf factor = FN(set)(1.f / sqrtf(FN(sum)(squares) / (float)c->width + c->epsilon));
        for (int64_t i = 0; i < whole; i += VL)
            FN(store)(y + i, FMA((FN(load)(x + i) - mean) * factor, FN(load)(c->weight + i), FN(load)(c->bias + i)));
        last = FMA(last * factor, FN(load_some)(c->weight + whole, rest), FN(load_some)(c->bias + whole, rest));
        memcpy(y + whole, &last, rest * sizeof *y);
    }
}

/* All weights of one output to `to`: a column of its panel. */
static void FN(unpack)(const struct linear *w, int64_t output, float *to)
{
    const char *panel = (const char *)w->panels + output / PANEL * panel_bytes(w, PANEL);
    const int64_t o = output % PANEL;
    uint16_t halves[VL] = {0};
    switch (w->kind) {
    case KIND_F32:
        for (int64_t i = 0; i < w->in; i++)
            to[i] = ((const float *)panel)[i * PANEL + o];
        break;
    case KIND_F16:
        for (int64_t k = 0, n; k < w->in; k += n) {
            n = MIN(VL, w->in - k);
            for (int64_t i = 0; i < n; i++)
                halves[i] = ((const uint16_t *)panel)[(k + i) * PANEL + o];
            const vf row = FN(load_half)(halves);
            memcpy(to + k, &row, n * sizeof *to);
        }
        break;
    default:
        for (int64_t k = 0; k < w->in; k += KB, panel += PANEL * (KB + 4)) {
            const int8_t *fours = (const int8_t *)panel + PANEL * 4 + o * 4;
            for (int64_t i = 0; i < MIN(KB, w->in - k); i++)
                to[k + i] = fours[i / 4 * PANEL * 4 + i % 4] * w->scale[output];
        }
    }
}

static void FN(embed)(const void *call, const struct batch *b)
{
    const struct embed_call *c = call;
    for (int64_t row; (row = next_item()) < b->rows;) {
        const float *position = c->positions + b->positions[row] * c->width;
        float *y = c->y + row * c->width;
        FN(unpack)(c->tokens, b->tokens[row], y);
        for (int64_t i = 0; i < c->width; i++)
            y[i] += position[i];
    }
}

/* === Attention === */

INLINE char *FN(at)(const void *cache, const struct kv *kv, int64_t index)
{
    return (char *)cache + index * (kv->half ? 2 : 4);
}

static void FN(write_kv)(const void *call, const struct batch *b)
{
    const struct attention_call *c = call;
    const struct kv *kv = &c->kv;
    const int64_t size = kv->block_size, dim = kv->head_dim, width = kv->heads * dim;
    const int64_t stride = size % GROUP ? 1 : GROUP;
    /* An item is one head of GROUP rows: neighbours in a key group are written by one thread, while it is in cache. */
    for (int64_t item; (item = next_item()) < DIV_UP(b->rows, GROUP) * kv->heads;) {
        const int64_t head = item % kv->heads, from = item / kv->heads * GROUP;
        for (int64_t row = from; row < MIN(b->rows, from + GROUP); row++) {
            const float *key = c->qkv + (row * 3 + 1) * width + head * dim, *value = key + width;
            const int64_t block = b->slots[row] / size, offset = b->slots[row] % size;
            const int64_t base = (block * kv->heads + head) * size * dim, v_at = base + offset * dim;
            const int64_t k_at = base + offset / stride * stride * dim + offset % stride;
            if (kv->half) {
                FN(store_half)((uint16_t *)kv->keys + k_at, key, dim, stride);
                FN(store_half)((uint16_t *)kv->values + v_at, value, dim, 1);
                continue;
            }
            for (int64_t i = 0; i < dim; i++)
                ((float *)kv->keys)[k_at + i * stride] = key[i];
            memcpy((float *)kv->values + v_at, value, dim * sizeof *value);
        }
    }
}

/* Where GROUP positions of one sequence and head lie, keys (head_dim, GROUP), values (GROUP, head_dim). Blocks that
 * GROUP does not divide are gathered into `room` first. */
struct FN(group) { const char *keys, *values; };

static struct FN(group) FN(find_group)(const struct kv *kv, const int32_t *table, int64_t head, int64_t position,
                                       int64_t count, char *room)
{
    const int64_t size = kv->block_size, dim = kv->head_dim, bytes = kv->half ? 2 : 4;
    if (size % GROUP == 0) {
        const int64_t at = ((table[position / size] * kv->heads + head) * size + position % size) * dim;
        return (struct FN(group)){FN(at)(kv->keys, kv, at), FN(at)(kv->values, kv, at)};
    }
    char *keys = room, *values = room + GROUP * dim * bytes;
    for (int64_t i = 0; i < count; i++) {
        const int64_t p = position + i, at = ((table[p / size] * kv->heads + head) * size + p % size) * dim;
        memcpy(values + i * dim * bytes, FN(at)(kv->values, kv, at), dim * bytes);
        for (int64_t d = 0; d < dim; d++)
            memcpy(keys + (d * GROUP + i) * bytes, FN(at)(kv->keys, kv, at + d), bytes);
    }
    return (struct FN(group)){keys, values};
}

/* The groups the span at `start` of `head` is made of, to prefetch; nothing where they would have to be gathered. */
static void FN(find_ahead)(const struct kv *kv, const int32_t *table, int64_t head, int64_t start, int64_t context,
                           struct FN(group) *ahead)
{
    memset(ahead, 0, SPAN / GROUP * sizeof *ahead);
    for (int64_t i = 0; kv->block_size % GROUP == 0 && i < MIN(SPAN, context - start); i += GROUP)
        ahead[i / GROUP] = FN(find_group)(kv, table, head, start + i, GROUP, NULL);
}

/* The running softmax of one row (Milakov and Gimelshein, 2018), by spans aligned to position 0. */
struct FN(row) { float most; vf total; };

/* scores: (SPAN,) of one span, `count` of them seen by this row; they become weights. Returns what to scale the past by. */
INLINE float FN(soften)(struct FN(row) *row, float *scores, int64_t count, int64_t computed)
{
    float most = row->most;
    for (int64_t i = 0; i < count; i += VL) {
        vf s = FN(select)(FN(first)(count - i), FN(load)(scores + i), FN(set)(-INFINITY));
        most = MAX(most, FN(largest)(s));
    }
    const vf factor = FN(exp)(FN(set)(row->most - most));
    row->total *= factor;
    for (int64_t i = 0; i < computed; i += VL) {
        vf weight = FN(select)(FN(first)(count - i), FN(exp)(FN(load)(scores + i) - most), (vf){0});
        row->total += weight;
        FN(store)(scores + i, weight);
    }
    row->most = most;
    return factor[0];
}

/* out[r, d] = out[r, d] * factor[r] + sum over positions of weight[r, position] * value[position, d], d in nv vectors. */
INLINE void FN(mix)(const int mr, const int nv, const int half, float *out, const float *factor, const float *weights,
                    const struct FN(group) *groups, const struct FN(group) *ahead, int64_t d, int64_t dim, int64_t count)
{
    const int64_t at = d * (half ? 2 : 4);
    vf acc[TILE_ROWS][4];
#pragma GCC unroll 12
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            acc[r][v] = FN(load)(out + r * KB + d + v * VL) * factor[r];
    for (int64_t i = 0; i < count; i += GROUP)
        FN(multiply)(mr, nv, half, acc, weights + i, SPAN, groups[i / GROUP].values + at, dim, MIN(GROUP, count - i),
                     ahead[i / GROUP].values + at);
#pragma GCC unroll 12
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            FN(store)(out + r * KB + d + v * VL, acc[r][v]);
}

/* One row's part of `mix` that fills no vector. */
static void FN(mix_rest)(int half, float *out, float factor, const float *weights, const struct FN(group) *groups, int64_t d,
                         int64_t dim, int64_t count)
{
    for (; d < dim; d++) {
        vf acc = FN(set)(out[d] * factor);
        for (int64_t i = 0; i < count; i++) {
            const char *value = groups[i / GROUP].values + (i % GROUP * dim + d) * (half ? 2 : 4);
            uint16_t bits[VL] = {0};
            if (half)
                memcpy(bits, value, 2);
            acc = FMA(FN(set)(weights[i]), half ? FN(load_half)(bits) : FN(load_some)((const float *)value, 1), acc);
        }
        out[d] = acc[0];
    }
}

/* Rows [row, row + mr) of one sequence, one head. */
INLINE void FN(attend)(const int mr, const int half, const struct attention_call *c, const struct batch *b, int64_t row, const int32_t *table,
                       int64_t head)
{
    const struct kv *kv = &c->kv;
    const int64_t dim = kv->head_dim, width = kv->heads * dim, *positions = b->positions + row;
    float query[TILE_ROWS * KB], out[TILE_ROWS * KB], scores[TILE_ROWS * SPAN], factor[TILE_ROWS];
    char room[SPAN / GROUP][2 * GROUP * KB * sizeof(float)];
    struct FN(row) state[TILE_ROWS];
    int64_t context = 0;
    for (int r = 0; r < mr; r++) {
        for (int64_t d = 0; d < dim; d++) {
            query[r * KB + d] = c->qkv[(row + r) * 3 * width + head * dim + d] * c->scale;
            out[r * KB + d] = 0;
        }
        state[r] = (struct FN(row)){-INFINITY, {0}};
        context = MAX(context, positions[r] + 1);
    }
    for (int64_t start = 0; start < context; start += SPAN) {
        const int64_t count = MIN(SPAN, context - start);
        struct FN(group) groups[SPAN / GROUP], ahead[SPAN / GROUP];
        if (start + SPAN < context)
            FN(find_ahead)(kv, table, head, start + SPAN, context, ahead);
        else
            FN(find_ahead)(kv, table, MIN(head + 1, kv->heads - 1), 0, context, ahead);
        for (int64_t i = 0; i < count; i += GROUP) {
            vf acc[TILE_ROWS][4] = {0};
            groups[i / GROUP] =
                FN(find_group)(kv, table, head, start + i, MIN(GROUP, count - i), room[i / GROUP]);
            FN(multiply)(mr, GROUP / VL, half, acc, query, KB, groups[i / GROUP].keys, GROUP, dim, ahead[i / GROUP].keys);
#pragma GCC unroll 12
            for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
                for (int v = 0; v < GROUP / VL; v++)
                    FN(store)(scores + r * SPAN + i + v * VL, acc[r][v]);
        }
        for (int r = 0; r < mr; r++)
            factor[r] = FN(soften)(&state[r], scores + r * SPAN, MIN(count, positions[r] + 1 - start), count);
        int64_t d = 0;
        for (; mr <= TILE_ROWS / 2 && d + 4 * VL <= dim; d += 4 * VL)
            FN(mix)(mr, 4, half, out, factor, scores, groups, ahead, d, dim, count);
        for (; d + 2 * VL <= dim; d += 2 * VL)
            FN(mix)(mr, 2, half, out, factor, scores, groups, ahead, d, dim, count);
        for (; d + VL <= dim; d += VL)
            FN(mix)(mr, 1, half, out, factor, scores, groups, ahead, d, dim, count);
        for (int r = 0; d < dim && r < mr; r++)
            FN(mix_rest)(half, out + r * KB, factor[r], scores + r * SPAN, groups, d, dim, count);
    }
    for (int r = 0; r < mr; r++) {
        const float inverse = 1.f / FN(sum)(state[r].total);
        for (int64_t d = 0; d < dim; d++)
            c->out[(row + r) * width + head * dim + d] = out[r * KB + d] * inverse;
    }
}

static void FN(attend_f32)(int rows, const struct attention_call *c, const struct batch *b, int64_t row, const int32_t *table, int64_t head)
{
#define CALL(n) FN(attend)(n, 0, c, b, row, table, head)
    WITH_ROWS(rows, CALL)
#undef CALL
}

static void FN(attend_f16)(int rows, const struct attention_call *c, const struct batch *b, int64_t row, const int32_t *table, int64_t head)
{
#define CALL(n) FN(attend)(n, 1, c, b, row, table, head)
    WITH_ROWS(rows, CALL)
#undef CALL
}

static void FN(attention)(const void *call, const struct batch *b)
{
    const struct attention_call *c = call;
    /* An item is a tile and a run of heads, which lie side by side in a block: long, but enough of them for every thread. */
    const int64_t heads = c->kv.heads, runs = MIN(heads, DIV_UP(8 * pool_threads(), b->tile_count)), run = DIV_UP(heads, runs);
    for (int64_t item, items = b->tile_count * runs; (item = next_item()) < items;) {
        const int32_t *tile = b->tiles + 3 * ((items - 1 - item) / runs); /* the last rows look furthest: first */
        const int32_t *table = b->block_tables + tile[2] * b->table_width;
        const int64_t from = item % runs * run;
        for (int64_t head = from; head < MIN(heads, from + run); head++) {
            if (c->kv.half)
                FN(attend_f16)(tile[1], c, b, tile[0], table, head);
            else
                FN(attend_f32)(tile[1], c, b, tile[0], table, head);
        }
    }
}

/* === Scores === */

INLINE int FN(any)(vi mask)
{
    int32_t all = 0;
    for (int i = 0; i < VL; i++)
        all |= mask[i];
    return all != 0;
}

/* log of the sum of exp(x[i]); sums of 64 vectors first, so that small ones are not lost beside the whole. */
static float FN(log_sum)(const float *x, int64_t n)
{
    const int64_t whole = n / VL * VL;
    const vf rest = FN(select)(FN(first)(n - whole), FN(load_some)(x + whole, n - whole), FN(set)(-INFINITY));
    vf most = rest;
    for (int64_t i = 0; i < whole; i += VL)
        most = MAXV(most, FN(load)(x + i));
    const float peak = FN(largest)(most);
    vf total = FN(select)(FN(first)(n - whole), FN(exp)(rest - peak), (vf){0});
    for (int64_t i = 0; i < whole;) {
        vf part = {0};
        for (const int64_t stop = MIN(whole, i + 64 * VL); i < stop; i += VL)
            part += FN(exp)(FN(load)(x + i) - peak);
        total += part;
    }
    return peak + logf(FN(sum)(total));
}

static int64_t FN(rank)(const float *x, int64_t n, float own)
{
    const int64_t whole = n / VL * VL;
    vi above = {0};
    for (int64_t i = 0; i < whole; i += VL)
        above -= FN(load)(x + i) > own;
    int64_t rank = 1;
    for (int i = 0; i < VL; i++)
        rank += above[i];
    for (int64_t i = whole; i < n; i++)
        rank += x[i] > own;
    return rank;
}

/* The `top` largest of x, largest first. */
static void FN(largest_of)(const float *x, int64_t n, int64_t top, float *values, int64_t *ids)
{
    for (int64_t k = 0; k < top; k++)
        values[k] = -INFINITY, ids[k] = 0;
    for (int64_t i = 0; i < n; i += VL) {
        if (i + VL <= n && !FN(any)(FN(load)(x + i) > values[top - 1]))
            continue;
        for (int64_t j = i; j < MIN(n, i + VL); j++) {
            int64_t k = top;
            for (; k > 0 && x[j] > values[k - 1]; k--)
                if (k < top)
                    values[k] = values[k - 1], ids[k] = ids[k - 1];
            if (k < top)
                values[k] = x[j], ids[k] = j;
        }
    }
}

static void FN(score)(const void *call, const struct batch *b)
{
    const struct score_call *c = call;
    for (int64_t row; (row = next_item()) < b->rows;) {
        const float *x = c->logits + row * c->width, own = x[b->tokens[row]], all = FN(log_sum)(x, c->width);
        c->own[row] = own - all;
        c->rank[row] = FN(rank)(x, c->width, own);
        if (c->top)
            FN(largest_of)(x, c->width, c->top, c->values + row * c->top, c->ids + row * c->top);
        for (int64_t k = 0; k < c->top; k++)
            c->values[row * c->top + k] -= all;
    }
}

static const struct level FN(level) = {
    CAT(LEVEL_NAME_, LEVEL), PANEL, TILE_ROWS,
    {FN(pack), FN(linear), FN(norm), FN(embed), FN(write_kv), FN(attention), FN(score), FN(pack_rows)},
};
