/* DIN's unit of the paper for float32 on a CPU: what torch_gate.py does in passes over memory, in registers.
 *
 * Built on demand by native.py for one shape: F units (a multiple of 16), H the width of queries, keys and values (a
 * multiple of 16). List u has keys offsets[u] to offsets[u + 1] and C rows, one after another; the pairs of a row follow
 * those of the row before it. Each of T threads takes a run of lists and writes sums of its own, so that nothing is
 * added in an order that hangs on time.
 */
#include "lanes.h"

#define NF (F / 16)
#define NH (H / 16)

typedef struct {
    int64_t lists, rows, threads;
    const int64_t *offsets;
    const float *queries, *keys, *from_query; /* [U C, H], [N, H], [U C, F] */
    const float *from_key, *product;          /* [F, H] */
    const float *key_turned, *product_turned; /* the same, [H, F] */
} Unit;

/* h [P, F], and a thread's sums of h and of its squares less a shift: sums [T, 2, F]. */
void hidden(const Unit *u, const float *shift, float *h, float *sums) {
#pragma omp parallel for num_threads(u->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < u->threads; thread++) {
        float turned[H * F] __attribute__((aligned(64)));
        v16 first[NF], second[NF];
        UNROLL for (int i = 0; i < NF; i++) first[i] = second[i] = ALL(0.0f);
        LISTS_OF(u, thread) {
            const int64_t begin = u->offsets[list], length = u->offsets[list + 1] - begin;
            for (int64_t c = 0; c < u->rows && length; c++) {
                const int64_t row = list * u->rows + c;
                const float *q = u->queries + row * H, *k = u->keys + begin * H;
                float *out = h + (begin * u->rows + c * length) * F;
                for (int j = 0; j < H; j++)
                    UNROLL for (int f = 0; f < F; f += 16)
                        AT(turned + j * F + f) = AT(u->product_turned + j * F + f) * q[j] + AT(u->key_turned + j * F + f);
                for (int64_t l = 0; l < length; l += 4) {
                    const int many = length - l < 4 ? (int)(length - l) : 4;
                    const float *key[4];
                    for (int i = 0; i < 4; i++) key[i] = k + (l + (i < many ? i : 0)) * H;
                    v16 sum[4][NF];
                    UNROLL for (int i = 0; i < 4; i++)
                        UNROLL for (int n = 0; n < NF; n++) sum[i][n] = AT(u->from_query + row * F + 16 * n);
                    for (int j = 0; j < H; j++) {
                        v16 m[NF];
                        UNROLL for (int n = 0; n < NF; n++) m[n] = AT(turned + j * F + 16 * n);
                        UNROLL for (int i = 0; i < 4; i++)
                            UNROLL for (int n = 0; n < NF; n++) sum[i][n] += key[i][j] * m[n];
                    }
                    for (int i = 0; i < many; i++)
                        UNROLL for (int n = 0; n < NF; n++) {
                            const v16 away = sum[i][n] - AT(shift + 16 * n);
                            AT(out + (l + i) * F + 16 * n) = sum[i][n];
                            first[n] += away;
                            second[n] += away * away;
                        }
                }
            }
        }
        UNROLL for (int n = 0; n < NF; n++) {
            AT(sums + thread * 2 * F + 16 * n) = first[n];
            AT(sums + thread * 2 * F + F + 16 * n) = second[n];
        }
    }
}

/* about [5, F]: mean, rate, w alpha, c = w (1 - alpha). Scores times scale [P], and what they pool [U C, H]. */
void pooled(const Unit *u, const float *h, const float *about, float bias, float scale, float *score, float *out) {
#pragma omp parallel for num_threads(u->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < u->threads; thread++) {
        LISTS_OF(u, thread) {
            const int64_t begin = u->offsets[list], length = u->offsets[list + 1] - begin;
            for (int64_t c = 0; c < u->rows; c++) {
                const int64_t pair = begin * u->rows + c * length;
                v16 sum[NH];
                UNROLL for (int n = 0; n < NH; n++) sum[n] = ALL(0.0f);
                for (int64_t l = 0; l < length; l++) {
                    v16 found = ALL(0.0f);
                    UNROLL for (int n = 0; n < NF; n++) {
                        const v16 x = AT(h + (pair + l) * F + 16 * n);
                        const v16 p = sigmoid((x - AT(about + 16 * n)) * AT(about + F + 16 * n));
                        found += x * (AT(about + 2 * F + 16 * n) + p * AT(about + 3 * F + 16 * n));
                    }
                    const float s = score[pair + l] = (total(found) + bias) * scale;
                    UNROLL for (int n = 0; n < NH; n++) sum[n] += s * AT(u->keys + (begin + l) * H + 16 * n);
                }
                UNROLL for (int n = 0; n < NH; n++) AT(out + (list * u->rows + c) * H + 16 * n) = sum[n];
            }
        }
    }
}

/* d score [P] (d_score holds that of the weights and takes it), dkeys [N, H] of the pooling, and the sums
 * [T, 4, F] of d score times h, h p, t = h p (1 - p) and t (h - mean). */
void scored(const Unit *u, const float *h, const float *about, const float *score, const float *grad, float scale,
            float *d_score, float *d_keys, float *sums) {
#pragma omp parallel for num_threads(u->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < u->threads; thread++) {
        v16 found[4][NF];
        for (int i = 0; i < 4; i++) UNROLL for (int n = 0; n < NF; n++) found[i][n] = ALL(0.0f);
        LISTS_OF(u, thread) {
            const int64_t begin = u->offsets[list], length = u->offsets[list + 1] - begin;
            memset(d_keys + begin * H, 0, length * H * sizeof(float));
            for (int64_t c = 0; c < u->rows; c++) {
                const int64_t pair = begin * u->rows + c * length;
                const float *g = grad + (list * u->rows + c) * H;
                for (int64_t l = 0; l < length; l++) {
                    v16 both = ALL(0.0f);
                    float *d_key = d_keys + (begin + l) * H;
                    UNROLL for (int n = 0; n < NH; n++) {
                        both += AT(g + 16 * n) * AT(u->keys + (begin + l) * H + 16 * n);
                        AT(d_key + 16 * n) += score[pair + l] * AT(g + 16 * n);
                    }
                    const float d = d_score[pair + l] = (d_score[pair + l] + total(both)) * scale;
                    UNROLL for (int n = 0; n < NF; n++) {
                        const v16 x = AT(h + (pair + l) * F + 16 * n), away = x - AT(about + 16 * n);
                        const v16 p = sigmoid(away * AT(about + F + 16 * n)), dx = d * x, dxp = dx * p;
                        const v16 t = dxp * (1.0f - p);
                        found[0][n] += dx;
                        found[1][n] += dxp;
                        found[2][n] += t;
                        found[3][n] += t * away;
                    }
                }
            }
        }
        for (int i = 0; i < 4; i++)
            UNROLL for (int n = 0; n < NF; n++) AT(sums + (thread * 4 + i) * F + 16 * n) = found[i][n];
    }
}

/* about [6, F]: mean, rate, w alpha, c, and what comes through the statistics: bend, start. The rest of dkeys,
 * d queries [U C, H], d from_query [U C, F], and a thread's d from_key and d product: sums [T, 2, F, H].
 * room [T, longest + 4, F] is for a row's dh. */
void through(const Unit *u, const float *h, const float *about, const float *d_score, int64_t longest, float *d_keys,
             float *d_queries, float *d_from_query, float *sums, float *room) {
#pragma omp parallel for num_threads(u->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < u->threads; thread++) {
        float m[F * H] __attribute__((aligned(64)));
        float *dh = room + thread * (longest + 4) * F;
        float *of_key = sums + thread * 2 * F * H, *of_product = of_key + F * H;
        memset(of_key, 0, 2 * F * H * sizeof(float));
        LISTS_OF(u, thread) {
            const int64_t begin = u->offsets[list], length = u->offsets[list + 1] - begin;
            for (int64_t c = 0; c < u->rows; c++) {
                const int64_t row = list * u->rows + c, pair = begin * u->rows + c * length;
                const float *q = u->queries + row * H;
                v16 of_query[NF];
                UNROLL for (int n = 0; n < NF; n++) of_query[n] = ALL(0.0f);
                for (int f = 0; f < F; f++)
                    UNROLL for (int j = 0; j < H; j += 16)
                        AT(m + f * H + j) = AT(u->product + f * H + j) * AT(q + j) + AT(u->from_key + f * H + j);
                for (int64_t l = 0; l < length; l++) {
                    const float d = d_score[pair + l];
                    UNROLL for (int n = 0; n < NF; n++) {
                        const v16 x = AT(h + (pair + l) * F + 16 * n), away = x - AT(about + 16 * n);
                        const v16 rate = AT(about + F + 16 * n), gated = AT(about + 3 * F + 16 * n);
                        const v16 p = sigmoid(away * rate);
                        const v16 plain = AT(about + 2 * F + 16 * n) + gated * (p + rate * x * p * (1.0f - p));
                        const v16 found = d * plain - AT(about + 4 * F + 16 * n) * away - AT(about + 5 * F + 16 * n);
                        AT(dh + l * F + 16 * n) = found;
                        of_query[n] += found;
                    }
                }
                memset(dh + length * F, 0, 4 * F * sizeof(float));
                UNROLL for (int n = 0; n < NF; n++) AT(d_from_query + row * F + 16 * n) = of_query[n];
                for (int64_t l = 0; l < length; l += 4) {
                    v16 sum[4][NH];
                    UNROLL for (int i = 0; i < 4; i++)
                        UNROLL for (int n = 0; n < NH; n++) sum[i][n] = ALL(0.0f);
                    for (int f = 0; f < F; f++) {
                        UNROLL for (int i = 0; i < 4; i++)
                            UNROLL for (int n = 0; n < NH; n++) sum[i][n] += dh[(l + i) * F + f] * AT(m + f * H + 16 * n);
                    }
                    const int many = length - l < 4 ? (int)(length - l) : 4;
                    for (int i = 0; i < many; i++)
                        UNROLL for (int n = 0; n < NH; n++) AT(d_keys + (begin + l + i) * H + 16 * n) += sum[i][n];
                }
                v16 of_q[NH];
                UNROLL for (int n = 0; n < NH; n++) of_q[n] = ALL(0.0f);
                for (int f = 0; f < F; f += 8) {
                    v16 sum[8][NH];
                    UNROLL for (int i = 0; i < 8; i++)
                        UNROLL for (int n = 0; n < NH; n++) sum[i][n] = ALL(0.0f);
                    for (int64_t l = 0; l < length; l++) {
                        const float *k = u->keys + (begin + l) * H;
                        UNROLL for (int i = 0; i < 8; i++)
                            UNROLL for (int n = 0; n < NH; n++) sum[i][n] += dh[l * F + f + i] * AT(k + 16 * n);
                    }
                    UNROLL for (int i = 0; i < 8; i++)
                        UNROLL for (int n = 0; n < NH; n++) {
                            const int64_t at = (f + i) * H + 16 * n;
                            AT(of_key + at) += sum[i][n];
                            AT(of_product + at) += sum[i][n] * AT(q + 16 * n);
                            of_q[n] += sum[i][n] * AT(u->product + at);
                        }
                }
                UNROLL for (int n = 0; n < NH; n++) AT(d_queries + row * H + 16 * n) = of_q[n];
            }
        }
    }
}
