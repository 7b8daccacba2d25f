/* What a request asks to be done to a row of logits before a token is picked from it: model/logits.py says the rules and their
 * order. Part of kernels.c, compiled once: the work follows the lists of a request and its text, not the vocabulary. */

static void add_biases(float *x, const struct sampling *s)
{
    for (int64_t i = 0; i < s->biases; i++)
        x[s->bias_ids[i]] += s->bias[i];
}

/* Whether the output ends with the first count - 1 tokens of run: (count,). */
static int nearly_said(const int64_t *output, int64_t produced, const int32_t *run, int64_t count)
{
    if (produced < count - 1)
        return 0;
    for (int64_t i = 0; i < count - 1; i++)
        if (output[produced - (count - 1) + i] != run[i])
            return 0;
    return 1;
}

static void ban(float *x, const struct sampling *s, const int64_t *output, int64_t produced)
{
    for (int64_t i = 0; produced < s->min_tokens && i < s->ends; i++)
        x[s->end_ids[i]] = -INFINITY;
    for (int64_t i = 0; i < s->bans; i++)
        x[s->ban_ids[i]] = -INFINITY;
    for (int64_t i = 0; i < s->runs; i++) {
        const int32_t *run = s->run_tokens + s->run_starts[i];
        const int64_t count = s->run_starts[i + 1] - s->run_starts[i];
        if (nearly_said(output, produced, run, count))
            x[run[count - 1]] = -INFINITY;
    }
}

/* counts: (width,) zeros, and left as zeros. */
static void penalise(float *x, const struct sampling *s, const struct sample_row *row, int32_t *counts)
{
    const int64_t start = s->penalty_range ? MAX(0, row->known - s->penalty_range) : 0;
    for (int64_t i = start; s->repetition != 1 && i < row->known; i++) {
        const int64_t token = row->tokens[i];
        if (!counts[token]++)
            x[token] = x[token] > 0 ? x[token] / s->repetition : x[token] * s->repetition;
    }
    for (int64_t i = start; s->repetition != 1 && i < row->known; i++)
        counts[row->tokens[i]] = 0;
    if (s->presence == 0 && s->frequency == 0)
        return;
    for (int64_t i = MAX(start, row->prompt); i < row->known; i++)
        counts[row->tokens[i]]++;
    for (int64_t i = MAX(start, row->prompt); i < row->known; i++) {
        const int64_t token = row->tokens[i];
        if (counts[token])
            x[token] -= counts[token] * s->frequency + s->presence;
        counts[token] = 0;
    }
}

/* === DRY: model/dry.py says what it is === */

/* How many tokens follow the last breaker in a text of `size`: all of them where there is none. */
static int64_t since_breaker(const int64_t *text, int64_t size, const struct sampling *s)
{
    for (int64_t at = size - 1; at >= 0; at--) {
        int64_t longest = -1;
        for (int32_t i = s->head_starts[text[at]]; i < s->head_starts[text[at] + 1]; i++) {
            const int32_t *tail = s->tail_tokens + s->tail_starts[s->tails[i]];
            const int64_t count = s->tail_starts[s->tails[i] + 1] - s->tail_starts[s->tails[i]];
            int64_t same = 0;
            while (same < count && at + 1 + same < size && text[at + 1 + same] == tail[same])
                same++;
            if (same == count)
                longest = MAX(longest, count);
        }
        if (longest >= 0)
            return size - at - 1 - longest;
    }
    return size;
}

static double power(double base, int64_t exponent)
{
    double result = 1;
    for (; exponent; exponent >>= 1, base *= base)
        if (exponent & 1)
            result *= base;
    return result;
}

/* lengths: (width,) zeros, and left as zeros; matches: (row->known,). Gusfield's Z algorithm on the reversed window. */
static void dry(float *x, const struct sampling *s, const struct sample_row *row, int32_t *lengths, int32_t *matches)
{
    const int64_t size = s->dry_last_n < 0 ? row->known : MIN(row->known, s->dry_last_n);
    const int64_t *window = row->tokens + row->known - size, *last = window + size - 1;
    const int64_t reach = size > s->dry_allowed_length ? since_breaker(window, size, s) : 0;
    if (size <= s->dry_allowed_length || reach < s->dry_allowed_length)
        return;
    for (int64_t i = 1, left = 0, right = 0; i < size; i++) {
        int64_t length = i < right ? MIN(right - i, matches[i - left]) : 0;
        while (i + length < size && last[-length] == last[-i - length])
            length++;
        matches[i] = (int32_t)length;
        if (i + length > right)
            left = i, right = i + length;
        const int64_t repeated = MIN(length, reach);
        if (repeated >= s->dry_allowed_length)
            lengths[last[1 - i]] = MAX(lengths[last[1 - i]], (int32_t)repeated + 1); /* + 1: 0 is none */
    }
    for (int64_t i = 1; i < size; i++) {
        const int64_t token = last[1 - i];
        if (lengths[token])
            x[token] -= (float)(s->dry_multiplier *
                                power(s->dry_base, MIN(lengths[token] - 1 - s->dry_allowed_length, s->dry_most)));
        lengths[token] = 0;
    }
}

/* All but the two masks: what a request allows comes before this, what a grammar allows after. x: (width,), a copy of the
 * row's logits; counts: (width,) of any content; matches: (row->known,). */
static void adjust(float *x, int64_t width, const struct sample_row *row, int32_t *counts, int32_t *matches)
{
    const struct sampling *s = row->request;
    if (s->repetition != 1 || s->presence != 0 || s->frequency != 0 || s->dry_multiplier != 0)
        memset(counts, 0, width * sizeof *counts);
    add_biases(x, s);
    ban(x, s, row->tokens + row->prompt, row->known - row->prompt);
    penalise(x, s, row, counts);
    if (s->dry_multiplier != 0)
        dry(x, s, row, counts, matches);
}
