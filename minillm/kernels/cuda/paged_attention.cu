// Paged attention in plain CUDA C++, to be read: decode in five versions from naive to fast, then prefill and store_kv.
// The versions compute the same. What changes from one to the next is which thread reads which address.
//
// The pool of one layer is [num_blocks, BLOCK_SIZE, Hkv, HEAD_SIZE]. The HEAD_SIZE numbers of a token's key in one head
// are neighbours in memory: a row. Token t of a request lies, through the request's block table, at
//
//     row(t) = (table[t / BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE) * Hkv + head
//
// A GPU runs threads in warps of 32, and the 32 execute an instruction together. When that is a load, memory delivers
// the sectors (32 neighbouring bytes, aligned) that the 32 addresses touch, whole. Neighbouring threads that read
// neighbouring numbers share sectors; threads that read far apart get a sector each and throw most of it away.
//
// Given as macros, because a compiler that knows them unrolls loops and keeps arrays in registers:
//     SCALAR      float, Half or BFloat16: the numbers of q, keys, values and out. All sums are float.
//     INDEX       int or long long: the numbers of tables, lengths, slots and query_starts
//     HEAD_SIZE   16, 32, 64 or 128     BLOCK_SIZE  tokens in a block     GROUP  query heads that share a key head
// Every kernel is launched with THREADS threads per block. A query sees only the last `window` keys; 0: all.
// What is masked is not loaded, and a query that sees nothing gets zeros.
//
// There is no host code and no #include, so that NVRTC can compile this file by itself. Global memory is read and written
// through `load` and `store` only: plain accesses on a GPU, counted where the file is compiled for the CPU.

struct Half { unsigned short bits; };
struct BFloat16 { unsigned short bits; };

#ifdef __CUDACC__
template <typename T> __device__ T load(const T* address) { return *address; }
template <typename T> __device__ void store(T* address, T value) { *address = value; }

__device__ float half_to_float(unsigned short bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}

__device__ unsigned short float_to_half(float number) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}
#endif

constexpr int WARP = 32;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int VECTOR = 16 / sizeof(SCALAR);  // numbers in 16 bytes, the most that one thread loads at once
constexpr int LANES = HEAD_SIZE / VECTOR;    // threads that read a row with one such load each: a team
constexpr int TEAMS = THREADS / LANES;
constexpr unsigned ALL = 0xffffffff;  // lanes of a warp

struct alignas(16) Vector { SCALAR numbers[VECTOR]; };

__device__ float to_float(float number) { return number; }
__device__ float to_float(Half number) { return half_to_float(number.bits); }
__device__ float to_float(BFloat16 number) { return __uint_as_float(unsigned(number.bits) << 16); }

__device__ void from_float(float number, float& to) { to = number; }
__device__ void from_float(float number, Half& to) { to.bits = float_to_half(number); }
__device__ void from_float(float number, BFloat16& to) {
    unsigned bits = __float_as_uint(number);
    unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    to.bits = number == number ? rounded : 0x7fff;                // a NaN must not be rounded up to infinity
}

__device__ SCALAR rounded(float number) {
    SCALAR result;
    from_float(number, result);
    return result;
}

// The VECTOR numbers that begin here; the address must be a multiple of 16.
__device__ const Vector* vector_at(const SCALAR* address) { return reinterpret_cast<const Vector*>(address); }
__device__ Vector* vector_at(SCALAR* address) { return reinterpret_cast<Vector*>(address); }

__device__ float minus_infinity() { return __uint_as_float(0xff800000); }

// Scores are of base 2: 2^x is what a GPU computes fastest, and 2^(x * log2(e)) = e^x.
__device__ float score_scale() { return 1.44269504f * rsqrtf(float(HEAD_SIZE)); }

// What exponents are relative to. Nothing seen yet: 0, because -inf - -inf would be NaN.
__device__ float base_of(float best) { return best == minus_infinity() ? 0.0f : best; }

// Sum over `lanes` neighbouring threads, a power of two, known to each of them.
__device__ float sum_over(float x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
    return x;
}

__device__ float max_over(float x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, distance));
    return x;
}

__device__ float block_max(float x) {
    __shared__ float of_warp[WARPS];
    x = max_over(x, WARP);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp) x = fmaxf(x, of_warp[warp]);
    return x;
}

__device__ float block_sum(float x) {
    __shared__ float of_warp[WARPS];
    x = sum_over(x, WARP);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < WARPS; ++warp) x += of_warp[warp];
    return x;
}

// Where a token's row begins, counted in numbers. 64 bits: a pool has more than 2^31 of them.
__device__ long long row_of(const INDEX* table, int position, int kv_head, int num_kv_heads) {
    long long block = load(table + position / BLOCK_SIZE);
    return ((block * BLOCK_SIZE + position % BLOCK_SIZE) * num_kv_heads + kv_head) * HEAD_SIZE;
}

__device__ int first_seen(int position, int window) { return window == 0 ? 0 : max(position - window + 1, 0); }

__device__ bool is_seen(int key, int position, int window) {
    return key >= first_seen(position, window) && key <= position;
}

// Turns `count` scores in shared memory into 2^(score - largest) and returns their sum. The barriers of block_max and
// block_sum stand between what a thread writes and what its neighbours read, here and after the return.
__device__ float exponentials(float* scores, int count) {
    __syncthreads();  // all scores are there
    float best = minus_infinity();
    for (int i = threadIdx.x; i < count; i += THREADS) best = fmaxf(best, scores[i]);
    float base = base_of(block_max(best));
    float total = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        scores[i] = exp2f(scores[i] - base);
        total += scores[i];
    }
    return block_sum(total);
}

// Thread d sums column d of the values, each times its key's weight: neighbouring threads read neighbouring numbers.
__device__ void sum_values(
    const SCALAR* values, const INDEX* table, int kv_head, int num_kv_heads, int first, int end, const float* weights,
    float total, SCALAR* out
) {
    for (int d = threadIdx.x; d < HEAD_SIZE; d += THREADS) {
        float sum = 0;
        for (int key = first; key < end; ++key) {
            float value = to_float(load(values + row_of(table, key, kv_head, num_kv_heads) + d));
            sum += weights[key - first] * value;
        }
        store(out + d, rounded(total == 0 ? 0.0f : sum / total));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// decode: one new token each of B requests, q [B, Hq, HEAD_SIZE], looks through tables [B, W] at its lengths[b] keys,
// its own included. Versions 1 to 3 keep a score per key in shared memory, which limits how many keys there may be.
// ---------------------------------------------------------------------------------------------------------------------

// Version 1: one block of threads per request and query head; a thread takes whole keys.
//
// Grid (B, Hq). Memory access: each thread walks along a key of its own, so at every step the 32 threads of a warp read
// 32 numbers that lie Hkv * HEAD_SIZE numbers apart. Each is in another sector: 32 sectors for one load, with one number
// used of each. The next step finds them in the L1 cache if they are still there.
extern "C" __global__ void decode_v1(
    const SCALAR* q, const SCALAR* keys, const SCALAR* values, const INDEX* tables, const INDEX* lengths, SCALAR* out,
    int q_stride, int table_stride, int window
) {
    extern __shared__ float scores[];
    const long long request = blockIdx.x;
    const int head = blockIdx.y, num_heads = gridDim.y, kv_head = head / GROUP, num_kv_heads = num_heads / GROUP;
    const INDEX* table = tables + request * table_stride;
    const SCALAR* query = q + request * q_stride + head * HEAD_SIZE;
    const int end = load(lengths + request), first = first_seen(end - 1, window);

    for (int key = first + threadIdx.x; key < end; key += THREADS) {
        const SCALAR* row = keys + row_of(table, key, kv_head, num_kv_heads);
        float score = 0;
        for (int d = 0; d < HEAD_SIZE; ++d) {
            float number = to_float(load(query + d));
            score += number * to_float(load(row + d));
        }
        scores[key - first] = score * score_scale();
    }
    const float total = exponentials(scores, end - first);
    SCALAR* own = out + (request * num_heads + head) * HEAD_SIZE;
    sum_values(values, table, kv_head, num_kv_heads, first, end, scores, total, own);
}

// Version 2: a warp takes a key.
//
// Grid (B, Hq). Memory access: coalesced. Thread l of a warp reads numbers l, l + 32, ... of the same key, so a load
// touches 32 neighbouring numbers: 4 sectors of float, 2 of half, all of their bytes used. Each thread then holds a
// part of the sum; five shuffles, which move numbers between the threads of a warp without memory, add them up.
extern "C" __global__ void decode_v2(
    const SCALAR* q, const SCALAR* keys, const SCALAR* values, const INDEX* tables, const INDEX* lengths, SCALAR* out,
    int q_stride, int table_stride, int window
) {
    extern __shared__ float scores[];
    const long long request = blockIdx.x;
    const int head = blockIdx.y, num_heads = gridDim.y, kv_head = head / GROUP, num_kv_heads = num_heads / GROUP;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const INDEX* table = tables + request * table_stride;
    const SCALAR* query = q + request * q_stride + head * HEAD_SIZE;
    const int end = load(lengths + request), first = first_seen(end - 1, window);

    for (int key = first + warp; key < end; key += WARPS) {
        const SCALAR* row = keys + row_of(table, key, kv_head, num_kv_heads);
        float score = 0;
        for (int d = lane; d < HEAD_SIZE; d += WARP) {
            float number = to_float(load(query + d));
            score += number * to_float(load(row + d));
        }
        score = sum_over(score, WARP);
        if (lane == 0) scores[key - first] = score * score_scale();
    }
    const float total = exponentials(scores, end - first);
    SCALAR* own = out + (request * num_heads + head) * HEAD_SIZE;
    sum_values(values, table, kv_head, num_kv_heads, first, end, scores, total, own);
}

// Version 3: loads of 16 bytes.
//
// Grid (B, Hq). Memory access: vectorised. A thread loads VECTOR neighbouring numbers at once, so LANES threads (a
// team) cover a key and a warp reads 32 / LANES keys with one instruction: 16 sectors, where version 2 asked for 4 (2
// of half) and had to ask as many times more. As many bytes move, with a fourth (eighth) of the instructions; each
// keeps more bytes on their way, which is what hides the time that memory takes. The query stays in registers.
extern "C" __global__ void decode_v3(
    const SCALAR* q, const SCALAR* keys, const SCALAR* values, const INDEX* tables, const INDEX* lengths, SCALAR* out,
    int q_stride, int table_stride, int window
) {
    extern __shared__ float scores[];
    __shared__ float sums[TEAMS][HEAD_SIZE];
    const long long request = blockIdx.x;
    const int head = blockIdx.y, num_heads = gridDim.y, kv_head = head / GROUP, num_kv_heads = num_heads / GROUP;
    const int team = threadIdx.x / LANES, column = threadIdx.x % LANES * VECTOR;
    const INDEX* table = tables + request * table_stride;
    const int end = load(lengths + request), first = first_seen(end - 1, window);
    const Vector query = load(vector_at(q + request * q_stride + head * HEAD_SIZE + column));

    for (int start = first; start < end; start += TEAMS) {  // as often for every team: all lanes take part in shuffles
        const int key = start + team;
        float score = 0;
        if (key < end) {
            Vector row = load(vector_at(keys + row_of(table, key, kv_head, num_kv_heads) + column));
            for (int i = 0; i < VECTOR; ++i) score += to_float(query.numbers[i]) * to_float(row.numbers[i]);
        }
        score = sum_over(score, LANES);
        if (key < end && column == 0) scores[key - first] = score * score_scale();
    }
    const float total = exponentials(scores, end - first);

    float sum[VECTOR] = {};
    for (int key = first + team; key < end; key += TEAMS) {
        Vector row = load(vector_at(values + row_of(table, key, kv_head, num_kv_heads) + column));
        for (int i = 0; i < VECTOR; ++i) sum[i] += scores[key - first] * to_float(row.numbers[i]);
    }
    for (int i = 0; i < VECTOR; ++i) sums[team][column + i] = sum[i];
    __syncthreads();
    for (int d = threadIdx.x; d < HEAD_SIZE; d += THREADS) {
        float number = 0;
        for (int other = 0; other < TEAMS; ++other) number += sums[other][d];
        store(out + (request * num_heads + head) * HEAD_SIZE + d, rounded(total == 0 ? 0.0f : number / total));
    }
}

// What a thread knows of one query head's softmax after some of the keys: the largest score, the sum of
// 2^(score - best), and the values so weighted, VECTOR columns of them.
struct Running {
    float best, total, sum[VECTOR];
};

// What a block knows of it, for thread d's one column.
struct Merged {
    float best, total, sum;
};

constexpr int AHEAD = 4;  // keys a thread loads before it computes: that is how many loads are on their way at once

// Each team takes every TEAMS-th key from `first` to `end` and keeps a running softmax for all heads of the group.
__device__ void look_at_keys(
    const Vector* query, const SCALAR* keys, const SCALAR* values, const INDEX* table, int kv_head, int num_kv_heads,
    int first, int end, Running* running
) {
    const int team = threadIdx.x / LANES, column = threadIdx.x % LANES * VECTOR;
    for (int start = first; start < end; start += TEAMS * AHEAD) {
        Vector k[AHEAD] = {}, v[AHEAD] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int key = start + i * TEAMS + team;
            if (key < end) {
                const long long row = row_of(table, key, kv_head, num_kv_heads);
                k[i] = load(vector_at(keys + row + column));
                v[i] = load(vector_at(values + row + column));
            }
        }
#pragma unroll
        for (int head = 0; head < GROUP; ++head) {
            Running& own = running[head];
            float scores[AHEAD], best = own.best;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                float score = 0;
#pragma unroll
                for (int n = 0; n < VECTOR; ++n) {
                    score += to_float(query[head].numbers[n]) * to_float(k[i].numbers[n]);
                }
                score = sum_over(score, LANES) * score_scale();
                scores[i] = start + i * TEAMS + team < end ? score : minus_infinity();
                best = fmaxf(best, scores[i]);
            }
            // A larger score has come: what is summed already counts for less.
            const float rescale = exp2f(own.best - base_of(best));
            own.best = best;
            own.total *= rescale;
#pragma unroll
            for (int n = 0; n < VECTOR; ++n) own.sum[n] *= rescale;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const float weight = exp2f(scores[i] - base_of(best));  // of a key that is not there: 0
                own.total += weight;
#pragma unroll
                for (int n = 0; n < VECTOR; ++n) own.sum[n] += weight * to_float(v[i].numbers[n]);
            }
        }
    }
}

// The teams' softmaxes of one head put together. Only threads below HEAD_SIZE have a column.
__device__ Merged merge_teams(const Running& own) {
    __shared__ float bests[TEAMS], totals[TEAMS], sums[TEAMS][HEAD_SIZE];
    const int team = threadIdx.x / LANES, column = threadIdx.x % LANES * VECTOR;
    __syncthreads();  // the head before has been read
    if (column == 0) bests[team] = own.best;
    if (column == 0) totals[team] = own.total;
#pragma unroll
    for (int n = 0; n < VECTOR; ++n) sums[team][column + n] = own.sum[n];
    __syncthreads();
    Merged merged = {minus_infinity(), 0, 0};
    for (int other = 0; other < TEAMS; ++other) merged.best = fmaxf(merged.best, bests[other]);
    for (int other = 0; other < TEAMS; ++other) {
        const float weight = exp2f(bests[other] - base_of(merged.best));
        merged.total += weight * totals[other];
        if (threadIdx.x < HEAD_SIZE) merged.sum += weight * sums[other][threadIdx.x];
    }
    return merged;
}

// The group's queries into registers, and nothing seen yet.
__device__ void begin(const SCALAR* queries, Vector* query, Running* running) {
    const int column = threadIdx.x % LANES * VECTOR;
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        query[head] = load(vector_at(queries + head * HEAD_SIZE + column));
        running[head] = {minus_infinity(), 0, {}};
    }
}

// Version 4: online softmax, and a whole group per block.
//
// Grid (B, Hkv). Memory access: every key and value is read once for all GROUP query heads that share it, where
// versions 1 to 3 read it once for each of them: GROUP times fewer bytes. And there is one pass: key and value of a
// token are loaded together, because the softmax is kept up to date as scores come in. So no scores are kept, and there
// is no limit to the number of keys.
extern "C" __global__ void decode_v4(
    const SCALAR* q, const SCALAR* keys, const SCALAR* values, const INDEX* tables, const INDEX* lengths, SCALAR* out,
    int q_stride, int table_stride, int window
) {
    const long long request = blockIdx.x;
    const int kv_head = blockIdx.y, num_kv_heads = gridDim.y;
    const INDEX* table = tables + request * table_stride;
    const int end = load(lengths + request), first = first_seen(end - 1, window);

    Vector query[GROUP];
    Running running[GROUP];
    begin(q + request * q_stride + kv_head * GROUP * HEAD_SIZE, query, running);
    look_at_keys(query, keys, values, table, kv_head, num_kv_heads, first, end, running);

    SCALAR* own = out + (request * num_kv_heads + kv_head) * GROUP * HEAD_SIZE;
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        const Merged merged = merge_teams(running[head]);
        const float number = merged.total == 0 ? 0.0f : merged.sum / merged.total;
        if (threadIdx.x < HEAD_SIZE) store(own + head * HEAD_SIZE + threadIdx.x, rounded(number));
    }
}

// Version 5: several blocks share the keys of one request and key head.
//
// Grid (B, Hkv, num_splits). Memory access: the same bytes as version 4, from more multiprocessors at once. With few
// requests version 4 has B * Hkv blocks where a GPU has over a hundred multiprocessors, and those without a block read
// nothing. Each split leaves its part, normalised, and the logarithm of its sum; `combine` weighs them. That costs one
// float per number, written and read again for each split, which is little beside its keys and values.
extern "C" __global__ void decode_v5(
    const SCALAR* q, const SCALAR* keys, const SCALAR* values, const INDEX* tables, const INDEX* lengths, float* parts,
    float* logs, int q_stride, int table_stride, int window
) {
    const long long request = blockIdx.x;
    const int kv_head = blockIdx.y, num_kv_heads = gridDim.y, split = blockIdx.z, num_splits = gridDim.z;
    const INDEX* table = tables + request * table_stride;
    const int length = load(lengths + request), first_of_all = first_seen(length - 1, window);
    const int steps = (length - first_of_all + TEAMS * AHEAD - 1) / (TEAMS * AHEAD);
    const int share = (steps + num_splits - 1) / num_splits * TEAMS * AHEAD;  // whole steps of look_at_keys
    const int first = first_of_all + split * share, end = min(first + share, length);

    Vector query[GROUP];
    Running running[GROUP];
    begin(q + request * q_stride + kv_head * GROUP * HEAD_SIZE, query, running);
    look_at_keys(query, keys, values, table, kv_head, num_kv_heads, first, end, running);

    const long long own = (request * num_kv_heads + kv_head) * GROUP;
#pragma unroll
    for (int head = 0; head < GROUP; ++head) {
        const Merged merged = merge_teams(running[head]);
        const long long part = (own + head) * num_splits + split;
        // A split without keys writes -inf and leaves no part.
        const float log = merged.total == 0 ? minus_infinity() : merged.best + log2f(merged.total);
        if (threadIdx.x == 0) store(logs + part, log);
        if (threadIdx.x < HEAD_SIZE && first < end) {
            store(parts + part * HEAD_SIZE + threadIdx.x, merged.total == 0 ? 0.0f : merged.sum / merged.total);
        }
    }
}

// Version 5's second kernel. Grid (B * Hq): one query head of one request per block, thread d its column d of all parts.
extern "C" __global__ void combine(const float* parts, const float* logs, SCALAR* out, int num_splits) {
    const long long row = blockIdx.x;
    const float* own_logs = logs + row * num_splits;
    float best = minus_infinity();
    for (int split = 0; split < num_splits; ++split) best = fmaxf(best, load(own_logs + split));
    for (int d = threadIdx.x; d < HEAD_SIZE; d += THREADS) {
        float total = 0, sum = 0;
        for (int split = 0; split < num_splits; ++split) {
            const float log = load(own_logs + split);
            if (log == minus_infinity()) continue;
            const float weight = exp2f(log - base_of(best));
            total += weight;
            sum += weight * load(parts + (row * num_splits + split) * HEAD_SIZE + d);
        }
        store(out + row * HEAD_SIZE + d, rounded(total == 0 ? 0.0f : sum / total));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// prefill: new tokens of B requests, one after the other in q [T, Hq, HEAD_SIZE]. Request b has rows query_starts[b] up
// to query_starts[b + 1], the last ones of its lengths[b] tokens; each sees itself and what is before it.
//
// Grid (tiles of queries, Hkv, B). A block has ROWS rows: TILE_QUERIES neighbouring queries, each in all heads of the
// group. Memory access: keys and values come into shared memory TILE_KEYS at a time, by loads of 16 bytes, and all rows
// use them from there: a key is read once for ROWS rows.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int ROWS = 16;
constexpr int TILE_QUERIES = ROWS / GROUP;
constexpr int TILE_KEYS = 16;
constexpr int ROW_LANES = THREADS / ROWS;  // threads that share a row; thread l has columns l, l + ROW_LANES, ...
constexpr int COLUMNS = HEAD_SIZE / ROW_LANES;

__device__ void load_tile(
    float (*tile)[HEAD_SIZE], const SCALAR* pool, const INDEX* table, int kv_head, int num_kv_heads, int tile_start,
    int first, int end
) {
    for (int i = threadIdx.x; i < TILE_KEYS * LANES; i += THREADS) {
        const int row = i / LANES, column = i % LANES * VECTOR, key = tile_start + row;
        if (key < first || key >= end) continue;
        const Vector numbers = load(vector_at(pool + row_of(table, key, kv_head, num_kv_heads) + column));
        for (int n = 0; n < VECTOR; ++n) tile[row][column + n] = to_float(numbers.numbers[n]);
    }
}

extern "C" __global__ void prefill(
    const SCALAR* q, const SCALAR* keys, const SCALAR* values, const INDEX* tables, const INDEX* query_starts,
    const INDEX* lengths, SCALAR* out, int q_stride, int table_stride, int window
) {
    __shared__ float k[TILE_KEYS][HEAD_SIZE], v[TILE_KEYS][HEAD_SIZE];
    const int kv_head = blockIdx.y, num_kv_heads = gridDim.y;
    const long long request = blockIdx.z, first_row = load(query_starts + request);
    const int num_queries = load(query_starts + request + 1) - first_row, length = load(lengths + request);
    const int first_query = blockIdx.x * TILE_QUERIES;
    if (first_query >= num_queries) return;  // the grid is as long as the longest request

    const int row = threadIdx.x / ROW_LANES, lane = threadIdx.x % ROW_LANES;
    const int query = first_query + row / GROUP, head = kv_head * GROUP + row % GROUP;
    const bool real = row < TILE_QUERIES * GROUP && query < num_queries;
    const int before = length - num_queries;  // the cached prefix; negative where rows are padding
    const int position = before + query;
    // Of the whole tile: some row of it sees keys first up to end.
    const int first = first_seen(before + first_query, window);
    const int end = before + min(first_query + TILE_QUERIES, num_queries);

    float numbers[COLUMNS], sum[COLUMNS] = {}, best = minus_infinity(), total = 0;
    const SCALAR* own = q + (first_row + query) * q_stride + head * HEAD_SIZE;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) numbers[c] = real ? to_float(load(own + c * ROW_LANES + lane)) : 0.0f;

    const INDEX* table = tables + request * table_stride;
    for (int start = first; start < end; start += TILE_KEYS) {
        load_tile(k, keys, table, kv_head, num_kv_heads, start, first, end);
        load_tile(v, values, table, kv_head, num_kv_heads, start, first, end);
        __syncthreads();  // the tile is there
        float scores[TILE_KEYS], new_best = best;
#pragma unroll
        for (int j = 0; j < TILE_KEYS; ++j) {
            float score = 0;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) score += numbers[c] * k[j][c * ROW_LANES + lane];
            score = sum_over(score, ROW_LANES) * score_scale();
            scores[j] = is_seen(start + j, position, window) ? score : minus_infinity();
            new_best = fmaxf(new_best, scores[j]);
        }
        const float rescale = exp2f(best - base_of(new_best));
        best = new_best;
        total *= rescale;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sum[c] *= rescale;
#pragma unroll
        for (int j = 0; j < TILE_KEYS; ++j) {
            // Not seen is skipped, not multiplied by 0: 0 * NaN is NaN, and others of the tile may see a NaN here.
            if (!is_seen(start + j, position, window)) continue;
            const float weight = exp2f(scores[j] - base_of(best));
            total += weight;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sum[c] += weight * v[j][c * ROW_LANES + lane];
        }
        __syncthreads();  // the tile has been used
    }
    if (!real) return;
    SCALAR* to = out + ((first_row + query) * num_kv_heads * GROUP + head) * HEAD_SIZE;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) store(to + c * ROW_LANES + lane, rounded(total == 0 ? 0.0f : sum[c] / total));
}

// ---------------------------------------------------------------------------------------------------------------------
// store_kv: T new keys and values into the pool, at slots[t] = block * BLOCK_SIZE + offset; a negative slot is padding.
//
// Grid (T). Memory access: a token's Hkv * HEAD_SIZE numbers are neighbours in k, in v and in the pool, so the block's
// threads copy them side by side, 16 bytes each.
// ---------------------------------------------------------------------------------------------------------------------
extern "C" __global__ void store_kv(
    SCALAR* keys, SCALAR* values, const INDEX* slots, const SCALAR* k, const SCALAR* v, int k_stride, int v_stride,
    int row_size
) {
    const long long token = blockIdx.x, slot = load(slots + token);
    if (slot < 0) return;
    for (int i = threadIdx.x * VECTOR; i < row_size; i += THREADS * VECTOR) {
        store(vector_at(keys + slot * row_size + i), load(vector_at(k + token * k_stride + i)));
        store(vector_at(values + slot * row_size + i), load(vector_at(v + token * v_stride + i)));
    }
}
