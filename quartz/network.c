/* A small network as a whole while it trains on a CPU: embeddings, blocks, the last norm, head and loss.

Read it with block.c, whose way it goes from end to end. Where a step takes some milliseconds, what a library needs to get
from one operation to the next is a good part of it. It computes what model.py's GPT.forward says; the logits stay float32.
*/

#include "block.c"

struct network {
    int64_t count, vocab, seed; /* of blocks; of dropout behind the embeddings */
    const int64_t *idx, *targets; /* (batch, T); a target of -1 is none */
    const float *factors;         /* of the targets' losses, (batch, T), or NULL */
    const float *embeddings, *positions, *head, *norm, *norm_bias; /* positions: or NULL; head: the embeddings if tied */
};

struct network_gradients {
    float *embeddings, *positions, *head, *norm, *norm_bias; /* head: NULL if tied */
};

/* What is kept of a forward pass beside what blocks keep. x: what enters the first block; y: what the last one gives;
   slopes: of the losses, by logits. */
struct ends {
    float *x, *y, *stats, *losses;
    uint16_t *slopes;
};

static struct ends ends_in(const struct network *net, const struct block *s, float *memory, int64_t *used) {
    const int64_t n = tokens(s), all = n * s->width;
    struct ends e;
    e.x = part_of(memory, used, all);
    e.y = part_of(memory, used, all);
    e.stats = part_of(memory, used, 2 * n);
    e.losses = part_of(memory, used, n);
    e.slopes = part_of(memory, used, n * padded(net->vocab) / 2);
    return e;
}

/* The head's weight, its rows made up with zeros, and in panels; and the backward pass's: gradients over each half of the
   tokens, and what the head read. */
struct head_work {
    float *padded, *head[2], *embeddings[2], *positions[2], *grad_x, *norm_sums;
    pair *weight, *read;
    int64_t zeroed; /* floats, from head[0] on */
};

static struct head_work head_in(const struct network *net, const struct block *s, float *memory, int64_t *used,
                                int64_t is_backward) {
    const int64_t rows = padded(net->vocab), width = s->width;
    struct head_work h = {0};
    h.padded = part_of(memory, used, rows * width);
    h.weight = part_of(memory, used, rows * width / 2);
    if (!is_backward)
        return h;
    const int64_t before = *used;
    for (int64_t i = 0; i < 2; i++) {
        h.head[i] = part_of(memory, used, rows * width);
        h.embeddings[i] = part_of(memory, used, net->vocab * width);
        h.positions[i] = part_of(memory, used, net->positions ? s->heads.length * width : 0);
    }
    h.zeroed = *used - before;
    h.grad_x = part_of(memory, used, tokens(s) * width);
    h.norm_sums = part_of(memory, used, chunks(s) * 2 * width);
    h.read = part_of(memory, used, pairs(s) * width);
    return h;
}

/* As blocks_sizes, and what a network needs beside. */
void network_sizes(const struct network *net, const struct block *s, int64_t *sizes) {
    blocks_sizes(s, net->count, sizes);
    for (int64_t i = 0; i < 2; i++) {
        ends_in(net, s, NULL, sizes + i);
        head_in(net, s, NULL, sizes + 2 + i, i);
    }
}

/* The last norm, as the first one of a block. */
static struct block last_norm(const struct network *net, const struct block *s) {
    struct block last = *s;
    last.norms[0] = net->norm, last.norm_biases[0] = net->norm_bias;
    return last;
}

static void lay_out_head(const struct network *net, const struct block *s, const struct head_work *h, int64_t is_backward) {
    const int64_t rows = padded(net->vocab), width = s->width, columns = is_backward ? width : rows;
    memcpy(h->padded, net->head, net->vocab * width * sizeof(float));
    memset(h->padded + net->vocab * width, 0, (rows - net->vocab) * width * sizeof(float));
    for (int64_t column = 0; column < columns; column += PANEL)
        (is_backward ? weight_backward : weight_forward)(h->padded, width, rows, column, h->weight);
}

/* A chunk's embeddings, behind dropout. */
static void embed(const struct network *net, const struct block *s, float *x, int64_t chunk) {
    const int64_t width = s->width, first = chunk * CHUNK, count = least(CHUNK, tokens(s) - first);
    const uint32_t seed = seed_from(net->seed, 0);
    for (int64_t row = first; row < first + count; row++)
        EACH_VECTOR(i, width) {
            vec its = load(FLOAT32, net->embeddings, net->idx[row] * width + i);
            if (net->positions)
                its += load(FLOAT32, net->positions, row % s->heads.length * width + i);
            put(x + row * width + i, behind_dropout(s, seed, row * width + i, its), WIDTH);
        }
}

/* A chunk's losses, each log(sum(exp(logits))) - the target's logit; and their slopes, if a backward pass may come. */
static void losses_of(const struct network *net, const struct block *s, int64_t keeps, const struct ends *e,
                      const struct work *w, const struct head_work *h, int64_t chunk) {
    OF_CHUNK
    const int64_t vocab = net->vocab, columns = padded(vocab);
    const struct block last = last_norm(net, s);
    uint16_t *rows = halves(s, sums, 0);
    norm_rows(&last, 0, count, e->y + first * width, e->stats + 2 * first, rows);
    multiply(count, columns, width / 2, rows, h->weight, sums);
    for (int64_t row = first; row < first + count; row++, sums += columns) {
        const int64_t target = net->targets[row];
        const float factor = target < 0 ? 0 : net->factors ? net->factors[row] : 1, wanted = sums[most(target, 0)];
        vec highest = (vec){} + sums[0], all = {};
        EACH(i, more, vocab) {
            vec its = some(sums + i, more, sums[0]);
            ints wins = its > highest;
            highest = (vec)((wins & (ints)its) | (~wins & (ints)highest));
        }
        const float top = largest(highest);
        EACH_VECTOR(i, columns) {
            vec its = exponential(load(FLOAT32, sums, i) - top);
            its = (vec)((ints)its & (places() + (int32_t)i < (int32_t)vocab));
            all += its;
            put(sums + i, its, WIDTH);
        }
        const float sum = total(all);
        e->losses[row] = factor ? (logf(sum) + top - wanted) * factor : 0;
        if (!keeps)
            continue;
        EACH_VECTOR(i, columns) {
            vec is_target = (vec)((places() + (int32_t)i == (int32_t)target) & (ints)((vec){} + 1.0f));
            give(BFLOAT16, e->slopes, row * columns + i, (load(FLOAT32, sums, i) / sum - is_target) * factor, WIDTH);
        }
    }
}

/* Whether a token is none of the vocabulary's. */
static int64_t has_strangers(const struct network *net, int64_t n) {
    int64_t strangers = 0;
    for (int64_t i = 0; i < n; i++)
        strangers += (uint64_t)net->idx[i] >= (uint64_t)net->vocab || net->targets[i] >= net->vocab || net->targets[i] < -1;
    return strangers > 0;
}

/* sums: of the losses, and how many targets there are. Returns 1, and computes nothing, where a token is unknown. */
int64_t network_forward(const struct network *net, const struct block *s, int64_t keeps, float *kept_memory,
                        float *work_memory, double *sums) {
    const int64_t at_once = by_sequence(s), count = net->count, length = s->heads.length, n = tokens(s);
    struct kept k[count];
    struct work w[count];
    int64_t used[2] = {0};
    if (has_strangers(net, n))
        return 1;
    kept_of(s, count, keeps, kept_memory, used, k);
    work_of(s, count, at_once, work_memory, used + 1, w, 0);
    const struct ends e = ends_in(net, s, kept_memory, used);
    const struct head_work h = head_in(net, s, work_memory, used + 1, 0);
    const float *x = e.x;
    float *y = e.y;
    lay_out_head(net, s, &h, 0);
    if (at_once) {
        lay_out_weights(s, count, w, 0);
        EACH_SEQUENCE for (int64_t sequence = 0; sequence < s->heads.batch; sequence++) {
            const int64_t first = sequence * length, last = first + length;
            EACH_CHUNK(first, last) embed(net, s, e.x, chunk);
            for (int64_t nth = 0; nth < count; nth++)
                sequence_forward(s + nth, k + nth, w + nth, FROM(nth), TO(nth), sequence);
            EACH_CHUNK(first, last) losses_of(net, s, keeps, &e, w, &h, chunk);
        }
    } else {
        EACH_PART EACH_CHUNK(0, n) embed(net, s, e.x, chunk);
        for (int64_t nth = 0; nth < count; nth++)
            block_forward(s + nth, k + nth, w, FROM(nth), TO(nth));
        EACH_PART EACH_CHUNK(0, n) losses_of(net, s, keeps, &e, w, &h, chunk);
    }
    sums[0] = sums[1] = 0;
    for (int64_t i = 0; i < n; i++)
        sums[0] += e.losses[i], sums[1] += net->targets[i] >= 0;
    return 0;
}

/* Back from the losses to what the last block gave, for a chunk. */
static void back_from_losses(const struct network *net, const struct block *s, const struct ends *e, const struct work *w,
                             const struct head_work *h, float scale, int64_t chunk) {
    OF_CHUNK
    const int64_t columns = padded(net->vocab);
    const struct block last = last_norm(net, s);
    uint16_t *rows = halves(s, sums, 0);
    float *grad_x = h->grad_x + first * width;
    multiply(count, width, columns / 2, e->slopes + first * columns, h->weight, sums);
    EACH_VECTOR(i, count * width) put(sums + i, load(FLOAT32, sums, i) * scale, WIDTH);
    memset(grad_x, 0, count * width * sizeof *grad_x);
    norm_rows_backward(&last, 0, count, e->y + first * width, e->stats + 2 * first, sums, grad_x, grad_x,
                       h->norm_sums + chunk * 2 * width, rows);
    into_panels(rows, count, width, first, pairs(s), h->read);
}

/* The gradients of head, embeddings and positions over a half of the tokens. */
static void half_of_ends(const struct network *net, const struct block *s, const struct ends *e, const struct work *w,
                         const struct head_work *h, int64_t is_second) {
    const int64_t first = is_second ? half(s) : 0, last = is_second ? tokens(s) : half(s), width = s->width;
    const int64_t columns = padded(net->vocab);
    const uint32_t seed = seed_from(net->seed, 0);
    for (int64_t row = 0; row < columns; row += PANEL)
        multiply_tokens(row, least(row + PANEL, columns), width, tokens(s), columns, e->slopes, h->read, (first + 1) / 2,
                        (last + 1) / 2, h->head[is_second] + row * width, (pair *)own_of(w));
    for (int64_t token = first; token < last; token++) {
        float *embedding = h->embeddings[is_second] + net->idx[token] * width;
        float *position = h->positions[is_second] + token % s->heads.length * width;
        EACH_VECTOR(i, width) {
            const vec its = behind_dropout(s, seed, token * width + i, load(FLOAT32, h->grad_x, token * width + i));
            put(embedding + i, load(FLOAT32, embedding, i) + its, WIDTH);
            if (net->positions)
                put(position + i, load(FLOAT32, position, i) + its, WIDTH);
        }
    }
}

/* With what network_forward kept, the gradients of all weights, of `scale` times the sum of the losses. */
void network_backward(const struct network *net, const struct block *s, float *kept_memory, float scale,
                      const struct network_gradients *grads, const struct gradients *to, float *work_memory) {
    const int64_t at_once = by_halves(s), count = net->count, n = tokens(s), width = s->width;
    struct kept k[count];
    struct work w[count];
    int64_t used[2] = {0};
    kept_of(s, count, 1, kept_memory, used, k);
    work_of(s, count, at_once, work_memory, used + 1, w, 1);
    const struct ends e = ends_in(net, s, kept_memory, used);
    const struct head_work h = head_in(net, s, work_memory, used + 1, 1);
    const float *x = e.x;
    lay_out_head(net, s, &h, 1);
    memset(h.head[0], 0, h.zeroed * sizeof(float));
    if (at_once) {
        lay_out_weights(s, count, w, 1);
        EACH_SEQUENCE for (int64_t is_second = 0; is_second < 2; is_second++) {
            EACH_CHUNK(is_second ? half(s) : 0, is_second ? n : half(s)) back_from_losses(net, s, &e, w, &h, scale, chunk);
            half_backward(s, count, k, w, x, h.grad_x, h.grad_x, to, is_second);
            half_of_ends(net, s, &e, w, &h, is_second);
        }
        add_halves(s, count, w, to);
    } else {
        EACH_PART EACH_CHUNK(0, n) back_from_losses(net, s, &e, w, &h, scale, chunk);
        for (int64_t nth = count - 1; nth >= 0; nth--)
            block_backward(s + nth, k + nth, w, FROM(nth), h.grad_x, h.grad_x, to + nth);
        EACH_SEQUENCE for (int64_t is_second = 0; is_second < 2; is_second++)
            half_of_ends(net, s, &e, w, &h, is_second);
    }
    EACH_VECTOR(i, net->vocab * width) {
        vec head = (load(FLOAT32, h.head[0], i) + load(FLOAT32, h.head[1], i)) * scale;
        vec embeddings = load(FLOAT32, h.embeddings[0], i) + load(FLOAT32, h.embeddings[1], i);
        put(grads->embeddings + i, grads->head ? embeddings : embeddings + head, WIDTH);
        if (grads->head)
            put(grads->head + i, head, WIDTH);
    }
    if (net->positions)
        EACH_VECTOR(i, s->heads.length * width)
            put(grads->positions + i, load(FLOAT32, h.positions[0], i) + load(FLOAT32, h.positions[1], i), WIDTH);
    sum_rows(chunks(s), 2 * width, width, h.norm_sums, grads->norm);
    if (grads->norm_bias)
        sum_rows(chunks(s), 2 * width, width, h.norm_sums + width, grads->norm_bias);
}
