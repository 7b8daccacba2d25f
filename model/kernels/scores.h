/* Log-probabilities and ranks of tokens. Part of ops.h. */

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
