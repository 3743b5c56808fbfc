// Generalized advantage estimation, backwards along each row, a vector of rows at a time.
#pragma once

#include "simd.h"

namespace fastrlhf {
namespace {

constexpr int64_t kGaeBlock = 256;    // positions converted to fp32 at a time
constexpr int64_t kGaeAhead = 4 * W;  // positions to fetch ahead: hardware follows only a few rows at a time

// W rows in the lanes of a vector: each step waits for the one before it, and no branch is taken on the mask, so that
// scattered masks cost no more than full ones.
struct GaeState {
  vfloat value{}, advantage{};  // of the nearest True position to the right
};

// The lanes of two concatenated vectors that swap lane j + kStep of the first with lane j of the second.
template <int kStep>
struct Exchange {
  int32_t low[W], high[W];
  constexpr Exchange() : low(), high() {
    for (int j = 0; j < W; ++j) {
      low[j] = j & kStep ? W + j - kStep : j;
      high[j] = j & kStep ? W + j : j + kStep;
    }
  }
};
template <int kStep>
constexpr Exchange<kStep> kExchange{};

// m[i] lane j <-> m[j] lane i, in log2(W) rounds that exchange one bit of the two indices each.
template <int kStep = 1>
FASTRLHF_INLINE void transpose(vfloat (&m)[W]) {
  const vint low = load_as<vint>(kExchange<kStep>.low), high = load_as<vint>(kExchange<kStep>.high);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & kStep) continue;
    const vfloat a = m[i], b = m[i + kStep];
    m[i] = shuffled(a, b, low);
    m[i + kStep] = shuffled(a, b, high);
  }
  if constexpr (2 * kStep < W) transpose<2 * kStep>(m);
}

// W positions of W rows, from `at` on.
FASTRLHF_INLINE void gae_tile(const float* const* rewards, const float* const* values, const bool* const* mask,
                              int64_t at, float gamma, float gamma_lam, GaeState* next, float* const* advantages,
                              float* const* returns) {
  vfloat reward[W], value[W], here[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    prefetch(rewards[r] + at - kGaeAhead);
    prefetch(values[r] + at - kGaeAhead);
    prefetch(mask[r] + at - kGaeAhead);
    reward[r] = load_as<vfloat>(rewards[r] + at);
    value[r] = load_as<vfloat>(values[r] + at);
    here[r] = bits<vfloat>(mask_lanes(mask[r] + at, W));
  }
  transpose(reward);
  transpose(value);
  transpose(here);
#pragma GCC unroll 16
  for (int t = W - 1; t >= 0; --t) {
    const vint keep = bits<vint>(here[t]);
    const vfloat advantage = (reward[t] + gamma * next->value - value[t]) + gamma_lam * next->advantage;
    next->advantage = select(keep, advantage, next->advantage);
    next->value = select(keep, value[t], next->value);
    reward[t] = select(keep, advantage, vfloat{});
    value[t] = select(keep, advantage + value[t], vfloat{});
  }
  transpose(reward);
  transpose(value);
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    store_as(advantages[r] + at, reward[r]);
    store_as(returns[r] + at, value[r]);
  }
}

// The first `n` < W positions of W rows: copied into a full tile, whose positions past them do not count.
void gae_first(const float* const* rewards, const float* const* values, const bool* const* mask, int64_t n, float gamma,
               float gamma_lam, GaeState* next, float* const* advantages, float* const* returns) {
  float scratch[4][W][W] = {};
  bool keep[W][W] = {};
  const float *reward[W], *value[W];
  const bool* here[W];
  float *advantage[W], *target[W];
  for (int r = 0; r < W; ++r) {
    __builtin_memcpy(scratch[0][r], rewards[r], n * sizeof(float));
    __builtin_memcpy(scratch[1][r], values[r], n * sizeof(float));
    __builtin_memcpy(keep[r], mask[r], n);
    reward[r] = scratch[0][r], value[r] = scratch[1][r], here[r] = keep[r];
    advantage[r] = scratch[2][r], target[r] = scratch[3][r];
  }
  gae_tile(reward, value, here, 0, gamma, gamma_lam, next, advantage, target);
  for (int r = 0; r < W; ++r) {
    __builtin_memcpy(advantages[r], advantage[r], n * sizeof(float));
    __builtin_memcpy(returns[r], target[r], n * sizeof(float));
  }
}

// Rows [row, end), at most W of them; if fewer, the last one is processed (and written) several times.
void gae_rows(const Gae& args, int64_t row, int64_t end) {
  const float gamma = static_cast<float>(args.gamma), gamma_lam = static_cast<float>(args.gamma * args.lam);
  float reward_scratch[W][kGaeBlock], value_scratch[W][kGaeBlock];
  const float *rewards[W], *values[W];
  const bool* mask[W];
  float *advantages[W], *returns[W];
  GaeState next;
  if (args.bootstrap.data)
    for (int r = 0; r < W; ++r) {
      float one;
      next.value[r] = *as_floats(args.bootstrap, row + r < end ? row + r : end - 1, 1, &one);
    }
  for (int64_t stop = args.length; stop > 0;) {
    const int64_t size = stop < kGaeBlock ? stop : kGaeBlock;
    for (int r = 0; r < W; ++r) {
      const int64_t start = (row + r < end ? row + r : end - 1) * args.length + stop - size;
      rewards[r] = as_floats(args.rewards, start, size, reward_scratch[r]);
      values[r] = as_floats(args.values, start, size, value_scratch[r]);
      mask[r] = args.mask + start;
      advantages[r] = args.advantages + start;
      returns[r] = args.returns + start;
    }
    int64_t at = size;
    while (at >= W) gae_tile(rewards, values, mask, at -= W, gamma, gamma_lam, &next, advantages, returns);
    if (at > 0) gae_first(rewards, values, mask, at, gamma, gamma_lam, &next, advantages, returns);
    stop -= size;
  }
}

void gae(const Gae& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += W) gae_rows(args, row, end);
}

}  // namespace
}  // namespace fastrlhf
