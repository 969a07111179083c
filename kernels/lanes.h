/* Sixteen floats at a time, for the kernels that are compiled on demand: gcc's vector types, on any processor. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));
#define AT(p) (*(v16 *)(p))
#define ALL(x) ((v16){0} + (x))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

/* A tile of a product, in as many registers as there are: TALL rows by BROAD vectors of sixteen columns. */
#ifdef __AVX512F__
#define TALL 8
#define BROAD 2
#else
#define TALL 4
#define BROAD 1
#endif
#define PANEL (16 * BROAD)

static inline float total(v16 x) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}

/* Of lanes of two vectors (the second's from 16 on), those that stay and, `side` further on, those that change places
 * when blocks of `side` = 8, 4, 2, 1 rows and columns are transposed. */
static const i16 STAY[4] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                            {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
                            {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
                            {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}};

/* Sixteen rows of sixteen become columns. */
INLINE void transposed(v16 *t) {
    UNROLL for (int stage = 0; stage < 4; stage++)
        UNROLL for (int i = 0; i < 16; i++) {
            const int side = 8 >> stage;
            if (i & side) continue;
            const v16 a = t[i], b = t[i + side];
            t[i] = __builtin_shuffle(a, b, STAY[stage]);
            t[i + side] = __builtin_shuffle(a, b, STAY[stage] + side);
        }
}

static inline v16 chosen(i16 where, v16 yes, v16 no) {
    return (v16)((where & (i16)yes) | (~where & (i16)no));
}

/* exp by 2^n times a polynomial (Cephes' coefficients), to two units in the last place; between exp(-87) and exp(87). */
static inline v16 expv(v16 y) {
    y = chosen(y > 87.0f, ALL(87.0f), y);
    y = chosen(y < -87.0f, ALL(-87.0f), y);
    const v16 shift = ALL(12582912.0f); /* 1.5 2^23 rounds to the nearest whole number */
    v16 n = y * 1.44269504088896341f + shift;
    const i16 bits = (i16)n;
    n -= shift;
    v16 r = y - n * 0.693359375f + n * 2.12194440e-4f;
    v16 e = ALL(1.9875691500e-4f);
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    return e * (v16)((bits << 23) + (127 << 23));
}

static inline v16 sigmoid(v16 x) {
    return 1.0f / (1.0f + expv(-x));
}

/* The first list of a thread, where each takes a run of lists with about as many rows as the others. */
static inline int64_t border(const int64_t *offsets, int64_t lists, int64_t threads, int64_t thread) {
    const int64_t rows = offsets[lists] * thread / threads;
    int64_t low = 0, high = lists;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (offsets[middle] < rows) low = middle + 1; else high = middle;
    }
    return thread == threads ? lists : low;
}

/* Of something with offsets, lists and threads. */
#define BORDER(x, thread) border((x)->offsets, (x)->lists, (x)->threads, thread)
#define LISTS_OF(x, thread) for (int64_t list = BORDER(x, thread); list < BORDER(x, (thread) + 1); list++)
