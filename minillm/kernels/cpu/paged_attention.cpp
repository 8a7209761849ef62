// The kernels of a step for a CPU. Compiled for one SCALAR (float, double, bf16), HEAD_SIZE and GROUP (query heads that
// share a key head), so that the loops over them unroll. Shapes, row-major:
//
//   q, out [T, Hq, D]   keys, values [num_blocks, block_size, Hkv, D]   tables [B, W]   lengths [B]
//
// What decides the time is the same as on a GPU: which bytes come from memory, and how often. A CPU loads cache lines of
// 64 bytes, so a head of 16 float32 or 32 bfloat16 numbers is one line, and neighbours in a head cost nothing more.
//
//   torch      gathers every block into a new tensor: each key is read, written and read again.
//   decode 1   reads blocks where they lie: no copy. But each query head reads its keys again: GROUP times.
//   decode 2   the whole group of query heads looks at a key while it is in registers: each key is read once.
//   prefill    a tile of queries looks at a tile of keys: keys are read once per tile of queries, not once per query.
//
// All sums are float32 (double for double); what is stored is rounded once. NaN and infinity pass through: the flags in
// __init__.py let sums be reordered, but do not promise the compiler finite numbers.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct bf16 {
    uint16_t bits;
    bf16() = default;
    bf16(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to the nearest, ties to even
    }
    operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &u, 4);
        return x;
    }
};

template <typename T> struct Sum { using type = float; };  // what numbers of type T are added up in
template <> struct Sum<double> { using type = double; };
using real = Sum<SCALAR>::type;
constexpr int D = HEAD_SIZE, G = GROUP;
constexpr real NOTHING = -__builtin_inf();

template <typename T> static T smaller(T a, T b) { return a < b ? a : b; }
template <typename T> static T larger(T a, T b) { return a < b ? b : a; }

// Memory that a thread keeps from call to call: at least so many numbers. (No C++ library: zig has none built.)
static real* scratch(int64_t count) {
    static thread_local real* place = nullptr;
    static thread_local int64_t size = 0;
    if (size < count) {
        free(place);
        place = (real*)malloc(count * sizeof(real));
        size = count;
    }
    return place;
}

// e^x for x <= 0, to about 2 in the last place, in operations that a vector unit has: 2^n * e^r, |r| <= ln(2) / 2.
static inline float exp_of(float x) {
    float low = x < -87.3f ? -87.3f : x;  // NaN is not below
    float n = nearbyintf(low * 1.44269504f);
    float r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t(int32_t(n)) + 127) << 23;  // NaN makes any power of two, and p is NaN
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.3f ? 0.0f : p * power;
}
static inline double exp_of(double x) { return exp(x); }

// Where token number t of a request lies in the pool of its layer: the place of its block, and there its own.
struct Pool {
    const SCALAR *keys, *values;
    int64_t block_size, heads;  // key heads, Hkv
    int64_t at(const int32_t* table, int64_t t, int64_t head) const {
        return ((table[t / block_size] * block_size + t % block_size) * heads + head) * D;
    }
};

// ---- small operations: each number is read once and written once ----

static real inverse_rms(const real* x, int64_t size, float eps) {
    real sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
    return 1 / sqrt(sum / size + real(eps));
}

// residual += x; out = RMSNorm(residual) * weight. [rows, size] each.
extern "C" void add_rms_norm(const SCALAR* x, SCALAR* residual, const SCALAR* weight, SCALAR* out, float eps,
                             int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
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

// out = silu(gate) * up, where a row of gate_up is gate and then up: [rows, 2 * size] -> [rows, size].
extern "C" void silu_mul(const SCALAR* gate_up, SCALAR* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const SCALAR *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; ++i) {
            real g = gate[i], e = exp_of(g > 0 ? -g : g);  // exp of what is not positive never overflows
            out[row * size + i] = SCALAR((g > 0 ? g : g * e) / (1 + e) * real(up[i]));
        }
    }
}

// Keys and values of T tokens, `width` numbers each, to their slots; a negative slot is padding.
extern "C" void store_kv(SCALAR* keys, SCALAR* values, const int64_t* slots, const SCALAR* k, const SCALAR* v,
                         int64_t tokens, int64_t width, int64_t k_stride, int64_t v_stride) {
    for (int64_t t = 0; t < tokens; ++t) {
        if (slots[t] < 0) continue;
        memcpy(keys + slots[t] * width, k + t * k_stride, width * sizeof(SCALAR));
        memcpy(values + slots[t] * width, v + t * v_stride, width * sizeof(SCALAR));
    }
}

// One head: RMSNorm if there is a weight, then each pair (x[i], x[i + D/2]) turned by its angle.
static void norm_and_rotate(const SCALAR* x, const SCALAR* weight, float eps, const SCALAR* cos, const SCALAR* sin,
                            SCALAR* out) {
    real y[D];
    for (int i = 0; i < D; ++i) y[i] = real(x[i]);
    if (weight) {
        real scale = inverse_rms(y, D, eps);
        for (int i = 0; i < D; ++i) y[i] *= scale * real(weight[i]);
    }
    for (int i = 0; i < D / 2; ++i) {
        out[i] = SCALAR(y[i] * real(cos[i]) + y[i + D / 2] * real(sin[i]));
        out[i + D / 2] = SCALAR(y[i + D / 2] * real(cos[i + D / 2]) + y[i] * real(sin[i + D / 2]));
    }
}

// From a row of the fused projection, q | k | v: queries to q, keys and values straight to their slots of the pool.
extern "C" void norm_rotate_store(const SCALAR* qkv, const SCALAR* q_weight, const SCALAR* k_weight, float eps,
                                  const SCALAR* cos, const SCALAR* sin, const int64_t* slots, SCALAR* q, SCALAR* keys,
                                  SCALAR* values, int64_t tokens, int64_t kv_heads, int threads) {
    const int64_t heads = kv_heads * G;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; ++t) {
        const SCALAR *row = qkv + t * (heads + 2 * kv_heads) * D, *c = cos + t * D, *s = sin + t * D;
        for (int64_t h = 0; h < heads; ++h) norm_and_rotate(row + h * D, q_weight, eps, c, s, q + (t * heads + h) * D);
        if (slots[t] < 0) continue;
        SCALAR *key = keys + slots[t] * kv_heads * D, *value = values + slots[t] * kv_heads * D;
        for (int64_t h = 0; h < kv_heads; ++h) norm_and_rotate(row + (heads + h) * D, k_weight, eps, c, s, key + h * D);
        memcpy(value, row + (heads + kv_heads) * D, kv_heads * D * sizeof(SCALAR));
    }
}

// ---- sampling ----

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
#pragma omp parallel for num_threads(threads) if (threads > 1)
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

// ---- decode: one query per request and head ----

// scores[first .. end) become weights that sum to 1 (softmax).
static void softmax(real* scores, int64_t first, int64_t end) {
    real most = NOTHING, sum = 0;
    for (int64_t t = first; t < end; ++t) most = scores[t] > most ? scores[t] : most;
    for (int64_t t = first; t < end; ++t) sum += scores[t] = exp_of(scores[t] - most);
    for (int64_t t = first; t < end; ++t) scores[t] /= sum;
}

// N query heads that share key head `head`, all keys first .. end - 1: q and out are [N, D].
template <int N>
static void look(const SCALAR* q, const Pool& pool, const int32_t* table, int64_t head, int64_t first, int64_t end,
                 SCALAR* out) {
    real* scores = scratch(N * end);
    const real scale = 1 / sqrt(real(D));
    real query[N][D], sum[N][D] = {};
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < D; ++i) query[n][i] = real(q[n * D + i]) * scale;
    for (int64_t t = first; t < end; ++t) {
        const SCALAR* key = pool.keys + pool.at(table, t, head);
        for (int n = 0; n < N; ++n) {
            real dot = 0;
            for (int i = 0; i < D; ++i) dot += query[n][i] * real(key[i]);
            scores[n * end + t] = dot;
        }
    }
    for (int n = 0; n < N; ++n) softmax(&scores[n * end], first, end);
    for (int64_t t = first; t < end; ++t) {
        const SCALAR* value = pool.values + pool.at(table, t, head);
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < D; ++i) sum[n][i] += scores[n * end + t] * real(value[i]);
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < D; ++i) out[n * D + i] = SCALAR(sum[n][i]);
}

// `window`: only the last so many keys are seen; 0 for all. A request of length 0 is padding and gives zeros.
extern "C" void decode(const SCALAR* q, int64_t q_stride, const SCALAR* keys, const SCALAR* values,
                       const int32_t* tables, int64_t table_stride, const int32_t* lengths, SCALAR* out,
                       int64_t requests, int64_t kv_heads, int64_t block_size, int64_t window, int version,
                       int threads) {
    const Pool pool{keys, values, block_size, kv_heads};
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < requests; ++b) {
        for (int64_t head = 0; head < kv_heads; ++head) {
            const SCALAR* query = q + b * q_stride + head * G * D;
            SCALAR* to = out + (b * kv_heads + head) * G * D;
            const int32_t* table = tables + b * table_stride;
            const int64_t end = lengths[b], first = window && end > window ? end - window : 0;
            if (end < 1) memset(to, 0, G * D * sizeof(SCALAR));
            else if (version == 1)
                for (int g = 0; g < G; ++g) look<1>(query + g * D, pool, table, head, first, end, to + g * D);
            else look<G>(query, pool, table, head, first, end, to);
        }
    }
}

// ---- prefill: several new tokens of a request look at its cached prefix and at each other ----

using vec = real __attribute__((vector_size(64)));  // one register of AVX-512, two of AVX2, four of NEON
constexpr int LANES = 64 / sizeof(real);
constexpr int WIDE = (D + LANES - 1) / LANES * LANES;  // a head, in whole vectors
constexpr int QUERIES = 32;                            // tokens in a tile of queries
constexpr int ROWS = QUERIES * G;                      // each with the query heads that share a key head
constexpr int KEYS = 64;                               // tokens in a tile of keys
constexpr int AT_ONCE = 4;                             // rows that share what is loaded of a tile of keys

struct alignas(64) Tile {
    real query[ROWS + AT_ONCE][WIDE], sum[ROWS + AT_ONCE][WIDE];  // sum: of values, weighted so far
    real keys[WIDE][KEYS], values[KEYS][WIDE];                    // keys lie transposed: neighbours are scored together
    real weights[ROWS + AT_ONCE][KEYS];
    real most[ROWS], total[ROWS];  // largest score so far, and the sum of the weights
};

// into += left @ right for AT_ONCE rows and N vectors of columns, which stay in registers.
template <int N, int INNER, int COLUMNS>
static inline void multiply_some(const real (*left)[INNER], const real (*right)[COLUMNS], real (*into)[COLUMNS], int inner) {
    vec sums[AT_ONCE][N];
#pragma GCC unroll 16
    for (int r = 0; r < AT_ONCE; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = *(const vec*)(into[r] + n * LANES);
    for (int j = 0; j < inner; ++j) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            const vec columns = *(const vec*)(right[j] + n * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < AT_ONCE; ++r) sums[r][n] += left[r][j] * columns;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < AT_ONCE; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) *(vec*)(into[r] + n * LANES) = sums[r][n];
}

template <int INNER, int COLUMNS>
static void multiply(const real (*left)[INNER], const real (*right)[COLUMNS], real (*into)[COLUMNS], int rows, int inner) {
    constexpr int VECTORS = COLUMNS / LANES, MOST = 4, REST = VECTORS % MOST;
    const auto from = [](auto array, int column) { return (decltype(array))(*array + column); };
    for (int row = 0; row < rows; row += AT_ONCE) {
        for (int n = 0; n + MOST <= VECTORS; n += MOST)
            multiply_some<MOST>(left + row, from(right, n * LANES), from(into + row, n * LANES), inner);
        if constexpr (REST > 0) {
            constexpr int n = VECTORS - REST;
            multiply_some<REST>(left + row, from(right, n * LANES), from(into + row, n * LANES), inner);
        }
    }
}

// Softmax over keys that come tile by tile (Milakov and Gimelshein 2018): a larger score rescales what was summed.
static void reweigh(Tile& tile, int row, int first, int end) {
    real* score = tile.weights[row];
    if (first >= end) {  // it sees none of these keys
        memset(score, 0, KEYS * sizeof(real));
        return;
    }
    real most = tile.most[row], total = 0;
    for (int j = first; j < end; ++j) most = score[j] > most ? score[j] : most;
    for (int j = 0; j < KEYS; ++j) {
        real weight = j >= first && j < end ? exp_of(score[j] - most) : 0;
        score[j] = weight;
        total += weight;
    }
    real shrink = tile.most[row] == NOTHING ? 0 : exp_of(tile.most[row] - most);
    tile.most[row] = most;
    tile.total[row] = tile.total[row] * shrink + total;
    for (int i = 0; i < D; ++i) tile.sum[row][i] *= shrink;
}

// One tile of queries at positions `position` .. position + tokens - 1 of one request, for one key head.
static void look_together(const SCALAR* q, int64_t q_stride, const Pool& pool, const int32_t* table, int64_t head,
                          int64_t position, int tokens, int64_t window, SCALAR* out, int64_t out_stride) {
    static thread_local Tile tile;
    const real scale = 1 / sqrt(real(D));
    const int rows = tokens * G;
    memset(tile.query, 0, sizeof tile.query);
    memset(tile.sum, 0, sizeof tile.sum);
    memset(tile.weights, 0, sizeof tile.weights);
    for (int row = 0; row < rows; ++row) {
        for (int i = 0; i < D; ++i) tile.query[row][i] = real(q[row / G * q_stride + row % G * D + i]) * scale;
        tile.most[row] = NOTHING, tile.total[row] = 0;
    }
    const int64_t end = position + tokens, begin = window && position + 1 > window ? position + 1 - window : 0;
    for (int64_t start = begin; start < end; start += KEYS) {
        const int count = int(smaller<int64_t>(KEYS, end - start));
        int wrong = 0;  // values that are not finite
        for (int j = 0; j < count; ++j) {
            const int64_t at = pool.at(table, start + j, head);
            for (int i = 0; i < D; ++i) {
                tile.keys[i][j] = real(pool.keys[at + i]);
                tile.values[j][i] = real(pool.values[at + i]);
                wrong += !__builtin_isfinite(tile.values[j][i]);
            }
        }
        memset(tile.weights, 0, sizeof tile.weights);
        multiply<WIDE, KEYS>(tile.query, tile.keys, tile.weights, rows, D);
        for (int row = 0; row < rows; ++row) {
            const int64_t own = position + row / G + 1 - start;  // keys of the tile before the end of what it sees
            const int64_t first = window ? larger<int64_t>(0, own - window) : 0, last = smaller<int64_t>(own, count);
            reweigh(tile, row, int(smaller(first, last)), int(last));
            // 0 * NaN is NaN: what is not finite is added here, to those who see it, and is 0 for the product below.
            for (int64_t j = first; wrong && j < last; ++j)
                for (int i = 0; i < D; ++i)
                    if (!__builtin_isfinite(tile.values[j][i])) tile.sum[row][i] += tile.weights[row][j] * tile.values[j][i];
        }
        for (int j = 0; wrong && j < count; ++j)
            for (int i = 0; i < D; ++i)
                if (!__builtin_isfinite(tile.values[j][i])) tile.values[j][i] = 0;
        multiply<KEYS, WIDE>(tile.weights, tile.values, tile.sum, rows, count);
    }
    for (int row = 0; row < rows; ++row)
        for (int i = 0; i < D; ++i)
            out[row / G * out_stride + row % G * D + i] = SCALAR(tile.sum[row][i] / tile.total[row]);
}

// Request b has rows starts[b] .. starts[b + 1] - 1 of q, the last of its lengths[b] tokens. Rows whose position would
// be negative, and rows of no request, are padding and give zeros.
extern "C" void prefill(const SCALAR* q, int64_t q_stride, const SCALAR* keys, const SCALAR* values,
                        const int32_t* tables, int64_t table_stride, const int32_t* starts, const int32_t* lengths,
                        SCALAR* out, int64_t rows, int64_t requests, int64_t kv_heads, int64_t block_size,
                        int64_t window, int threads) {
    const Pool pool{keys, values, block_size, kv_heads};
    const int64_t out_stride = kv_heads * G * D;
    struct Piece { int64_t request, row, position, tokens; };
    Piece* pieces = (Piece*)malloc((rows + 1) * sizeof(Piece));
    int64_t count = 0;
    memset(out, 0, rows * out_stride * sizeof(SCALAR));  // what padding keeps
    for (int64_t b = 0; b < requests; ++b) {
        const int64_t before = lengths[b] - (starts[b + 1] - starts[b]);  // position of its first row
        for (int64_t row = starts[b] + larger<int64_t>(0, -before); row < starts[b + 1]; row += QUERIES)
            pieces[count++] = {b, row, before + row - starts[b], smaller<int64_t>(QUERIES, starts[b + 1] - row)};
    }
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t p = count - 1; p >= 0; --p) {  // late pieces see most keys: they go first
        for (int64_t head = 0; head < kv_heads; ++head) {
            const Piece& piece = pieces[p];
            look_together(q + piece.row * q_stride + head * G * D, q_stride, pool, tables + piece.request * table_stride,
                          head, piece.position, int(piece.tokens), window, out + piece.row * out_stride + head * G * D,
                          out_stride);
        }
    }
    free(pieces);
}
