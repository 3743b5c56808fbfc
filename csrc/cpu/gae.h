// Generalised advantage estimation, backwards along each row.
#pragma once

#include "simd.h"

namespace fastrlhf {
namespace {

constexpr int64_t kGaeBlock = 512;  // positions converted to fp32 at a time
constexpr int kGaeRows = 4;         // rows walked together: each waits on its own chain of additions

// One position of one row. Masks come in long runs, so the branch is predicted and the chain is one multiply-add.
FASTRLHF_INLINE void gae_step(float reward, float value, bool here, float gamma, float gamma_lam, float* next_value,
                              float* next_advantage, float* advantage, float* target) {
  if (!here) {
    *advantage = *target = 0.0f;
    return;
  }
  const float a = (reward + gamma * *next_value - value) + gamma_lam * *next_advantage;
  *advantage = a;
  *target = a + value;
  *next_advantage = a;
  *next_value = value;
}

template <int R>
void gae_rows(const Gae& args, int64_t row) {
  const float gamma = static_cast<float>(args.gamma), gamma_lam = static_cast<float>(args.gamma * args.lam);
  float reward_scratch[R][kGaeBlock], value_scratch[R][kGaeBlock];
  float next_value[R] = {}, next_advantage[R] = {};
  for (int64_t end = args.length; end > 0;) {
    const int64_t size = end < kGaeBlock ? end : kGaeBlock, begin = end - size;
    const float *rewards[R], *values[R];
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * args.length + begin;
      rewards[r] = as_floats(args.rewards, at, size, reward_scratch[r]);
      values[r] = as_floats(args.values, at, size, value_scratch[r]);
    }
    for (int64_t t = size - 1; t >= 0; --t)
      for (int r = 0; r < R; ++r) {
        const int64_t at = (row + r) * args.length + begin + t;
        gae_step(rewards[r][t], values[r][t], args.mask[at], gamma, gamma_lam, &next_value[r], &next_advantage[r],
                 &args.advantages[at], &args.returns[at]);
      }
    end = begin;
  }
}

void gae(const Gae& args, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + kGaeRows <= end; row += kGaeRows) gae_rows<kGaeRows>(args, row);
  for (; row < end; ++row) gae_rows<1>(args, row);
}

}  // namespace
}  // namespace fastrlhf
