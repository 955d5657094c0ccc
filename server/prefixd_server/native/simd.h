// Vectors of LANES floats, as many as a register of the instruction set holds, by GCC's extensions.

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

INLINE Vec splat(float x) { return x - Vec{}; }

// e^x for x <= 0, to 2 ulp: 2^n * p(r), Cephes' polynomial.
INLINE Vec exp_negative(Vec x) {
    x = x < splat(-87.f) ? splat(-87.f) : x;
    IntVec n = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    IntVec bits = (n + 127) << 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

INLINE float sum_of(Vec x) {
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float most_of(Vec x) {
    float most = NEVER;
    for (int i = 0; i < LANES; i++) most = std::max(most, ((float*)&x)[i]);
    return most;
}

}  // namespace
