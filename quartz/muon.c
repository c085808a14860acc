/* Muon's Newton-Schulz steps (quartz/optim.py), in bfloat16 on a CPU.

Read it when Muon's part of a training step is slow. Of products that are symmetric, half is computed. A matrix is one
thread's, so bits do not depend on the number of threads.
*/

#include "products.h"

/* g (n, n) = a b of `pairs` pairs, where it is symmetric: computed from the diagonal's panels down, and mirrored. */
static void multiply_symmetric(int64_t n, int64_t pairs, const uint16_t *a, const pair *b, float *g) {
    const pair *left = (const pair *)a;
    for (int64_t j = 0, wide; j < n; j += PANEL) {
        const pair *panel = b + panel_at(j, n, pairs, &wide);
        for (int64_t r = j; r < n; r += 4)
            tiles(BFLOAT16, 4, wide, pairs, left + r * pairs, pairs, 1, panel, wide, g + r * n + j, n, 0);
        const int64_t below = j + wide;
        transpose(n - below, wide, (const pair *)g + below * n + j, n, (pair *)g + j * n + below, n);
    }
}

/* Floats that a thread works in. */
int64_t newton_schulz_work(int64_t rows, int64_t columns) { return 2 * rows * (rows + columns); }

/* Each matrix of x (n, rows, columns), rows <= columns, both multiples of 16, becomes so many times
   a x + (b g + c g g) x, with g = x x'. */
void newton_schulz(int64_t threads, int64_t n, int64_t rows, int64_t columns, int64_t steps, float a, float b, float c,
                   uint16_t *x, float *work) {
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
#endif
    for (int64_t i = 0; i < n; i++) {
        uint16_t *its = x + i * rows * columns;
        float *gram = work + omp_get_thread_num() * newton_schulz_work(rows, columns), *product = gram + rows * rows;
        pair *panels = (pair *)(product + rows * columns), *gram_panels = panels + rows * columns / 2;
        uint16_t *halves = (uint16_t *)(gram_panels + rows * rows / 2);
        for (int64_t step = 0; step < steps; step++) {
            for (int64_t j = 0, wide; j < rows; j += PANEL) {
                pair *panel = panels + panel_at(j, rows, columns / 2, &wide);
                transpose(wide, columns / 2, (const pair *)its + j * columns / 2, columns / 2, panel, wide);
            }
            multiply_symmetric(rows, columns / 2, its, panels, gram);
            for (int64_t at = 0; at < rows * rows; at += WIDTH)
                give(BFLOAT16, halves, at, load(FLOAT32, gram, at), WIDTH);
            into_panels(halves, rows, rows, 0, rows / 2, gram_panels);
            multiply_symmetric(rows, rows / 2, halves, gram_panels, gram);
            for (int64_t at = 0; at < rows * rows; at += WIDTH) /* of g as it was multiplied: errors cancel out so */
                give(BFLOAT16, halves, at, load(BFLOAT16, halves, at) * b + load(FLOAT32, gram, at) * c, WIDTH);
            into_panels(its, rows, columns, 0, rows / 2, panels);
            multiply(rows, columns, rows / 2, halves, panels, product);
            for (int64_t at = 0; at < rows * columns; at += WIDTH)
                give(BFLOAT16, its, at, load(BFLOAT16, its, at) * a + load(FLOAT32, product, at), WIDTH);
        }
    }
}
