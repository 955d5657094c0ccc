// Vectors of LANES floats, as many as a register of the instruction set holds, by GCC's extensions.

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias));

INLINE Vec splat(float x) { return x - Vec{}; }

// e^x for x <= 0, to 1 ulp where there are fused multiply-adds: 2^n * p(r), with r at most half of
// log(2); p fitted for the least relative error.
INLINE Vec exp_negative(Vec x) {
    x = x < splat(-87.f) ? splat(-87.f) : x;
    // Numbers of this size have no fraction: the sum is rounded, and its bits end with those of
    // n + 127, the exponent of 2^n.
    const float magic = 0x1.8p23f + 127;
    const Vec rounded = x * 1.44269504f + magic;
    const Vec n = rounded - magic;
    const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.3814221635e-3f);
    p = p * r + 8.3688988724e-3f;
    p = p * r + 4.1668405739e-2f;
    p = p * r + 1.6666519128e-1f;
    p = p * r + 4.9999993346e-1f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    IntVec bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits <<= 23;
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
