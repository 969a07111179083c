/* A decoding step through all layers of a model of Llama's form, for float32 on a CPU.
 *
 * Built on demand for one width W of a head (a multiple of 16). Widths of rows are multiples of 16.
 * Rotations are those of halves: numbers i and i + W / 2 of a head turn together.
 */
#include "products.h"

#define NW (W / 16)
#define SIDE 4 /* samples that are worked on together, so that a key that is read serves them all */

/* Columns of a packed weight's panel. */
int64_t panel(void) { return PANEL; }

/* One product, for whoever wants to time it. */
void multiply(const float *x, const float *w, float *out, int64_t rows, int64_t in, int64_t columns) {
    product(x, in, w, out, columns, rows, in, columns, 0);
}

/* out = x / sqrt(mean(x^2) + eps), a row. */
void norm(const float *x, float *out, int64_t rows, int64_t width, float eps) {
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * width;
        v16 sum = ALL(0.0f);
        for (int64_t j = 0; j < width; j += 16) sum += AT(from + j) * AT(from + j);
        const float rate = 1.0f / sqrtf(total(sum) / width + eps);
        for (int64_t j = 0; j < width; j += 16) AT(out + row * width + j) = AT(from + j) * rate;
    }
}

/* out = silu(gate) up, where a row of joined is gate, then up. */
void swiglu(const float *joined, float *out, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = joined + 2 * row * width, *up = gate + width;
        for (int64_t j = 0; j < width; j += 16)
            AT(out + row * width + j) = AT(gate + j) * sigmoid(AT(gate + j)) * AT(up + j);
    }
}

static inline void turned(const float *from, const float *cos, const float *sin, float scale, float *out, int64_t step) {
    for (int j = 0; j < W / 2; j++) {
        const float a = from[j], b = from[j + W / 2];
        out[j * step] = (a * cos[j] - b * sin[j]) * scale;
        out[(j + W / 2) * step] = (b * cos[j] + a * sin[j]) * scale;
    }
}

typedef struct {
    int64_t rows, samples, threads, heads, kv_heads;
    int64_t prompt, prompt_room; /* tokens of a prompt; the same up to a multiple of 16 */
    int64_t own_most, own_room;  /* tokens that a sample can have; the same up to a multiple of 16 */
    const int64_t *prompts;      /* [R]: which prompt a row follows */
    const float *bias;           /* [N, prompt_room]: 0 where a token counts, -inf elsewhere */
    const float *cos, *sin;      /* [R, own_most, W / 2] */
} Rows;

/* One token more of every sample: its queries and keys are turned, its keys and values are kept, and its heads look at
 * the prompt and at what the sample has.
 *
 * qkv [R n, H + 2 G, W]. Kept: prompt_k [N, G, W, prompt_room] and own_k [R n, G, W, own_room], key numbers first, so
 * that sixteen keys are met at a time; prompt_v [N, G, P, W], own_v [R n, G, own_most, W]. t: tokens a sample has had
 * before. out [R n, H, W]. */
static void attend(const Rows *r, int64_t begin, int64_t end, const float *qkv, const float *prompt_k, const float *prompt_v, float *own_k, float *own_v,
            int64_t t, float *out) {
    const int64_t group = r->heads / r->kv_heads, room = r->prompt_room, own_room = r->own_room;
    const int64_t token = (r->heads + 2 * r->kv_heads) * W, own_end = t / 16 * 16 + 16;
    const float scale = 1.0f / sqrtf((float)W);
    i16 lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
    for (int64_t row = begin; row < end; row++) {
        const int64_t prompt = r->prompts[row];
        const float *cos = r->cos + (row * r->own_most + t) * (W / 2), *sin = r->sin + (row * r->own_most + t) * (W / 2);
        const float *bias = r->bias + prompt * room;
        for (int64_t g = 0; g < r->kv_heads; g++) {
            const float *keys = prompt_k + (prompt * r->kv_heads + g) * W * room;
            const float *values = prompt_v + (prompt * r->kv_heads + g) * r->prompt * W;
            for (int64_t i = 0; i < r->samples; i++) {
                const int64_t m = row * r->samples + i;
                const float *key = qkv + m * token + (r->heads + g) * W, *value = key + r->kv_heads * W;
                turned(key, cos, sin, 1.0f, own_k + (m * r->kv_heads + g) * W * own_room + t, own_room);
                memcpy(own_v + ((m * r->kv_heads + g) * r->own_most + t) * W, value, W * sizeof(float));
            }
            for (int64_t h = g * group; h < (g + 1) * group; h++)
                for (int64_t first = 0; first < r->samples; first += SIDE) {
                    const int many = r->samples - first < SIDE ? (int)(r->samples - first) : SIDE;
                    float q[SIDE][W], weight[SIDE][room + own_end];
                    const float *mine_k[SIDE], *mine_v[SIDE];
                    v16 most[SIDE];
                    for (int i = 0; i < SIDE; i++) {
                        const int64_t m = row * r->samples + first + (i < many ? i : 0);
                        turned(qkv + m * token + h * W, cos, sin, scale, q[i], 1);
                        mine_k[i] = own_k + (m * r->kv_heads + g) * W * own_room;
                        mine_v[i] = own_v + (m * r->kv_heads + g) * r->own_most * W;
                        most[i] = ALL(-INFINITY);
                    }
                    for (int64_t s = 0; s < room; s += 16) {
                        v16 sum[SIDE];
                        UNROLL for (int i = 0; i < SIDE; i++) sum[i] = AT(bias + s);
                        for (int j = 0; j < W; j++) {
                            const v16 k = AT(keys + j * room + s);
                            UNROLL for (int i = 0; i < SIDE; i++) sum[i] += q[i][j] * k;
                        }
                        UNROLL for (int i = 0; i < SIDE; i++) {
                            AT(weight[i] + s) = sum[i];
                            most[i] = chosen(sum[i] > most[i], sum[i], most[i]);
                        }
                    }
                    for (int64_t s = 0; s < own_end; s += 16) {
                        v16 sum[SIDE];
                        UNROLL for (int i = 0; i < SIDE; i++) sum[i] = ALL(0.0f);
                        for (int j = 0; j < W; j++)
                            UNROLL for (int i = 0; i < SIDE; i++) sum[i] += q[i][j] * AT(mine_k[i] + j * own_room + s);
                        UNROLL for (int i = 0; i < SIDE; i++) {
                            sum[i] = chosen(lane + (int32_t)s <= (int32_t)t, sum[i], ALL(-INFINITY));
                            AT(weight[i] + room + s) = sum[i];
                            most[i] = chosen(sum[i] > most[i], sum[i], most[i]);
                        }
                    }
                    v16 mixed[SIDE][NW];
                    float whole[SIDE];
                    for (int i = 0; i < SIDE; i++) {
                        float top = most[i][0];
                        for (int l = 1; l < 16; l++) top = most[i][l] > top ? most[i][l] : top;
                        v16 sum = ALL(0.0f);
                        for (int64_t s = 0; s < room + own_end; s += 16) {
                            const v16 away = AT(weight[i] + s) - top;
                            const v16 e = chosen(away > -87.0f, expv(away), ALL(0.0f));
                            AT(weight[i] + s) = e;
                            sum += e;
                        }
                        whole[i] = total(sum);
                        UNROLL for (int n = 0; n < NW; n++) mixed[i][n] = ALL(0.0f);
                    }
                    for (int64_t s = 0; s < r->prompt; s++)
                        UNROLL for (int n = 0; n < NW; n++) {
                            const v16 v = AT(values + s * W + 16 * n);
                            UNROLL for (int i = 0; i < SIDE; i++) mixed[i][n] += weight[i][s] * v;
                        }
                    for (int64_t s = 0; s <= t; s++)
                        UNROLL for (int i = 0; i < SIDE; i++)
                            UNROLL for (int n = 0; n < NW; n++)
                                mixed[i][n] += weight[i][room + s] * AT(mine_v[i] + s * W + 16 * n);
                    for (int i = 0; i < many; i++)
                        UNROLL for (int n = 0; n < NW; n++) {
                            const int64_t m = row * r->samples + first + i;
                            AT(out + (m * r->heads + h) * W + 16 * n) = mixed[i][n] / whole[i];
                        }
                }
        }
    }
}

typedef struct {
    const float *qkv, *out, *gate_up, *down;  /* packed, with the norms' weights in what reads them */
    const float *prompt_k, *prompt_v;
    float *own_k, *own_v;
} Layer;

/* All layers over one token more of every sample: x [R n, width] in place. room [R n, …] is for what is between. Each
 * thread takes some of the rows through all layers: no row waits for another. */
void step(const Rows *r, const Layer *layers, int64_t count, int64_t width, int64_t wide, float eps, int64_t t, float *x,
          float *room) {
    const int64_t all = r->rows * r->samples, heads = r->heads * W, joined = heads + 2 * r->kv_heads * W;
    float *normed = room, *qkv = normed + all * width, *mixed = qkv + all * joined;
    float *both = mixed + all * heads, *gated = both + all * 2 * wide;
#pragma omp parallel for num_threads(r->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < r->threads; thread++) {
        const int64_t begin = r->rows * thread / r->threads, end = r->rows * (thread + 1) / r->threads;
        const int64_t first = begin * r->samples, rows = (end - begin) * r->samples;
        float *own = x + first * width, *own_normed = normed + first * width, *own_gated = gated + first * wide;
        float *own_both = both + first * 2 * wide;
        for (const Layer *layer = layers; layer < layers + count; layer++) {
            norm(own, own_normed, rows, width, eps);
            product(own_normed, width, layer->qkv, qkv + first * joined, joined, rows, width, joined, 0);
            attend(r, begin, end, qkv, layer->prompt_k, layer->prompt_v, layer->own_k, layer->own_v, t, mixed);
            product(mixed + first * heads, heads, layer->out, own, width, rows, heads, width, 1);
            norm(own, own_normed, rows, width, eps);
            product(own_normed, width, layer->gate_up, own_both, 2 * wide, rows, width, 2 * wide, 0);
            swiglu(own_both, own_gated, rows, wide);
            product(own_gated, wide, layer->down, own, width, rows, wide, width, 1);
        }
    }
}
