/* Causal attention while a model trains on a CPU, in bfloat16, and its backward pass, without ever holding all weights.

Read it when training with long contexts is slow. It computes what model.py's `attend` says (Dao, 2023, "FlashAttention-2":
what is kept is the logarithm of each query's sum, and the weights are computed once more on the way back);
quartz/kernels.py calls it. Numbers that are multiplied are bfloat16, sums are float32. Keys and values of a head are one
thread's, so bits do not depend on the number of threads.
*/

#include "products.h"

enum { BLOCK = 32 }; /* queries, or keys, that go together */
enum { AHEAD = 16 }; /* so many rows on, memory is asked for in time */

struct attention {
    int64_t threads, batch, n_head, n_kv, length, head_dim;
    int64_t dropped; /* of 2^16 weights; the others are multiplied by `kept` */
    int64_t seed;
    float kept;
    int64_t strides[6][3]; /* in numbers, from one batch, head and token to the next: of q, k, v, and their gradients */
};

enum { Q, K, V, GRAD_Q, GRAD_K, GRAD_V };

/* Where a head begins in one of them; `head` counts over the batch too. */
INLINE int64_t begins(const struct attention *s, int64_t which, int64_t head) {
    const int64_t heads = which % 3 == Q ? s->n_head : s->n_kv;
    return head / heads * s->strides[which][0] + head % heads * s->strides[which][1];
}

INLINE int64_t stride(const struct attention *s, int64_t which) { return s->strides[which][2]; }

/* c (rows, columns) = or += a (rows, 2 n) b (2 n, columns); rows a multiple of 8, columns of 16; strides in pairs, a's from
   a row and from a pair to the next. */
INLINE void product(int64_t rows, int64_t columns, int64_t n, const pair *a, int64_t a_row, int64_t a_next,
                    const pair *b, int64_t b_stride, float *c, int64_t c_stride, const int adds) {
    int64_t j = 0;
    for (; j + 4 * WIDTH <= columns; j += 4 * WIDTH)
        for (int64_t r = 0; r < rows; r += 4)
            tile(BFLOAT16, 4, 4, n, a + r * a_row, a_row, a_next, b + j, b_stride, c + r * c_stride + j, c_stride, adds);
    for (; j + 2 * WIDTH <= columns; j += 2 * WIDTH)
        for (int64_t r = 0; r < rows; r += 8)
            tile(BFLOAT16, 8, 2, n, a + r * a_row, a_row, a_next, b + j, b_stride, c + r * c_stride + j, c_stride, adds);
    for (; j < columns; j += WIDTH)
        for (int64_t r = 0; r < rows; r += 8)
            tile(BFLOAT16, 8, 1, n, a + r * a_row, a_row, a_next, b + j, b_stride, c + r * c_stride + j, c_stride, adds);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Where a head's numbers lie while they are multiplied: T, its length, made up with zeros to a multiple of BLOCK */

INLINE int64_t padded(int64_t length) { return (length + BLOCK - 1) / BLOCK * BLOCK; }

/* The T rows of d numbers, and zeros for those from T on to P. */
static void copy_rows(const uint16_t *from, int64_t stride, int64_t T, int64_t P, int64_t d, uint16_t *to) {
    for (int64_t t = 0; t < T; t++, to += d) {
        __builtin_prefetch(from + (t + AHEAD) * stride);
        for (int64_t i = 0; i < d; i += WIDTH)
            *(halves_at *)(to + i) = *(const halves_at *)(from + t * stride + i);
    }
    memset(to, 0, (P - T) * d * sizeof *to);
}

/* rows (P, d) as the right side of x @ rows.T: pairs (d / 2, P) */
static void turned(const uint16_t *rows, int64_t P, int64_t d, pair *to) {
    transpose(P, d / 2, (const pair *)rows, d / 2, to, P);
}

/* The first columns of rows (P, d) as the right side of x @ rows: pairs (P / 2, d) */
static void paired(const uint16_t *rows, int64_t P, int64_t columns, int64_t d, pair *to) {
    for (int64_t t = 0; t < P; t += 2)
        for (int64_t c = 0; c < columns; c += WIDTH)
            *(ints_at *)(to + t / 2 * d + c) = pair_of_rows(rows + t * d + c, d, 0);
}

/* Floats that a thread needs to work in: as attend_backward shares them out; attend needs fewer. */
int64_t scratch(const struct attention *s) {
    const int64_t P = padded(s->length), d = s->head_dim;
    return 7 * P * d + 4 * BLOCK * P + 2 * P;
}

#ifdef _OPENMP
#define EACH_HEAD _Pragma("omp parallel for schedule(dynamic) num_threads(s->threads)")
#else
#define EACH_HEAD
#endif

/* ------------------------------------------------------------------------------------------------------------------ */

/* q (batch, n_head, T, head_dim), k and v (batch, n_kv, T, head_dim), by `strides` -> y (batch, T, n_head, head_dim), and
   the logarithms of the sums (batch, n_head, T): of the g-th head of keys and values, counted over the batch. */
static void attend(const struct attention *s, int64_t g, const uint16_t *q, const uint16_t *k, const uint16_t *v,
                   uint16_t *y, float *logs, float *work) {
    const int64_t T = s->length, P = padded(T), d = s->head_dim, each = s->n_head / s->n_kv;
    const float scale = 1 / sqrtf(d), binary = scale * (float)M_LOG2E;
    float *scores = work + omp_get_thread_num() * scratch(s), *sums = scores + BLOCK * P, *reads = sums + BLOCK;
    pair *keys = (pair *)(reads + BLOCK * d), *values = keys + P * d / 2;
    uint16_t *rows = (uint16_t *)(values + P * d / 2), *weights = rows + P * d;
    copy_rows(k + begins(s, K, g), stride(s, K), T, P, d, rows);
    turned(rows, P, d, keys);
    copy_rows(v + begins(s, V, g), stride(s, V), T, P, d, rows);
    paired(rows, P, d, d, values);
    for (int64_t head = g * each; head < (g + 1) * each; head++) {
        const uint32_t seed = seed_from(s->seed, head);
        copy_rows(q + begins(s, Q, head), stride(s, Q), T, P, d, rows);
        for (int64_t first = 0; first < T; first += BLOCK) {
            const int64_t seen = first + BLOCK;
            product(BLOCK, seen, d / 2, (pair *)(rows + first * d), d / 2, 1, keys, P, scores, P, 0);
            for (int64_t t = first; t < seen; t++) {
                float *its = scores + (t - first) * P;
                vec most = (vec){} + its[0], sum = {};
                for (int64_t i = 0; i <= t; i += WIDTH) {
                    vec score = load(FLOAT32, its, i);
                    ints wins = score > most;
                    if (i + WIDTH > t + 1)
                        wins &= places() + (int32_t)i <= (int32_t)t;
                    most = (vec)((wins & (ints)score) | (~wins & (ints)most));
                }
                const float highest = largest(most);
                for (int64_t i = 0; i < seen; i += WIDTH) {
                    vec weight = power_of_two((load(FLOAT32, its, i) - highest) * binary);
                    if (i + WIDTH > t + 1)
                        weight = (vec)((ints)weight & (places() + (int32_t)i <= (int32_t)t));
                    sum += weight;
                    if (s->dropped)
                        weight *= kept((uint32_t)(t * T + i), 1, seed, s->dropped, s->kept);
                    give(BFLOAT16, weights, (t - first) * P + i, weight, WIDTH);
                }
                sums[t - first] = total(sum);
                if (t < T)
                    logs[head * T + t] = highest * scale + logf(sums[t - first]);
            }
            product(BLOCK, d, seen / 2, (pair *)weights, P / 2, 1, values, d, reads, d, 0);
            for (int64_t t = first; t < seen && t < T; t++) {
                const int64_t at = ((head / s->n_head * T + t) * s->n_head + head % s->n_head) * d;
                const float share = 1 / sums[t - first];
                for (int64_t i = 0; i < d; i += WIDTH)
                    give(BFLOAT16, y, at + i, load(FLOAT32, reads, (t - first) * d + i) * share, WIDTH);
            }
        }
    }
}

void attention_forward(const struct attention *s, const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *y,
                       float *logs, float *work) {
    EACH_HEAD for (int64_t g = 0; g < s->batch * s->n_kv; g++)
        attend(s, g, q, k, v, y, logs, work);
}

/* to (T, d) = rows * factor */
static void give_rows(const float *rows, float factor, int64_t T, int64_t d, uint16_t *to, int64_t stride) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < d; i += WIDTH)
            give(BFLOAT16, to, t * stride + i, load(FLOAT32, rows, t * d + i) * factor, WIDTH);
}

/* With what attend took and gave, and y's gradient: those of q, k and v. The weights are computed with keys as
   rows; each query's part of the softmax's own gradient is the product of its y and y's gradient. */
static void attend_backward(const struct attention *s, int64_t g, const uint16_t *q, const uint16_t *k, const uint16_t *v,
                            const uint16_t *y, const float *logs, const uint16_t *grad, uint16_t *grad_q,
                            uint16_t *grad_k, uint16_t *grad_v, float *work) {
    const int64_t T = s->length, P = padded(T), d = s->head_dim, each = s->n_head / s->n_kv, all = s->n_head * d;
    const float scale = 1 / sqrtf(d), binary = scale * (float)M_LOG2E;
    float *scores = work + omp_get_thread_num() * scratch(s), *slopes = scores + BLOCK * P;
    float *sum_k = slopes + BLOCK * P, *sum_v = sum_k + P * d, *sum_q = sum_v + P * d;
    float *lows = sum_q + P * d, *parts = lows + P;
    pair *queries = (pair *)(parts + P), *query_pairs = queries + P * d / 2;
    pair *grads = query_pairs + P * d / 2, *grad_pairs = grads + P * d / 2, *slope_pairs = grad_pairs + P * d / 2;
    uint16_t *keys = (uint16_t *)(slope_pairs + BLOCK / 2 * P), *values = keys + P * d;
    pair *key_pairs = (pair *)(values + P * d);
    uint16_t *weights = (uint16_t *)(key_pairs + P * d / 2), *slope_rows = weights + BLOCK * P, *rows = slope_rows + BLOCK * P;
    copy_rows(k + begins(s, K, g), stride(s, K), T, P, d, keys);
    copy_rows(v + begins(s, V, g), stride(s, V), T, P, d, values);
    paired(keys, P, d, d, key_pairs);
    for (int64_t head = g * each; head < (g + 1) * each; head++) {
        const uint32_t seed = seed_from(s->seed, head);
        const int64_t at = head / s->n_head * T * all + head % s->n_head * d;
        copy_rows(q + begins(s, Q, head), stride(s, Q), T, P, d, rows);
        turned(rows, P, d, queries);
        paired(rows, P, d, d, query_pairs);
        copy_rows(grad + at, all, T, P, d, rows);
        turned(rows, P, d, grads);
        paired(rows, P, d, d, grad_pairs);
        for (int64_t t = 0; t < P; t++) {
            vec along = {};
            if (t < T)
                for (int64_t i = 0; i < d; i += WIDTH)
                    along += load(BFLOAT16, rows, t * d + i) * load(BFLOAT16, y, at + t * all + i);
            parts[t] = total(along);
            lows[t] = t < T ? logs[head * T + t] * (float)M_LOG2E : INFINITY;
        }
        const int64_t more = head > g * each; /* of those that share these keys and values */
        for (int64_t first = 0; first < T; first += BLOCK) {
            const int64_t count = P - first; /* queries that may see these keys */
            product(BLOCK, count, d / 2, (pair *)(keys + first * d), d / 2, 1, queries + first, P, scores, P, 0);
            product(BLOCK, count, d / 2, (pair *)(values + first * d), d / 2, 1, grads + first, P, slopes, P, 0);
            for (int64_t r = 0; r < BLOCK; r++)
                for (int64_t i = 0; i < count; i += WIDTH) {
                    vec weight = power_of_two(load(FLOAT32, scores, r * P + i) * binary - load(FLOAT32, lows, first + i));
                    if (i < r)
                        weight = (vec)((ints)weight & (places() + (int32_t)i >= (int32_t)r));
                    vec slope = load(FLOAT32, slopes, r * P + i), left = weight;
                    if (s->dropped) {
                        const uint32_t counter = (uint32_t)((first + i) * T + first + r);
                        vec factor = kept(counter, (uint32_t)T, seed, s->dropped, s->kept);
                        left *= factor;
                        slope *= factor;
                    }
                    give(BFLOAT16, weights, r * P + i, left, WIDTH);
                    give(BFLOAT16, slope_rows, r * P + i, weight * (slope - load(FLOAT32, parts, first + i)), WIDTH);
                }
            paired(slope_rows, BLOCK, count, P, slope_pairs);
            product(BLOCK, d, count / 2, (pair *)weights, P / 2, 1, grad_pairs + first / 2 * d, d, sum_v + first * d, d, more);
            product(BLOCK, d, count / 2, (pair *)slope_rows, P / 2, 1, query_pairs + first / 2 * d, d, sum_k + first * d,
                    d, more);
            product(count, d, BLOCK / 2, slope_pairs, 1, P, key_pairs + first / 2 * d, d, sum_q + first * d, d, first > 0);
        }
        give_rows(sum_q, scale, T, d, grad_q + begins(s, GRAD_Q, head), stride(s, GRAD_Q));
    }
    give_rows(sum_k, scale, T, d, grad_k + begins(s, GRAD_K, g), stride(s, GRAD_K));
    give_rows(sum_v, 1, T, d, grad_v + begins(s, GRAD_V, g), stride(s, GRAD_V));
}

void attention_backward(const struct attention *s, const uint16_t *q, const uint16_t *k, const uint16_t *v,
                        const uint16_t *y, const float *logs, const uint16_t *grad, uint16_t *grad_q, uint16_t *grad_k,
                        uint16_t *grad_v, float *work) {
    EACH_HEAD for (int64_t g = 0; g < s->batch * s->n_kv; g++)
        attend_backward(s, g, q, k, v, y, logs, grad, grad_q, grad_k, grad_v, work);
}
