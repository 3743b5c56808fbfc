// Vectors of floats in the compiler's vector types, and the operations that the kernels use.
//
// One source serves every instruction set: the width follows the flags the file is compiled with. Nothing here has
// external linkage and no standard header with inline functions is included: the linker keeps one copy of such a
// function, and it could be the AVX-512 one, on a machine without AVX-512.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
#include <immintrin.h>
#endif

namespace fastrlhf {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * W)));
typedef int32_t vint __attribute__((vector_size(4 * W)));
typedef uint32_t vuint __attribute__((vector_size(4 * W)));
typedef uint16_t vhalf __attribute__((vector_size(2 * W)));
typedef int8_t vbyte __attribute__((vector_size(W)));

#define FASTRLHF_INLINE inline __attribute__((always_inline))

constexpr float kInf = __builtin_inff();
constexpr int kUnroll = 4;  // independent accumulators: enough to hide the latency of an addition

FASTRLHF_INLINE vfloat splat(float x) { return x - vfloat{}; }

template <class V, class T>
FASTRLHF_INLINE V load_as(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
FASTRLHF_INLINE void store_as(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <class To, class From>
FASTRLHF_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  __builtin_memcpy(&to, &v, sizeof(To));
  return to;
}

FASTRLHF_INLINE vfloat select(vint mask, vfloat a, vfloat b) { return mask ? a : b; }
// Lane j is lane from[j] of the concatenation of a and b.
FASTRLHF_INLINE vfloat shuffled(vfloat a, vfloat b, vint from) {
#if defined(__clang__)  // which has no shuffle by a vector, and makes one of this when `from` is constant
  vfloat v;
  for (int j = 0; j < W; ++j) v[j] = from[j] < W ? a[from[j]] : b[from[j] - W];
  return v;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// When `a` is NaN so is the result: the order of operands is that of the hardware's instructions.
FASTRLHF_INLINE vfloat at_least(vfloat a, vfloat low) { return a < low ? low : a; }
FASTRLHF_INLINE vfloat at_most(vfloat a, vfloat high) { return a > high ? high : a; }
FASTRLHF_INLINE vfloat absolute(vfloat a) { return bits<vfloat>(bits<vint>(a) & 0x7fffffff); }

FASTRLHF_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

FASTRLHF_INLINE double sum_of(vfloat v) {
  float lane[W];
  store_as(lane, v);
  double sum = 0;
  for (int i = 0; i < W; ++i) sum += lane[i];
  return sum;
}

FASTRLHF_INLINE float max_of(vfloat v) {
  float lane[W];
  store_as(lane, v);
  float top = lane[0];
  for (int i = 1; i < W; ++i) top = lane[i] > top ? lane[i] : top;
  return top;
}

// --- exponentials and logarithms: coefficients are minimax fits, of relative error below 4e-9 before rounding --------

// (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2
FASTRLHF_INLINE vfloat exp_tail(vfloat r) {
  vfloat q = splat(0.0013814320f) * r + 0.0083688507f;
  q = q * r + 0.0416684002f;
  q = q * r + 0.1666651964f;
  return q * r + 0.4999999404f;
}

// exp(x) = m * 2^n: returns m, and in `power` the bits of 2^(n - 127 + kBias).
// Taking log(2) as one float shifts x by n * 2e-9. A term of a softmax that is 2^-n of the largest is off by that much,
// relatively, so their sum by less than log2(V) * 2e-9: below the rounding of the sum itself.
template <int kBias>
FASTRLHF_INLINE vfloat exp_mantissa(vfloat x, vfloat* power) {
  // Adding 1.5 * 2^23 rounds to an integer, left in the low bits of the sum: shifted up they are the exponent of 2^n.
  constexpr float kShift = 12582912.0f + kBias;
  const vfloat shifted = x * 1.44269504f + kShift;
  const vfloat r = x - (shifted - kShift) * 0.69314718f;
  *power = bits<vfloat>(bits<vint>(shifted) << 23);
  return (exp_tail(r) * r + 1.0f) * r + 1.0f;
}

constexpr float kExpLowest = -88.0f;

// exp(x) for x in [kExpLowest, 0]; exactly 0 below 2^-126, so kExpLowest itself gives 0. NaN stays NaN.
FASTRLHF_INLINE vfloat exp_nonpositive(vfloat x) {
  vfloat power;
  const vfloat m = exp_mantissa<127>(x, &power);
  return m * power;
}

// exp(x) for any x; results below 2^-125 are 0.
FASTRLHF_INLINE vfloat exp_any(vfloat x) {
  vfloat power;
  const vfloat m = exp_mantissa<126>(at_most(at_least(x, splat(-87.3f)), splat(89.0f)), &power);
  return m * power * 2.0f;  // in two steps, since 2^128 is not a float
}

// log(1 + t) for t in [0, 1], accurate however small t is: 2 atanh(s), s = t / (2 + t).
FASTRLHF_INLINE vfloat log1p_unit(vfloat t) {
  const vfloat s = t / (t + 2.0f), z = s * s;
  vfloat q = splat(0.1215046662f) * z + 0.1071382920f;
  q = q * z + 0.1430844236f;
  q = q * z + 0.1999943887f;
  q = q * z + 0.3333333781f;
  return 2.0f * (s + s * z * q);
}

// exp(x) - 1 - x, given e = exp(x), without cancellation near 0.
FASTRLHF_INLINE vfloat expm1_minus(vfloat x, vfloat e) {
  vfloat q = splat(2.4841680e-5f) * x + 1.9961957e-4f;
  q = q * x + 1.3889040e-3f;
  q = q * x + 8.3331828e-3f;
  q = q * x + 4.1666664e-2f;
  q = q * x + 1.6666667e-1f;
  q = q * x + 0.5f;
  return select(absolute(x) <= 0.5f, q * x * x, (e - 1.0f) - x);
}

// --- storage formats ------------------------------------------------------------------------------------------------

// 16 bits to 32 and back, zeros above. Compilers do not find the instructions for __builtin_convertvector.
FASTRLHF_INLINE vuint widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return bits<vuint>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bits<vuint>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_as<vhalf>(p), vuint);
#endif
}

FASTRLHF_INLINE vhalf narrow(vuint v) {
#if defined(__AVX512F__)
  return bits<vhalf>(_mm512_cvtepi32_epi16(bits<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bits<__m256i>(v), bits<__m256i>(v));  // within each half of the register
  return bits<vhalf>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(v, vhalf);
#endif
}

FASTRLHF_INLINE vfloat from_half_bits(vuint h) {
  const vuint magnitude = (h & 0x7fff) << 13;
  const vuint normal = magnitude + (112u << 23);  // the exponents' biases differ by 112
  const vuint special = normal | 0x7f800000u;     // infinity and NaN
  // Subnormals: made normal by a leading bit, which is then subtracted; never a subnormal operand, which is slow.
  const vuint small = bits<vuint>(bits<vfloat>(normal + (1u << 23)) - 0x1p-14f);
  vuint f = bits<vint>(magnitude) < 0x00800000 ? small : normal;
  f = bits<vint>(magnitude) >= 0x0f800000 ? special : f;
  return bits<vfloat>(f | (h & 0x8000) << 16);
}

FASTRLHF_INLINE vuint to_half_bits(vfloat v) {
  const vuint all = bits<vuint>(v), sign = (all >> 16) & 0x8000, f = all & 0x7fffffff;
  const vuint normal = (f + (0xc8000fffu + ((f >> 13) & 1))) >> 13;  // exponent - 112, rounded to nearest even
  // Below 2^-14: adding 0.5 leaves the value, rounded to multiples of 2^-24, in the low bits.
  const vuint small = bits<vuint>(bits<vfloat>(f) + 0.5f) - 0x3f000000u;
  vuint h = bits<vint>(f) < 0x38800000 ? small : normal;
  h = bits<vint>(f) >= 0x477ff000 ? vuint{} + 0x7c00u : h;  // 65520 and above: infinity
  h = bits<vint>(f) > 0x7f800000 ? vuint{} + 0x7e00u : h;
  return h | sign;
}

struct F32 {
  using T = float;
  static FASTRLHF_INLINE vfloat load(const float* p) { return load_as<vfloat>(p); }
  static FASTRLHF_INLINE vfloat pack(vfloat v) { return v; }
};

struct BF16 {
  using T = uint16_t;
  static FASTRLHF_INLINE vfloat load(const uint16_t* p) { return bits<vfloat>(widen(p) << 16); }
  static FASTRLHF_INLINE vhalf pack(vfloat v) {
#if defined(__AVX512BF16__)
    return bits<vhalf>(
        _mm512_cvtneps_pbh(bits<__m512>(v)));  // one instruction instead of nine; flushes subnormals to 0
#endif
    const vuint f = bits<vuint>(v);
    const vuint rounded = (f + (0x7fffu + ((f >> 16) & 1))) >> 16;
    return narrow(v != v ? vuint{} + 0x7fc0u : rounded);
  }
};

struct F16 {
  using T = uint16_t;
#if defined(__AVX512F__)
  static FASTRLHF_INLINE vfloat load(const uint16_t* p) {
    return bits<vfloat>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static FASTRLHF_INLINE vhalf pack(vfloat v) {
    return bits<vhalf>(_mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__) && defined(__F16C__)
  static FASTRLHF_INLINE vfloat load(const uint16_t* p) {
    return bits<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static FASTRLHF_INLINE vhalf pack(vfloat v) {
    return bits<vhalf>(_mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static FASTRLHF_INLINE vfloat load(const uint16_t* p) { return from_half_bits(widen(p)); }
  static FASTRLHF_INLINE vhalf pack(vfloat v) { return narrow(to_half_bits(v)); }
#endif
};

// The first `n` < W elements; the other lanes hold `fill`.
template <class D>
FASTRLHF_INLINE vfloat load_part(const typename D::T* p, int64_t n, float fill) {
  typename D::T lane[W] = {};
  __builtin_memcpy(lane, p, n * sizeof(lane[0]));
  vfloat v = D::load(lane);
  for (int i = 0; i < W; ++i) v[i] = i < n ? v[i] : fill;
  return v;
}

template <class D>
FASTRLHF_INLINE void store_part(typename D::T* p, int64_t n, vfloat v) {
  const auto packed = D::pack(v);
  __builtin_memcpy(p, &packed, n * sizeof(*p));
}

template <class D>
FASTRLHF_INLINE float load_one(const typename D::T* p) {
  return load_part<D>(p, 1, 0.0f)[0];
}

// The first n <= W values of a bool tensor as a vector mask; false in the lanes past them.
FASTRLHF_INLINE vint mask_lanes(const bool* mask, int64_t n) {
  int8_t here[W] = {};
  __builtin_memcpy(here, mask, n);
#if defined(__AVX512F__)  // compilers convert bytes one by one
  return bits<vint>(_mm512_cvtepi8_epi32(load_as<__m128i>(here))) != 0;
#elif defined(__AVX2__) && defined(__F16C__)
  return bits<vint>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(here)))) != 0;
#else
  return __builtin_convertvector(load_as<vbyte>(here), vint) != 0;
#endif
}

// out[i] = f at i, for i in [0, n): `f.full(i)` returns W values from i on, `f.part(i, k)` the k < W from i on.
template <class D, class F>
FASTRLHF_INLINE void write_row(typename D::T* out, int64_t n, const F& f) {
  // Each vector is a long chain of operations; AVX2's sixteen registers hold the constants and one such chain.
  constexpr int kFlight = W == 16 ? 4 : 1;
  decltype(D::pack(vfloat{})) packed[kFlight];
  int64_t i = 0;
  for (; i + kFlight * W <= n; i += kFlight * W) {
    for (int k = 0; k < kFlight; ++k) packed[k] = D::pack(f.full(i + k * W));
    for (int k = 0; k < kFlight; ++k) store_as(out + i + k * W, packed[k]);
  }
  for (; i + W <= n; i += W) store_as(out + i, D::pack(f.full(i)));
  if (i < n) store_part<D>(out + i, n - i, f.part(i, n - i));
}

template <class D>
FASTRLHF_INLINE typename D::T* row_of(const Rows& rows, int64_t n) {
  const int64_t offset = n / rows.length * rows.stride_b + n % rows.length * rows.stride_l;
  return static_cast<typename D::T*>(rows.data) + offset;
}

template <class D>
inline void clear(typename D::T* p, int64_t n) {
  __builtin_memset(p, 0, n * sizeof(*p));  // 0.0 is all zero bits in every format
}

// Elements [begin, begin + n) as fp32: a pointer into x if it is fp32, otherwise converted into `scratch`.
inline const float* as_floats(const Floats& x, int64_t begin, int64_t n, float* scratch) {
  if (x.dtype == DType::f32) return static_cast<const float*>(x.data) + begin;
  if (x.dtype == DType::f64) {
    const double* from = static_cast<const double*>(x.data) + begin;
    for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<float>(from[i]);
    return scratch;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + begin;
  const bool brain = x.dtype == DType::bf16;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_as(scratch + i, brain ? BF16::load(from + i) : F16::load(from + i));
  for (; i < n; ++i) scratch[i] = brain ? load_one<BF16>(from + i) : load_one<F16>(from + i);
  return scratch;
}

// Computes d / T for d = x - max. kUnit: T is 1, the usual case, which saves two of about twenty instructions.
template <bool kUnit>
struct Temperature {
  float high = 1, low = 0;    // 1 / T in two parts, so that the product is as exact as the division
  float lowest = kExpLowest;  // clamps d where the exponential has vanished, so that 0 times it is 0 and not NaN

  explicit Temperature(double t) {
    if (kUnit) return;
    high = static_cast<float>(1 / t);
    low = static_cast<float>(1 / t - high);
    lowest = static_cast<float>(kExpLowest * t);
  }
  // d not below `lowest`
  FASTRLHF_INLINE vfloat divide(vfloat d) const { return kUnit ? d : d * high + d * low; }
  FASTRLHF_INLINE vfloat divide_clamped(vfloat d) const { return divide(at_least(d, splat(lowest))); }
  // d may be -inf, and stays that
  FASTRLHF_INLINE vfloat divide_any(vfloat d) const { return kUnit ? d : d * high + at_least(d, splat(-1e30f)) * low; }
};

// Call f with the storage format and the temperature as template types.
template <class F>
FASTRLHF_INLINE void specialize(DType dtype, double temperature, const F& f) {
  const auto with = [&](auto format) {
    if (temperature == 1)
      f(format, Temperature<true>(1));
    else
      f(format, Temperature<false>(temperature));
  };
  if (dtype == DType::f32) return with(F32{});
  if (dtype == DType::bf16) return with(BF16{});
  with(F16{});
}

}  // namespace
}  // namespace fastrlhf
