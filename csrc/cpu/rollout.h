// Before and after GAE over a rollout: the KL-shaped rewards, and the moments that whitening needs.
#pragma once

#include "../layouts.h"
#include "simd.h"

namespace fastrlhf {
namespace {

constexpr int64_t kRewardBlock = 512;

FASTRLHF_INLINE vfloat estimate_kl(Estimator estimator, vfloat d) {
  if (estimator == Estimator::k1) return d;
  if (estimator == Estimator::abs) return absolute(d);
  if (estimator == Estimator::k2) return 0.5f * d * d;
  return expm1_minus(-d, exp_any(-d));
}

// Positions [at, at + n) of a row, n <= W, from fp32 log-probs; the row's score is added later.
FASTRLHF_INLINE void reward_step(const ShapedRewards& a, const float* logprobs, const float* ref, int64_t at,
                                 int64_t n) {
  const vint here = mask_lanes(a.mask + at, n);
  const auto get = [&](const float* p) { return n == W ? load_as<vfloat>(p) : load_part<F32>(p, n, 0.0f); };
  const vfloat kl = select(here, estimate_kl(a.estimator, get(logprobs) - get(ref)), vfloat{});
  const vfloat penalty = at_most(at_least(kl, splat(-a.clip)), splat(a.clip));
  store_part<F32>(a.kl + at, n, kl);
  store_part<F32>(a.rewards + at, n, select(here, -a.kl_coef * penalty, vfloat{}));
}

void shaped_rewards(const ShapedRewards& a, int64_t begin, int64_t end) {
  float scratch[2][kRewardBlock], score;
  for (int64_t row = begin; row < end; ++row) {
    int64_t last = -1;
    for (int64_t from = 0; from < a.length; from += kRewardBlock) {
      const int64_t size = a.length - from < kRewardBlock ? a.length - from : kRewardBlock;
      const int64_t base = row * a.length + from;
      const float* logprobs = as_floats(a.logprobs, base, size, scratch[0]);
      const float* ref = as_floats(a.ref_logprobs, base, size, scratch[1]);
      int64_t i = 0;
      for (; i + W <= size; i += W) reward_step(a, logprobs + i, ref + i, base + i, W);
      if (i < size) reward_step(a, logprobs + i, ref + i, base + i, size - i);
    }
    for (int64_t t = a.length - 1; t >= 0 && last < 0; --t)
      if (a.mask[row * a.length + t]) last = row * a.length + t;
    if (last >= 0) a.rewards[last] += *as_floats(a.scores, row, 1, &score);
  }
}

void moments(const Moments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.advantages + row * a.length;
    const bool* mask = a.mask + row * a.length;
    double count = 0, sum = 0, spread = 0;
    for (int64_t t = 0; t < a.length; ++t) {
      count += mask[t];
      sum += mask[t] ? x[t] : 0.0f;
    }
    const double mean = count > 0 ? sum / count : 0.0;
    for (int64_t t = 0; t < a.length; ++t) spread += mask[t] ? (x[t] - mean) * (x[t] - mean) : 0.0;
    a.out[row * Moment::size + Moment::count] = static_cast<float>(count);
    a.out[row * Moment::size + Moment::mean] = static_cast<float>(mean);
    a.out[row * Moment::size + Moment::squared_deviations] = static_cast<float>(spread);
  }
}

}  // namespace
}  // namespace fastrlhf
