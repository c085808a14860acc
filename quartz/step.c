/* The step of a GPT on a CPU: tokens of several texts in, or a prompt's, the logits that follow each of them out.

Read it to see what a token costs once nothing is in the way of reading the weights. It computes what model.py says, with
weights of float32, bfloat16 or int8 and sums in float32; quartz/compiled.py has a C compiler translate it, once for a
machine, and calls it.

Every number of a row is summed in one order, whatever rows stand beside it and however many threads there are: they
share out whole sums, never parts of one. So a text has the same bits alone and among others. A prompt's tokens, which are
many of one text, have an order of their own, that is faster for them.
*/

#include "products.h"

/* A tile is as many sums as the registers can hold. */
#if WIDTH == 8
#define ROWS 2
#else
#define ROWS 6
#endif
#define OUTPUTS 4

/* Where the processor multiplies bfloat16, what meets weights of that kind is rounded to it too; else it is float32. */
#if defined(__AVX512BF16__)
enum { MULTIPLIES_HALVES = 1 };
#else
enum { MULTIPLIES_HALVES = 0 };
#endif

int64_t multiplies_halves(void) { return MULTIPLIES_HALVES; }

INLINE int64_t kind_of_x(int64_t kind) { return MULTIPLIES_HALVES && kind == BFLOAT16 ? BFLOAT16 : FLOAT32; }

/* A matrix (outputs, inputs) as it lies in memory; int8 has a scale for each of its rows. */
struct matrix {
    const void *weight;
    const float *scale, *bias; /* (outputs,) or NULL */
    int64_t outputs, inputs;
    int64_t kind;
};

struct norm {
    const float *weight, *bias; /* (width,); NULL weight: there is no such norm */
};

struct layer {
    struct norm ln_1, q_norm, k_norm, ln_2;
    struct matrix attn, attn_proj, fc, fc_proj;
    float *keys, *values; /* (rows of the cache, n_kv, capacity, head_dim) */
};

struct network {
    int64_t n_layer, n_head, n_kv, head_dim, width, hidden, capacity, threads;
    int64_t is_gpt2; /* layer norm and GELU, else RMS norm, rotary positions and SwiGLU */
    float eps;
    const struct layer *layers;
    struct norm ln_f;
    struct matrix head;
};

/* What a call is about: n tokens, of which each stands at a position of a row of the cache. */
struct call {
    int64_t n;
    const int64_t *rows, *positions;
    const float *cos, *sin; /* (n, head_dim); NULL for GPT-2 */
    float *x;               /* (n, width): the embeddings; then what the last block puts out */
    float *h, *qkv, *y;     /* (n, width), (n, (n_head + 2 n_kv) head_dim), (n, n_head head_dim) */
    float *f;               /* (n, 2 hidden), or (n, 3 hidden) with SwiGLU */
    float *scores;          /* (threads, n_head / n_kv, capacity), of a prompt (threads, QUERIES, capacity) */
    int64_t is_prompt;      /* whether they are many, and follow each other in one text */
    int64_t m;              /* how many of the tokens have their logits computed, the last of them */
    float *logits;          /* (m, outputs of the head) */
};

/* ------------------------------------------------------------------------------------------------------------------ */
/* Products */

/* Bits, not numbers: WIDTH pairs of bfloat16, for add_pairs. */
INLINE vec pairs(const void *from, int64_t i) { return (vec) * (const ints_at *)((const uint16_t *)from + i); }

/* Sums of some rows of x, each times OUTPUTS rows of the weight: the registers hold all of them. With `asks`, what
   follows in the weight is asked for meanwhile. */
INLINE void dots(const int64_t kind, const int rows, const int asks, const void *const weight[OUTPUTS], int64_t inputs,
                 const float *x, int64_t stride, quad sums[ROWS]) {
    const int64_t x_kind = kind_of_x(kind), at_once = x_kind == BFLOAT16 ? 2 * WIDTH : WIDTH;
    vec sum[ROWS][OUTPUTS];
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int o = 0; o < OUTPUTS; o++)
            sum[r][o] = (vec){};
    int64_t i = 0;
    for (; i + at_once <= inputs; i += at_once) {
        vec w[OUTPUTS];
        UNROLLED for (int o = 0; o < OUTPUTS; o++)
            w[o] = x_kind == BFLOAT16 ? pairs(weight[o], i) : load(kind, weight[o], i);
        if (asks && i * SIZES[kind] % 64 == 0)
            UNROLLED for (int o = 0; o < OUTPUTS; o++)
                __builtin_prefetch((const char *)weight[o] + (inputs + i) * SIZES[kind], 0, 2);
        UNROLLED for (int r = 0; r < rows; r++) {
            vec its = x_kind == BFLOAT16 ? pairs(x + r * stride, i) : load(FLOAT32, x + r * stride, i);
            UNROLLED for (int o = 0; o < OUTPUTS; o++)
                sum[r][o] = x_kind == BFLOAT16 ? add_pairs(sum[r][o], (ints)its, (ints)w[o]) : sum[r][o] + its * w[o];
        }
    }
    UNROLLED for (int r = 0; r < rows; r++)
        sums[r] = totals(sum[r]);
    for (; i < inputs; i++)
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < OUTPUTS; o++)
                sums[r][o] = fmaf(load_one(x_kind, x + r * stride, i), load_one(kind, weight[o], i), sums[r][o]);
}

/* With all that is constant known, the compiler keeps the sums in registers. */
typedef void tile_of(const void *const *weight, int64_t inputs, const float *x, int64_t stride, quad *sums);

#define TILE(kind, rows, asks)                                                                                         \
    static void tile_##kind##_##rows##_##asks(const void *const *weight, int64_t inputs, const float *x,               \
                                              int64_t stride, quad *sums) {                                            \
        dots(kind, rows, asks, weight, inputs, x, stride, sums);                                                       \
    }
#define TILES_OF(kind)                                                                                                 \
    TILE(kind, 1, 0)                                                                                                   \
    TILE(kind, 1, 1)                                                                                                   \
    TILE(kind, 2, 0)                                                                                                   \
    TILE(kind, 2, 1)                                                                                                   \
    MORE_TILES_OF(kind)
#if ROWS == 6
#define MORE_TILES_OF(kind)                                                                                            \
    TILE(kind, 3, 0)                                                                                                   \
    TILE(kind, 3, 1)                                                                                                   \
    TILE(kind, 4, 0)                                                                                                   \
    TILE(kind, 4, 1)                                                                                                   \
    TILE(kind, 5, 0)                                                                                                   \
    TILE(kind, 5, 1)                                                                                                   \
    TILE(kind, 6, 0)                                                                                                   \
    TILE(kind, 6, 1)
#define ASKING(kind, asks)                                                                                             \
    {                                                                                                                  \
        tile_##kind##_1_##asks, tile_##kind##_2_##asks, tile_##kind##_3_##asks, tile_##kind##_4_##asks,                \
            tile_##kind##_5_##asks, tile_##kind##_6_##asks                                                             \
    }
#else
#define MORE_TILES_OF(kind)
#define ASKING(kind, asks)                                                                                             \
    { tile_##kind##_1_##asks, tile_##kind##_2_##asks }
#endif

TILES_OF(FLOAT32)
TILES_OF(BFLOAT16)
TILES_OF(INT8)

static tile_of *const TILES[3][2][ROWS] = {
    {ASKING(FLOAT32, 0), ASKING(FLOAT32, 1)},
    {ASKING(BFLOAT16, 0), ASKING(BFLOAT16, 1)},
    {ASKING(INT8, 0), ASKING(INT8, 1)},
};

/* For n rows of x, of kind_of_x(m->kind) and `stride` floats apart: y[row][o] = sum, or += sum, for the outputs from
   `first` to `last`. A tile's rows of the weight stand a quarter of these apart: so memory is read in OUTPUTS long streams,
   which processors foresee. A lone row is left to that: more is under way at a time than can be asked for. */
static void product(const struct matrix *m, int64_t first, int64_t last, int64_t n, const float *x, int64_t stride,
                    float *y, int64_t y_stride, int adds) {
    const int64_t apart = (last - first + OUTPUTS - 1) / OUTPUTS;
    for (int64_t o = first; o < first + apart; o++) {
        const void *weight[OUTPUTS];
        for (int c = 0; c < OUTPUTS; c++) {
            int64_t its = o + c * apart < last ? o + c * apart : last - 1; /* one that is not there is not written */
            weight[c] = (const char *)m->weight + its * m->inputs * SIZES[m->kind];
        }
        for (int64_t row = 0; row < n; row += ROWS) {
            quad sums[ROWS];
            const int64_t rows = n - row < ROWS ? n - row : ROWS;
            TILES[m->kind][n > 1 && row == 0][rows - 1](weight, m->inputs, x + row * stride, stride, sums);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0, out = o; c < OUTPUTS && out < last; c++, out += apart) {
                    float sum = sums[r][c], *to = y + (row + r) * y_stride + out;
                    sum = m->scale ? sum * m->scale[out] : sum;
                    sum = m->bias ? sum + m->bias[out] : sum;
                    *to = adds ? *to + sum : sum;
                }
        }
    }
}

/* A prompt's tokens are so many that it pays to turn the weight, COLUMNS outputs and DEPTH words of 32 bits at a time: then
   the sums of a vector are of different outputs, and never have to be added up across. */
enum { COLUMNS = (WIDTH == 8 ? 2 : 4) * WIDTH, DEPTH = 384, TOKENS = WIDTH == 8 ? 6 : 4 };

/* panel (depth, count): of `count` outputs from `first` on the words from k on, as x has them. The next are asked for. */
static void turn(const struct matrix *m, int64_t first, int64_t count, int64_t words, int64_t k, int64_t depth,
                 pair *panel) {
    const int64_t is_as_x = m->kind == kind_of_x(m->kind), size = SIZES[is_as_x ? FLOAT32 : m->kind];
    for (int64_t o = 0; o < count; o += WIDTH)
        for (int64_t i = 0, more; i < depth; i += more) {
            const int64_t at = (first + o) * words + k + i;
            const char *next = (const char *)m->weight + (at + WIDTH * words) * size;
            pair *to = panel + i * count + o;
            vec its[WIDTH];
            more = least(WIDTH, depth - i);
            for (int64_t r = 0; r < WIDTH; r++)
                __builtin_prefetch(next + r * words * size, 0, 2);
            if (is_as_x) {
                transpose(WIDTH, more, (const pair *)m->weight + at, words, to, count);
                continue;
            }
            for (int64_t r = 0; r < WIDTH; r++)
                its[r] = take(m->kind, m->weight, at + r * words, more) * (m->scale ? m->scale[first + o + r] : 1);
            transpose(WIDTH, more, (const pair *)its, WIDTH, to, count);
        }
}

/* Rows of y before a sum is added: what is there, or nothing, and the bias. */
static void begin_sums(const struct matrix *m, int64_t first, int64_t count, int64_t rows, float *y, int64_t y_stride,
                       int adds) {
    for (int64_t r = 0; r < rows; r++, y += y_stride)
        for (int64_t o = first; o < first + count; o += WIDTH) {
            const vec old = adds ? load(FLOAT32, y, o) : (vec){};
            put(y + o, m->bias ? old + load(FLOAT32, m->bias, o) : old, WIDTH);
        }
}

/* As `product`, for outputs that fill vectors. `kind`: x's. */
INLINE void product_of_prompt(const int64_t kind, const struct matrix *m, int64_t first, int64_t last, int64_t n,
                              const float *x, int64_t stride, float *y, int64_t y_stride, int adds) {
    const int64_t words = kind == BFLOAT16 ? m->inputs / 2 : m->inputs;
    pair panel[DEPTH * COLUMNS] __attribute__((aligned(64)));
    for (int64_t o = first, count; o < last; o += count) {
        count = least(COLUMNS, last - o);
        for (int64_t k = 0; k < words; k += DEPTH) {
            const int64_t depth = least(DEPTH, words - k);
            turn(m, o, count, words, k, depth, panel);
            for (int64_t row = 0, rows; row < n; row += rows) {
                const pair *its = (const pair *)x + row * stride + k;
                float *to = y + row * y_stride;
                rows = least(TOKENS, n - row);
                if (!k)
                    begin_sums(m, o, count, rows, to, y_stride, adds);
                all_tiles(kind, TOKENS, rows, count, depth, its, stride, 1, panel, count, to + o, y_stride, 1);
            }
        }
    }
}

static void part_of_product(int64_t of_prompt, const struct matrix *m, int64_t first, int64_t last, int64_t n,
                            const float *x, int64_t stride, float *y, int64_t y_stride, int adds) {
    if (!of_prompt || (last - first) % WIDTH || m->inputs % 2)
        product(m, first, last, n, x, stride, y, y_stride, adds);
    else if (kind_of_x(m->kind) == BFLOAT16)
        product_of_prompt(BFLOAT16, m, first, last, n, x, stride, y, y_stride, adds);
    else
        product_of_prompt(FLOAT32, m, first, last, n, x, stride, y, y_stride, adds);
}

/* Outputs are shared out in pieces, so that a thread that was held up has others do more of them. */
INLINE int64_t piece_of(int64_t of_prompt, int64_t outputs, int64_t threads) {
    int64_t piece = (outputs / (threads * 8) + 15) / 16 * 16;
    return of_prompt ? COLUMNS : piece ? piece : 16;
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* What comes between */

/* For the product with m that follows. */
static void normalise(const struct network *net, struct norm norm, const float *x, const struct matrix *m, float *y) {
    if (net->is_gpt2)
        layer_norm(x, norm.weight, norm.bias, net->width, 1e-5f, kind_of_x(m->kind), y, (float[2]){0});
    else
        rms_norm(x, norm.weight, net->width, net->eps, kind_of_x(m->kind), y, 0);
}

/* Channel i turns together with i + head_dim / 2; the sines have their signs. */
static void rotate(int64_t head_dim, const float *cos, const float *sin, float *x) {
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = fmaf(b, sin[i], a * cos[i]);
        x[i + half] = fmaf(a, sin[i + half], b * cos[i + half]);
    }
}

/* gelu, in GPT-2's form by tanh: 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)) */
static void gelu(const float *x, int64_t count, int64_t kind, void *y, int64_t at) {
    EACH(i, more, count) {
        vec its = some(x + i, more, 0), u = 0.7978845608f * (its + 0.044715f * its * its * its);
        give(kind, y, at + i, its / (1.0f + exponential(-2.0f * u)), more);
    }
}

static void silu_times(const float *gate, const float *up, int64_t count, int64_t kind, void *y, int64_t at) {
    EACH(i, more, count) {
        vec its = some(gate + i, more, 0);
        give(kind, y, at + i, its / (1.0f + exponential(-its)) * some(up + i, more, 0), more);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Attention */

/* Normalises and rotates a token's queries and key of one head of keys, and writes key and value into the cache. */
static void place(const struct network *net, const struct layer *layer, const struct call *call, int64_t t, int64_t g) {
    const int64_t d = net->head_dim, each = net->n_head / net->n_kv;
    float *row = call->qkv + t * (net->n_head + 2 * net->n_kv) * d;
    float *q = row + g * each * d, *k = row + (net->n_head + g) * d, *v = k + net->n_kv * d;
    for (int64_t head = 0; head <= each; head++) {
        float *its = head < each ? q + head * d : k;
        struct norm norm = head < each ? layer->q_norm : layer->k_norm;
        if (norm.weight)
            rms_norm(its, norm.weight, d, net->eps, FLOAT32, its, 0);
        if (call->cos)
            rotate(d, call->cos + t * d, call->sin + t * d, its);
    }
    int64_t at = ((call->rows[t] * net->n_kv + g) * net->capacity + call->positions[t]) * d;
    memcpy(layer->keys + at, k, d * sizeof(float));
    memcpy(layer->values + at, v, d * sizeof(float));
}

/* What the queries of a token read from one head of keys and values, up to the token's own position. */
static void attend(const struct network *net, const struct layer *layer, const struct call *call, int64_t t, int64_t g,
                   float *scores) {
    const int64_t d = net->head_dim, each = net->n_head / net->n_kv, length = call->positions[t] + 1;
    const int64_t at = (call->rows[t] * net->n_kv + g) * net->capacity * d;
    const float *q = call->qkv + (t * (net->n_head + 2 * net->n_kv) + g * each) * d, *values = layer->values + at;
    const struct matrix keys = {layer->keys + at, NULL, NULL, length, d, FLOAT32};
    product(&keys, 0, length, each, q, d, scores, net->capacity, 0);
    const float scale = 1 / sqrtf(d);
    for (int64_t head = 0; head < each; head++) {
        float *its = scores + head * net->capacity, *y = call->y + t * net->n_head * d;
        const int64_t kind = kind_of_x(layer->attn_proj.kind), first = (g * each + head) * d;
        float most = its[0];
        for (int64_t i = 1; i < length; i++)
            most = its[i] > most ? its[i] : most;
        vec sum = {};
        EACH(i, more, length) {
            put(its + i, exponential((some(its + i, more, most) - most) * scale), more);
            sum += some(its + i, more, 0);
        }
        const float share = 1 / total(sum);
        int64_t j = 0;
        for (; j + 4 * WIDTH <= d; j += 4 * WIDTH) {
            vec read[4] = {};
            for (int64_t i = 0; i < length; i++)
                for (int c = 0; c < 4; c++)
                    read[c] += its[i] * load(FLOAT32, values, i * d + j + c * WIDTH);
            for (int c = 0; c < 4; c++)
                give(kind, y, first + j + c * WIDTH, read[c] * share, WIDTH);
        }
        for (; j < d; j += WIDTH) {
            int64_t more = d - j < WIDTH ? d - j : WIDTH;
            vec read = {};
            for (int64_t i = 0; i < length; i++)
                read += its[i] * some(values + i * d + j, more, 0);
            give(kind, y, first + j, read * share, more);
        }
    }
}

/* The same of `count` tokens of a prompt, from token t on, one in each lane: of heads that fill vectors, and not the stack. */
enum { QUERIES = 2 * WIDTH, CHANNELS = 512 };

INLINE int64_t attends_together(int64_t head_dim) { return head_dim % WIDTH == 0 && head_dim <= CHANNELS; }

/* scores (keys, QUERIES) of the keys up to `end`; each query sees `before` of them, and those up to its own. In their place
   come the numerators; factors: 1 / their sums. */
static void softmax(int64_t before, int64_t end, float *scores, float *factors) {
    for (int64_t lane = 0; lane < QUERIES; lane += WIDTH) {
        const ints token = places() + (int32_t)lane;
        vec most = (vec){} - INFINITY, sum = {};
        for (int64_t i = 0; i < end; i++) {
            const vec its = load(FLOAT32, scores, i * QUERIES + lane);
            const ints is_more = (its > most) & (token >= (int32_t)(i - before));
            most = (vec)((is_more & (ints)its) | (~is_more & (ints)most));
        }
        for (int64_t i = 0; i < end; i++) {
            float *to = scores + i * QUERIES + lane;
            const vec its = instead(token < (int32_t)(i - before), 0, exponential(load(FLOAT32, to, 0) - most));
            put(to, its, WIDTH);
            sum += its;
        }
        put(factors + lane, 1.0f / sum, WIDTH);
    }
}

static void attend_together(const struct network *net, const struct layer *layer, const struct call *call, int64_t t,
                            int64_t count, int64_t g, float *scores) {
    const int64_t d = net->head_dim, each = net->n_head / net->n_kv, all = (net->n_head + 2 * net->n_kv) * d;
    const int64_t before = call->positions[t], end = before + count, kind = kind_of_x(layer->attn_proj.kind);
    const int64_t at = (call->rows[t] * net->n_kv + g) * net->capacity * d;
    const pair *keys = (const pair *)(layer->keys + at), *values = (const pair *)(layer->values + at);
    const float scale = 1 / sqrtf(d);
    float queries[CHANNELS * QUERIES], read[TOKENS * CHANNELS], factors[QUERIES];
    for (int64_t head = g * each; head < (g + 1) * each; head++) {
        for (int64_t j = 0; j < d; j++)
            for (int64_t lane = 0; lane < QUERIES; lane++)
                queries[j * QUERIES + lane] = lane < count ? call->qkv[(t + lane) * all + head * d + j] * scale : 0;
        all_tiles(FLOAT32, TOKENS, end, QUERIES, d, keys, d, 1, (pair *)queries, QUERIES, scores, QUERIES, 0);
        softmax(before, end, scores, factors);
        for (int64_t r = 0, more; r < count; r += more) {
            const pair *shares = (const pair *)scores + r;
            more = least(TOKENS, count - r);
            for (int64_t j = 0; j < d; j += COLUMNS)
                all_tiles(FLOAT32, TOKENS, more, least(COLUMNS, d - j), before + r + more, shares, 1, QUERIES, values + j, d,
                          read + j, d, 0);
            for (int64_t i = 0; i < more; i++)
                for (int64_t j = 0; j < d; j += WIDTH)
                    give(kind, call->y + (t + r + i) * net->n_head * d, head * d + j,
                         load(FLOAT32, read, i * d + j) * factors[r + i], WIDTH);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* The step */

#ifdef _OPENMP
#define SHARE_OUT _Pragma("omp for schedule(dynamic)")
#else
#define SHARE_OUT
#endif

/* Shares a product out among the threads. */
#define SHARED_PRODUCT(of_prompt, m, x, stride, y, y_stride, adds)                                                     \
    {                                                                                                                  \
        const int64_t piece = piece_of(of_prompt, (m)->outputs, net->threads);                                         \
        SHARE_OUT for (int64_t first = 0; first < (m)->outputs; first += piece)                                        \
            part_of_product(of_prompt, m, first, least(first + piece, (m)->outputs), n, x, stride, y, y_stride, adds); \
    }

static void block(const struct network *net, const struct layer *layer, const struct call *call) {
    const int64_t n = call->n, width = net->width, hidden = net->hidden, heads = net->n_head * net->head_dim;
    const int64_t all = heads + 2 * net->n_kv * net->head_dim, of_prompt = call->is_prompt;
    const int64_t at_once = of_prompt && attends_together(net->head_dim) ? QUERIES : 1;
    const int64_t parts = (n + at_once - 1) / at_once, rows_of_scores = at_once > 1 ? at_once : net->n_head / net->n_kv;
    float *scores = call->scores + omp_get_thread_num() * rows_of_scores * net->capacity;
    SHARE_OUT for (int64_t t = 0; t < n; t++)
        normalise(net, layer->ln_1, call->x + t * width, &layer->attn, call->h + t * width);
    SHARED_PRODUCT(of_prompt, &layer->attn, call->h, width, call->qkv, all, 0)
    SHARE_OUT for (int64_t i = 0; i < n * net->n_kv; i++)
        place(net, layer, call, i / net->n_kv, i % net->n_kv);
    SHARE_OUT for (int64_t i = 0; i < parts * net->n_kv; i++) {
        const int64_t t = i / net->n_kv * at_once;
        if (at_once > 1)
            attend_together(net, layer, call, t, least(at_once, n - t), i % net->n_kv, scores);
        else
            attend(net, layer, call, t, i % net->n_kv, scores);
    }
    SHARED_PRODUCT(of_prompt, &layer->attn_proj, call->y, heads, call->x, width, 1)
    SHARE_OUT for (int64_t t = 0; t < n; t++)
        normalise(net, layer->ln_2, call->x + t * width, &layer->fc, call->h + t * width);
    /* Of a token: what the first product gives, and behind it what the second one takes. */
    const struct matrix *fc = &layer->fc;
    const int64_t f_width = net->is_gpt2 ? hidden : 2 * hidden, stride = f_width + hidden;
    const int64_t piece = piece_of(of_prompt, hidden, net->threads), kind = kind_of_x(layer->fc_proj.kind);
    float *active = call->f + f_width;
    SHARE_OUT for (int64_t first = 0; first < hidden; first += piece) {
        const int64_t last = least(first + piece, hidden);
        part_of_product(of_prompt, fc, first, last, n, call->h, width, call->f, stride, 0);
        if (!net->is_gpt2)
            part_of_product(of_prompt, fc, hidden + first, hidden + last, n, call->h, width, call->f, stride, 0);
        for (int64_t t = 0; t < n; t++) {
            const float *its = call->f + t * stride + first;
            if (net->is_gpt2)
                gelu(its, last - first, kind, active + t * stride, first);
            else
                silu_times(its, its + hidden, last - first, kind, active + t * stride, first);
        }
    }
    SHARED_PRODUCT(of_prompt, &layer->fc_proj, active, stride, call->x, width, 1)
}

void step(const struct network *net, const struct call *call) {
#ifdef _OPENMP
#pragma omp parallel num_threads(net->threads)
#endif
    {
        for (int64_t layer = 0; layer < net->n_layer; layer++)
            block(net, net->layers + layer, call);
        const int64_t n = call->m, width = net->width;
        const float *x = call->x + (call->n - n) * width;
        SHARE_OUT for (int64_t t = 0; t < n; t++)
            normalise(net, net->ln_f, x + t * width, &net->head, call->h + t * width);
        SHARED_PRODUCT(0, &net->head, call->h, width, call->logits, net->head.outputs, 0)
    }
}
