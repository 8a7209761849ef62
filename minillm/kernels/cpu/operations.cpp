// The operations of a step in which tokens do not meet, except those that know of heads. A CPU's time goes into moving
// numbers, so each operation takes together what reads the same ones: each number is read once and written once.
//
//   1 add_rms_norm     [rows, size]        the stream, and its norm
//   2 silu_mul         [rows, 2 * size]    the middle of the MLP
//   3 store_kv         [tokens, width]     new keys and values to their slots of the pool
//   4 sample_rows      [rows, ids]         tokens from logits, with counted noise

// ---- 1 ----

// residual += x; out = RMSNorm(residual) * weight. [rows, size] each.
extern "C" void add_rms_norm(const SCALAR* x, SCALAR* residual, const SCALAR* weight, SCALAR* out, float eps,
                             int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * size >= ENOUGH)
    for (int64_t row = 0; row < rows; ++row) {
        real* s = scratch(size);
        SCALAR* kept = residual + row * size;
        for (int64_t i = 0; i < size; ++i) {
            kept[i] = SCALAR(real(kept[i]) + real(x[row * size + i]));
            s[i] = real(kept[i]);  // what the next layer will read is what is normalised
        }
        real scale = inverse_rms(s, size, eps);
        for (int64_t i = 0; i < size; ++i) out[row * size + i] = SCALAR(s[i] * scale * real(weight[i]));
    }
}

// ---- 2 ----

// out = silu(gate) * up, where a row of gate_up is gate and then up: [rows, 2 * size] -> [rows, size].
extern "C" void silu_mul(const SCALAR* gate_up, SCALAR* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * size >= ENOUGH)
    for (int64_t row = 0; row < rows; ++row) {
        const SCALAR *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; ++i) {
            real g = gate[i], e = exp_of(g > 0 ? -g : g);  // exp of what is not positive never overflows
            out[row * size + i] = SCALAR((g > 0 ? g : g * e) / (1 + e) * real(up[i]));
        }
    }
}

// ---- 3 ----

// Keys and values of T tokens, `width` numbers each, to their slots; a negative slot is padding.
extern "C" void store_kv(SCALAR* keys, SCALAR* values, const int64_t* slots, const SCALAR* k, const SCALAR* v,
                         int64_t tokens, int64_t width, int64_t k_stride, int64_t v_stride) {
    for (int64_t t = 0; t < tokens; ++t) {
        if (slots[t] < 0) continue;
        memcpy(keys + slots[t] * width, k + t * k_stride, width * sizeof(SCALAR));
        memcpy(values + slots[t] * width, v + t * v_stride, width * sizeof(SCALAR));
    }
}

// ---- 4 ----

// ln(x) for x > 0, to about 1 in the last place: 2^e * (1 + m), with 1 + m from sqrt(1/2) to sqrt(2).
static inline float log_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    const int32_t below = bits - 0x3f3504f3;  // sqrt(1/2)
    const float e = float(below >> 23);
    bits = (below & 0x7fffff) + 0x3f3504f3;
    float m;
    memcpy(&m, &bits, 4);
    m -= 1.0f;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    return m - 0.5f * m * m + p * m * m * m + e * 0.693147181f;
}

constexpr int STRIDE = 512;  // ids between the four whose noise one count makes, as everywhere
constexpr int IDS = 4 * STRIDE;

// See `sampling.philox`: word w of count number i goes to bits[w * STRIDE + i].
static void philox(uint32_t first_count, uint64_t seed, uint64_t draw, uint32_t* bits) {
    for (uint32_t i = 0; i < STRIDE; ++i) {
        uint32_t c0 = first_count + i, c1 = 0, c2 = uint32_t(draw), c3 = uint32_t(draw >> 32);
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t left = uint64_t(c0) * 0xD2511F53u, right = uint64_t(c2) * 0xCD9E8D57u;
            c0 = uint32_t(right >> 32) ^ c1 ^ k0;
            c1 = uint32_t(right);
            c2 = uint32_t(left >> 32) ^ c3 ^ k1;
            c3 = uint32_t(left);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        bits[i] = c0, bits[STRIDE + i] = c1, bits[2 * STRIDE + i] = c2, bits[3 * STRIDE + i] = c3;
    }
}

// See `sampling.gumbel_noise`. Near 0, where the logarithm of 1 - u would be too coarse, a series makes it.
static inline float gumbel(uint32_t bits) {
    const float u = smaller((float(bits) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
    const float series = u * (1 + u * (0.5f + u * (0.33333334f + u * 0.25f)));  // next is u^5 / 5
    return -log_of(u < 0x1p-5f ? series : -log_of(1 - u));
}

// logits [rows, size] -> ids [rows]: the largest of logit / temperature + noise, of equal ones the first.
extern "C" void sample_rows(const SCALAR* logits, const float* temperatures, const int64_t* seeds, const int64_t* draws,
                            int64_t* ids, int64_t rows, int64_t size, float greedy_below, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * size >= ENOUGH)
    for (int64_t row = 0; row < rows; ++row) {
        const bool draws_it = temperatures[row] >= greedy_below;
        const real scale = draws_it ? 1 / real(temperatures[row]) : 1;
        real best = NOTHING, scores[IDS];
        uint32_t bits[IDS];
        int64_t id = 0, wrong = 0;
        for (int64_t first = 0; first < size; first += IDS) {
            const SCALAR* own = logits + row * size + first;
            const int count = int(smaller<int64_t>(IDS, size - first));
            for (int i = 0; i < count; ++i) scores[i] = real(own[i]) * scale;
            for (int i = 0; i < count; ++i) wrong += !(real(own[i]) < -NOTHING);  // NaN, too
            if (draws_it) {
                philox(uint32_t(first / 4), uint64_t(seeds[row]), uint64_t(draws[row]), bits);
                for (int i = 0; i < count; ++i) scores[i] += gumbel(bits[i]);
            }
            real most = NOTHING;
            for (int i = 0; i < count; ++i) most = scores[i] > most ? scores[i] : most;
            if (!(most > best)) continue;
            int i = 0;
            while (scores[i] != most) ++i;
            best = most, id = first + i;
        }
        ids[row] = wrong ? -1 : id;
    }
}
