/* Layers of a model of Llama's form over whole rows of a prompt and several samples behind it, and their gradient, for
 * float32 on a CPU.
 *
 * Built on demand for one width W of a head (a multiple of 16). A user's tokens go through a layer together, so what is
 * between stays in a core's cache; threads take users, and each adds up gradients of weights of its own. Buffers' rows
 * are padded to an odd number of cache lines (of 16 floats), so that a column meets all sets of the cache.
 */
#include "packed_attention.h"

#define DEEP 160 /* tokens whose part of a weight's gradient is added at a time: a panel of them stays in the cache */

/* Weights [out, in], as they are; packed ones of PANEL columns; what is between, a padded row a token. */
typedef struct {
    const float *norm, *mlp_norm, *q, *k, *v, *out, *gate, *up, *down;
    float *to_qkv, *to_out, *to_both, *to_down;         /* x w^T, with the norms in what reads them */
    float *from_qkv, *from_out, *from_both, *from_down; /* y w, likewise */
    float *x, *qkv, *weight, *mixed, *mid, *both, *y;   /* x: what comes in; mid: after attention; y: what goes out */
} Layer;

/* Floats a thread needs beside what is kept. */
int64_t scratch(const Pass *p) {
    const Sizes s = sizes(p);
    const int64_t keys = W * (s.room + p->samples * s.own_room), bias = (p->prompt + 1) * s.room;
    return s.tokens * (s.x + s.both + 2 * s.gated + s.mixed + s.qkv + s.slots + 1) + keys + bias;
}

/* Panels for x w^T and for y w, whose columns and rows are `all` of several weights. */
static void pack_both(const float *w, const float *norm, int64_t out, int64_t in, float *to, float *from,
                      int64_t before, int64_t all) {
    pack(w, norm, out, in, to, before);
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < in; i += 16) {
            v16 value = AT(w + o * in + i);
            if (norm) value *= AT(norm + i);
            AT(from + (i / PANEL * all + before + o) * PANEL + i % PANEL) = value;
        }
}

void pack_all(const Pass *p, const Layer *layers, int64_t count) {
    const int64_t heads = p->heads * W, kv = p->kv_heads * W, width = p->width, wide = p->wide;
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const Layer *l = layers + i;
        pack_both(l->q, l->norm, heads, width, l->to_qkv, l->from_qkv, 0, heads + 2 * kv);
        pack_both(l->k, l->norm, kv, width, l->to_qkv, l->from_qkv, heads, heads + 2 * kv);
        pack_both(l->v, l->norm, kv, width, l->to_qkv, l->from_qkv, heads + kv, heads + 2 * kv);
        pack_both(l->out, 0, width, heads, l->to_out, l->from_out, 0, width);
        pack_both(l->gate, l->mlp_norm, wide, width, l->to_both, l->from_both, 0, 2 * wide);
        pack_both(l->up, l->mlp_norm, wide, width, l->to_both, l->from_both, wide, 2 * wide);
        pack_both(l->down, 0, width, wide, l->to_down, l->from_down, 0, width);
    }
}

/* dw [out, in] += dy [rows, out]^T x [rows, in]. */
static void outer(const float *dy, int64_t dy_row, const float *x, int64_t x_row, float *dw, int64_t rows, int64_t out,
                  int64_t in) {
    for (int64_t first = 0; first < rows; first += DEEP) {
        const int64_t deep = rows - first < DEEP ? rows - first : DEEP;
        for (int64_t c = 0; c < in; c += PANEL)
            strip(BROAD, (Matrix){dy + first * dy_row, 1, dy_row}, x + first * x_row + c, x_row, dw + c, in, out, deep,
                  1);
    }
}

static void big(const float *x, int64_t x_row, const float *w, float *out, int64_t out_row, int64_t rows, int64_t in,
                int64_t columns, int add) {
    if (add) product(x, x_row, w, out, out_row, rows, in, columns, 1);
    else product(x, x_row, w, out, out_row, rows, in, columns, 0);
}

/* unit = x / sqrt(mean(x^2) + eps), and what x was multiplied with. */
static void norm(const float *x, float *unit, float *rate, int64_t rows, int64_t width, int64_t row, float eps) {
    for (int64_t r = 0; r < rows; r++, x += row, unit += row) {
        v16 sum = ALL(0.0f);
        for (int64_t j = 0; j < width; j += 16) sum += AT(x + j) * AT(x + j);
        rate[r] = 1.0f / sqrtf(total(sum) / width + eps);
        for (int64_t j = 0; j < width; j += 16) AT(unit + j) = AT(x + j) * rate[r];
    }
}

/* g += the gradient of x, where back is that of its unit. */
static void norm_back(const float *unit, const float *rate, const float *back, float *g, int64_t rows, int64_t width,
                      int64_t row) {
    for (int64_t r = 0; r < rows; r++, unit += row, back += row, g += row) {
        v16 sum = ALL(0.0f);
        for (int64_t j = 0; j < width; j += 16) sum += AT(unit + j) * AT(back + j);
        const float along = total(sum) / width;
        for (int64_t j = 0; j < width; j += 16) AT(g + j) += (AT(back + j) - AT(unit + j) * along) * rate[r];
    }
}

static void forward_user(const Pass *p, const Sizes *s, const Layer *l, int64_t user, int64_t first, int64_t kept,
                         float *room) {
    const int64_t tokens = s->tokens, wanted = tokens - first, heads = p->heads * W, group = p->heads / p->kv_heads;
    float *x = l->x + user * tokens * s->x, *y = l->y + user * tokens * s->x, *mid = l->mid + kept * tokens * s->x;
    float *qkv = l->qkv + kept * tokens * s->qkv, *weight = l->weight + kept * tokens * s->weight;
    float *mixed = l->mixed + kept * tokens * s->mixed, *both = l->both + kept * tokens * s->both;
    float *unit = room, *rate = unit + tokens * s->x, *gated = rate + tokens, *keys = gated + tokens * s->gated;
    float *bias = keys + W * (s->room + p->samples * s->own_room);
    norm(x, unit, rate, tokens, p->width, s->x, p->eps);
    big(unit, s->x, l->to_qkv, qkv, s->qkv, tokens, p->width, heads + 2 * p->kv_heads * W, 0);
    turn(p, s, user, qkv, 1.0f);
    biases(p, s, user, bias);
    for (int64_t h = 0; h < p->heads; h++) {
        const float *k = qkv + heads + h / group * W;
        float *score = weight + h * s->slots;
        if (h % group == 0) all_across(p, s, k, keys);
        meet(p, s, first, qkv + h * W, s->qkv, keys, score, s->weight);
        for (int64_t i = first; i < tokens; i++) {
            const int64_t after = i - p->prompt;
            if (after < 0) softmax(score + i * s->weight, bias + i * s->room, s->room, 0, 0);
            else softmax(score + i * s->weight, bias + p->prompt * s->room, s->room, s->own_room, after % p->own);
        }
        mix(p, s, first, score, s->weight, k + p->kv_heads * W, mixed + h * W, s->mixed);
    }
    x += first * s->x, y += first * s->x, mid += first * s->x, mixed += first * s->mixed, both += first * s->both;
    memcpy(mid, x, wanted * s->x * sizeof(float));
    big(mixed, s->mixed, l->to_out, mid, s->x, wanted, heads, p->width, 1);
    norm(mid, unit, rate, wanted, p->width, s->x, p->eps);
    big(unit, s->x, l->to_both, both, s->both, wanted, p->width, 2 * p->wide, 0);
    for (int64_t i = 0; i < wanted; i++) {
        const float *gate = both + i * s->both, *up = gate + p->wide;
        for (int64_t j = 0; j < p->wide; j += 16)
            AT(gated + i * s->gated + j) = AT(gate + j) * sigmoid(AT(gate + j)) * AT(up + j);
    }
    memcpy(y, mid, wanted * s->x * sizeof(float));
    big(gated, s->gated, l->to_down, y, s->x, wanted, p->wide, p->width, 1);
}

/* All layers over all users: from the first layer's x to the last one's y. */
void forward(const Pass *p, const Layer *layers, int64_t count, float *room) {
    const Sizes s = sizes(p);
#pragma omp parallel for num_threads(p->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < p->threads; thread++)
        for (const Layer *l = layers; l < layers + count; l++)
            for (int64_t user = p->users * thread / p->threads; user < p->users * (thread + 1) / p->threads; user++)
                forward_user(p, &s, l, user, l == layers + count - 1 ? p->skip : 0, p->keeps ? user : thread,
                             room + thread * scratch(p));
}

/* A layer's gradients, each [out, in] as the weight; of q, k, v and of gate, up one after the other. */
typedef struct {
    float *qkv, *out, *both, *down, *norm, *mlp_norm;
} Gradient;

/* g [tokens, width], the gradient of what goes out of a layer, becomes that of what came in; d takes its part. */
static void backward_user(const Pass *p, const Sizes *s, const Layer *l, const Gradient *d, int64_t user, int64_t first,
                          float *g, float *room) {
    const int64_t tokens = s->tokens, wanted = tokens - first, heads = p->heads * W, group = p->heads / p->kv_heads;
    const int64_t joined = heads + 2 * p->kv_heads * W, width = p->width, wide = p->wide;
    const float *x = l->x + user * tokens * s->x, *mid = l->mid + (user * tokens + first) * s->x;
    const float *qkv = l->qkv + user * tokens * s->qkv, *weight = l->weight + user * tokens * s->weight;
    const float *mixed = l->mixed + user * tokens * s->mixed, *both = l->both + (user * tokens + first) * s->both;
    float *unit = room, *rate = unit + tokens * s->x, *gated = rate + tokens, *back_gated = gated + tokens * s->gated;
    float *back_both = back_gated + tokens * s->gated, *back_mixed = back_both + tokens * s->both;
    float *back_qkv = back_mixed + tokens * s->mixed, *back_score = back_qkv + tokens * s->qkv;
    float *values = back_score + tokens * s->slots, *back_unit = back_gated, *back_x = g, *top_g = g + first * s->x;
    norm(mid, unit, rate, wanted, width, s->x, p->eps);
    big(top_g, s->x, l->from_down, back_gated, s->gated, wanted, width, wide, 0);
    for (int64_t i = 0; i < wanted; i++)
        for (int64_t j = 0; j < wide; j += 16) {
            const v16 gate = AT(both + i * s->both + j), up = AT(both + i * s->both + wide + j);
            const v16 open = sigmoid(gate), silu = gate * open, back = AT(back_gated + i * s->gated + j);
            AT(gated + i * s->gated + j) = silu * up;
            AT(back_both + i * s->both + j) = back * up * (open + silu * (1.0f - open));
            AT(back_both + i * s->both + wide + j) = back * silu;
        }
    if (d) outer(top_g, s->x, gated, s->gated, d->down, wanted, width, wide);
    big(back_both, s->both, l->from_both, back_unit, s->x, wanted, 2 * wide, width, 0);
    if (d) outer(back_both, s->both, unit, s->x, d->both, wanted, 2 * wide, width);
    norm_back(unit, rate, back_unit, top_g, wanted, width, s->x);
    big(top_g, s->x, l->from_out, back_mixed + first * s->mixed, s->mixed, wanted, width, heads, 0);
    if (d) outer(top_g, s->x, mixed + first * s->mixed, s->mixed, d->out, wanted, width, heads);
    memset(back_qkv, 0, tokens * s->qkv * sizeof(float));
    for (int64_t h = 0; h < p->heads; h++) {
        const int64_t k = heads + h / group * W, v = k + p->kv_heads * W;
        const float *own_weight = weight + h * s->slots;
        if (h % group == 0) all_across(p, s, qkv + v, values);
        meet(p, s, first, back_mixed + h * W, s->mixed, values, back_score, s->slots);
        for (int64_t i = first; i < tokens; i++) {
            const int64_t size = i < p->prompt ? s->room : s->slots;
            const float *share = own_weight + i * s->weight;
            float *back = back_score + i * s->slots;
            v16 sum = ALL(0.0f);
            for (int64_t j = 0; j < size; j += 16) sum += AT(share + j) * AT(back + j);
            const float along = total(sum);
            for (int64_t j = 0; j < size; j += 16) AT(back + j) = AT(share + j) * (AT(back + j) - along);
        }
        mix(p, s, first, back_score, s->slots, qkv + k, back_qkv + h * W, s->qkv);
        mix_back(p, s, first, back_score, s->slots, qkv + h * W, s->qkv, back_qkv + k);
        mix_back(p, s, first, own_weight, s->weight, back_mixed + h * W, s->mixed, back_qkv + v);
    }
    turn(p, s, user, back_qkv, -1.0f);
    big(back_qkv, s->qkv, l->from_qkv, back_unit, s->x, tokens, joined, width, 0);
    norm(x, unit, rate, tokens, width, s->x, p->eps);
    if (d) outer(back_qkv, s->qkv, unit, s->x, d->qkv, tokens, joined, width);
    norm_back(unit, rate, back_unit, back_x, tokens, width, s->x);
}

/* Gradients of rows of a weight that had a norm in it, and the norm's own. */
static void apart(const float *w, const float *norm, float *d, float *d_norm, int64_t out, int64_t in) {
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < in; i += 16) {
            const v16 at = AT(d + o * in + i);
            AT(d_norm + i) += at * AT(w + o * in + i);
            AT(d + o * in + i) = at * AT(norm + i);
        }
}

/* g [U, tokens, width], the gradient of the last layer's y, becomes that of the first one's x. d [threads, count] (none
 * where no weight learns) begin with zeros and lie in one piece of size floats each; the first thread's end as the
 * sums. */
void backward(const Pass *p, const Layer *layers, const Gradient *d, int64_t count, int64_t size, float *g,
              float *room) {
    const Sizes s = sizes(p);
    const int64_t kv = p->kv_heads * W, heads = p->heads * W;
#pragma omp parallel for num_threads(p->threads) schedule(static, 1)
    for (int64_t thread = 0; thread < p->threads; thread++)
        for (int64_t i = count - 1; i >= 0; i--)
            for (int64_t user = p->users * thread / p->threads; user < p->users * (thread + 1) / p->threads; user++)
                backward_user(p, &s, layers + i, d ? d + thread * count + i : 0, user, i == count - 1 ? p->skip : 0,
                              g + user * s.tokens * s.x, room + thread * scratch(p));
    if (!d) return;
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const Layer *l = layers + i;
        const Gradient *of = d + i;
        for (int64_t thread = 1; thread < p->threads; thread++)
            for (int64_t j = 0; j < size; j += 16) AT(of->qkv + j) += AT(d[thread * count + i].qkv + j);
        apart(l->q, l->norm, of->qkv, of->norm, heads, p->width);
        apart(l->k, l->norm, of->qkv + heads * p->width, of->norm, kv, p->width);
        apart(l->v, l->norm, of->qkv + (heads + kv) * p->width, of->norm, kv, p->width);
        apart(l->gate, l->mlp_norm, of->both, of->mlp_norm, p->wide, p->width);
        apart(l->up, l->mlp_norm, of->both + p->wide * p->width, of->mlp_norm, p->wide, p->width);
    }
}
