// The pairwise ranking loss of one prompt: every response against every other.
#pragma once

#include "simd.h"

namespace fastrlhf {
namespace {

constexpr int64_t kRankBlock = 256;

struct RankingVectors {
  vfloat loss{}, correct{}, pairs{}, margin{}, slope{};
};

// Response i against W others of scores `other`; side is 1 where i is the better, -1 where it is the worse, else 0.
// Each pair occurs twice: the loss is counted at the better response, each gradient at its own. `gap`: the margins of
// the responses, that of i less the others'.
FASTRLHF_INLINE void ranking_step(float score, vfloat other, vfloat side, vfloat gap, float center,
                                  RankingVectors* sums) {
  const vfloat margin = score - other, sum = score + other, z = side * (margin - gap);
  const vfloat t = exp_any(-absolute(z));
  const vfloat loss = at_least(-z, vfloat{}) + log1p_unit(t);           // -log sigmoid(z)
  const vfloat slope = select(z >= 0.0f, t, splat(1.0f)) / (t + 1.0f);  // sigmoid(-z)
  const vint better = side > 0.0f;
  sums->loss += select(better, loss + center * sum * sum, vfloat{});
  sums->correct += select(better & (margin > 0.0f), splat(1.0f), vfloat{});
  sums->pairs += select(better, splat(1.0f), vfloat{});
  sums->margin += select(better, margin, vfloat{});
  sums->slope += select(side != 0.0f, 2 * center * sum - side * slope, vfloat{});
}

template <class R>
void ranking_response(const float* scores, const R* ranks, const float* margins, float center, int64_t i, int64_t count,
                      RankingSums* prompt, float* grad) {
  RankingVectors sums;
  float side[kRankBlock];
  const auto gap = [&](int64_t j, int64_t n) {
    return margins ? margins[i] - load_part<F32>(margins + j, n, 0.0f) : vfloat{};
  };
  for (int64_t at = 0; at < count; at += kRankBlock) {
    const int64_t size = count - at < kRankBlock ? count - at : kRankBlock;
    for (int64_t j = 0; j < size; ++j)
      side[j] = static_cast<float>(ranks[i] < ranks[at + j]) - static_cast<float>(ranks[i] > ranks[at + j]);
    int64_t j = 0;
    for (; j + W <= size; j += W)
      ranking_step(scores[i], load_as<vfloat>(scores + at + j), load_as<vfloat>(side + j), gap(at + j, W), center,
                   &sums);
    if (j < size)
      ranking_step(scores[i], load_part<F32>(scores + at + j, size - j, 0.0f), load_part<F32>(side + j, size - j, 0.0f),
                   gap(at + j, size - j), center, &sums);
  }
  prompt->loss += sum_of(sums.loss);
  prompt->correct += sum_of(sums.correct);
  prompt->pairs += sum_of(sums.pairs);
  prompt->margin += sum_of(sums.margin);
  grad[i] = static_cast<float>(sum_of(sums.slope));
}

RankingSums ranking(const Ranking& a, int64_t begin, int64_t end) {
  RankingSums prompt{};
  const float* margins = a.margins ? a.margins + begin : nullptr;
  for (int64_t i = 0; i < end - begin; ++i) {
    if (a.int_ranks)
      ranking_response(a.scores + begin, a.int_ranks + begin, margins, a.center_coef, i, end - begin, &prompt,
                       a.grad + begin);
    else
      ranking_response(a.scores + begin, a.float_ranks + begin, margins, a.center_coef, i, end - begin, &prompt,
                       a.grad + begin);
  }
  if (a.per_prompt && prompt.pairs > 1)
    for (int64_t i = begin; i < end; ++i) a.grad[i] = static_cast<float>(a.grad[i] / prompt.pairs);
  return prompt;
}

}  // namespace
}  // namespace fastrlhf
