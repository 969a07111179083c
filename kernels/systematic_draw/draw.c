/* The next code of every sample of some users, for float32 on a CPU: guidance, softmax, and a point in its sums.
 *
 * Numbers of codes are multiples of 16. A user's samples depend on that user's numbers alone.
 */
#include "lanes.h"

typedef struct {
    int64_t users, samples, codes;
    int64_t user_step, fresh_step, fresh_user_step, out_step, out_user_step; /* numbers from one to the next */
    const float *with, *without; /* logits [U, n, K], a user's samples side by side; without: none, or under guidance */
    const double *fresh;         /* [U, n] in [0, 1) */
    uint8_t *alike;              /* [U, n, n]: which samples have all codes in common so far; none: all points are fresh */
    int64_t *out;                /* [U, n] */
    float guidance, rate;        /* rate: one over the temperature */
} Draw;

static inline v16 mixed(const Draw *d, const float *with, const float *without, int64_t k) {
    v16 x = AT(with + k);
    if (d->without) x = AT(without + k) + d->guidance * (x - AT(without + k));
    return x;
}

typedef double w8 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));

static inline double sixteen(v16 e) {
    v8 half[2];
    memcpy(half, &e, sizeof e);
    const w8 sum = __builtin_convertvector(half[0], w8) + __builtin_convertvector(half[1], w8);
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

/* The first code at which the sum of chances is above a point's share of all of it. */
static int64_t code_at(const Draw *d, const float *with, const float *without, double point, float *chance) {
    const int64_t codes = d->codes;
    v16 most = ALL(-INFINITY);
    for (int64_t k = 0; k < codes; k += 16) {
        const v16 x = mixed(d, with, without, k) * d->rate;
        AT(chance + k) = x;
        most = chosen(x > most, x, most);
    }
    float top = most[0];
    for (int i = 1; i < 16; i++) top = most[i] > top ? most[i] : top;
    double sum = 0;
    for (int64_t k = 0; k < codes; k += 16) {
        const v16 y = AT(chance + k) - top;
        const v16 e = chosen(y < -87.0f, ALL(0.0f), expv(y));
        AT(chance + k) = e;
        sum += sixteen(e);
    }
    /* The same additions again, in the same order; then, within sixteen, one by one. */
    const double at = point * sum;
    double before = 0;
    for (int64_t k = 0; k < codes; k += 16) {
        const double after = before + sixteen(AT(chance + k));
        if (after > at) {
            for (int64_t i = k; i < k + 15; i++)
                if ((before += chance[i]) > at) return i;
            return k + 15;
        }
        before = after;
    }
    return codes - 1;
}

/* Returns how many pairs of samples are still alike, each with itself among them. scratch [K]. */
int64_t draw(const Draw *d, float *scratch) {
    const int64_t n = d->samples;
    int64_t left = 0;
    for (int64_t u = 0; u < d->users; u++) {
        const float *with = d->with + u * d->user_step, *without = d->without ? d->without + u * d->user_step : 0;
        const double *fresh = d->fresh + u * d->fresh_user_step;
        uint8_t *alike = d->alike ? d->alike + u * n * n : 0;
        int64_t *out = d->out + u * d->out_user_step;
        for (int64_t i = 0; i < n; i++) {
            double point = fresh[i * d->fresh_step];
            if (alike) {
                /* Those alike share the first one's point, and stand evenly spaced after it. */
                int64_t first = -1, rank = 0, count = 0;
                for (int64_t j = 0; j < n; j++)
                    if (alike[i * n + j]) {
                        if (first < 0) first = j;
                        rank += j < i;
                        count++;
                    }
                point = fresh[first * d->fresh_step] + (double)rank / (double)count;
                point -= point >= 1.0;
            }
            out[i * d->out_step] = code_at(d, with + i * d->codes, d->without ? without + i * d->codes : 0, point, scratch);
        }
        if (alike)
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < n; j++)
                    left += alike[i * n + j] &= out[i * d->out_step] == out[j * d->out_step];
    }
    return left;
}
