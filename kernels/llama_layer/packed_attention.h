/* Attention over whole rows of a prompt and several samples behind it, for float32 on a CPU: the prompt looks at itself
 * causally, a sample at the prompt and causally at itself, padding at itself only. Heads are W wide.
 */
#include "products.h"

#define ROUND(n) (((n) + 15) / 16 * 16)
#define PAD(n) ((ROUND(n) / 16 | 1) * 16)

typedef struct {
    int64_t users, threads, heads, kv_heads, width, wide;
    int64_t prompt, samples, own; /* tokens of a prompt; samples behind it, and tokens of each */
    int64_t skip; /* tokens of the prompt, at its beginning, of which nobody wants to know what the last layer makes */
    int64_t keeps; /* whether every layer has room of its own for what is between, for a gradient; else each thread */
    const uint8_t *mask;     /* [U, P] */
    const float *cos, *sin;  /* [U, T, W / 2] */
    float eps;
} Pass;

typedef struct {
    int64_t tokens, room, own_room, slots, x, qkv, weight, mixed, both, gated;
} Sizes;

static Sizes sizes(const Pass *p) {
    Sizes s = {.tokens = p->prompt + p->samples * p->own, .room = ROUND(p->prompt), .own_room = ROUND(p->own)};
    s.slots = s.room + s.own_room;
    s.x = PAD(p->width), s.qkv = PAD((p->heads + 2 * p->kv_heads) * W), s.weight = p->heads * s.slots;
    s.mixed = PAD(p->heads * W), s.both = PAD(2 * p->wide);
    s.gated = PAD(p->wide > p->width ? p->wide : p->width); /* its room holds a row of x, too */
    return s;
}

/* out [rows, columns] = x [rows, depth] w [depth, columns], or that more, of a few columns (a multiple of 16). */
static void few(Matrix x, const float *w, int64_t w_row, float *out, int64_t out_row, int64_t rows, int64_t depth,
                int64_t columns, int add) {
    int64_t c = 0;
    for (; c + PANEL <= columns; c += PANEL)
        if (add) strip(BROAD, x, w + c, w_row, out + c, out_row, rows, depth, 1);
        else strip(BROAD, x, w + c, w_row, out + c, out_row, rows, depth, 0);
    for (; c < columns; c += 16)
        if (add) strip(1, x, w + c, w_row, out + c, out_row, rows, depth, 1);
        else strip(1, x, w + c, w_row, out + c, out_row, rows, depth, 0);
}

/* Queries and keys of a token turn by its place, or back; queries are scaled. */
static void turn(const Pass *p, const Sizes *s, int64_t user, float *qkv, const float sign) {
    const float scale = 1.0f / sqrtf((float)W);
    for (int64_t i = 0; i < s->tokens; i++, qkv += s->qkv) {
        const float *cos = p->cos + (user * s->tokens + i) * (W / 2), *sin = p->sin + (user * s->tokens + i) * (W / 2);
        for (int64_t h = 0; h < p->heads + p->kv_heads; h++) {
            const float by = h < p->heads ? scale : 1.0f;
            float *at = qkv + h * W;
            for (int j = 0; j < W / 2; j++) {
                const float a = at[j], b = at[j + W / 2], c = cos[j] * by, d = sin[j] * by * sign;
                at[j] = a * c - b * d;
                at[j + W / 2] = b * c + a * d;
            }
        }
    }
}

/* [rows, W] → [W, room], with zeros where room is left. */
static void across(const float *from, int64_t row, int64_t rows, float *out, int64_t room) {
    for (int64_t i = 0; i < room; i += 16)
        for (int j = 0; j < W; j += 16) {
            v16 block[16];
            UNROLL for (int k = 0; k < 16; k++)
                block[k] = i + k < rows ? AT(from + (i + k) * row + j) + ALL(0.0f) : ALL(0.0f);
            transposed(block);
            UNROLL for (int k = 0; k < 16; k++) AT(out + (j + k) * room + i) = block[k];
        }
}

/* A prompt's keys or values and, behind them, each sample's, all across. */
static void all_across(const Pass *p, const Sizes *s, const float *from, float *out) {
    across(from, s->qkv, p->prompt, out, s->room);
    for (int64_t i = 0; i < p->samples; i++)
        across(from + (p->prompt + i * p->own) * s->qkv, s->qkv, p->own, out + W * (s->room + i * s->own_room),
               s->own_room);
}

/* [tokens, W] rows of every query, from the first that counts, times what lies across → [tokens, slots]. */
static void meet(const Pass *p, const Sizes *s, int64_t first, const float *q, int64_t q_row, const float *keys,
                 float *out, int64_t out_row) {
    few((Matrix){q + first * q_row, q_row, 1}, keys, s->room, out + first * out_row, out_row, s->tokens - first, W,
        s->room, 0);
    for (int64_t i = 0; i < p->samples; i++) {
        const int64_t at = p->prompt + i * p->own;
        few((Matrix){q + at * q_row, q_row, 1}, keys + W * (s->room + i * s->own_room), s->own_room,
            out + at * out_row + s->room, out_row, p->own, W, s->own_room, 0);
    }
}

/* out [tokens, W] = [tokens, slots] times rows of the prompt and of a sample's own. */
static void mix(const Pass *p, const Sizes *s, int64_t first, const float *weight, int64_t weight_row, const float *v,
                float *out, int64_t out_row) {
    few((Matrix){weight + first * weight_row, weight_row, 1}, v, s->qkv, out + first * out_row, out_row,
        s->tokens - first, p->prompt, W, 0);
    for (int64_t i = 0; i < p->samples; i++) {
        const int64_t at = p->prompt + i * p->own;
        few((Matrix){weight + at * weight_row + s->room, weight_row, 1}, v + at * s->qkv, s->qkv, out + at * out_row,
            out_row, p->own, p->own, W, 1);
    }
}

/* g, rows of the prompt and of a sample's own, += [tokens, slots]^T times rows of every query. */
static void mix_back(const Pass *p, const Sizes *s, int64_t first, const float *weight, int64_t weight_row,
                     const float *q, int64_t q_row, float *g) {
    few((Matrix){weight + first * weight_row, 1, weight_row}, q + first * q_row, q_row, g, s->qkv, p->prompt,
        s->tokens - first, W, 1);
    for (int64_t i = 0; i < p->samples; i++) {
        const int64_t at = p->prompt + i * p->own;
        few((Matrix){weight + at * weight_row + s->room, 1, weight_row}, q + at * q_row, q_row, g + at * s->qkv, s->qkv,
            p->own, p->own, W, 1);
    }
}

static void softmax(float *score, const float *bias, int64_t room, int64_t own_room, int64_t t) {
    v16 most = ALL(-INFINITY), sum = ALL(0.0f);
    i16 lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
    for (int64_t i = 0; i < room + own_room; i += 16) {
        if (i < room) AT(score + i) += AT(bias + i);
        else AT(score + i) = chosen(lane + (int32_t)(i - room) <= (int32_t)t, AT(score + i), ALL(-INFINITY));
        most = chosen(AT(score + i) > most, AT(score + i), most);
    }
    float top = most[0];
    for (int l = 1; l < 16; l++) top = most[l] > top ? most[l] : top;
    for (int64_t i = 0; i < room + own_room; i += 16) {
        const v16 away = AT(score + i) - top;
        AT(score + i) = chosen(away > -87.0f, expv(away), ALL(0.0f));
        sum += AT(score + i);
    }
    const float rate = 1.0f / total(sum);
    for (int64_t i = 0; i < room + own_room; i += 16) AT(score + i) *= rate;
}

/* What each token of a prompt may look at, and in the last row what samples may: 0 or -inf [P + 1, room]. */
static void biases(const Pass *p, const Sizes *s, int64_t user, float *bias) {
    for (int64_t i = 0; i <= p->prompt; i++)
        for (int64_t j = 0; j < s->room; j++) {
            const int real = j < p->prompt && p->mask[user * p->prompt + j];
            bias[i * s->room + j] = (real && (i == p->prompt || j < i)) || (i == j && i < p->prompt) ? 0.0f : -INFINITY;
        }
}
