// Softmax statistics of a row in one pass over memory, and the gradient of log-prob, entropy and log-sum-exp.
#pragma once

#include "simd.h"

namespace fastrlhf {
namespace {

// Columns taken at a time: small enough to stay in the first cache between the two loops over it, large enough that
// moving its sums into double costs little. fp32 sums never grow longer than kBlock / (kUnroll * W) terms.
template <class D>
constexpr int64_t kBlock = sizeof(typename D::T) == 4 ? 1024 : 4096;

// Columns to fetch ahead of a gradient: 1 KB. Hardware stops at the end of a page.
template <class D>
constexpr int64_t kAhead = 1024 / sizeof(typename D::T);

// sum_j e_j and sum_j e_j (x_j - top) / T with e_j = exp((x_j - top) / T), over the columns seen so far.
struct Softmax {
  float top = -kInf;
  double sum = 0, weighted = 0;

  float shift() const { return top == -kInf ? 0.0f : top; }

  // Move the sums to a new maximum; true when it rose.
  bool raise(float block_top, double temperature, double* scale) {
    if (!(block_top > top)) return false;
    const double gap = (static_cast<double>(top) - block_top) / temperature;
    *scale = sum == 0 ? 0.0 : __builtin_exp(gap);
    weighted = *scale == 0 ? 0.0 : *scale * (weighted + gap * sum);
    sum *= *scale;
    top = block_top;
    return true;
  }
};

// cap * tanh(x / cap), and its derivative given the tanh.
struct Softcap {
  float cap, inverse;

  explicit Softcap(double c) : cap(static_cast<float>(c)), inverse(c > 0 ? static_cast<float>(1 / c) : 0.0f) {}

  FASTRLHF_INLINE vfloat tanh(vfloat x) const {
    const vfloat z = x * inverse, magnitude = absolute(z), e = exp_any(-2.0f * magnitude), square = z * z;
    const vfloat large = (1.0f - e) / (e + 1.0f), sign = bits<vfloat>(bits<vint>(z) & static_cast<int32_t>(0x80000000));
    // where 1 - e would cancel: the series, of relative error 6e-9 at its end
    const vfloat series = z + z * square * ((splat(-0.0539682540f) * square + 0.1333333333f) * square - 0.3333333333f);
    return select(magnitude < 0.15f, series, bits<vfloat>(bits<vint>(large) | bits<vint>(sign)));
  }
  FASTRLHF_INLINE vfloat of(vfloat x) const { return cap * tanh(x); }
  static FASTRLHF_INLINE vfloat slope(vfloat t) { return (1.0f - t) * (t + 1.0f); }
};

template <class D>
void capped_block(const typename D::T* x, int64_t n, const Softcap& softcap, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store_as(out + i, softcap.of(D::load(x + i)));
  if (i < n) store_part<F32>(out + i, n - i, softcap.of(load_part<D>(x + i, n - i, 0.0f)));
}

template <class D>
FASTRLHF_INLINE float block_max(const typename D::T* x, int64_t n) {
  vfloat top[kUnroll];
  for (auto& t : top) t = splat(-kInf);
  int64_t i = 0;
  for (; i + kUnroll * W <= n; i += kUnroll * W)
    for (int k = 0; k < kUnroll; ++k) top[k] = at_least(top[k], D::load(x + i + k * W));
  for (; i + W <= n; i += W) top[0] = at_least(top[0], D::load(x + i));
  if (i < n) top[0] = at_least(top[0], load_part<D>(x + i, n - i, -kInf));
  return max_of(at_least(at_least(top[0], top[1]), at_least(top[2], top[3])));
}

template <class D, class Temp>
void block_sums(const typename D::T* x, int64_t n, const Temp& temperature, Softmax* row) {
  const vfloat shift = splat(row->shift());
  vfloat sum[kUnroll] = {}, weighted[kUnroll] = {};
  const auto add = [&](vfloat v, int k) {
    const vfloat u = temperature.divide_clamped(v - shift), e = exp_nonpositive(u);
    sum[k] += e;
    weighted[k] += e * u;
  };
  int64_t i = 0;
  for (; i + kUnroll * W <= n; i += kUnroll * W)
    for (int k = 0; k < kUnroll; ++k) {
      prefetch(x + i + k * W + kBlock<D>);  // the next block is fetched while this one is computed
      add(D::load(x + i + k * W), k);
    }
  for (; i + W <= n; i += W) add(D::load(x + i), 0);
  if (i < n) add(load_part<D>(x + i, n - i, -kInf), 1);
  for (int k = 0; k < kUnroll; ++k) {
    row->sum += sum_of(sum[k]);
    row->weighted += sum_of(weighted[k]);
  }
}

// The label's column in this shard, or -1.
FASTRLHF_INLINE int64_t local_label(int64_t label, int64_t vocab_start, int64_t columns) {
  const uint64_t local = static_cast<uint64_t>(label) - static_cast<uint64_t>(vocab_start);  // may wrap; then too large
  return local < static_cast<uint64_t>(columns) ? static_cast<int64_t>(local) : -1;
}

void logprob_statistics(const LogprobStatistics& a, int64_t begin, int64_t end) {
  const Softcap softcap(a.softcap);
  specialize(a.dtype, a.temperature, [&](auto format, auto temperature) {
    using D = decltype(format);
    float capped[kBlock<D>];
    for (int64_t n = begin; n < end; ++n) {
      if (a.mask && !a.mask[n]) {  // never read: any finite numbers will do, since the results are masked
        a.row_max[n] = a.weighted[n] = a.target[n] = 0.0f;
        a.row_sum[n] = 1.0f;
        continue;
      }
      const typename D::T* x = row_of<D>(a.rows, n);
      Softmax row;
      double scale;
      for (int64_t at = 0; at < a.columns; at += kBlock<D>) {
        const int64_t size = a.columns - at < kBlock<D> ? a.columns - at : kBlock<D>;
        if (a.softcap > 0) {
          capped_block<D>(x + at, size, softcap, capped);
          row.raise(block_max<F32>(capped, size), a.temperature, &scale);
          block_sums<F32>(capped, size, temperature, &row);
          continue;
        }
        row.raise(block_max<D>(x + at, size), a.temperature, &scale);
        block_sums<D>(x + at, size, temperature, &row);
      }
      const int64_t label = local_label(a.labels[n], a.vocab_start, a.columns);
      a.row_max[n] = row.sum == row.sum ? row.top : __builtin_nanf("");  // the maxima skip NaN, the sum does not
      a.row_sum[n] = static_cast<float>(row.sum);
      a.weighted[n] = static_cast<float>(row.weighted);
      a.target[n] = label < 0 ? -kInf : load_one<D>(x + label);
      if (label >= 0 && a.softcap > 0) a.target[n] = softcap.of(splat(a.target[n]))[0];
    }
  });
}

// d/dx_j = e_j (at_p + at_entropy (x_j - M) / T), except at the label.
template <class D, class Temp, bool kEntropy, bool kCapped>
struct LogprobGradient {
  const typename D::T* x;
  vfloat shift, at_p, at_entropy;
  Temp temperature;
  Softcap softcap;

  FASTRLHF_INLINE vfloat of(vfloat v) const {
    const vfloat t = kCapped ? softcap.tanh(v) : v;
    const vfloat u = temperature.divide_clamped((kCapped ? softcap.cap * t : v) - shift), e = exp_nonpositive(u);
    const vfloat d = kEntropy ? e * (at_entropy * u + at_p) : e * at_p;
    return kCapped ? d * Softcap::slope(t) : d;
  }
  FASTRLHF_INLINE vfloat full(int64_t i) const {
    prefetch(x + i + kAhead<D>);
    return of(D::load(x + i));
  }
  FASTRLHF_INLINE vfloat part(int64_t i, int64_t n) const { return of(load_part<D>(x + i, n, -kInf)); }
};

template <class D, class Temp>
void logprob_gradient_row(const LogprobBackward& a, const Temp& temperature, int64_t n) {
  const typename D::T* x = row_of<D>(a.rows, n);
  typename D::T* out = row_of<D>(a.out, n);
  const Softcap softcap(a.softcap);
  const double log_sum = __builtin_log(static_cast<double>(a.row_sum[n])), shift = a.row_max[n];
  const double to_label = a.grad_logprobs ? a.grad_logprobs[n] : 0.0;
  const double to_entropy = a.grad_entropy ? a.grad_entropy[n] : 0.0;
  const double to_p = (a.grad_logsumexp ? a.grad_logsumexp[n] : 0.0) - to_label;
  const double offset = a.grad_entropy ? a.entropy[n] - log_sum : 0.0;  // log p_j + H = (x_j - M) / T + offset
  const double norm = 1 / (a.row_sum[n] * a.temperature);

  // The label's gradient is a difference, 1 - p: it is computed separately, in double. Read first: `out` may be `x`.
  const int64_t label = local_label(a.labels[n], a.vocab_start, a.columns);
  double at_label = 0;
  if (label >= 0) {
    const float t = a.softcap > 0 ? softcap.tanh(splat(load_one<D>(x + label)))[0] : 0.0f;
    const float value = a.softcap > 0 ? softcap.cap * t : load_one<D>(x + label);
    const double u = (value - shift) / a.temperature, e = __builtin_exp(u);
    const double entropy_term = e == 0 ? 0.0 : e * (u + offset) * to_entropy;
    at_label = to_label / a.temperature + (e * to_p - entropy_term) * norm;
    if (a.softcap > 0) at_label *= (1.0 - t) * (1.0 + t);
  }
  const vfloat at_p = splat(static_cast<float>((to_p - to_entropy * offset) * norm));
  const vfloat at_entropy = splat(static_cast<float>(-to_entropy * norm));
  const vfloat top = splat(a.row_max[n]);
  if (a.softcap > 0)  // rarely used: one form serves both
    write_row<D>(out, a.columns, LogprobGradient<D, Temp, true, true>{x, top, at_p, at_entropy, temperature, softcap});
  else if (a.grad_entropy)
    write_row<D>(out, a.columns, LogprobGradient<D, Temp, true, false>{x, top, at_p, at_entropy, temperature, softcap});
  else
    write_row<D>(out, a.columns,
                 LogprobGradient<D, Temp, false, false>{x, top, at_p, at_entropy, temperature, softcap});
  if (label >= 0) store_part<D>(out + label, 1, splat(static_cast<float>(at_label)));
  clear<D>(out + a.columns, a.width - a.columns);
}

void logprob_backward(const LogprobBackward& a, int64_t begin, int64_t end) {
  specialize(a.dtype, a.temperature, [&](auto format, auto temperature) {
    using D = decltype(format);
    for (int64_t n = begin; n < end; ++n) {
      if (a.mask && !a.mask[n])
        clear<D>(row_of<D>(a.out, n), a.width);
      else
        logprob_gradient_row<D>(a, temperature, n);
    }
  });
}

}  // namespace
}  // namespace fastrlhf
