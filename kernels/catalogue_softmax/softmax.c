/* Cross-entropy of rows against a catalogue, with all gradients, for float32 on a CPU.
 *
 * Built on demand for one width W (a multiple of PANEL). Some rows at a time: their exponentials are made, used twice
 * and overwritten, so that they never leave the cache. No largest logit is searched for: the caller has seen that none
 * can overflow.
 */
#include <stdlib.h>

#include "lanes.h"

typedef struct {
    int64_t rows, items;  /* items: up to a multiple of PANEL */
    int64_t some;         /* rows at a time, a multiple of TALL */
    int64_t threads;
    const float *states;  /* [rows, W] */
    const float *own;     /* [rows]: logits of the rows' own items */
    const int64_t *own_item;
    const float *share;   /* [rows] */
    const float *vectors; /* [items, W], zeros behind the last one */
    const float *packed;  /* the same as [items / PANEL, W, PANEL] */
    const float *bias;    /* [items], very low behind the last one */
    const int32_t *numbers; /* [items]: which items they are */
    float *d_states;      /* [rows, W] */
    float *d_items;       /* [threads, items, W], zeros before */
    float *mass;          /* [rows]: the sum of exponentials */
} Batch;

int64_t panel(void) { return PANEL; }

/* sum[i][] += x[i across + k along] w[k wide + ...] over k. */
INLINE void tile(v16 sum[TALL][BROAD], const int tall, const float *x, int64_t across, int64_t along, const float *w,
                 int64_t wide, int64_t many) {
    for (int64_t k = 0; k < many; k++) {
        v16 at[BROAD];
        UNROLL for (int v = 0; v < BROAD; v++) at[v] = AT(w + k * wide + 16 * v);
        UNROLL for (int i = 0; i < tall; i++)
            UNROLL for (int v = 0; v < BROAD; v++) sum[i][v] += x[i * across + k * along] * at[v];
    }
}

/* Exponentials of a tile's logits, none for a row's own item, and their sums. chance: where the tile lies. */
INLINE void chances(const Batch *b, const int tall, const float *states, const int64_t *own_item, int64_t at,
                    float *chance, v16 *mass) {
    v16 sum[TALL][BROAD];
    UNROLL for (int i = 0; i < tall; i++)
        UNROLL for (int v = 0; v < BROAD; v++) sum[i][v] = AT(b->bias + at + 16 * v);
    tile(sum, tall, states, W, 1, b->packed + at * W, PANEL, W);
    UNROLL for (int v = 0; v < BROAD; v++) {
        i16 number;
        memcpy(&number, b->numbers + at + 16 * v, sizeof number);
        UNROLL for (int i = 0; i < tall; i++) {
            const v16 e = chosen(number == (int32_t)own_item[i], ALL(0.0f), expv(sum[i][v]));
            mass[i] += e;
            AT(chance + i * PANEL + 16 * v) = e;
        }
    }
}

/* The gradient of a few rows' states, from their chances: [items / PANEL, some, PANEL]. */
INLINE void to_states(const Batch *b, const int tall, const float *chance, const float *rate, float *out) {
    for (int64_t c = 0; c < W; c += PANEL) {
        v16 sum[TALL][BROAD];
        UNROLL for (int i = 0; i < tall; i++)
            UNROLL for (int v = 0; v < BROAD; v++) sum[i][v] = ALL(0.0f);
        for (int64_t at = 0; at < b->items; at += PANEL)
            tile(sum, tall, chance + at * b->some, PANEL, 1, b->vectors + at * W + c, W, PANEL);
        UNROLL for (int i = 0; i < tall; i++)
            UNROLL for (int v = 0; v < BROAD; v++) AT(out + i * W + c + 16 * v) = sum[i][v] * rate[i];
    }
}

static void rows(const Batch *b, int64_t begin, int64_t end, float *d_items, float *chance, float *rated) {
    const int64_t some = b->some;
    for (int64_t first = begin; first < end; first += some) {
        const int64_t many = end - first < some ? end - first : some, even = many / TALL * TALL;
        const float *states = b->states + first * W;
        const int64_t *own_item = b->own_item + first;
        v16 mass[some];
        float rate[some];
        for (int64_t i = 0; i < many; i++) mass[i] = ALL(0.0f);
        for (int64_t at = 0; at < b->items; at += PANEL) {
            float *here = chance + at * some;
            for (int64_t i = 0; i < even; i += TALL)
                chances(b, TALL, states + i * W, own_item + i, at, here + i * PANEL, mass + i);
            for (int64_t i = even; i < many; i++)
                chances(b, 1, states + i * W, own_item + i, at, here + i * PANEL, mass + i);
        }
        for (int64_t i = 0; i < many; i++) {
            b->mass[first + i] = total(mass[i]) + expf(b->own[first + i]);
            rate[i] = b->share[first + i] / b->mass[first + i];
            for (int64_t j = 0; j < W; j += 16) AT(rated + i * W + j) = AT(states + i * W + j) * rate[i];
        }
        float *d_states = b->d_states + first * W;
        for (int64_t i = 0; i < even; i += TALL)
            to_states(b, TALL, chance + i * PANEL, rate + i, d_states + i * W);
        for (int64_t i = even; i < many; i++) to_states(b, 1, chance + i * PANEL, rate + i, d_states + i * W);
        for (int64_t at = 0; at < b->items; at += TALL) {
            const float *here = chance + at / PANEL * PANEL * some + at % PANEL;
            for (int64_t c = 0; c < W; c += PANEL) {
                float *out = d_items + at * W + c;
                v16 sum[TALL][BROAD];
                UNROLL for (int i = 0; i < TALL; i++)
                    UNROLL for (int v = 0; v < BROAD; v++) sum[i][v] = AT(out + i * W + 16 * v);
                tile(sum, TALL, here, 1, PANEL, rated + c, W, many);
                UNROLL for (int i = 0; i < TALL; i++)
                    UNROLL for (int v = 0; v < BROAD; v++) AT(out + i * W + 16 * v) = sum[i][v];
            }
        }
    }
}

/* scratch: [threads, some (items + W)]. */
void cross_entropy(const Batch *b, float *scratch) {
    const int64_t size = b->some * (b->items + W);
#pragma omp parallel for num_threads(b->threads) schedule(static, 1) if (b->threads > 1)
    for (int64_t t = 0; t < b->threads; t++) {
        float *mine = scratch + t * size;
        rows(b, t * b->rows / b->threads, (t + 1) * b->rows / b->threads, b->d_items + t * b->items * W, mine,
             mine + b->some * b->items);
    }
}
