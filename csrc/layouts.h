// The rows of the small tensors that kernels return, by name. fastrlhf/ops/layouts.py is the source and says what each
// holds; tests/csrc/test_layouts.py compares the two.
#pragma once

#include <cstdint>

namespace fastrlhf {

struct SoftmaxStatistic {
  enum : int64_t { row_max, row_sum, weighted, target, size };
};

struct KLStatistic {
  enum : int64_t { row_max, row_sum, ref_max, ref_sum, cross, size };
};

struct Moment {
  enum : int64_t { count, mean, squared_deviations, size };
};

struct PPOMetric {
  enum : int64_t {
    loss,
    policy_loss,
    value_loss,
    entropy,
    clip_fraction,
    value_clip_fraction,
    approx_kl,
    ratio_mean,
    ratio_max,
    kl,
    grad_scale,
    size
  };
};

struct RankingMetric {
  enum : int64_t { loss, accuracy, pairs, margin, grad_scale, size };
};

}  // namespace fastrlhf
