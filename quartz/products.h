/* Products with sums in float32, for attention.c, block.c, muon.c and step.c.

Their right side lies in words of 32 bits: a number of float32, or a pair of bfloat16 that follow each other in a sum. Of n
words a sum is made. A matrix lies in panels of up to PANEL columns, each (n, columns) words.
*/

#pragma once
#include "vectors.h"

enum { PANEL = 4 * WIDTH };

typedef uint32_t pair __attribute__((may_alias)); /* or one number of float32 */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* c (rows, WIDTH * wide) = or += a b, for n words: a's steps from a row and a word to the next, b's from a word. */
INLINE void tile(const int64_t kind, const int rows, const int wide, int64_t n, const pair *a, int64_t a_row,
                 int64_t a_next, const pair *b, int64_t b_stride, float *c, int64_t c_stride, const int adds) {
    vec sum[8][4];
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int w = 0; w < wide; w++)
            sum[r][w] = adds ? load(FLOAT32, c, r * c_stride + w * WIDTH) : (vec){};
    for (int64_t i = 0; i < n; i++) {
        ints its[4];
        UNROLLED for (int w = 0; w < wide; w++) {
            ints one = *(const ints_at *)(b + i * b_stride + w * WIDTH);
            STAYS(one);
            its[w] = one;
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            ints factor = (ints){} + (int32_t)a[r * a_row + i * a_next];
            UNROLLED for (int w = 0; w < wide; w++)
                sum[r][w] = kind == BFLOAT16 ? add_pairs(sum[r][w], factor, its[w])
                                             : sum[r][w] + (vec)factor * (vec)its[w];
        }
    }
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int w = 0; w < wide; w++)
            put(c + r * c_stride + w * WIDTH, sum[r][w], WIDTH);
}

INLINE ints paired_halves(halves_at low, halves_at high) {
    return __builtin_convertvector(low, ints) | __builtin_convertvector(high, ints) << 16;
}

/* Two rows that lie one below the other; is_alone: the second is zeros. */
INLINE ints pair_of_rows(const uint16_t *rows, int64_t columns, int64_t is_alone) {
    return paired_halves(*(const halves_at *)rows, is_alone ? (halves_at){} : *(const halves_at *)(rows + columns));
}

/* Where column `column`, the first of a panel, begins, and how many columns that panel has. */
INLINE int64_t panel_at(int64_t column, int64_t columns, int64_t n, int64_t *wide) {
    *wide = least(PANEL, columns - column);
    return column * n;
}

INLINE void tiles(const int64_t kind, const int rows, int64_t wide, int64_t n, const pair *a, int64_t a_row, int64_t a_next,
                  const pair *b, int64_t b_stride, float *c, int64_t c_stride, const int adds) {
    switch (wide / WIDTH) {
    case 4: tile(kind, rows, 4, n, a, a_row, a_next, b, b_stride, c, c_stride, adds); break;
    case 3: tile(kind, rows, 3, n, a, a_row, a_next, b, b_stride, c, c_stride, adds); break;
    case 2: tile(kind, rows, 2, n, a, a_row, a_next, b, b_stride, c, c_stride, adds); break;
    case 1: tile(kind, rows, 1, n, a, a_row, a_next, b, b_stride, c, c_stride, adds); break;
    }
}

/* Of any number of rows: so many at a time, then one by one. */
INLINE void all_tiles(const int64_t kind, const int at_once, int64_t rows, int64_t wide, int64_t n, const pair *a,
                      int64_t a_row, int64_t a_next, const pair *b, int64_t b_stride, float *c, int64_t c_stride,
                      const int adds) {
    int64_t r = 0;
    for (; r + at_once <= rows; r += at_once)
        tiles(kind, at_once, wide, n, a + r * a_row, a_row, a_next, b, b_stride, c + r * c_stride, c_stride, adds);
    for (; r < rows; r++)
        tiles(kind, 1, wide, n, a + r * a_row, a_row, a_next, b, b_stride, c + r * c_stride, c_stride, adds);
}

/* c (rows, columns) = a (rows, 2 n) b, which lies in panels */
static inline void multiply(int64_t rows, int64_t columns, int64_t n, const uint16_t *a, const pair *b, float *c) {
    for (int64_t j = 0, wide; j < columns; j += PANEL) {
        const pair *panel = b + panel_at(j, columns, n, &wide);
        all_tiles(BFLOAT16, 4, rows, wide, n, (const pair *)a, n, 1, panel, wide, c + j, columns, 0);
    }
}

/* Rows (count, columns), which are tokens from the even number `first` on, into panels of n pairs. */
static inline void into_panels(const uint16_t *rows, int64_t count, int64_t columns, int64_t first, int64_t n, pair *to) {
    for (int64_t j = 0, wide; j < columns; j += PANEL) {
        pair *panel = to + panel_at(j, columns, n, &wide) + first / 2 * wide;
        for (int64_t t = 0; t < count; t += 2, panel += wide)
            for (int64_t i = 0; i < wide; i += WIDTH)
                *(ints_at *)(panel + i) = pair_of_rows(rows + t * columns + j + i, columns, t + 1 == count);
    }
}
