/* Attention over the paged cache. Part of ops.h. */

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
    const int64_t size = half ? 2 : 4;
    for (int64_t i = 0; i < count; i += GROUP)
        FN(multiply)(mr, nv, half, acc, weights + i, SPAN, groups[i / GROUP].values + at, dim, MIN(GROUP, count - i),
                     ahead[i / GROUP].values + at, dim * size, (int)DIV_UP(nv * VL * size, LINE));
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
            FN(multiply)(mr, GROUP / VL, half, acc, query, KB, groups[i / GROUP].keys, GROUP, dim, ahead[i / GROUP].keys,
                         GROUP * (half ? 2 : 4), 1);
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
