/* Layer norm and embedding. Part of ops.h. */

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
