/* Products in tiles that fill the registers: rows by vectors of sixteen columns. */
#include "lanes.h"

/* A matrix: number (i, j) lies at i * row + j * column. */
typedef struct {
    const float *at;
    int64_t row, column;
} Matrix;

INLINE void tile(const int rows, const int broad, Matrix x, const float *w, int64_t w_row, float *out, int64_t out_row,
                 int64_t depth, const int add) {
    v16 sum[TALL][BROAD];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < broad; v++) {
            if (add) sum[r][v] = AT(out + r * out_row + 16 * v);
            else sum[r][v] = ALL(0.0f);
            /* What is added to has long left the nearest cache: the next tile's is asked for while this one works. */
            if (add) __builtin_prefetch(out + (r + TALL) * out_row + 16 * v, 1);
        }
    for (int64_t k = 0; k < depth; k++) {
        v16 at[BROAD];
        UNROLL for (int v = 0; v < broad; v++) at[v] = AT(w + k * w_row + 16 * v);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < broad; v++) sum[r][v] += x.at[r * x.row + k * x.column] * at[v];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < broad; v++) AT(out + r * out_row + 16 * v) = sum[r][v];
}

/* out [rows, 16 broad] = x [rows, depth] w [depth, 16 broad], or that more. */
INLINE void strip(const int broad, Matrix x, const float *w, int64_t w_row, float *out, int64_t out_row, int64_t rows,
                  int64_t depth, const int add) {
    int64_t r = 0;
    for (; r + TALL <= rows; r += TALL, x.at += TALL * x.row, out += TALL * out_row)
        tile(TALL, broad, x, w, w_row, out, out_row, depth, add);
    switch (rows - r) { /* the last rows in one tile, too: a tile's time hardly depends on how tall it is */
#define LEFT(n) case n: tile(n < TALL ? n : 1, broad, x, w, w_row, out, out_row, depth, add); break;
        LEFT(1) LEFT(2) LEFT(3) LEFT(4) LEFT(5) LEFT(6) LEFT(7)
#undef LEFT
    }
}

/* out = x w, or that more: of a packed weight [columns / PANEL, in, PANEL], where numbers of a row of x lie side by
 * side. */
INLINE void product(const float *x, int64_t x_row, const float *w, float *out, int64_t out_row, int64_t rows,
                    int64_t in, int64_t columns, const int add) {
    for (int64_t c = 0; c < columns; c += PANEL)
        strip(BROAD, (Matrix){x, x_row, 1}, w + c * in, PANEL, out + c, out_row, rows, in, add);
}

/* Panels of a weight [out, in] for x w^T, from column `before` on, times a norm's weight [in] unless there is none. */
static inline void pack(const float *w, const float *norm, int64_t out, int64_t in, float *panels, int64_t before) {
    for (int64_t o = 0; o < out; o += 16)
        for (int64_t i = 0; i < in; i += 16) {
            const int64_t place = before + o;
            float *to = panels + (place / PANEL * in + i) * PANEL + place % PANEL;
            v16 block[16];
            UNROLL for (int k = 0; k < 16; k++) {
                block[k] = AT(w + (o + k) * in + i);
                if (norm) block[k] *= AT(norm + i);
            }
            transposed(block);
            UNROLL for (int k = 0; k < 16; k++) AT(to + k * PANEL) = block[k];
        }
}
