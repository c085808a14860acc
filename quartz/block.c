/* Blocks of the network while it trains on a CPU, in bfloat16, forward and backward, their products included.

Read it when a training step on a CPU is slow. It computes what model.py's Block says; quartz/kernels.py calls it where
the processor multiplies bfloat16 in vectors. What is multiplied is bfloat16; sums, norms and the residual stream are
float32. Tokens go in chunks, each of which stays in a core's cache from one product to the next. A weight's gradient is a
sum over all tokens, in an order that only the shape decides: so bits do not depend on the number of threads.

What one core wrote and the other reads costs most, above all where cores have no cache in common. So two threads share
the sequences once for all blocks and both passes, and meet to lay out weights and to add up gradients.
*/

#include "attention.c"
#include "passes.c"
#include "products.h"

enum { C_ATTN, ATTN_PROJ, C_FC, MLP_PROJ, LINEARS };
enum { CHUNK = 64, STRIP = 4, DEPTH = 256, STRIP_PAIRS = DEPTH + 4 };

struct block {
    struct heads heads;         /* of bfloat16 */
    struct attention attention; /* of queries and keys as `heads` leaves them */
    int64_t width, hidden, is_gated, is_centred;
    int64_t dropped, seeds[2]; /* of what is added to the residual stream, as `dropout` of passes.c has it */
    float kept, eps;
    const float *weights[LINEARS], *biases[LINEARS], *norms[2], *norm_biases[2]; /* biases: or NULL */
};

struct gradients {
    float *weights[LINEARS], *biases[LINEARS], *norms[2], *norm_biases[2], *q_norm, *k_norm;
};

INLINE int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
INLINE int64_t tokens(const struct block *s) { return s->heads.batch * s->heads.length; }
INLINE int64_t chunks(const struct block *s) { return (tokens(s) + CHUNK - 1) / CHUNK; }
INLINE int64_t pairs(const struct block *s) { return (tokens(s) + 1) / 2; } /* of tokens */
INLINE int64_t turned_width(const struct block *s) { return (s->heads.n_head + s->heads.n_kv) * s->heads.head_dim; }
INLINE int64_t read_width(const struct block *s) { return s->heads.n_head * s->heads.head_dim; }

static int64_t inputs(const struct block *s, int64_t linear) {
    return linear == ATTN_PROJ ? read_width(s) : linear == MLP_PROJ ? s->hidden : s->width;
}

static int64_t outputs(const struct block *s, int64_t linear) {
    const int64_t qkv = read_width(s) + 2 * s->heads.n_kv * s->heads.head_dim;
    return linear == C_ATTN ? qkv : linear == C_FC ? s->hidden * (1 + s->is_gated) : s->width;
}

/* One thread takes a sequence from end to end, so that what is read of it is still in that core's cache, if sequences end
   with a chunk and are many. */
INLINE int64_t by_sequence(const struct block *s) {
    return s->heads.length % CHUNK == 0 && s->heads.batch >= 4 * s->heads.threads;
}

/* The tokens of the first half of the sequences; a gradient of weights is the sum of this half's and the other's. */
INLINE int64_t half(const struct block *s) {
    const int64_t is_cut = s->heads.length % CHUNK == 0 && s->heads.batch >= 8;
    return is_cut ? (s->heads.batch + 1) / 2 * s->heads.length : tokens(s);
}

/* Each of two threads takes a half, back through all blocks. */
INLINE int64_t by_halves(const struct block *s) { return half(s) < tokens(s) && s->heads.threads <= 2; }

/* ------------------------------------------------------------------------------------------------------------------ */
/* Memory: parts of one tensor of floats, each at a border of 64 bytes */

INLINE void *part_of(float *memory, int64_t *used, int64_t floats) {
    void *part = memory ? memory + *used : NULL;
    *used += (floats + 15) / 16 * 16;
    return part;
}

/* What the backward pass needs of the forward pass, but for what it soon has once more: what norms and activations gave.
   `next` is what the block gave, where another one follows. */
struct kept {
    float *mid, *stats[2], *scales, *logs, *next;
    uint16_t *qkv, *turned, *y, *h;
};

static struct kept kept_in(const struct block *s, int64_t is_last, float *memory, int64_t *used) {
    const int64_t n = tokens(s), d = s->heads.head_dim;
    struct kept k = {0};
    k.mid = part_of(memory, used, n * s->width);
    for (int64_t i = 0; i < 2; i++)
        k.stats[i] = part_of(memory, used, 2 * n); /* means, and what norms multiply by */
    k.logs = part_of(memory, used, n * s->heads.n_head);
    k.qkv = part_of(memory, used, n * outputs(s, C_ATTN) / 2);
    k.turned = k.qkv;
    if (s->heads.cos) {
        k.scales = part_of(memory, used, n * turned_width(s) / d);
        k.turned = part_of(memory, used, n * turned_width(s) / 2);
    }
    k.y = part_of(memory, used, n * read_width(s) / 2);
    k.h = part_of(memory, used, n * outputs(s, C_FC) / 2);
    k.next = part_of(memory, used, is_last ? 0 : n * s->width);
    return k;
}

/* What a pass works in. Of each block: its weights in panels, and in the backward pass sums over chunks, and gradients of
   weights over the second half of the tokens. Of all together: each thread's own; what linear layers read, in panels, and
   the gradients of what they gave. */
struct work {
    pair *weights[LINEARS];
    float *bias_sums[LINEARS], *norm_sums[2], *head_sums, *others[LINEARS];
    pair *read[LINEARS];
    uint16_t *gave[LINEARS], *grad_y;
    float *attention, *own;
    int64_t each; /* floats a thread */
};

static int64_t widest(const struct block *s) {
    int64_t wide = 0;
    for (int64_t i = 0; i < LINEARS; i++)
        wide = most(wide, most(inputs(s, i), outputs(s, i)));
    return wide;
}

static void work_of_all(const struct block *s, struct work *w, float *memory, int64_t *used, int64_t is_backward) {
    w->each = most(CHUNK * 2 * widest(s), PANEL * (STRIP_PAIRS + widest(s)));
    w->own = part_of(memory, used, s->heads.threads * w->each);
    w->attention = part_of(memory, used, s->heads.threads * scratch(&s->attention));
    if (!is_backward)
        return;
    for (int64_t i = 0; i < LINEARS; i++) {
        w->read[i] = part_of(memory, used, pairs(s) * inputs(s, i));
        w->gave[i] = part_of(memory, used, tokens(s) * outputs(s, i) / 2);
    }
    w->grad_y = part_of(memory, used, tokens(s) * read_width(s) / 2);
}

static void work_of_one(const struct block *s, struct work *w, float *memory, int64_t *used, int64_t is_backward) {
    for (int64_t i = 0; i < LINEARS; i++)
        w->weights[i] = part_of(memory, used, inputs(s, i) * outputs(s, i) / 2);
    if (!is_backward)
        return;
    for (int64_t i = 0; i < LINEARS; i++) {
        w->bias_sums[i] = part_of(memory, used, s->biases[i] ? chunks(s) * outputs(s, i) : 0);
        w->others[i] = part_of(memory, used, by_halves(s) ? inputs(s, i) * outputs(s, i) : 0);
    }
    for (int64_t i = 0; i < 2; i++)
        w->norm_sums[i] = part_of(memory, used, chunks(s) * 2 * s->width);
    w->head_sums = part_of(memory, used, chunks(s) * 2 * s->heads.head_dim);
}

/* Of `count` blocks that are alike: each in memory of its own, or, if no backward pass is to come, all in the same. */
static void kept_of(const struct block *s, int64_t count, int64_t keeps, float *memory, int64_t *used, struct kept *k) {
    for (int64_t nth = 0; nth < count; nth++)
        if (nth && !keeps)
            k[nth] = k[0];
        else
            k[nth] = kept_in(s + nth, keeps ? nth + 1 == count : count == 1, memory, used);
}

/* Likewise: all blocks at once, or one after the other in the same memory. */
static void work_of(const struct block *s, int64_t count, int64_t at_once, float *memory, int64_t *used, struct work *w,
                    int64_t is_backward) {
    work_of_all(s, w, memory, used, is_backward);
    for (int64_t nth = 0; nth < count; nth++) {
        w[nth] = w[0];
        if (!nth || at_once)
            work_of_one(s + nth, w + nth, memory, used, is_backward);
    }
}

/* Whether that is faster than to leave products to a library: with vectors of bfloat16, and no tiles (AMX). */
int64_t block_pays(void) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}

/* Four numbers of floats: what blocks_forward keeps for a backward pass; what it keeps if none is to come; what it works in;
   what blocks_backward works in. */
void blocks_sizes(const struct block *s, int64_t count, int64_t *sizes) {
    struct kept k[count];
    struct work w[count];
    int64_t floats[4] = {0};
    for (int64_t i = 0; i < 2; i++) {
        kept_of(s, count, !i, NULL, floats + i, k);
        work_of(s, count, i ? by_halves(s) : by_sequence(s), NULL, floats + 2 + i, w, i);
    }
    memcpy(sizes, floats, sizeof floats);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Products */

#ifdef _OPENMP
#define EACH_PART _Pragma("omp parallel for schedule(dynamic) num_threads(s->heads.threads)")
#define EACH_SEQUENCE _Pragma("omp parallel for schedule(static) num_threads(s->heads.threads)")
#else
#define EACH_PART
#define EACH_SEQUENCE
#endif

/* Columns from `column` on of rows (tokens, width), from token `first` on, into strips of STRIP columns, each `n` pairs,
   which lie a bit apart, or caches would mistake one for the other; what comes next is asked for in time. */
static void into_strips(const uint16_t *rows, int64_t tokens, int64_t width, int64_t first, int64_t n, int64_t column,
                        int64_t columns, pair *to) {
    for (int64_t k = 0; k < n; k++)
        for (int64_t j = 0; j < columns; j += WIDTH) {
            const int64_t t = first + 2 * k;
            __builtin_prefetch(rows + (t + AHEAD) * width + column + j);
            __builtin_prefetch(rows + (t + AHEAD + 1) * width + column + j);
            const ints its = pair_of_rows(rows + t * width + column + j, width, t + 1 == tokens);
            UNROLLED for (int64_t i = 0; i < WIDTH; i += STRIP)
                memcpy(to + (j + i) * STRIP_PAIRS + k * STRIP, (const pair *)&its + i, STRIP * sizeof(pair));
        }
}

/* c (last - first, columns): rows first to last of gave' read, over pairs of tokens from `begin` to `end` of those
   in gave (tokens, width) and in `read`, which lies in panels. */
static void multiply_tokens(int64_t first, int64_t last, int64_t columns, int64_t tokens, int64_t width,
                            const uint16_t *gave, const pair *read, int64_t begin, int64_t end, float *c, pair *strips) {
    const int64_t n = (tokens + 1) / 2;
    for (int64_t k = begin; k < end; k += DEPTH) {
        const int64_t depth = least(DEPTH, end - k);
        into_strips(gave, tokens, width, 2 * k, depth, first, last - first, strips);
        for (int64_t j = 0, wide; j < columns; j += PANEL) {
            const pair *panel = read + panel_at(j, columns, n, &wide) + k * wide;
            for (int64_t r = 0; r < last - first; r += STRIP)
                tiles(BFLOAT16, STRIP, wide, depth, strips + r * STRIP_PAIRS, 1, STRIP, panel, wide, c + r * columns + j,
                      columns, k > begin);
        }
    }
}

/* A weight (out, in) in panels of `out` columns and pairs of `in`, for x @ weight.T. */
static void weight_forward(const float *weight, int64_t in, int64_t out, int64_t column, pair *to) {
    int64_t wide;
    pair *panel = to + panel_at(column, out, in / 2, &wide);
    for (int64_t o = 0; o < wide; o += WIDTH)
        for (int64_t i = 0, more; i < in; i += more) {
            pair rows[WIDTH][WIDTH];
            more = least(2 * WIDTH, in - i);
            for (int64_t r = 0; r < WIDTH; r++)
                for (int64_t c = 0; c < more; c += WIDTH)
                    give(BFLOAT16, rows[r], c, load(FLOAT32, weight, (column + o + r) * in + i + c), WIDTH);
            transpose(WIDTH, more / 2, rows[0], WIDTH, panel + i / 2 * wide + o, wide);
        }
}

/* The same in panels of `in` columns and pairs of `out`, for grad @ weight. */
static void weight_backward(const float *weight, int64_t in, int64_t out, int64_t column, pair *to) {
    int64_t wide;
    pair *panel = to + panel_at(column, in, out / 2, &wide);
    for (int64_t o = 0; o < out; o += 2, panel += wide)
        for (int64_t i = 0; i < wide; i += WIDTH) {
            const float *its = weight + o * in + column + i;
            *(ints_at *)(panel + i) = paired_halves(rounded(load(FLOAT32, its, 0)), rounded(load(FLOAT32, its, in)));
        }
}

/* What is done for each 64 columns of every linear layer, in one loop: where those of a layer begin, and all end. */
struct parts {
    int64_t begin[LINEARS + 1];
};

static struct parts parts_of(const struct block *s, int64_t (*columns)(const struct block *, int64_t)) {
    struct parts parts = {{0}};
    for (int64_t i = 0; i < LINEARS; i++)
        parts.begin[i + 1] = parts.begin[i] + (columns(s, i) + PANEL - 1) / PANEL;
    return parts;
}

INLINE int64_t linear_of(const struct parts *parts, int64_t part) {
    int64_t i = 0;
    while (part >= parts->begin[i + 1])
        i++;
    return i;
}

static void lay_out_weights(const struct block *s, int64_t count, const struct work *w, int64_t is_backward) {
    const struct parts parts = parts_of(s, is_backward ? inputs : outputs);
    EACH_PART for (int64_t all = 0; all < count * parts.begin[LINEARS]; all++) {
        const int64_t nth = all / parts.begin[LINEARS], part = all % parts.begin[LINEARS], i = linear_of(&parts, part);
        const int64_t column = (part - parts.begin[i]) * PANEL;
        (is_backward ? weight_backward : weight_forward)(s[nth].weights[i], inputs(s, i), outputs(s, i), column,
                                                         w[nth].weights[i]);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Between the products, for rows of a chunk */

#define EACH_VECTOR(i, n) for (int64_t i = 0; i < (n); i += WIDTH)

/* stats: of each row the mean, 0 for an RMS norm, and what it was multiplied by. */
static void norm_rows(const struct block *s, int64_t which, int64_t count, const float *x, float *stats, uint16_t *y) {
    const int64_t width = s->width;
    for (int64_t r = 0; r < count; r++, x += width, y += width, stats += 2)
        if (s->is_centred)
            layer_norm(x, s->norms[which], s->norm_biases[which], width, s->eps, BFLOAT16, y, stats);
        else
            stats[0] = 0, stats[1] = rms_norm(x, s->norms[which], width, s->eps, BFLOAT16, y, 0);
}

/* to = beside + x's gradient, with that of y; sums (2, width): the gradients of weight and bias. And y once more. */
static void norm_rows_backward(const struct block *s, int64_t which, int64_t count, const float *x, const float *stats,
                               const float *grad, const float *beside, float *to, float *sums, uint16_t *y) {
    const int64_t width = s->width;
    const float *weight = s->norms[which], *bias = s->norm_biases[which];
    memset(sums, 0, 2 * width * sizeof *sums);
    for (int64_t r = 0; r < count; r++, x += width, grad += width, beside += width, to += width, y += width) {
        const float mean = stats[2 * r], scale = stats[2 * r + 1];
        vec along = {}, all = {};
        EACH_VECTOR(i, width) {
            vec unit = (load(FLOAT32, x, i) - mean) * scale, its = load(FLOAT32, grad, i);
            vec factor = load(FLOAT32, weight, i), given = unit * factor;
            put(sums + i, load(FLOAT32, sums, i) + its * unit, WIDTH);
            if (bias)
                put(sums + width + i, load(FLOAT32, sums, width + i) + its, WIDTH);
            give(BFLOAT16, y, i, bias ? given + load(FLOAT32, bias, i) : given, WIDTH);
            its *= factor;
            along += its * unit;
            all += its;
        }
        const float by_unit = total(along) / width, by_mean = s->is_centred ? total(all) / width : 0;
        EACH_VECTOR(i, width) {
            vec unit = (load(FLOAT32, x, i) - mean) * scale, its = load(FLOAT32, grad, i) * load(FLOAT32, weight, i);
            put(to + i, load(FLOAT32, beside, i) + (its - unit * by_unit - by_mean) * scale, WIDTH);
        }
    }
}

/* Numbers from number `at` on of what is added to the residual stream, behind dropout. */
INLINE vec behind_dropout(const struct block *s, uint32_t seed, int64_t at, vec its) {
    return s->dropped ? its * kept((uint32_t)at, 1, seed, s->dropped, s->kept) : its;
}

/* to = x + dropout(sums + bias), for rows from `first` on */
static void add_rows(const struct block *s, int64_t which, int64_t first, int64_t count, const float *sums,
                     const float *bias, const float *x, float *to) {
    const int64_t width = s->width;
    const uint32_t seed = seed_from(s->seeds[which], 0);
    for (int64_t r = 0; r < count; r++)
        EACH_VECTOR(i, width) {
            const int64_t at = (first + r) * width + i;
            vec its = load(FLOAT32, sums, r * width + i);
            if (bias)
                its += load(FLOAT32, bias, i);
            put(to + at, load(FLOAT32, x, at) + behind_dropout(s, seed, at, its), WIDTH);
        }
}

/* The gradient of what was added: rows of grad from `first` on, behind dropout. */
static void added_rows(const struct block *s, int64_t which, int64_t first, int64_t count, const float *grad, uint16_t *to) {
    const uint32_t seed = seed_from(s->seeds[which], 0);
    EACH_VECTOR(i, count * s->width) {
        const int64_t at = first * s->width + i;
        give(BFLOAT16, to, i, behind_dropout(s, seed, at, load(FLOAT32, grad, at)), WIDTH);
    }
}

static void round_rows(int64_t count, int64_t width, const float *sums, const float *bias, uint16_t *to) {
    for (int64_t r = 0; r < count; r++, sums += width, to += width)
        EACH_VECTOR(i, width) {
            vec its = load(FLOAT32, sums, i);
            give(BFLOAT16, to, i, bias ? its + load(FLOAT32, bias, i) : its, WIDTH);
        }
}

static void activate_rows(const struct block *s, int64_t count, const uint16_t *h, uint16_t *to) {
    const int64_t hidden = s->hidden;
    if (!s->is_gated)
        EACH_VECTOR(i, count * hidden) give(BFLOAT16, to, i, gelu(load(BFLOAT16, h, i)), WIDTH);
    else
        for (int64_t r = 0; r < count; r++, h += 2 * hidden, to += hidden)
            EACH_VECTOR(i, hidden)
                give(BFLOAT16, to, i, swiglu(load(BFLOAT16, h, i), load(BFLOAT16, h, hidden + i)), WIDTH);
}

/* to: the gradient of h, with that of what activate_rows gave; and that once more */
static void activate_rows_backward(const struct block *s, int64_t count, const uint16_t *h, const float *grad,
                                   uint16_t *to, uint16_t *gave) {
    const int64_t hidden = s->hidden;
    if (!s->is_gated)
        EACH_VECTOR(i, count * hidden) {
            vec x = load(BFLOAT16, h, i);
            give(BFLOAT16, gave, i, gelu(x), WIDTH);
            give(BFLOAT16, to, i, load(FLOAT32, grad, i) * gelu_slope(x), WIDTH);
        }
    else
        for (int64_t r = 0; r < count; r++, h += 2 * hidden, to += 2 * hidden, grad += hidden, gave += hidden)
            EACH_VECTOR(i, hidden) {
                vec g = load(FLOAT32, grad, i), gate = load(BFLOAT16, h, i), up = load(BFLOAT16, h, hidden + i);
                give(BFLOAT16, gave, i, swiglu(gate, up), WIDTH);
                give(BFLOAT16, to, i, g * swiglu_slope(gate, up), WIDTH);
                give(BFLOAT16, to, hidden + i, g * silu(gate), WIDTH);
            }
}

/* The gradient of a linear layer's bias, from that of what it gave: of rows from `first` on */
static void sum_bias(const struct block *s, const struct work *w, int64_t linear, int64_t first, int64_t count) {
    const int64_t width = outputs(s, linear);
    const uint16_t *rows = w->gave[linear] + first * width;
    if (!s->biases[linear])
        return;
    float *sums = w->bias_sums[linear] + first / CHUNK * width;
    memset(sums, 0, width * sizeof *sums);
    for (int64_t r = 0; r < count; r++)
        EACH_VECTOR(i, width) put(sums + i, load(FLOAT32, sums, i) + load(BFLOAT16, rows, r * width + i), WIDTH);
}

/* to = the sum of `count` rows, each of which lies `stride` behind the one before */
static void sum_rows(int64_t count, int64_t stride, int64_t width, const float *rows, float *to) {
    memset(to, 0, width * sizeof *to);
    for (int64_t r = 0; r < count; r++)
        EACH_VECTOR(i, width) put(to + i, load(FLOAT32, to, i) + load(FLOAT32, rows, r * stride + i), WIDTH);
}

/* ------------------------------------------------------------------------------------------------------------------ */

INLINE float *own_of(const struct work *w) { return w->own + omp_get_thread_num() * w->each; }

#define OF_CHUNK                                                                                                       \
    const int64_t width = s->width, first = chunk * CHUNK, count = least(CHUNK, tokens(s) - first);                    \
    float *sums = own_of(w);

/* Behind `sums`, as many halves twice. */
INLINE uint16_t *halves(const struct block *s, float *sums, int64_t nth) {
    return (uint16_t *)(sums + CHUNK * widest(s)) + nth * CHUNK * widest(s);
}

/* A chunk, up to queries, keys and values. */
static void before_attention(const struct block *s, const struct kept *k, const struct work *w, const float *x,
                             int64_t chunk) {
    OF_CHUNK
    const int64_t qkv = outputs(s, C_ATTN), d = s->heads.head_dim, turned_heads = s->heads.n_head + s->heads.n_kv;
    uint16_t *rows = halves(s, sums, 0);
    norm_rows(s, 0, count, x + first * width, k->stats[0] + 2 * first, rows);
    multiply(count, qkv, width / 2, rows, w->weights[C_ATTN], sums);
    round_rows(count, qkv, sums, s->biases[C_ATTN], k->qkv + first * qkv);
    if (s->heads.cos)
        for (int64_t row = first; row < first + count; row++)
            for (int64_t head = 0; head < turned_heads; head++)
                turn_head(&s->heads, head, row % s->heads.length, k->qkv + row * qkv + head * d,
                          k->turned + (row * turned_heads + head) * d, k->scales + row * turned_heads + head);
}

/* And from what was read by attention to the end. */
static void after_attention(const struct block *s, const struct kept *k, const struct work *w, const float *x, float *to,
                            int64_t chunk) {
    OF_CHUNK
    const int64_t read = read_width(s), h = outputs(s, C_FC);
    uint16_t *rows = halves(s, sums, 0), *active = halves(s, sums, 1);
    multiply(count, width, read / 2, k->y + first * read, w->weights[ATTN_PROJ], sums);
    add_rows(s, 0, first, count, sums, s->biases[ATTN_PROJ], x, k->mid);
    norm_rows(s, 1, count, k->mid + first * width, k->stats[1] + 2 * first, rows);
    multiply(count, h, width / 2, rows, w->weights[C_FC], sums);
    round_rows(count, h, sums, s->biases[C_FC], k->h + first * h);
    activate_rows(s, count, k->h + first * h, active);
    multiply(count, width, s->hidden / 2, active, w->weights[MLP_PROJ], sums);
    add_rows(s, 1, first, count, sums, s->biases[MLP_PROJ], k->mid, to);
}

#define EACH_CHUNK(first, last) for (int64_t chunk = (first) / CHUNK; chunk < ((last) + CHUNK - 1) / CHUNK; chunk++)
#define EACH_OF_SEQUENCE(head, sequence)                                                                               \
    for (int64_t head = (sequence) * s->heads.n_kv; head < ((sequence) + 1) * s->heads.n_kv; head++)

INLINE void attend_head(const struct block *s, const struct kept *k, const struct work *w, int64_t head) {
    attend(&s->attention, head, k->turned, k->turned + read_width(s), k->qkv + turned_width(s), k->y, k->logs, w->attention);
}

static void sequence_forward(const struct block *s, const struct kept *k, const struct work *w, const float *x, float *y,
                             int64_t sequence) {
    const int64_t first = sequence * s->heads.length, last = first + s->heads.length;
    EACH_CHUNK(first, last) before_attention(s, k, w, x, chunk);
    EACH_OF_SEQUENCE(head, sequence) attend_head(s, k, w, head);
    EACH_CHUNK(first, last) after_attention(s, k, w, x, y, chunk);
}

static void block_forward(const struct block *s, const struct kept *k, const struct work *w, const float *x, float *y) {
    lay_out_weights(s, 1, w, 0);
    EACH_PART EACH_CHUNK(0, tokens(s)) before_attention(s, k, w, x, chunk);
    EACH_PART for (int64_t head = 0; head < s->heads.batch * s->heads.n_kv; head++)
        attend_head(s, k, w, head);
    EACH_PART EACH_CHUNK(0, tokens(s)) after_attention(s, k, w, x, y, chunk);
}

#define FROM(nth) ((nth) ? k[(nth)-1].next : x)
#define TO(nth) ((nth) + 1 < count ? k[nth].next : y)

/* x, y (batch, T, width): what goes into the first of `count` blocks that are alike, and what comes out of the last; kept,
   work: of blocks_sizes. */
void blocks_forward(const struct block *s, int64_t count, int64_t keeps, const float *x, float *y, float *kept_memory,
                    float *work_memory) {
    const int64_t at_once = by_sequence(s);
    struct kept k[count];
    struct work w[count];
    kept_of(s, count, keeps, kept_memory, &(int64_t){0}, k);
    work_of(s, count, at_once, work_memory, &(int64_t){0}, w, 0);
    if (at_once) {
        lay_out_weights(s, count, w, 0);
        EACH_SEQUENCE for (int64_t sequence = 0; sequence < s->heads.batch; sequence++)
            for (int64_t nth = 0; nth < count; nth++)
                sequence_forward(s + nth, k + nth, w + nth, FROM(nth), TO(nth), sequence);
    } else
        for (int64_t nth = 0; nth < count; nth++)
            block_forward(s + nth, k + nth, w, FROM(nth), TO(nth));
}

/* Back from the end to attention, for a chunk; grad_x is not all of it yet. */
static void back_to_attention(const struct block *s, const struct kept *k, const struct work *w, const float *grad,
                              float *grad_x, int64_t chunk) {
    OF_CHUNK
    const int64_t read = read_width(s), h = outputs(s, C_FC);
    uint16_t *added = w->gave[MLP_PROJ] + first * width, *slopes = w->gave[C_FC] + first * h, *rows = halves(s, sums, 0);
    added_rows(s, 1, first, count, grad, added);
    multiply(count, s->hidden, width / 2, added, w->weights[MLP_PROJ], sums);
    activate_rows_backward(s, count, k->h + first * h, sums, slopes, rows);
    into_panels(rows, count, s->hidden, first, pairs(s), w->read[MLP_PROJ]);
    multiply(count, width, h / 2, slopes, w->weights[C_FC], sums);
    norm_rows_backward(s, 1, count, k->mid + first * width, k->stats[1] + 2 * first, sums, grad + first * width,
                       grad_x + first * width, w->norm_sums[1] + chunk * 2 * width, rows);
    into_panels(rows, count, width, first, pairs(s), w->read[C_FC]);
    added = w->gave[ATTN_PROJ] + first * width;
    added_rows(s, 0, first, count, grad_x, added);
    multiply(count, read, width / 2, added, w->weights[ATTN_PROJ], sums);
    round_rows(count, read, sums, NULL, w->grad_y + first * read);
    into_panels(k->y + first * read, count, read, first, pairs(s), w->read[ATTN_PROJ]);
}

/* And on to x. */
static void back_to_x(const struct block *s, const struct kept *k, const struct work *w, const float *x, float *grad_x,
                      int64_t chunk) {
    OF_CHUNK
    const int64_t qkv = outputs(s, C_ATTN), d = s->heads.head_dim, turned_heads = s->heads.n_head + s->heads.n_kv;
    uint16_t *grad_qkv = w->gave[C_ATTN], *rows = halves(s, sums, 0);
    float *head_sums = w->head_sums + chunk * 2 * d;
    memset(head_sums, 0, 2 * d * sizeof *head_sums);
    if (s->heads.cos)
        for (int64_t row = first; row < first + count; row++)
            for (int64_t head = 0; head < turned_heads; head++) {
                uint16_t *its = grad_qkv + row * qkv + head * d;
                turn_head_backward(&s->heads, head, row % s->heads.length, k->qkv + row * qkv + head * d,
                                   k->scales[row * turned_heads + head], its, its, head_sums);
            }
    multiply(count, width, qkv / 2, grad_qkv + first * qkv, w->weights[C_ATTN], sums);
    norm_rows_backward(s, 0, count, x + first * width, k->stats[0] + 2 * first, sums, grad_x + first * width,
                       grad_x + first * width, w->norm_sums[0] + chunk * 2 * width, rows);
    into_panels(rows, count, width, first, pairs(s), w->read[C_ATTN]);
    for (int64_t i = 0; i < LINEARS; i++)
        sum_bias(s, w, i, first, count);
}

INLINE void attend_head_backward(const struct block *s, const struct kept *k, const struct work *w, int64_t head) {
    uint16_t *grad_qkv = w->gave[C_ATTN];
    attend_backward(&s->attention, head, k->turned, k->turned + read_width(s), k->qkv + turned_width(s), k->y, k->logs,
                    w->grad_y, grad_qkv, grad_qkv + read_width(s), grad_qkv + turned_width(s), w->attention);
}

static void sequence_backward(const struct block *s, const struct kept *k, const struct work *w, const float *x,
                              const float *grad, float *grad_x, int64_t sequence) {
    const int64_t first = sequence * s->heads.length, last = first + s->heads.length;
    EACH_CHUNK(first, last) back_to_attention(s, k, w, grad, grad_x, chunk);
    EACH_OF_SEQUENCE(head, sequence) attend_head_backward(s, k, w, head);
    EACH_CHUNK(first, last) back_to_x(s, k, w, x, grad_x, chunk);
}

/* 64 rows of the gradient of a weight, over pairs of tokens from `begin` to `end`; c: its first row */
static void weight_rows(const struct block *s, const struct work *w, int64_t linear, int64_t row, int64_t begin,
                        int64_t end, float *c) {
    multiply_tokens(row, least(row + PANEL, outputs(s, linear)), inputs(s, linear), tokens(s), outputs(s, linear),
                    w->gave[linear], w->read[linear], begin, end, c, (pair *)own_of(w));
}

static void add_to(int64_t n, const float *others, float *to) {
    EACH_VECTOR(i, n) put(to + i, load(FLOAT32, to, i) + load(FLOAT32, others, i), WIDTH);
}

/* What of gradients is a sum over chunks. */
static void sum_chunks(const struct block *s, const struct work *w, const struct gradients *to) {
    const int64_t width = s->width, d = s->heads.head_dim;
    for (int64_t i = 0; i < LINEARS; i++)
        if (to->biases[i])
            sum_rows(chunks(s), outputs(s, i), outputs(s, i), w->bias_sums[i], to->biases[i]);
    for (int64_t i = 0; i < 2; i++) {
        sum_rows(chunks(s), 2 * width, width, w->norm_sums[i], to->norms[i]);
        if (to->norm_biases[i])
            sum_rows(chunks(s), 2 * width, width, w->norm_sums[i] + width, to->norm_biases[i]);
    }
    if (to->q_norm) {
        sum_rows(chunks(s), 2 * d, d, w->head_sums, to->q_norm);
        sum_rows(chunks(s), 2 * d, d, w->head_sums + d, to->k_norm);
    }
}

/* The gradients of part `part` of all weights, over both halves of the tokens. */
static void weight_part(const struct block *s, const struct work *w, const struct gradients *to, int64_t part,
                        const struct parts *parts) {
    const int64_t i = linear_of(parts, part), row = (part - parts->begin[i]) * PANEL, columns = inputs(s, i);
    float *c = to->weights[i] + row * columns, *other = own_of(w) + PANEL * STRIP_PAIRS;
    weight_rows(s, w, i, row, 0, (half(s) + 1) / 2, c);
    if (half(s) < tokens(s)) {
        weight_rows(s, w, i, row, half(s) / 2, tokens(s) / 2, other);
        add_to((least(row + PANEL, outputs(s, i)) - row) * columns, other, c);
    }
}

/* Of one block, by any number of threads; the bits are those of half_backward and add_halves. */
static void block_backward(const struct block *s, const struct kept *k, const struct work *w, const float *x,
                           const float *grad, float *grad_x, const struct gradients *to) {
    const struct parts parts = parts_of(s, outputs);
    lay_out_weights(s, 1, w, 1);
    if (by_sequence(s)) {
        EACH_PART for (int64_t sequence = 0; sequence < s->heads.batch; sequence++)
            sequence_backward(s, k, w, x, grad, grad_x, sequence);
    } else {
        EACH_PART EACH_CHUNK(0, tokens(s)) back_to_attention(s, k, w, grad, grad_x, chunk);
        EACH_PART for (int64_t head = 0; head < s->heads.batch * s->heads.n_kv; head++)
            attend_head_backward(s, k, w, head);
        EACH_PART EACH_CHUNK(0, tokens(s)) back_to_x(s, k, w, x, grad_x, chunk);
    }
    EACH_PART for (int64_t part = 0; part < parts.begin[LINEARS]; part++)
        weight_part(s, w, to, part, &parts);
    sum_chunks(s, w, to);
}

/* A half of the sequences, back through all blocks. */
static void half_backward(const struct block *s, int64_t count, const struct kept *k, const struct work *w, const float *x,
                          const float *grad, float *grad_x, const struct gradients *to, int64_t is_second) {
    const int64_t first = is_second ? half(s) : 0, last = is_second ? tokens(s) : half(s), length = s->heads.length;
    for (int64_t nth = count - 1; nth >= 0; nth--, grad = grad_x) {
        for (int64_t sequence = first / length; sequence < last / length; sequence++)
            sequence_backward(s + nth, k + nth, w + nth, FROM(nth), grad, grad_x, sequence);
        for (int64_t i = 0; i < LINEARS; i++)
            for (int64_t row = 0; row < outputs(s, i); row += PANEL) {
                float *c = is_second ? w[nth].others[i] : to[nth].weights[i];
                weight_rows(s + nth, w + nth, i, row, first / 2, last / 2, c + row * inputs(s, i));
            }
    }
}

/* To the gradients over the first half of the tokens, those over the second; and what is a sum over chunks. */
static void add_halves(const struct block *s, int64_t count, const struct work *w, const struct gradients *to) {
    EACH_PART for (int64_t part = 0; part < count * LINEARS; part++) {
        const int64_t nth = part / LINEARS, i = part % LINEARS;
        add_to(inputs(s, i) * outputs(s, i), w[nth].others[i], to[nth].weights[i]);
    }
    for (int64_t nth = 0; nth < count; nth++)
        sum_chunks(s + nth, w + nth, to + nth);
}

/* With x, what blocks_forward kept, and the gradient of y: that of x, and of each block's weights. */
void blocks_backward(const struct block *s, int64_t count, const float *x, float *kept_memory, const float *grad,
                     float *grad_x, const struct gradients *to, float *work_memory) {
    const int64_t at_once = by_halves(s);
    struct kept k[count];
    struct work w[count];
    kept_of(s, count, 1, kept_memory, &(int64_t){0}, k);
    work_of(s, count, at_once, work_memory, &(int64_t){0}, w, 1);
    if (at_once) {
        lay_out_weights(s, count, w, 1);
        EACH_SEQUENCE for (int64_t is_second = 0; is_second < 2; is_second++)
            half_backward(s, count, k, w, x, grad, grad_x, to, is_second);
        add_halves(s, count, w, to);
    } else
        for (int64_t nth = count - 1; nth >= 0; nth--, grad = grad_x)
            block_backward(s + nth, k + nth, w, FROM(nth), grad, grad_x, to + nth);
}
