/* Causal attention within lists of unlike length, forward and backward, for float32 on a CPU.
 *
 * Built on demand by native.py for one width E of a head (a multiple of 16). List u has rows offsets[u] to
 * offsets[u + 1]; a row looks at those of its list up to itself. Rows are worked on sixteen at a time, so that the last
 * sixteen keys they meet are those that some of them may not see. Keys (and values, in the backward) are packed numbers
 * first, sixteen beside each other: a panel [E, 16]. Where a row may not look, nothing is multiplied by what lies there
 * except a score that is thrown away: what comes later can hold anything. Each of T threads takes a run of lists.
 */
#include "lanes.h"

#define NE (E / 16)
#define BLOCK 16 /* rows worked on together: as many as lanes, so that only one panel is masked */
#define PART (NE % BROAD ? 1 : BROAD)
#define AHEAD 48 /* rows: lists are short, so what comes next is asked for before it is reached */
#define LEAST(a, b) ((a) < (b) ? (a) : (b))

typedef struct {
    int64_t lists, heads, threads, longest;
    int64_t q_step, k_step, v_step; /* numbers from a row to the next; heads follow each other, E apart */
    const int64_t *offsets;
    const float *q, *k, *v;
} Lists;

static inline int64_t whole(int64_t length) { return (length + BLOCK - 1) / BLOCK * BLOCK; }

/* Numbers that a thread needs between: packed keys and values, two kinds of weights and of rows. */
int64_t room(int64_t longest) { return 2 * (E + BLOCK) * whole(longest) + 2 * BLOCK * E; }

/* In lane r the sum of vector r. The vectors are lost. */
INLINE v16 sums(v16 *of) {
    transposed(of);
    v16 sum = of[0];
    UNROLL for (int i = 1; i < 16; i++) sum += of[i];
    return sum;
}

/* In lane r the highest number of vector r. The vectors are lost. */
INLINE v16 highest(v16 *of) {
    transposed(of);
    v16 most = of[0];
    UNROLL for (int i = 1; i < 16; i++) most = chosen(of[i] > most, of[i], most);
    return most;
}

/* Panels [E, 16] of the rows of a list, the last one filled up with zeros. */
static void pack(const float *x, int64_t step, int64_t length, float *panels) {
    for (int64_t i = 0; i < length; i += BLOCK)
        for (int e = 0; e < E; e += 16) {
            v16 at[16];
            UNROLL for (int r = 0; r < 16; r++) {
                at[r] = ALL(0.0f);
                if (i + r < length) at[r] = AT(x + (i + r) * step + e);
                __builtin_prefetch(x + (i + r + AHEAD) * step + e);
            }
            transposed(at);
            UNROLL for (int r = 0; r < 16; r++) AT(panels + i * E + (e + r) * BLOCK) = at[r];
        }
}

/* Some rows times a number, in a block [BLOCK, E] that is filled up with zeros. */
static inline void taken(const float *x, int64_t step, int many, float scale, float *block) {
    for (int r = 0; r < many; r++)
        UNROLL for (int n = 0; n < NE; n++) {
            AT(block + r * E + 16 * n) = AT(x + r * step + 16 * n) * scale;
            __builtin_prefetch(x + (r + AHEAD) * step + 16 * n);
        }
    if (many < BLOCK) memset(block + many * E, 0, (BLOCK - many) * E * sizeof(float));
}

INLINE void met_tile(const int broad, const float *rows, const float *panels, float *out, int64_t columns) {
    v16 sum[TALL][BROAD];
    UNROLL for (int r = 0; r < TALL; r++)
        UNROLL for (int b = 0; b < broad; b++) sum[r][b] = ALL(0.0f);
    for (int e = 0; e < E; e++) {
        v16 at[BROAD];
        UNROLL for (int b = 0; b < broad; b++) at[b] = AT(panels + (b * E + e) * BLOCK);
        UNROLL for (int r = 0; r < TALL; r++)
            UNROLL for (int b = 0; b < broad; b++) sum[r][b] += rows[r * E + e] * at[b];
    }
    UNROLL for (int r = 0; r < TALL; r++)
        UNROLL for (int b = 0; b < broad; b++) AT(out + r * columns + 16 * b) = sum[r][b];
}

/* out [BLOCK, columns]: products of a block's rows with everything in the panels. */
INLINE void met(const float *block, int many, const float *panels, float *out, int64_t columns) {
    for (int r = 0; r < many; r += TALL) {
        int64_t c = 0;
        for (; c + 16 * BROAD <= columns; c += 16 * BROAD)
            met_tile(BROAD, block + r * E, panels + c * E, out + r * columns + c, columns);
        for (; c < columns; c += 16) met_tile(1, block + r * E, panels + c * E, out + r * columns + c, columns);
    }
}

/* out [many, E] = rate_r sum_j weight_rj x_j, where row r of the block sees the rows of x up to begin + r. */
INLINE void mixed(const float *weight, int64_t columns, const float *x, int64_t step, int64_t begin, int many,
                  const float *rate, float *out, int64_t out_step) {
    for (int first = 0; first < many; first += TALL)
        for (int n = 0; n < NE; n += PART) {
            const float *w = weight + first * columns, *from = x + 16 * n;
            const int64_t seen = begin + first;
            v16 sum[TALL][PART];
            UNROLL for (int r = 0; r < TALL; r++)
                UNROLL for (int p = 0; p < PART; p++) sum[r][p] = ALL(0.0f);
            for (int64_t j = 0; j < seen; j++) {
                v16 at[PART];
                UNROLL for (int p = 0; p < PART; p++) at[p] = AT(from + j * step + 16 * p);
                UNROLL for (int r = 0; r < TALL; r++)
                    UNROLL for (int p = 0; p < PART; p++) sum[r][p] += w[r * columns + j] * at[p];
            }
            UNROLL for (int c = 0; c < TALL; c++) {
                if (first + c >= many) break;
                UNROLL for (int p = 0; p < PART; p++) {
                    const v16 at = AT(from + (seen + c) * step + 16 * p);
                    UNROLL for (int r = c; r < TALL; r++) sum[r][p] += w[r * columns + seen + c] * at;
                }
            }
            UNROLL for (int r = 0; r < TALL; r++) {
                if (first + r >= many) break;
                UNROLL for (int p = 0; p < PART; p++)
                    AT(out + (first + r) * out_step + 16 * (n + p)) = sum[r][p] * rate[first + r];
            }
        }
}

/* out_j += sum_r weight_rj block_r, or = for the rows j that the block itself begins with, from j = begin on. */
INLINE void spread(const float *weight, int64_t columns, const float *block, int64_t begin, int many, float *out,
                   int64_t out_step) {
    for (int64_t j = 0; j < begin + many; j += TALL)
        for (int n = 0; n < NE; n += PART) {
            const int own = j >= begin, keys = (int)LEAST(TALL, begin + many - j);
            const float *w = weight + j, *from = block + 16 * n;
            float *to = out + j * out_step + 16 * n;
            v16 sum[TALL][PART];
            int r = 0;
            if (own) {
                r = (int)(j - begin);
                UNROLL for (int c = 0; c < TALL; c++)
                    UNROLL for (int p = 0; p < PART; p++) sum[c][p] = ALL(0.0f);
                UNROLL for (int i = 0; i < TALL; i++)
                    UNROLL for (int p = 0; p < PART; p++) {
                        const v16 at = AT(from + (r + i) * E + 16 * p);
                        UNROLL for (int c = 0; c <= i; c++) sum[c][p] += w[(r + i) * columns + c] * at;
                    }
                r += TALL;
            } else
                UNROLL for (int c = 0; c < TALL; c++)
                    UNROLL for (int p = 0; p < PART; p++) sum[c][p] = AT(to + c * out_step + 16 * p);
            for (; r < many; r++) {
                v16 at[PART];
                UNROLL for (int p = 0; p < PART; p++) at[p] = AT(from + r * E + 16 * p);
                UNROLL for (int c = 0; c < TALL; c++)
                    UNROLL for (int p = 0; p < PART; p++) sum[c][p] += w[r * columns + c] * at[p];
            }
            UNROLL for (int c = 0; c < TALL; c++) {
                if (c >= keys) break;
                UNROLL for (int p = 0; p < PART; p++) AT(to + c * out_step + 16 * p) = sum[c][p];
            }
        }
}

/* exp(y), and 0 far below; what is no number stays so. */
static inline v16 weight_of(v16 y) { return chosen(y < -87.0f, ALL(0.0f), expv(y)); }

/* Where a row of a block may look in its last panel. */
static inline i16 seen_by(int r) {
    i16 lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
    return lane <= r;
}

/* The numbers of a list and a head: out [N, A, E], and for the backward each row's highest score and one over its
 * sum, tops and rates [N, A]. */
static void look(const Lists *l, int64_t begin, int64_t length, int64_t head, float *between, float *out, float *tops,
                 float *rates) {
    const int64_t step = l->heads * E;
    const float *v = l->v + begin * l->v_step + head * E, *q = l->q + begin * l->q_step + head * E;
    float *panels = between, *weight = panels + E * whole(length), *block = weight + BLOCK * whole(length);
    const float scale = 1.0f / sqrtf((float)E);
    pack(l->k + begin * l->k_step + head * E, l->k_step, length, panels);
    for (int64_t at = 0; at < length; at += BLOCK) {
        const int many = (int)LEAST(BLOCK, length - at);
        const int64_t columns = at + BLOCK;
        v16 most[BLOCK], sum[BLOCK];
        float top[BLOCK], rate[BLOCK];
        taken(q + at * l->q_step, l->q_step, many, scale, block);
        met(block, many, panels, weight, columns);
        for (int r = 0; r < BLOCK; r++) {
            float *w = weight + r * columns;
            most[r] = sum[r] = ALL(0.0f);
            if (r >= many) continue;
            most[r] = AT(w + at) = chosen(seen_by(r), AT(w + at), ALL(-INFINITY));
            for (int64_t j = 0; j < at; j += 16) most[r] = chosen(AT(w + j) > most[r], AT(w + j), most[r]);
        }
        AT(top) = highest(most);
        for (int r = 0; r < many; r++) {
            float *w = weight + r * columns;
            for (int64_t j = 0; j < columns; j += 16) sum[r] += AT(w + j) = weight_of(AT(w + j) - top[r]);
        }
        AT(rate) = 1.0f / sums(sum);
        for (int r = 0; r < many; r++) {
            const int64_t row = (begin + at + r) * l->heads + head;
            tops[row] = top[r];
            rates[row] = rate[r];
        }
        mixed(weight, columns, v, l->v_step, at, many, rate, out + (begin + at) * step + head * E, step);
    }
}

/* The gradients of a list and a head, [N, A, E]. */
static void back(const Lists *l, int64_t begin, int64_t length, int64_t head, float *between, const float *tops,
                 const float *rates, const float *grad, float *d_q, float *d_k, float *d_v) {
    const int64_t step = l->heads * E, own = begin * step + head * E, all = whole(length);
    const float *q = l->q + begin * l->q_step + head * E, *k = l->k + begin * l->k_step + head * E;
    float *keys = between, *values = keys + E * all, *weight = values + E * all, *bent = weight + BLOCK * all;
    float *block = bent + BLOCK * all, *given = block + BLOCK * E;
    const float scale = 1.0f / sqrtf((float)E);
    float scales[BLOCK];
    for (int r = 0; r < BLOCK; r++) scales[r] = scale;
    pack(k, l->k_step, length, keys);
    pack(l->v + begin * l->v_step + head * E, l->v_step, length, values);
    for (int64_t at = 0; at < length; at += BLOCK) {
        const int many = (int)LEAST(BLOCK, length - at);
        const int64_t columns = at + BLOCK;
        taken(q + at * l->q_step, l->q_step, many, scale, block);
        taken(grad + own + at * step, step, many, 1.0f, given);
        met(block, many, keys, weight, columns);
        met(given, many, values, bent, columns);
        v16 both[BLOCK];
        float mean[BLOCK];
        for (int r = 0; r < BLOCK; r++) {
            float *w = weight + r * columns, *b = bent + r * columns;
            both[r] = ALL(0.0f);
            if (r >= many) {
                AT(w + at) = AT(b + at) = both[r];
                continue;
            }
            /* Either may hold anything where the row may not look. */
            AT(w + at) = chosen(seen_by(r), AT(w + at), ALL(-INFINITY));
            AT(b + at) = chosen(seen_by(r), AT(b + at), both[r]);
            const int64_t row = (begin + at + r) * l->heads + head;
            for (int64_t j = 0; j < columns; j += 16) {
                AT(w + j) = weight_of(AT(w + j) - tops[row]) * rates[row];
                both[r] += AT(w + j) * AT(b + j);
            }
        }
        AT(mean) = sums(both);
        for (int r = 0; r < many; r++)
            for (int64_t j = r * columns; j < (r + 1) * columns; j += 16)
                AT(bent + j) = AT(weight + j) * (AT(bent + j) - mean[r]);
        mixed(bent, columns, k, l->k_step, at, many, scales, d_q + own + at * step, step);
        spread(weight, columns, given, at, many, d_v + own, step);
        spread(bent, columns, block, at, many, d_k + own, step);
    }
}

#define EACH_LIST                                                                                                  \
    LISTS_OF(l, thread)                                                                                            \
        for (int64_t head = 0, begin = l->offsets[list], length = l->offsets[list + 1] - begin; head < l->heads; head++)

/* between [T, room(longest)]. */
void forward(const Lists *l, float *between, float *out, float *tops, float *rates) {
#pragma omp parallel for num_threads(l->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < l->threads; thread++)
        EACH_LIST look(l, begin, length, head, between + thread * room(l->longest), out, tops, rates);
}

void backward(const Lists *l, float *between, const float *tops, const float *rates, const float *grad, float *d_q,
              float *d_k, float *d_v) {
#pragma omp parallel for num_threads(l->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < l->threads; thread++)
        EACH_LIST back(l, begin, length, head, between + thread * room(l->longest), tops, rates, grad, d_q, d_k, d_v);
}
