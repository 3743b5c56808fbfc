// bias + GELU (tanh form) of the rows of a matrix product, and its gradient, in one pass each.
#pragma once

#include "simd.h"

namespace fastrlhf {
namespace {

// gelu(z) = z sigmoid(2 u(z)), u(z) = sqrt(2 / pi) (z + 0.044715 z^3): z (1 + tanh(u)) / 2 without its cancellation.
struct Gelu {
  vfloat w, sigmoid;  // w: z, bounded where the sigmoid is 0 or 1, which avoids 0 * infinity

  FASTRLHF_INLINE explicit Gelu(vfloat z) : w(at_most(at_least(z, splat(-20.0f)), splat(20.0f))) {
    const vfloat twice = w * (1.5957691216f + 0.0713548162f * w * w);
    sigmoid = 1.0f / (exp_any(-twice) + 1.0f);
  }
  FASTRLHF_INLINE vfloat slope() const {
    return sigmoid + sigmoid * (1.0f - sigmoid) * (w * (1.5957691216f + 0.2140644488f * w * w));
  }
};

template <class D>
void bias_gelu_rows(const BiasGelu& a, int64_t begin, int64_t end) {
  using T = typename D::T;
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(a.x) + n * a.width;
    const auto at = [&](vfloat z) { return z * Gelu(z).sigmoid; };
    struct Row {
      const T *x, *bias;
      decltype(at) f;
      FASTRLHF_INLINE vfloat full(int64_t i) const { return f(D::load(x + i) + D::load(bias + i)); }
      FASTRLHF_INLINE vfloat part(int64_t i, int64_t k) const {
        return f(load_part<D>(x + i, k, 0.0f) + load_part<D>(bias + i, k, 0.0f));
      }
    };
    write_row<D>(static_cast<T*>(a.out) + n * a.width, a.width, Row{x, bias, at});
  }
}

template <class D>
void bias_gelu_backward_rows(const BiasGelu& a, int64_t begin, int64_t end, float* bias_grad) {
  using T = typename D::T;
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(a.x) + n * a.width;
    const T* grad = static_cast<const T*>(a.grad) + n * a.width;
    T* out = static_cast<T*>(a.out) + n * a.width;
    int64_t i = 0;
    for (; i + W <= a.width; i += W) {
      const vfloat v = D::load(grad + i) * Gelu(D::load(x + i) + D::load(bias + i)).slope();
      store_as(out + i, D::pack(v));
      store_as(bias_grad + i, load_as<vfloat>(bias_grad + i) + v);
    }
    if (const int64_t k = a.width - i) {
      const vfloat z = load_part<D>(x + i, k, 0.0f) + load_part<D>(bias + i, k, 0.0f);
      const vfloat v = load_part<D>(grad + i, k, 0.0f) * Gelu(z).slope();
      store_part<D>(out + i, k, v);
      store_part<F32>(bias_grad + i, k, load_part<F32>(bias_grad + i, k, 0.0f) + v);
    }
  }
}

void bias_gelu(const BiasGelu& a, int64_t begin, int64_t end) {
  specialize(a.dtype, 1, [&](auto format, auto) { bias_gelu_rows<decltype(format)>(a, begin, end); });
}

void bias_gelu_backward(const BiasGelu& a, int64_t begin, int64_t end, float* bias_grad) {
  specialize(a.dtype, 1,
             [&](auto format, auto) { bias_gelu_backward_rows<decltype(format)>(a, begin, end, bias_grad); });
}

}  // namespace
}  // namespace fastrlhf
