// The clipped PPO losses of one block of tokens: sums and gradients.
#pragma once

#include "simd.h"

namespace fastrlhf {
namespace {

// Per-token inputs of a block as fp32.
struct PpoBlock {
  enum { kLogprobs, kOld, kAdvantages, kValues, kOldValues, kReturns, kEntropy, kInputs };
  const float* input[kInputs];  // null if not given
  const bool* mask;
  float scratch[kInputs][kPpoBlock];

  PpoBlock(const PpoLoss& a, int64_t begin, int64_t n) : mask(a.mask + begin) {
    const Floats* given[] = {&a.logprobs,   &a.old_logprobs, &a.advantages, &a.values,
                             &a.old_values, &a.returns,      &a.entropy};
    for (int k = 0; k < kInputs; ++k) input[k] = given[k]->data ? as_floats(*given[k], begin, n, scratch[k]) : nullptr;
  }

  FASTRLHF_INLINE vfloat load(int which, int64_t i, int64_t n, vint here) const {
    const float* from = input[which] + i;
    return select(here, n == W ? load_as<vfloat>(from) : load_part<F32>(from, n, 0.0f), vfloat{});
  }
};

struct PpoVectors {
  vfloat policy{}, value{}, entropy{}, clipped{}, value_clipped{}, approx_kl{}, ratio{}, count{}, ratio_max{};
};

// Tokens [i, i + n) of the block, n <= W.
FASTRLHF_INLINE void ppo_step(const PpoLoss& a, const PpoBlock& block, int64_t i, int64_t n, int64_t begin,
                              PpoVectors* sums) {
  const vint here = mask_lanes(block.mask + i, n);
  const auto get = [&](int which) { return block.load(which, i, n, here); };
  const auto one_where = [&](vint mask) { return select(mask, splat(1.0f), vfloat{}); };

  const vfloat log_ratio = get(PpoBlock::kLogprobs) - get(PpoBlock::kOld), advantage = get(PpoBlock::kAdvantages);
  const vfloat ratio = exp_any(log_ratio);
  const vfloat bounded =
      at_most(at_least(ratio, splat(static_cast<float>(1 - a.clip))), splat(static_cast<float>(1 + a.clip)));
  const vfloat plain = -advantage * ratio, clipped = -advantage * bounded;
  const vint cut = clipped > plain;
  store_part<F32>(a.grad_logprobs + begin + i, n, select(cut, vfloat{}, plain));
  sums->policy += select(cut, clipped, plain);
  sums->clipped += one_where(cut);
  sums->approx_kl += expm1_minus(log_ratio, ratio);
  sums->ratio += select(here, ratio, vfloat{});
  sums->ratio_max = at_least(sums->ratio_max, select(here, ratio, vfloat{}));
  sums->count += one_where(here);

  if (block.input[PpoBlock::kValues]) {
    const float bound = static_cast<float>(a.value_clip);
    const vfloat value = get(PpoBlock::kValues), old = get(PpoBlock::kOldValues), target = get(PpoBlock::kReturns);
    const vfloat step = value - old, bounded_step = at_most(at_least(step, splat(-bound)), splat(bound));
    const vfloat off = value - target, off_clipped = old + bounded_step - target;
    // A step inside the bound is never cut: old + (value - old) may round past value, which would lose its gradient.
    const vint value_cut = (step != bounded_step) & (off_clipped * off_clipped > off * off);
    const vfloat chosen = select(value_cut, off_clipped, off);
    sums->value += 0.5f * chosen * chosen;
    sums->value_clipped += one_where(value_cut);
    const vfloat slope = static_cast<float>(a.value_coef) * off;
    store_part<F32>(a.grad_values + begin + i, n, select(value_cut, vfloat{}, slope));
  }
  if (block.input[PpoBlock::kEntropy]) sums->entropy += get(PpoBlock::kEntropy);
}

PpoSums ppo_loss(const PpoLoss& a, int64_t begin, int64_t end) {
  const PpoBlock block(a, begin, end - begin);
  PpoVectors sums;
  int64_t i = 0;
  for (; i + W <= end - begin; i += W) ppo_step(a, block, i, W, begin, &sums);
  if (i < end - begin) ppo_step(a, block, i, end - begin - i, begin, &sums);
  const double ratio = sum_of(sums.ratio);
  return {sum_of(sums.policy),
          sum_of(sums.value),
          sum_of(sums.entropy),
          sum_of(sums.clipped),
          sum_of(sums.value_clipped),
          sum_of(sums.approx_kl),
          ratio,
          sum_of(sums.count),
          ratio == ratio ? max_of(sums.ratio_max) : __builtin_nanf("")};
}

}  // namespace
}  // namespace fastrlhf
