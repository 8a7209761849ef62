// What a CUDA kernel needs to run on a CPU, one thread at a time, with every access to global memory checked and noted.
//
// The same .cu source is compiled as ordinary C++ behind this header. A block's threads are fibers: each has a stack of
// its own and runs until it waits for others, at a barrier or in a shuffle. Then the next one runs. Blocks follow each
// other. A warp runs on as far as it can before the next one begins. So a run is the same every time, and a race on a
// GPU shows as a wrong result in some `order` of the threads. Shared memory begins as NaN in every block.
//
// Each of these ends the run with a message: an access outside all arrays or not aligned to its size, a barrier that
// not all threads of a block reach, a shuffle without one of the lanes it names.
//
// C headers only: C++'s would take longer to compile than the kernels.
//
// Left out: atomics, textures, clocks, several streams; and time. This counts accesses, it does not model caches.

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__ static
#define __forceinline__ inline
#ifdef __linux__
#define __shared__ static __attribute__((section("block_shared")))
extern char __start_block_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_block_shared[] __attribute__((weak, visibility("hidden")));
#else
#define __shared__ static
#endif

struct dim3 {
    unsigned x, y, z;
};

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

namespace cpu {

constexpr int WARP = 32, ALIGNMENT = 256, STACK_BYTES = 256 << 10, MAX_SHARED_BYTES = 48 << 10, MAX_LINES = 1024;

struct Array {  // an argument of the kernel that points to global memory
    char* begin;
    char* end;
    int32_t item_bytes;
    int32_t stored;  // set when something is written there
    char name[32];
};

struct Record {  // one access of one thread
    int64_t address;  // bytes from the multiple of ALIGNMENT at or below the array's begin: sectors begin at 0, 32, ...
    int32_t block, thread, line;
    int32_t occurrence;  // how many accesses this thread has made from this line before
    int16_t array, size;
    int32_t stored;
};

enum State { READY, AT_BARRIER, IN_SHUFFLE, ENDED };

struct Thread {
    dim3 index;
    int number;
    State state;
    bool started;
    jmp_buf place;  // where it waits
    ucontext_t first;
    char* stack;
    int line;  // of the barrier or shuffle it waits at
    unsigned mask, source;
    uint64_t given, taken;
    int32_t accesses[MAX_LINES];
};

static Thread* threads;
static int num_threads;
static Array* arrays;
static int num_arrays;
static Record* records;
static long num_records, room_for_records;
static Thread* current;
static jmp_buf scheduler;
static char message[512];
static bool recording;
static int block_number;
static dim3 block_index, block_size, grid_size;
static void (*kernel)(void**);
static void** kernel_arguments;
alignas(16) static char dynamic_shared[MAX_SHARED_BYTES];

// --- fibers ---
// A switch is a longjmp: swapcontext would ask the operating system twice each time.

static void give_way() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

static void live() {
    for (;;) {
        kernel(kernel_arguments);
        current->state = ENDED;
        give_way();
    }
}

static void __attribute__((noinline)) resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.first);
}

static void fail(const char* format, ...) {
    int used = snprintf(
        message, sizeof message, "block (%u, %u, %u), thread %d: ", block_index.x, block_index.y, block_index.z,
        current->number
    );
    va_list values;
    va_start(values, format);
    vsnprintf(message + used, sizeof message - used, format, values);
    va_end(values);
    _longjmp(scheduler, 1);
}

static void make_threads() {
    num_threads = block_size.x * block_size.y * block_size.z;
    threads = static_cast<Thread*>(calloc(num_threads, sizeof(Thread)));
    char* stacks = static_cast<char*>(malloc(size_t(num_threads) * STACK_BYTES));
    for (int i = 0; i < num_threads; ++i) {
        Thread& thread = threads[i];
        thread.number = i;
        thread.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        thread.stack = stacks + size_t(i) * STACK_BYTES;
        getcontext(&thread.first);
        thread.first.uc_stack.ss_sp = thread.stack;
        thread.first.uc_stack.ss_size = STACK_BYTES;
        makecontext(&thread.first, live, 0);
    }
}

static void free_threads() {
    free(threads[0].stack);
    free(threads);
}

// --- global memory ---

static const char* name_of(const char* address, long* index) {
    const Array* nearest = nullptr;
    long least = 0;
    for (int i = 0; i < num_arrays; ++i) {
        const Array& array = arrays[i];
        long distance = address < array.begin ? array.begin - address : address - array.end;
        if (!nearest || distance < least) nearest = &array, least = distance;
    }
    if (!nearest) return "nothing";
    long bytes = address - nearest->begin;
    *index = bytes >= 0 ? bytes / nearest->item_bytes : -((-bytes + nearest->item_bytes - 1) / nearest->item_bytes);
    return nearest->name;
}

static Record* new_record() {
    if (num_records == room_for_records) {
        room_for_records = max(1 << 16, 2 * room_for_records);
        records = static_cast<Record*>(realloc(records, room_for_records * sizeof(Record)));
    }
    return &records[num_records++];
}

static void note(const void* pointer, int size, bool stored, int line) {
    const char* address = static_cast<const char*>(pointer);
    for (int i = 0; i < num_arrays; ++i) {
        Array& array = arrays[i];
        if (address < array.begin || address + size > array.end) continue;
        if (reinterpret_cast<uintptr_t>(address) % size) break;
        array.stored |= stored;
        if (!recording) return;
        if (line >= MAX_LINES) fail("line %d: only the first %d are counted; pass a shorter source", line, MAX_LINES);
        const int64_t offset = address - array.begin + reinterpret_cast<uintptr_t>(array.begin) % ALIGNMENT;
        *new_record() = {
            offset, block_number, current->number, line, current->accesses[line]++, int16_t(i), int16_t(size), stored
        };
        return;
    }
    long index = 0;
    const char* name = name_of(address, &index);
    bool aligned = reinterpret_cast<uintptr_t>(address) % size == 0;
    fail(
        "line %d %s %d bytes at %s[%ld], %s", line, stored ? "stores" : "loads", size, name, index,
        aligned ? "outside the array" : "which is not aligned to its size"
    );
}

// --- waiting for each other ---

static void barrier(int line) {
    current->state = AT_BARRIER;
    current->line = line;
    give_way();
}

static bool all_in_shuffle(const Thread* warp, int lanes, const Thread& own) {
    for (int lane = 0; lane < WARP; ++lane) {
        if (!(own.mask >> lane & 1)) continue;
        if (lane >= lanes || warp[lane].state != IN_SHUFFLE) return false;
        if (warp[lane].mask != own.mask || warp[lane].line != own.line) return false;
    }
    return true;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    Thread& own = *current;
    const int warp_start = own.number / WARP * WARP, lane = own.number % WARP;
    Thread* warp = &threads[warp_start];
    const int lanes = min(WARP, num_threads - warp_start);
    if (!(mask >> lane & 1)) fail("line %d: a shuffle among lanes %#x, by lane %d", line, mask, lane);
    if (!(mask >> source & 1)) fail("line %d: a shuffle among lanes %#x reads lane %d", line, mask, source);
    memcpy(&own.given, &value, sizeof value);
    own.mask = mask, own.source = source, own.line = line, own.state = IN_SHUFFLE;
    if (all_in_shuffle(warp, lanes, own)) {
        for (int other = 0; other < lanes; ++other) {
            if (mask >> other & 1) warp[other].taken = warp[warp[other].source].given, warp[other].state = READY;
        }
    } else {
        give_way();
    }
    memcpy(&value, &own.taken, sizeof value);
    return value;
}

static const char* what(const Thread& thread) {
    static char text[80];
    if (thread.state == ENDED) return "has ended";
    const char* where = thread.state == AT_BARRIER ? "waits at the barrier" : "waits for other lanes in the shuffle";
    snprintf(text, sizeof text, "%s of line %d", where, thread.line);
    return text;
}

// No thread can go on. True if all wait at one barrier, which then opens; false if all have ended, or never will.
static bool open_barrier() {
    const Thread *waiting = nullptr, *other = nullptr;  // other: one that does not wait at the same place
    for (int i = 0; i < num_threads && !waiting; ++i) {
        if (threads[i].state != ENDED) waiting = &threads[i];
    }
    if (!waiting) return false;
    for (int i = 0; i < num_threads; ++i) {
        if (threads[i].state != waiting->state || threads[i].line != waiting->line) other = &threads[i];
    }
    if (!other && waiting->state == AT_BARRIER) {
        for (int i = 0; i < num_threads; ++i) threads[i].state = READY;
        return true;
    }
    char first[80];
    snprintf(first, sizeof first, "%s", what(*waiting));
    current = &threads[waiting->number];
    if (_setjmp(scheduler)) return false;
    if (other) fail("%s, while thread %d %s", first, other->number, what(*other));
    fail("%s that the block does not have", first);
    return false;
}

// Which one comes i-th of `count` that take turns.
static int turn(int i, int count, int order) { return order < 0 ? count - 1 - i : (i + order) % count; }

// Until all threads of a warp wait for other warps: a warp runs ahead of the others as far as barriers let it.
static void run_warp(int first, int order) {
    const int lanes = min(WARP, num_threads - first);
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < lanes; ++i) {
            Thread& thread = threads[first + turn(i, lanes, order)];
            if (thread.state != READY) continue;
            moved = true;
            resume(thread);
            if (message[0]) return;
        }
    }
}

static void run_block(int order) {
    memset(dynamic_shared, 0xff, sizeof dynamic_shared);
#ifdef __linux__
    if (__start_block_shared) memset(__start_block_shared, 0xff, __stop_block_shared - __start_block_shared);
#endif
    for (int i = 0; i < num_threads; ++i) {
        threads[i].state = READY;
        memset(threads[i].accesses, 0, sizeof threads[i].accesses);
    }
    const int num_warps = (num_threads + WARP - 1) / WARP;
    do {
        for (int i = 0; i < num_warps && !message[0]; ++i) run_warp(turn(i, num_warps, order) * WARP, order);
        if (message[0]) return;
    } while (open_barrier());
}

template <int... I>
struct Numbers {};

template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};

template <int... I>
struct UpTo<0, I...> : Numbers<I...> {};

template <typename... Arguments, int... I>
void call(void (*function)(Arguments...), void** values, Numbers<I...>) {
    function(*static_cast<Arguments*>(values[I])...);
}

template <typename... Arguments>
void call(void (*function)(Arguments...), void** values) {
    call(function, values, UpTo<sizeof...(Arguments)>());
}

template <typename... Arguments>
constexpr int num_arguments(void (*)(Arguments...)) {
    return sizeof...(Arguments);
}

}  // namespace cpu

// --- what a kernel calls ---

#define threadIdx (cpu::current->index)
#define blockIdx cpu::block_index
#define blockDim cpu::block_size
#define gridDim cpu::grid_size

template <typename T>
T load(const T* address, int line = __builtin_LINE()) {
    cpu::note(address, sizeof(T), false, line);
    return *address;
}

template <typename T>
void store(T* address, T value, int line = __builtin_LINE()) {
    cpu::note(address, sizeof(T), true, line);
    *address = value;
}

static void __syncthreads(int line = __builtin_LINE()) { cpu::barrier(line); }

static void __syncwarp(unsigned mask = 0xffffffff, int line = __builtin_LINE()) {
    cpu::shuffle(mask, 0, cpu::current->number % cpu::WARP, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    int lane = cpu::current->number % cpu::WARP;
    return cpu::shuffle(mask, value, lane / width * width + source % width, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
    int lane = cpu::current->number % cpu::WARP, source = lane ^ distance;
    return cpu::shuffle(mask, value, source / width <= lane / width ? source : lane, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
    int lane = cpu::current->number % cpu::WARP, source = lane + distance;
    return cpu::shuffle(mask, value, source / width == lane / width ? source : lane, line);
}

static float __uint_as_float(unsigned bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static unsigned __float_as_uint(float number) {
    unsigned bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static float reciprocal_root(float x) { return 1 / sqrtf(x); }
#define rsqrtf reciprocal_root  // newer C libraries have a function of CUDA's name

static float half_to_float(unsigned short bits) {
    unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    return (sign ? -1 : 1) * ldexpf(fraction, -24);
}

static unsigned short float_to_half(float number) {
    unsigned bits = __float_as_uint(number), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;
    if (size >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (size < 0x38800000) return sign | unsigned(nearbyintf(ldexpf(__uint_as_float(size), 24)));
    return sign | ((size + 0xfff + (size >> 13 & 1)) - 0x38000000) >> 13;
}

// --- what Python calls ---

extern "C" {

// Runs a kernel over the grid. `order`: the threads of a block take turns from this one on; -1: backwards.
// Returns a message of what went wrong, empty if nothing did.
const char* emulate(
    void (*function)(void**), void** arguments, const unsigned* grid, const unsigned* block, cpu::Array* arrays,
    int num_arrays, int order, int record
) {
    cpu::kernel = function;
    cpu::kernel_arguments = arguments;
    cpu::grid_size = {grid[0], grid[1], grid[2]};
    cpu::block_size = {block[0], block[1], block[2]};
    cpu::arrays = arrays;
    cpu::num_arrays = num_arrays;
    cpu::recording = record;
    cpu::num_records = 0;
    cpu::message[0] = 0;
    cpu::make_threads();
    const unsigned num_blocks = grid[0] * grid[1] * grid[2];
    for (unsigned number = 0; number < num_blocks && !cpu::message[0]; ++number) {
        cpu::block_number = number;
        cpu::block_index = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
        cpu::run_block(order);
    }
    cpu::free_threads();
    return cpu::message;
}

const cpu::Record* recorded() { return cpu::records; }
long num_recorded() { return cpu::num_records; }
}
