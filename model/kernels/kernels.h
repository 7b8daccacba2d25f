/* Shapes and shared parts of the CPU kernels. See kernels.c for the story. */
#ifndef GPT2_KERNELS_H
#define GPT2_KERNELS_H

#include <stdatomic.h>
#include <stdint.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline))
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define DIV_UP(a, b) (((a) + (b) - 1) / (b))
#define ROUND_UP(a, b) (DIV_UP(a, b) * (b))

enum { ABI = 4 };           /* another number whenever a struct or an entry point below changes its meaning */
enum { KB = 256 };          /* columns of x packed together; also the largest head_dim, and one int8 group */
enum { GROUP = 16 };        /* positions of a key group */
enum { SPAN = 64 };         /* positions of one softmax step, aligned to position 0 whatever the chunk */
enum { SPREAD = 128 };      /* weights of one partial sum of a sampler */
enum { MAX_PANEL = 32 };
enum { LINE = 64 };         /* bytes of a cache line */

enum kind { KIND_F32, KIND_F16, KIND_I8 };
enum activation { ACT_NONE, ACT_GELU_TANH, ACT_GELU_ERF, ACT_RELU, ACT_SILU };

/* y = act(x Wt + bias) (+ residual), W (out, in) packed by OP_PACK of the same level. */
struct linear {
    int64_t in, out;
    int64_t kind;
    const void *panels; /* see kernels.c */
    const float *bias;  /* (out rounded up to MAX_PANEL), zeros where there is none */
    const float *scale; /* the same shape: int8 weights' scale of each output */
};

/* What every operation of one step shares: the rows, and where they belong. */
struct batch {
    int64_t rows, sequences, table_width;
    const int64_t *tokens, *positions, *slots; /* (rows,); slot = block * block_size + offset */
    const int32_t *query_starts;               /* (sequences + 1,) */
    const int32_t *block_tables;               /* (sequences, table_width) */
    void *packed;                              /* set by kernels_run: room for one packed x, or for samplers */
    int32_t *tiles;                            /* set by kernels_run: (tile_count, 3): first row, rows, sequence */
    int64_t tile_count;
};

struct linear_call {
    const struct linear *w;
    const float *x;        /* (rows, in) */
    const float *residual; /* (rows, out) or NULL */
    float *y;              /* (rows, out) */
    int32_t act;
};

/* Rows of x, quantised and packed: x = scale * (value - zero). */
struct quantised {
    uint8_t *values; /* (groups, rows of a tile, KB) */
    float *scale;    /* (groups, rows of a tile) */
    int32_t *zero;
};

/* The panel that a thread takes next, of which each tile of this one fetches its part: evenly, as memory and arithmetic keep
 * each other waiting otherwise. panel: NULL where there is nothing to fetch. */
struct next_panel {
    const char *panel;
    int64_t part, parts;
};

struct pack_call {
    const struct linear *w;
    const float *weight; /* element (o, i) at weight[o * stride_out + i * stride_in] */
    int64_t stride_out, stride_in;
};

struct norm_call {
    const float *x, *weight, *bias; /* (rows, width), (width,), (width,) */
    float *y;
    int64_t width;
    float epsilon;
};

struct embed_call {
    const struct linear *tokens; /* (vocab, width), packed: the head's own weights where the two are tied */
    const float *positions;      /* (n_positions, width) */
    float *y;                    /* (rows, width) */
    int64_t width;
};

/* One layer's cache. keys and values: (blocks, heads, block_size, head_dim) elements of fp32, or fp16 where half.
 * Within a block and head, values are (block_size, head_dim); keys are (block_size / GROUP, head_dim, GROUP), so that one
 * vector holds the same coordinate of GROUP positions; where GROUP does not divide block_size, (block_size, head_dim). */
struct kv {
    void *keys, *values;
    int64_t heads, block_size, head_dim;
    int32_t half;
};

/* OP_WRITE_KV reads kv and qkv alone. */
struct attention_call {
    struct kv kv;
    const float *qkv; /* (rows, 3, heads, head_dim) */
    float *out;       /* (rows, heads, head_dim) */
    float scale;
};

/* The log-softmax of batch->tokens, one a row; how many outscore it, and one; and the `top` likeliest, the likeliest first,
 * of equals the one before. */
struct score_call {
    const float *logits; /* (rows, width) */
    int64_t width, top;
    float *own;          /* (rows,) */
    int64_t *rank;       /* (rows,) */
    float *values;       /* (rows, top) */
    int64_t *ids;        /* (rows, top) */
};

/* What one request asks of the sampler. Run i is run_tokens[run_starts[i]] to run_tokens[run_starts[i + 1] - 1]. */
struct sampling {
    double top_p, typical_p, xtc_probability, xtc_threshold, dry_multiplier, dry_base;
    int64_t top_k;  /* 0: none */
    int64_t min_tokens;
    int64_t penalty_range; /* latest tokens that the penalties look at; 0: all */
    int64_t dry_allowed_length, dry_last_n /* -1: all */, dry_most /* the largest exponent */;
    const uint32_t *allowed; /* a bit for each token, or NULL */
    const int32_t *bias_ids;
    const float *bias;       /* -INFINITY bans */
    const int32_t *end_ids;  /* not before min_tokens */
    const int32_t *ban_ids;  /* never */
    const int32_t *run_tokens, *run_starts;                            /* never one after the other */
    const int32_t *head_starts, *tails, *tail_starts, *tail_tokens;    /* of dry: model.request_tables.Breakers */
    int64_t biases, ends, bans, runs;
    float temperature, min_p, presence, frequency, repetition;
    int32_t greedy;
    int32_t min_p_last, temperature_last;
    int32_t adjusts; /* whether anything but min_tokens and a grammar changes the logits */
};

struct sample_row {
    const struct sampling *request;
    const int64_t *tokens; /* (known,): the prompt, then the output */
    int64_t prompt, known;
    const uint32_t *grammar; /* a bit for each token that the grammar allows, or NULL */
    double uniform, coin;    /* in [0, 1) */
};

struct sample_call {
    const float *logits; /* (rows, width) */
    int64_t width;
    const struct sample_row *rows;
    int64_t longest; /* tokens known of a row */
    int64_t *tokens; /* (rows,); -1 where nothing is left that may be picked */
};

enum op { OP_PACK, OP_LINEAR, OP_NORM, OP_EMBED, OP_WRITE_KV, OP_ATTENTION, OP_SCORE, OP_SAMPLE,
          OP_PACK_ROWS /* of OP_LINEAR, by itself */, OPS };

struct step {
    int64_t op;
    const void *call;
};

/* One set of these for each instruction set. An operation is run by all threads of the pool at once. */
struct level {
    const char *name;
    int32_t panel, tile_rows; /* output columns of a panel; rows computed together */
    void (*ops[OPS])(const void *call, const struct batch *batch);
    size_t (*sample_room)(const struct sample_call *call); /* bytes of batch->packed that one thread needs */
};

#endif
