// Paged attention for a CPU, compiled for one HEAD_SIZE and GROUP (query heads that share a key head), so that the loops
// over them unroll. Shapes, row-major:
//
//   q, out [T, Hq, D]   keys, values [num_blocks, block_size, Hkv, D]   tables [B, W]   lengths [B]
//
// What decides the time is the same as on a GPU: which bytes come from memory, and how often. A CPU loads cache lines of
// 64 bytes, so a head of 16 float32 or 32 bfloat16 numbers is one line, and neighbours in a head cost nothing more.
//
//   torch        gathers every block into a new tensor: each key is read, written and read again.
//   1 decode     reads blocks where they lie: no copy. But each query head reads its keys again: GROUP times.
//   2 decode     the whole group of query heads looks at a key while it is in registers: each key is read once.
//   3 prefill    a tile of queries looks at a tile of keys: keys are read once per tile of queries, not once per query.
//   4 norm_rotate_store makes the queries for these, and puts new keys and values into their blocks.

constexpr int D = HEAD_SIZE, G = GROUP;

// Where token number t of a request lies in the pool of its layer: the place of its block, and there its own.
struct Pool {
    const SCALAR *keys, *values;
    int64_t block_size, heads;  // key heads, Hkv
    int64_t at(const int32_t* table, int64_t t, int64_t head) const {
        return ((table[t / block_size] * block_size + t % block_size) * heads + head) * D;
    }
};

// ---- 1 and 2: decode, one query per request and head ----

// scores[first .. end) become weights that sum to 1 (softmax).
static void softmax(real* scores, int64_t first, int64_t end) {
    real most = NOTHING, sum = 0;
    for (int64_t t = first; t < end; ++t) most = scores[t] > most ? scores[t] : most;
    for (int64_t t = first; t < end; ++t) sum += scores[t] = exp_of(scores[t] - most);
    for (int64_t t = first; t < end; ++t) scores[t] /= sum;
}

// Asks for a head that is needed AHEAD tokens later. A processor guesses which lines come next only within a page, and a
// page of 4 KiB holds few tokens. Without it decode took 1.5 times as long in float32, 1.1 in bfloat16, where keys and
// values come from memory (one thread of an AMD EPYC, 16 requests of 200 tokens, 3 key heads of 64); 4 to 12 are equal.
constexpr int64_t AHEAD = 8;
static inline void prefetch(const SCALAR* head) {
    for (const SCALAR* line = head; line < head + D; line += 64 / sizeof(SCALAR)) __builtin_prefetch(line);
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
        prefetch(pool.keys + pool.at(table, smaller(t + AHEAD, end - 1), head));
        for (int n = 0; n < N; ++n) {
            real dot = 0;
            for (int i = 0; i < D; ++i) dot += query[n][i] * real(key[i]);
            scores[n * end + t] = dot;
        }
    }
    for (int n = 0; n < N; ++n) softmax(&scores[n * end], first, end);
    for (int64_t t = first; t < end; ++t) {
        const SCALAR* value = pool.values + pool.at(table, t, head);
        prefetch(pool.values + pool.at(table, smaller(t + AHEAD, end - 1), head));
        for (int n = 0; n < N; ++n)
            for (int i = 0; i < D; ++i) sum[n][i] += scores[n * end + t] * real(value[i]);
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < D; ++i) out[n * D + i] = SCALAR(sum[n][i]);
}

// Only the last `window` keys are seen; 0 for all. A request of length 0 is padding and gives zeros.
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

// ---- 3: prefill, several new tokens of a request look at its cached prefix and at each other ----

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

// ---- 4: from the projection to queries and blocks ----

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
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * heads * D >= ENOUGH)
    for (int64_t t = 0; t < tokens; ++t) {
        const SCALAR *row = qkv + t * (heads + 2 * kv_heads) * D, *c = cos + t * D, *s = sin + t * D;
        for (int64_t h = 0; h < heads; ++h) norm_and_rotate(row + h * D, q_weight, eps, c, s, q + (t * heads + h) * D);
        if (slots[t] < 0) continue;
        SCALAR *key = keys + slots[t] * kv_heads * D, *value = values + slots[t] * kv_heads * D;
        for (int64_t h = 0; h < kv_heads; ++h) norm_and_rotate(row + (heads + h) * D, k_weight, eps, c, s, key + h * D);
        memcpy(value, row + (heads + kv_heads) * D, kv_heads * D * sizeof(SCALAR));
    }
}
