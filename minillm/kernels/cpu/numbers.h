// What the other two files begin with: numbers of type SCALAR (float, double, bf16), in which the model computes.
//
// All sums are float32 (double for double); what is stored is rounded once. NaN and infinity pass through: the flags in
// __init__.py let sums be reordered, but do not promise the compiler finite numbers. Rows, or pairs of request and head,
// are shared among threads and each is computed by one alone: their number changes no bit of the result.

#if defined(_OPENMP) && !defined(__GNUC__) || defined(_OPENMP) && defined(__clang__)
#error "this compiler's threads are not those of GNU's OpenMP, which torch has loaded"
#endif

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

static real inverse_rms(const real* x, int64_t size, float eps) {
    real sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
    return 1 / sqrt(sum / size + real(eps));
}

// Numbers from which a loop over rows is shared: below, it is over before another thread has begun.
constexpr int64_t ENOUGH = 1 << 13;
