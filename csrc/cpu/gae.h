// Generalised advantage estimation, backwards along each row, several rows at a time.
#pragma once

#include "simd.h"

namespace fastrlhf {
namespace {

constexpr int64_t kGaeBlock = 256;  // positions converted to fp32 at a time

// Four rows in a vector, two vectors in flight: each step waits for the one before it, and no branch is taken on the
// mask, so that scattered masks cost no more than full ones.
constexpr int kGaeLanes = 4, kGaeVectors = 2, kGaeRows = kGaeLanes * kGaeVectors;
typedef float lanes __attribute__((vector_size(4 * kGaeLanes)));
typedef int32_t lane_mask __attribute__((vector_size(4 * kGaeLanes)));

struct GaeState {
  lanes value{}, advantage{};  // of the nearest True position to the right
};

// Rows [row, end), at most kGaeRows of them: when fewer, the last one is walked (and written) several times.
void gae_rows(const Gae& args, int64_t row, int64_t end) {
  const float gamma = static_cast<float>(args.gamma), gamma_lam = static_cast<float>(args.gamma * args.lam);
  float reward_scratch[kGaeRows][kGaeBlock], value_scratch[kGaeRows][kGaeBlock];
  const float *rewards[kGaeRows], *values[kGaeRows];
  int64_t start[kGaeRows];  // of each row's block
  GaeState next[kGaeVectors];
  for (int64_t stop = args.length; stop > 0;) {
    const int64_t size = stop < kGaeBlock ? stop : kGaeBlock;
    for (int r = 0; r < kGaeRows; ++r) {
      start[r] = (row + r < end ? row + r : end - 1) * args.length + stop - size;
      rewards[r] = as_floats(args.rewards, start[r], size, reward_scratch[r]);
      values[r] = as_floats(args.values, start[r], size, value_scratch[r]);
    }
    for (int64_t t = size - 1; t >= 0; --t)
      for (int v = 0; v < kGaeVectors; ++v) {
        const int r = v * kGaeLanes;
        const lanes reward{rewards[r][t], rewards[r + 1][t], rewards[r + 2][t], rewards[r + 3][t]};
        const lanes value{values[r][t], values[r + 1][t], values[r + 2][t], values[r + 3][t]};
        const lane_mask here = lane_mask{args.mask[start[r] + t], args.mask[start[r + 1] + t],
                                         args.mask[start[r + 2] + t], args.mask[start[r + 3] + t]} != 0;
        const lanes advantage = (reward + gamma * next[v].value - value) + gamma_lam * next[v].advantage;
        const lanes kept = here ? advantage : lanes{}, target = here ? advantage + value : lanes{};
        next[v].advantage = here ? advantage : next[v].advantage;
        next[v].value = here ? value : next[v].value;
        for (int k = 0; k < kGaeLanes; ++k) {
          args.advantages[start[r + k] + t] = kept[k];
          args.returns[start[r + k] + t] = target[k];
        }
      }
    stop -= size;
  }
}

void gae(const Gae& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kGaeRows) gae_rows(args, row, end);
}

}  // namespace
}  // namespace fastrlhf
