/* From rows of logits to tokens, by the definition in model/picking.py. Part of ops.h. */

/* A weight below which no token can be among those that min_p, top_k and top_p keep. min_p: 0 where it comes later. */
static float FN(least)(const struct FN(draft) *d, const struct sampling *s, float min_p, double total)
{
    const int64_t blocks = DIV_UP(d->width, SPREAD);
    float least = MAX(min_p, d->smallest);
    if (s->top_k > 0 && s->top_k < d->width) /* k blocks have a token each that reaches the k-th largest of their maxima */
        least = MAX(least, s->top_k <= blocks ? FN(kth_largest)(d->most, blocks, s->top_k, 31)
                                              : FN(kth_largest)(d->weights, d->width, s->top_k, 8));
    else if (s->top_p < 1 && min_p == 0) /* all that weigh less could not make up what top_p leaves out */
        least = MAX(least, (float)((1 - s->top_p) * total / d->width * 0.999));
    return least;
}

static void FN(keep_best_of_all)(struct FN(draft) *d, const struct sampling *s, double total)
{
    const float min_p = s->min_p_last ? 0 : s->min_p;
    FN(collect)(d, FN(least)(d, s, min_p, total));
    if (s->top_k > 0)
        FN(keep_top_k)(d, s->top_k);
    if (s->top_p < 1)
        FN(keep_top_p)(d, s->top_p * (s->top_k > 0 || min_p > 0 ? FN(mass)(d->kept, d->count, d->coarse) : total));
    if (s->min_p_last)
        FN(keep_min_p)(d, s->min_p);
    if (s->typical_p < 1) {
        const double all = FN(mass)(d->kept, d->count, d->coarse);
        FN(keep_typical)(d, s->typical_p, all, FN(sum_tempered)(d, d->kept, d->ids, d->count) / all);
    }
}

static int64_t FN(pick)(struct FN(draft) *d, const struct sample_row *row)
{
    const struct sampling *s = row->request;
    const float inverse = 1 / s->temperature;
    const int cuts = s->top_k > 0 || s->min_p > 0 || s->top_p < 1, typical = s->typical_p < 1;
    const int excludes = row->coin < s->xtc_probability && s->xtc_threshold <= 0.5;
    const int filters = cuts || typical || excludes;
    d->inverse = filters && s->temperature_last ? 1 : inverse;
    const double total = FN(weigh)(d);
    if (!filters)
        return FN(draw_any)(d, total, row->uniform);
    if (typical && !cuts)
        FN(keep_typical_of_all)(d, s->typical_p, total);
    else
        FN(keep_best_of_all)(d, s, total);
    if (excludes)
        FN(exclude_top_choices)(d, s->xtc_threshold * FN(mass)(d->kept, d->count, d->coarse));
    if (s->temperature_last)
        FN(temper)(d, inverse);
    return FN(draw_kept)(d, row->uniform);
}

/* === The operation === */

/* Where one thread works: everything in a draft, a copy of the logits, and what `adjust` needs. */
static size_t FN(sample_room)(const struct sample_call *c)
{
    const size_t row = ROUND_UP(c->width + VL, LINE), blocks = ROUND_UP(DIV_UP(c->width, SPREAD), LINE);
    return 9 * row * 4 + blocks * (8 + 4) + ROUND_UP(c->longest, LINE) * 4;
}

/* The row's logits as the request wants them: themselves where it changes nothing, else in `copy`. */
static const float *FN(adjusted)(const struct sample_call *c, const struct sample_row *row, float *copy, int32_t *counts,
                                 int32_t *matches)
{
    const float *raw = c->logits + (row - c->rows) * c->width;
    const struct sampling *s = row->request;
    if (!s->adjusts && !row->grammar && row->known - row->prompt >= s->min_tokens)
        return raw;
    if (s->allowed)
        FN(mask)(copy, raw, c->width, s->allowed);
    else
        memcpy(copy, raw, c->width * sizeof *copy);
    adjust(copy, c->width, row, counts, matches);
    if (row->grammar)
        FN(mask)(copy, copy, c->width, row->grammar);
    return copy;
}

static void FN(sample)(const void *call, const struct batch *b)
{
    const struct sample_call *c = call;
    const size_t row = ROUND_UP(c->width + VL, LINE), blocks = ROUND_UP(DIV_UP(c->width, SPREAD), LINE);
    float *room = (float *)((char *)b->packed + thread_number * FN(sample_room)(c)), *copy = room;
    struct FN(draft) d = {.width = c->width, .coarse = 1};
    while (d.coarse < c->width)
        d.coarse *= 2;
    d.smallest = nextafterf((float)(d.coarse * 0x1p-53), 1);
    d.sums = (double *)(room + 9 * row), d.most = (float *)(d.sums + blocks);
    d.weights = room + row, d.ids = (int32_t *)room + 2 * row, d.kept = room + 3 * row, d.keys = (int32_t *)room + 4 * row;
    d.some_keys = (int32_t *)room + 5 * row, d.some_masses = room + 6 * row, d.ones = room + 7 * row;
    d.tempered = room + 8 * row;
    for (int64_t i; (i = next_item()) < b->rows;) {
        const struct sample_row *r = c->rows + i;
        d.logits = FN(adjusted)(c, r, copy, d.keys, (int32_t *)(d.most + blocks));
        d.peak = FN(peak)(d.logits, c->width);
        if (d.peak == -INFINITY && r->grammar) { /* nothing overrules a grammar */
            FN(mask)(copy, c->logits + i * c->width, c->width, r->grammar);
            d.peak = FN(peak)(copy, c->width);
        }
        if (!(d.peak > -INFINITY)) {
            c->tokens[i] = -1;
        } else if (r->request->greedy) {
            c->tokens[i] = FN(best)(d.logits, c->width, d.peak);
        } else {
            c->tokens[i] = FN(pick)(&d, r);
        }
    }
}
