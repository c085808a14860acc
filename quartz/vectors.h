/* Vectors of numbers, for all that is in C: how they are read, added up and written. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef _OPENMP
extern int omp_get_thread_num(void);
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

/* Of the width of this machine's registers. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef float floats_at __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t halves_at __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef int16_t shorts __attribute__((vector_size(2 * WIDTH)));
typedef int8_t bytes_at __attribute__((vector_size(WIDTH), aligned(1), may_alias));

#define UNROLLED _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, INT8 };
static const int64_t SIZES[] = {4, 2, 1}; /* bytes */

INLINE vec load(const int64_t kind, const void *from, int64_t i) {
    if (kind == FLOAT32)
        return *(const floats_at *)((const float *)from + i);
    if (kind == BFLOAT16) /* the upper half of a float32 */
        return (vec)(__builtin_convertvector(*(const halves_at *)((const uint16_t *)from + i), ints) << 16);
    const int8_t *bytes = (const int8_t *)from + i;
#if defined(__AVX512F__) /* by name: gcc takes what widens fourfold apart, number for number */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i_u *)bytes)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i_u *)bytes)));
#else
    const shorts wider = __builtin_convertvector(*(const bytes_at *)bytes, shorts);
    return __builtin_convertvector(__builtin_convertvector(wider, ints), vec);
#endif
}

INLINE float load_one(const int64_t kind, const void *from, int64_t i) {
    if (kind == FLOAT32)
        return ((const float *)from)[i];
    if (kind == INT8)
        return ((const int8_t *)from)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

typedef float quad __attribute__((vector_size(16)));

/* Halves are added to each other until four numbers are left. */
INLINE quad folded(vec v) {
#if WIDTH == 16
    typedef float oct __attribute__((vector_size(32)));
    oct half[2];
    memcpy(half, &v, sizeof v);
    const oct w = half[0] + half[1];
#else
    const vec w = v;
#endif
#if WIDTH >= 8
    quad quarter[2];
    memcpy(quarter, &w, sizeof w);
    return quarter[0] + quarter[1];
#else
    return w;
#endif
}

INLINE float total(vec v) {
    quad four = folded(v);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float largest(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float highest = v[0];
    for (int lane = 1; lane < WIDTH; lane++)
        highest = v[lane] > highest ? v[lane] : highest;
    return highest;
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t picks __attribute__((vector_size(16)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (picks){__VA_ARGS__})
#endif

/* The totals of four, each added up as `total` does. */
INLINE quad totals(const vec v[4]) {
    quad a = folded(v[0]), b = folded(v[1]), c = folded(v[2]), d = folded(v[3]);
    quad ab = PICK(a, b, 0, 1, 4, 5) + PICK(a, b, 2, 3, 6, 7), cd = PICK(c, d, 0, 1, 4, 5) + PICK(c, d, 2, 3, 6, 7);
    return PICK(ab, cd, 0, 2, 4, 6) + PICK(ab, cd, 1, 3, 5, 7);
}

INLINE vec instead(ints where, float number, vec x) {
    return (vec)((where & (ints)((vec){} + number)) | (~where & (ints)x));
}

/* Between low and high, and what is no number as it is. */
INLINE vec within(float low, float high, vec x) {
#if defined(__AVX512F__) /* by name: gcc compares and blends */
    return (vec)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#else
    return instead(x > high, high, instead(x < low, low, x));
#endif
}

/* p * 2^n, n whole numbers within reach */
INLINE vec scaled(vec p, vec n) {
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
#endif
}

/* e to the power of each number, to 2 units in the last place: 2^n times a polynomial (Cephes' expf). */
INLINE vec exponential(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: added and taken off, it rounds to whole numbers */
    x = within(-87, 88, x);
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return scaled(p, n);
}

/* 2 to the power of each number from -126 to 127, to 2 units in the last place, in less time: for training. The polynomial is the best of its
   degree for relative errors between -1/2 and 1/2. */
INLINE vec power_of_two(vec x) {
    const float magic = 12582912.0f;
    x = within(-126, 127, x);
    vec shifted = x + magic, n = shifted - magic, r = x - n;
    vec p = r * 1.3276466635e-3f + 9.6755418926e-3f;
    p = p * r + 5.5507134646e-2f;
    p = p * r + 2.4022120237e-1f;
    p = p * r + 6.9314694405e-1f;
    p = p * r + 1.0000001192f;
    return scaled(p, n);
}

/* 1 / x of finite numbers, to an error of a few units in the last place: by name in less than half a division's time. */
INLINE vec inverse(vec x) {
#if defined(__AVX512F__)
    vec near = (vec)_mm512_rcp14_ps((__m512)x);
    return near * (2.0f - x * near);
#else
    return 1.0f / x;
#endif
}

/* A number of a vector for each i from 0 to n: `more` of them at a time. */
#define EACH(i, more, n) for (int64_t i = 0, more; i < (n) && (more = (n) - i < WIDTH ? (n) - i : WIDTH); i += WIDTH)

/* The first `count` numbers of a vector; a copy of a number that is not known would be a call. */
INLINE vec some(const float *from, int64_t count, float rest) {
    vec v = (vec){} + rest;
    if (count == WIDTH)
        memcpy(&v, from, sizeof v);
    else
        memcpy(&v, from, count * sizeof(float));
    return v;
}

INLINE void put(float *to, vec v, int64_t count) {
    if (count == WIDTH)
        memcpy(to, &v, sizeof v);
    else
        memcpy(to, &v, count * sizeof(float));
}

/* `some` of any kind, the rest 0. */
INLINE vec take(const int64_t kind, const void *from, int64_t i, int64_t count) {
    if (count == WIDTH)
        return load(kind, from, i);
    float some_of[WIDTH] = {0};
    for (int64_t j = 0; j < count; j++)
        some_of[j] = load_one(kind, from, i + j);
    vec v;
    memcpy(&v, some_of, sizeof v);
    return v;
}

/* What an RMS norm multiplies `width` numbers by: 1 / sqrt(mean of squares + eps). */
INLINE float rms_scale(const int64_t kind, const void *from, int64_t width, float eps) {
    vec squares = {};
    EACH(i, more, width) {
        vec its = take(kind, from, i, more);
        squares += its * its;
    }
    return 1 / sqrtf(total(squares) / width + eps);
}

/* To bfloat16 by rounding to the nearest, a tie to the even one; what is no number stays none. */
INLINE halves_at rounded(vec v) {
#if defined(__AVX512BF16__)
    return (halves_at)_mm512_cvtneps_pbh((__m512)v);
#else
    ints bits = (ints)v, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, is_none = v != v;
    return __builtin_convertvector((is_none & 0x7fc0) | (~is_none & near), halves_at);
#endif
}

/* Writes the first `count` numbers of a vector. */
INLINE void give(const int64_t kind, void *to, int64_t i, vec v, int64_t count) {
    if (kind == FLOAT32) {
        put((float *)to + i, v, count);
        return;
    }
    const halves_at half = rounded(v);
    if (count == WIDTH)
        memcpy((uint16_t *)to + i, &half, sizeof half);
    else
        memcpy((uint16_t *)to + i, &half, count * sizeof(uint16_t));
}

/* An RMS norm of float32, x * scale * weight, to y from number `at` on; returns the scale. */
INLINE float rms_norm(const float *x, const float *weight, int64_t width, float eps, int64_t kind, void *y, int64_t at) {
    const float scale = rms_scale(FLOAT32, x, width, eps);
    EACH(i, more, width)
        give(kind, y, at + i, some(x + i, more, 0) * scale * some(weight + i, more, 0), more);
    return scale;
}

/* A layer norm of float32, (x - mean) * scale * weight + bias, where there is one, to y; stats: mean and scale. */
INLINE void layer_norm(const float *x, const float *weight, const float *bias, int64_t width, float eps, int64_t kind,
                       void *y, float *stats) {
    vec sum = {}, squares = {};
    EACH(i, more, width)
        sum += some(x + i, more, 0);
    const float mean = total(sum) / width;
    EACH(i, more, width) {
        vec centred = some(x + i, more, mean) - mean;
        squares += centred * centred;
    }
    const float scale = 1 / sqrtf(total(squares) / width + eps);
    EACH(i, more, width) {
        vec its = (some(x + i, more, 0) - mean) * scale * some(weight + i, more, 0);
        give(kind, y, i, bias ? its + some(bias + i, more, 0) : its, more);
    }
    stats[0] = mean, stats[1] = scale;
}

/* A hash of 32 bits (Wellons, 2018, "lowbias32"). */
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));
INLINE bits hashed(bits x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* What dropout multiplies numbers by, counted from `first` on, `apart`: 0 for so many of 2^16 draws, else `factor`. */
INLINE vec kept(uint32_t first, uint32_t apart, uint32_t seed, int64_t dropped, float factor) {
    bits counters;
    UNROLLED for (int lane = 0; lane < WIDTH; lane++)
        counters[lane] = first + lane * apart;
    ints is_kept = (ints)(hashed(hashed(counters) + seed) & 0xffff) >= (int32_t)dropped;
    return (vec)(is_kept & (ints)((vec){} + factor));
}

INLINE uint32_t seed_from(int64_t seed, int64_t nth) {
    return hashed(hashed((bits){} + (uint32_t)seed) + (uint32_t)((uint64_t)seed >> 32) + (uint32_t)nth)[0];
}

/* 0, 1, 2, … */
INLINE ints places(void) {
    ints i;
    for (int lane = 0; lane < WIDTH; lane++)
        i[lane] = lane;
    return i;
}

typedef ints ints_at __attribute__((aligned(2), may_alias));
typedef bits bits_at __attribute__((aligned(4), may_alias));

/* Exchanges, in each two rows that are `step` apart, what is `step` off the diagonal. */
INLINE void exchange(ints *rows, const int step) {
    ints lower, upper;
    UNROLLED for (int lane = 0; lane < WIDTH; lane++) {
        lower[lane] = lane & step ? WIDTH + lane - step : lane;
        upper[lane] = lane & step ? WIDTH + lane : lane + step;
    }
    UNROLLED for (int i = 0; i < WIDTH; i++)
        if (!(i & step)) {
            const ints a = rows[i], b = rows[i + step];
#if defined(__clang__)
            for (int lane = 0; lane < WIDTH; lane++) {
                rows[i][lane] = lower[lane] < WIDTH ? a[lower[lane]] : b[lower[lane] - WIDTH];
                rows[i + step][lane] = upper[lane] < WIDTH ? a[upper[lane]] : b[upper[lane] - WIDTH];
            }
#else
            rows[i] = __builtin_shuffle(a, b, lower);
            rows[i + step] = __builtin_shuffle(a, b, upper);
#endif
        }
}

/* to (columns, rows) = from (rows, columns), of 32 bits; rows a multiple of WIDTH, strides between rows. */
INLINE void transpose(int64_t rows, int64_t columns, const uint32_t *from, int64_t from_stride, uint32_t *to,
                      int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += WIDTH)
        EACH(c, more, columns) {
            ints its[WIDTH] = {};
            UNROLLED for (int i = 0; i < WIDTH; i++)
                if (more == WIDTH)
                    memcpy(its + i, from + (r + i) * from_stride + c, sizeof *its);
                else
                    memcpy(its + i, from + (r + i) * from_stride + c, more * sizeof *from);
            exchange(its, 1);
            exchange(its, 2);
            if (WIDTH > 4)
                exchange(its, 4);
            if (WIDTH > 8)
                exchange(its, 8);
            for (int64_t i = 0; i < more; i++)
                memcpy(to + (c + i) * to_stride + r, its + i, sizeof *its);
        }
}

/* Says that a vector is wanted in a register: gcc would read one that is used often from memory each time. */
#if defined(__AVX512F__)
#define STAYS(v) __asm__("" : "+v"(v))
#else
#define STAYS(v) (void)0
#endif

/* sum += a.low * b.low + a.high * b.high, for WIDTH pairs of bfloat16, two in 32 bits */
INLINE vec add_pairs(vec sum, ints a, ints b) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (vec)(a << 16) * (vec)(b << 16);
    return sum + (vec)(a & (int32_t)0xffff0000) * (vec)(b & (int32_t)0xffff0000);
#endif
}
