/* Linear layers. Part of ops.h. */

/* Where a tile begins to fetch its part of the next panel, or NULL. It goes on by `bytes / next.parts` for each `bytes` of its
 * own panel; where it has no other tile to share with, that is more than one line at a time. */
INLINE const char *FN(ahead)(const struct next_panel *next, int64_t panel_bytes)
{
    return next->panel ? next->panel + next->part * (panel_bytes / next->parts) : NULL;
}

INLINE int FN(lines_ahead)(const struct next_panel *next, int64_t bytes) { return (int)DIV_UP(bytes / next->parts, LINE); }

/* out: (mr, PANEL) = x w. x: one packed tile whose groups are `height` rows apart; w: one panel. */
INLINE void FN(tile_float)(const int mr, const int half, float *out, const float *x, int height, const char *w, int64_t in,
                           const struct next_panel *next)
{
    const int64_t bytes = PANEL * (half ? 2 : 4);
    const char *ahead = FN(ahead)(next, in * bytes);
    vf acc[TILE_ROWS][4] = {0};
    for (int64_t k = 0; k < in; k += KB) {
        const int64_t n = MIN(KB, in - k);
        FN(multiply)(mr, 2, half, acc, x, KB, w, PANEL, n, ahead, bytes / next->parts, FN(lines_ahead)(next, bytes));
        x += height * KB;
        w += n * bytes;
        ahead = ahead ? ahead + n * (bytes / next->parts) : NULL;
    }
#pragma GCC unroll 12
    for (int r = 0; r < mr; r++) {
        FN(store)(out + r * PANEL, acc[r][0]);
        FN(store)(out + r * PANEL + VL, acc[r][1]);
    }
}

static void FN(tile_f32)(int rows, float *out, const float *x, int height, const char *w, int64_t in,
                         const struct next_panel *next)
{
#define CALL(n) FN(tile_float)(n, 0, out, x, height, w, in, next)
    WITH_ROWS(rows, CALL)
#undef CALL
}

static void FN(tile_f16)(int rows, float *out, const float *x, int height, const char *w, int64_t in,
                         const struct next_panel *next)
{
#define CALL(n) FN(tile_float)(n, 1, out, x, height, w, in, next)
    WITH_ROWS(rows, CALL)
#undef CALL
}

/* The same for int8. scale and zero: (groups, height) of this tile. out is still to be scaled by the weights' scales. */
INLINE void FN(tile_int8)(const int mr, float *out, const struct quantised *x, int height, const char *w, int64_t in,
                          const struct next_panel *next)
{
    const uint8_t *q = x->values;
    const char *ahead = FN(ahead)(next, ROUND_UP(in, 4) * PANEL);
    const int lines = FN(lines_ahead)(next, PANEL * 4);
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
            for (int line = 0; ahead && line < lines; line++)
                __builtin_prefetch(ahead + line * LINE, 0, 2);
            ahead = ahead ? ahead + PANEL * 4 / next->parts : NULL;
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

static void FN(tile_i8)(int rows, float *out, const struct quantised *x, int height, const char *w, int64_t in,
                        const struct next_panel *next)
{
#define CALL(n) FN(tile_int8)(n, out, x, height, w, in, next)
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
    for (int64_t item = next_item(), after; item < panels * runs; item = after) {
        const int64_t panel = item / runs, from = item % runs * run, end = MIN(DIV_UP(b->rows, height), from + run);
        const char *weights = (const char *)w->panels + panel * bytes;
        after = next_item();
        const int another = after < panels * runs && after / runs != panel;
        struct next_panel next = {another ? (const char *)w->panels + after / runs * bytes : NULL, 0, MAX(1, end - from)};
        for (int64_t tile = from; tile < end; tile++, next.part++) {
            float acc[TILE_ROWS * PANEL];
            const int rows = (int)MIN(height, b->rows - tile * height);
            const float *x = as_is ? c->x : (const float *)b->packed + tile * height * groups * KB;
            const struct quantised q = FN(tile_of)(b, tile, height, groups);
            switch (w->kind) {
            case KIND_F32: FN(tile_f32)(rows, acc, x, height, weights, w->in, &next); break;
            case KIND_F16: FN(tile_f16)(rows, acc, x, height, weights, w->in, &next); break;
            default: FN(tile_i8)(rows, acc, &q, height, weights, w->in, &next);
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
