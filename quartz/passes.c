/* What a training step does between its products, each in one pass over memory: norms, SwiGLU, GELU, dropout, and
   queries, keys and values on their way to attention, with their backward passes; and clipping.

Read it when a step on a CPU is slow. It computes what model.py says; quartz/kernels.py calls it.
Numbers are read and written in float32 or bfloat16 (`kind`), and computed in float32. Sums over rows are taken in BLOCKS
parts, which are shared out among the threads and added up in their order: so bits do not depend on the number of threads.
*/

#include "vectors.h"

enum { BLOCKS = 64 };

#ifdef _OPENMP
#define EACH_BLOCK _Pragma("omp parallel for schedule(static) num_threads(threads)")
#else
#define EACH_BLOCK (void)threads;
#endif

INLINE int64_t start_of(int64_t block, int64_t n) { return n * block / BLOCKS; }

/* ------------------------------------------------------------------------------------------------------------------ */
/* RMS norm: y = x * scale * weight, scale = 1 / sqrt(mean of squares + eps) */

void norm_forward(int64_t threads, int64_t kind, int64_t n, int64_t width, float eps, const float *x, const float *weight,
                  float *scales, void *y) {
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++)
        for (int64_t row = start_of(block, n); row < start_of(block + 1, n); row++)
            scales[row] = rms_norm(x + row * width, weight, width, eps, kind, y, row * width);
}

/* grad_x = scale * (g - unit * mean(g * unit)), with g = grad * weight and unit = x * scale; grad_weight in parts. */
void norm_backward(int64_t threads, int64_t kind, int64_t n, int64_t width, const float *x, const float *weight,
                   const float *scales, const void *grad, float *grad_x, float *parts) {
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++) {
        float *part = parts + block * width;
        for (int64_t row = start_of(block, n); row < start_of(block + 1, n); row++) {
            const float *its = x + row * width, scale = scales[row];
            vec along = {};
            EACH(i, more, width) {
                vec unit = some(its + i, more, 0) * scale, g = take(kind, grad, row * width + i, more);
                along += g * unit * some(weight + i, more, 0);
                put(part + i, some(part + i, more, 0) + g * unit, more);
            }
            const float mean = total(along) / width;
            EACH(i, more, width) {
                vec unit = some(its + i, more, 0) * scale, g = take(kind, grad, row * width + i, more);
                put(grad_x + row * width + i, (g * some(weight + i, more, 0) - unit * mean) * scale, more);
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* SwiGLU: y = silu(gate) * up, of rows that hold both */

INLINE vec logistic(vec x) { return inverse(1.0f + power_of_two(x * -1.4426950409f)); }
INLINE vec silu(vec gate) { return gate * logistic(gate); }
INLINE vec swiglu(vec gate, vec up) { return silu(gate) * up; }

/* By the gate; by `up` it is silu(gate). */
INLINE vec swiglu_slope(vec gate, vec up) {
    vec share = logistic(gate);
    return up * share * (1.0f + gate * (1.0f - share));
}

void swiglu_forward(int64_t threads, int64_t kind, int64_t n, int64_t hidden, const void *x, void *y) {
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++)
        for (int64_t row = start_of(block, n); row < start_of(block + 1, n); row++)
            EACH(i, more, hidden) {
                vec gate = take(kind, x, 2 * row * hidden + i, more), up = take(kind, x, (2 * row + 1) * hidden + i, more);
                give(kind, y, row * hidden + i, swiglu(gate, up), more);
            }
}

void swiglu_backward(int64_t threads, int64_t kind, int64_t n, int64_t hidden, const void *x, const void *grad,
                     void *grad_x) {
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++)
        for (int64_t row = start_of(block, n); row < start_of(block + 1, n); row++)
            EACH(i, more, hidden) {
                vec gate = take(kind, x, 2 * row * hidden + i, more), up = take(kind, x, (2 * row + 1) * hidden + i, more);
                vec g = take(kind, grad, row * hidden + i, more);
                give(kind, grad_x, 2 * row * hidden + i, g * swiglu_slope(gate, up), more);
                give(kind, grad_x, (2 * row + 1) * hidden + i, g * silu(gate), more);
            }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* GELU in GPT-2's form by tanh: y = 0.5 x (1 + tanh u) = x * share, share = 1 / (1 + exp(-2 u)) */

INLINE vec gelu_share(vec x) { return inverse(1.0f + power_of_two(x * (-2.3022081985f - 0.1029432396f * x * x))); }
INLINE vec gelu(vec x) { return x * gelu_share(x); }

INLINE vec gelu_slope(vec x) {
    vec share = gelu_share(x);
    return share + x * share * (1.0f - share) * (1.5957691216f + 0.2140644488f * x * x);
}

void gelu_forward(int64_t threads, int64_t kind, int64_t n, const void *x, void *y) {
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++) {
        const int64_t start = start_of(block, n);
        EACH(i, more, start_of(block + 1, n) - start)
            give(kind, y, start + i, gelu(take(kind, x, start + i, more)), more);
    }
}

void gelu_backward(int64_t threads, int64_t kind, int64_t n, const void *x, const void *grad, void *grad_x) {
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++) {
        const int64_t start = start_of(block, n);
        EACH(i, more, start_of(block + 1, n) - start) {
            vec slope = gelu_slope(take(kind, x, start + i, more));
            give(kind, grad_x, start + i, take(kind, grad, start + i, more) * slope, more);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Dropout, forward and backward alike: of 2^16 numbers so many become 0, and the others are multiplied by `factor` */

void dropout(int64_t threads, int64_t kind, int64_t n, int64_t seed, int64_t dropped, float factor, const void *x,
             void *y) {
    const uint32_t own = seed_from(seed, 0);
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++) {
        const int64_t start = start_of(block, n);
        EACH(i, more, start_of(block + 1, n) - start) {
            vec factors = kept((uint32_t)(start + i), 1, own, dropped, factor);
            give(kind, y, start + i, take(kind, x, start + i, more) * factors, more);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Clipping: many arrays are scaled down to a norm together, and go in pieces */

enum { PIECE = 1 << 14 };

/* Where piece `piece` of all arrays begins, and how long it is. */
INLINE float *piece_of(float *const *arrays, const int64_t *sizes, int64_t piece, int64_t *count) {
    int64_t array = 0;
    for (; piece * PIECE >= sizes[array]; array++)
        piece -= (sizes[array] + PIECE - 1) / PIECE;
    const int64_t left = sizes[array] - piece * PIECE;
    *count = left < PIECE ? left : PIECE;
    return arrays[array] + piece * PIECE;
}

/* Returns the norm of what is in n arrays, and scales them down to `limit` if it is more; sums: one for each piece. */
double clip(int64_t threads, int64_t n, float *const *arrays, const int64_t *sizes, double limit, double *sums) {
    int64_t pieces = 0;
    for (int64_t array = 0; array < n; array++)
        pieces += (sizes[array] + PIECE - 1) / PIECE;
    EACH_BLOCK for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t count;
        const float *x = piece_of(arrays, sizes, piece, &count);
        vec squares = {};
        EACH(i, more, count) {
            vec its = some(x + i, more, 0);
            squares += its * its;
        }
        sums[piece] = total(squares);
    }
    double all = 0;
    for (int64_t piece = 0; piece < pieces; piece++)
        all += sums[piece];
    const double norm = sqrt(all);
    const float factor = limit / (norm + 1e-6);
    if (factor < 1)
        EACH_BLOCK for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t count;
            float *x = piece_of(arrays, sizes, piece, &count);
            EACH(i, more, count)
                put(x + i, some(x + i, more, 0) * factor, more);
        }
    return norm;
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Heads: (batch, T, n_head + 2 n_kv, head_dim) to queries, keys and values (batch, heads, T, head_dim), the first two
   normalised (where there are weights) and rotated: channel i together with i + head_dim / 2, by sines with their signs. */

struct heads {
    int64_t threads, kind, batch, length, n_head, n_kv, head_dim;
    float eps;
    const float *q_weight, *k_weight; /* (head_dim,) or NULL */
    const float *cos, *sin;           /* (T, head_dim), or NULL: nothing is done but to lay them out */
};

/* Where head h of a row of qkv lies in its own tensor, of q, k and v. */
INLINE void *place(const struct heads *s, int64_t row, int64_t h, void *q, void *k, void *v) {
    const int64_t size = SIZES[s->kind] * s->head_dim, batch = row / s->length, t = row % s->length;
    void *of = h < s->n_head ? q : h < s->n_head + s->n_kv ? k : v;
    const int64_t heads = h < s->n_head ? s->n_head : s->n_kv, own = h < s->n_head ? h : (h - s->n_head) % s->n_kv;
    return (char *)of + ((batch * heads + own) * s->length + t) * size;
}

/* Head h of one row, at place t of its sequence: turned, and before that normalised; *scale is what for. */
INLINE void turn_head(const struct heads *s, int64_t h, int64_t t, const void *from, void *to, float *scale) {
    const int64_t d = s->head_dim, half = d / 2;
    const float *weight = h < s->n_head ? s->q_weight : s->k_weight, *cos = s->cos + t * d, *sin = s->sin + t * d;
    const float its = weight ? rms_scale(s->kind, from, d, s->eps) : 1;
    *scale = its;
    EACH(i, more, half) {
        vec a = take(s->kind, from, i, more) * its, b = take(s->kind, from, half + i, more) * its;
        if (weight) {
            a *= some(weight + i, more, 0);
            b *= some(weight + half + i, more, 0);
        }
        give(s->kind, to, i, a * some(cos + i, more, 0) + b * some(sin + i, more, 0), more);
        give(s->kind, to, half + i, b * some(cos + half + i, more, 0) + a * some(sin + half + i, more, 0), more);
    }
}

/* to, which may be grad: the gradient of x, which turn_head took; sums (2, head_dim): the weights' gradients */
INLINE void turn_head_backward(const struct heads *s, int64_t h, int64_t t, const void *x, float scale, const void *grad,
                               void *to, float *sums) {
    const int64_t d = s->head_dim, half = d / 2;
    const float *weight = h < s->n_head ? s->q_weight : s->k_weight, *cos = s->cos + t * d, *sin = s->sin + t * d;
    float *part = sums + (h >= s->n_head) * d, mean = 0, turned_back[2][512];
    vec along = {};
    EACH(i, more, half) {
        vec a = take(s->kind, grad, i, more), b = take(s->kind, grad, half + i, more);
        vec low = a * some(cos + i, more, 0) + b * some(sin + half + i, more, 0);
        vec high = b * some(cos + half + i, more, 0) + a * some(sin + i, more, 0);
        if (weight) {
            vec unit_low = take(s->kind, x, i, more) * scale, unit_high = take(s->kind, x, half + i, more) * scale;
            put(part + i, some(part + i, more, 0) + low * unit_low, more);
            put(part + half + i, some(part + half + i, more, 0) + high * unit_high, more);
            low *= some(weight + i, more, 0);
            high *= some(weight + half + i, more, 0);
            along += low * unit_low + high * unit_high;
        }
        put(turned_back[0] + i, low, more);
        put(turned_back[1] + i, high, more);
    }
    if (weight)
        mean = total(along) / d;
    for (int64_t part_of = 0; part_of < 2; part_of++)
        EACH(i, more, half) {
            vec g = some(turned_back[part_of] + i, more, 0);
            if (weight)
                g = (g - take(s->kind, x, part_of * half + i, more) * scale * mean) * scale;
            give(s->kind, to, part_of * half + i, g, more);
        }
}

void heads_forward(const struct heads *s, const void *qkv, float *scales, void *q, void *k, void *v) {
    const int64_t n = s->batch * s->length, d = s->head_dim, all = s->n_head + 2 * s->n_kv;
    const int64_t turned = s->n_head + s->n_kv, threads = s->threads;
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++)
        for (int64_t row = start_of(block, n); row < start_of(block + 1, n); row++)
            for (int64_t h = 0; h < all; h++) {
                const void *from = (const char *)qkv + (row * all + h) * d * SIZES[s->kind];
                void *to = place(s, row, h, q, k, v);
                if (h < turned && s->cos)
                    turn_head(s, h, row % s->length, from, to, scales + row * turned + h);
                else
                    memcpy(to, from, d * SIZES[s->kind]);
            }
}

/* parts: of the weights' gradients, (BLOCKS, 2, head_dim) */
void heads_backward(const struct heads *s, const void *qkv, const float *scales, const void *grad_q, const void *grad_k,
                    const void *grad_v, void *grad_qkv, float *parts) {
    const int64_t n = s->batch * s->length, d = s->head_dim, all = s->n_head + 2 * s->n_kv;
    const int64_t turned = s->n_head + s->n_kv, threads = s->threads;
    EACH_BLOCK for (int64_t block = 0; block < BLOCKS; block++)
        for (int64_t row = start_of(block, n); row < start_of(block + 1, n); row++)
            for (int64_t h = 0; h < all; h++) {
                const void *x = (const char *)qkv + (row * all + h) * d * SIZES[s->kind];
                void *to = (char *)grad_qkv + (row * all + h) * d * SIZES[s->kind];
                const void *grad = place(s, row, h, (void *)grad_q, (void *)grad_k, (void *)grad_v);
                if (h < turned && s->cos)
                    turn_head_backward(s, h, row % s->length, x, scales[row * turned + h], grad, to, parts + 2 * block * d);
                else
                    memcpy(to, grad, d * SIZES[s->kind]);
            }
}
