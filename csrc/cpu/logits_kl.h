// KL(p || q) of two rows of logits x and y in one pass over both, and its gradients.
#pragma once

#include "logprob.h"

namespace fastrlhf {
namespace {

// Adds exp((x - max x) / T), the same of y, and exp((x - max x) / T) (x - y) of one block to the running sums.
template <class D, class Temp>
void kl_block(const typename D::T* x, const typename D::T* y, int64_t n, const Temp& temperature, Softmax* p,
              Softmax* q, double* cross) {
  const vfloat shift_x = splat(p->shift()), shift_y = splat(q->shift());
  vfloat sum_x[2] = {}, sum_y[2] = {}, sum_cross[2] = {};
  const auto add = [&](vfloat vx, vfloat vy, int k) {
    const vfloat dx = vx - shift_x, dy = vy - shift_y;
    const vfloat e = exp_nonpositive(temperature.divide_clamped(dx));
    sum_x[k] += e;
    sum_y[k] += exp_nonpositive(temperature.divide_clamped(dy));
    sum_cross[k] += select(e == 0.0f, vfloat{}, e * (dx - dy));  // where p is 0, whatever q is
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W)
    for (int k = 0; k < 2; ++k) {
      prefetch(x + i + k * W + kBlock<D>);
      prefetch(y + i + k * W + kBlock<D>);
      add(D::load(x + i + k * W), D::load(y + i + k * W), k);
    }
  for (; i < n; i += W) {
    const int64_t left = n - i < W ? n - i : W;
    if (left == W)
      add(D::load(x + i), D::load(y + i), 0);
    else
      add(load_part<D>(x + i, left, -kInf), load_part<D>(y + i, left, -kInf), 1);
  }
  const double sum = sum_of(sum_x[0]) + sum_of(sum_x[1]);
  p->sum += sum;
  q->sum += sum_of(sum_y[0]) + sum_of(sum_y[1]);
  // The rows' maxima may be far apart: their difference is added here, in double, not to every x - y, in fp32.
  *cross += sum_of(sum_cross[0]) + sum_of(sum_cross[1]) + (static_cast<double>(p->shift()) - q->shift()) * sum;
}

template <class D, class Temp>
void kl_statistics_row(const KlStatistics& a, const Temp& temperature, int64_t n) {
  const typename D::T *x = row_of<D>(a.rows, n), *y = row_of<D>(a.ref, n);
  Softmax p, q;
  double cross = 0, scale;
  for (int64_t at = 0; at < a.columns; at += kBlock<D>) {
    const int64_t size = a.columns - at < kBlock<D> ? a.columns - at : kBlock<D>;
    if (p.raise(block_max<D>(x + at, size), a.temperature, &scale)) cross = scale == 0 ? 0.0 : cross * scale;
    q.raise(block_max<D>(y + at, size), a.temperature, &scale);
    kl_block<D>(x + at, y + at, size, temperature, &p, &q, &cross);
  }
  const float nan = __builtin_nanf("");
  a.max_x[n] = p.sum == p.sum ? p.top : nan;
  a.sum_x[n] = static_cast<float>(p.sum);
  a.max_y[n] = q.sum == q.sum ? q.top : nan;
  a.sum_y[n] = static_cast<float>(q.sum);
  a.cross[n] = static_cast<float>(cross / a.temperature);
}

void kl_statistics(const KlStatistics& a, int64_t begin, int64_t end) {
  specialize(a.dtype, a.temperature, [&](auto format, auto temperature) {
    using D = decltype(format);
    for (int64_t n = begin; n < end; ++n) {
      if (!a.mask || a.mask[n]) {
        kl_statistics_row<D>(a, temperature, n);
        continue;
      }
      a.max_x[n] = a.max_y[n] = a.cross[n] = 0.0f;
      a.sum_x[n] = a.sum_y[n] = 1.0f;
    }
  });
}

// d/dx_j = e_j ((x_j - max x - y_j + max y) / T + offset) scale_x
template <class D, class Temp>
struct KlGradient {
  const typename D::T *x, *y;
  vfloat max_x, max_y, offset, scale_x;
  Temp temperature;

  FASTRLHF_INLINE vfloat of(vfloat vx, vfloat vy) const {
    const vfloat w = temperature.divide_any(vy - max_y);
    const vfloat u = temperature.divide_clamped(vx - max_x), e = exp_nonpositive(u);
    return select(e == 0.0f, vfloat{}, e * (u - w + offset) * scale_x);
  }
  FASTRLHF_INLINE vfloat full(int64_t i) const {
    prefetch(x + i + kAhead<D>);
    prefetch(y + i + kAhead<D>);
    return of(D::load(x + i), D::load(y + i));
  }
  FASTRLHF_INLINE vfloat part(int64_t i, int64_t n) const {
    return of(load_part<D>(x + i, n, -kInf), load_part<D>(y + i, n, -kInf));
  }
};

// d/dy_j = f_j scale_y - e_j scale_x
template <class D, class Temp>
struct KlRefGradient {
  const typename D::T *x, *y;
  vfloat max_x, max_y, scale_x, scale_y;
  Temp temperature;

  FASTRLHF_INLINE vfloat of(vfloat vx, vfloat vy) const {
    const vfloat e = exp_nonpositive(temperature.divide_clamped(vx - max_x));
    const vfloat f = exp_nonpositive(temperature.divide_clamped(vy - max_y));
    return f * scale_y - e * scale_x;
  }
  FASTRLHF_INLINE vfloat full(int64_t i) const {
    prefetch(x + i + kAhead<D>);
    prefetch(y + i + kAhead<D>);
    return of(D::load(x + i), D::load(y + i));
  }
  FASTRLHF_INLINE vfloat part(int64_t i, int64_t n) const {
    return of(load_part<D>(x + i, n, -kInf), load_part<D>(y + i, n, -kInf));
  }
};

template <class D, class Temp>
void kl_gradient_row(const KlBackward& a, const Temp& temperature, int64_t n) {
  const typename D::T *x = row_of<D>(a.rows, n), *y = row_of<D>(a.ref, n);
  const double g = a.grad[n] / a.temperature, sum_x = a.sum_x[n], sum_y = a.sum_y[n];
  const vfloat max_x = splat(a.max_x[n]), max_y = splat(a.max_y[n]);
  const vfloat scale_x = splat(static_cast<float>(g / sum_x)), scale_y = splat(static_cast<float>(g / sum_y));
  if (a.out.data) {
    const double offset = __builtin_log(sum_y) - __builtin_log(sum_x) - a.kl[n];
    typename D::T* out = row_of<D>(a.out, n);
    const KlGradient<D, Temp> gradient{x, y, max_x, max_y, splat(static_cast<float>(offset)), scale_x, temperature};
    write_row<D>(out, a.columns, gradient);
    clear<D>(out + a.columns, a.width - a.columns);
  }
  if (a.ref_out.data) {
    typename D::T* out = row_of<D>(a.ref_out, n);
    write_row<D>(out, a.columns, KlRefGradient<D, Temp>{x, y, max_x, max_y, scale_x, scale_y, temperature});
    clear<D>(out + a.columns, a.width - a.columns);
  }
}

void kl_backward(const KlBackward& a, int64_t begin, int64_t end) {
  specialize(a.dtype, a.temperature, [&](auto format, auto temperature) {
    using D = decltype(format);
    for (int64_t n = begin; n < end; ++n) {
      if (!a.mask || a.mask[n]) {
        kl_gradient_row<D>(a, temperature, n);
        continue;
      }
      if (a.out.data) clear<D>(row_of<D>(a.out, n), a.width);
      if (a.ref_out.data) clear<D>(row_of<D>(a.ref_out, n), a.width);
    }
  });
}

}  // namespace
}  // namespace fastrlhf
