// The policy-loss family and the value loss of one block of tokens, or of one sequence: sums and gradients.
#pragma once

#include "rollout.h"
#include "simd.h"

namespace fastrlhf {
namespace {

// Per-token inputs of a block as fp32.
struct PpoBlock {
  enum { kLogprobs, kOld, kAdvantages, kValues, kOldValues, kReturns, kEntropy, kRef, kWeights, kInputs };
  const float* input[kInputs];  // null if not given
  const bool* mask;
  float scratch[kInputs][kPpoBlock];

  PpoBlock(const PpoLoss& a, int64_t begin, int64_t n) : mask(a.mask + begin) {
    const Floats* given[] = {&a.logprobs, &a.old_logprobs, &a.advantages,   &a.values, &a.old_values,
                             &a.returns,  &a.entropy,      &a.ref_logprobs, &a.weights};
    for (int k = 0; k < kInputs; ++k) input[k] = given[k]->data ? as_floats(*given[k], begin, n, scratch[k]) : nullptr;
  }

  FASTRLHF_INLINE vfloat load(int which, int64_t i, int64_t n, vint here) const {
    const float* from = input[which] + i;
    return select(here, n == W ? load_as<vfloat>(from) : load_part<F32>(from, n, 0.0f), vfloat{});
  }
};

struct PpoVectors {
  vfloat policy{}, value{}, entropy{}, clipped{}, value_clipped{}, approx_kl{}, ratio{}, count{}, kl{}, ratio_max{};
  vfloat slope{};  // of a sequence's terms in its log-ratio
};

// The derivative of estimate_kl in d.
FASTRLHF_INLINE vfloat kl_slope(Estimator estimator, vfloat d) {
  const vfloat one = splat(1.0f);
  if (estimator == Estimator::k1) return one;
  if (estimator == Estimator::abs) return select(d > 0.0f, one, select(d < 0.0f, -one, vfloat{}));
  if (estimator == Estimator::k2) return d;
  return d - expm1_minus(-d, exp_any(-d));  // 1 - exp(-d), without its cancellation near 0
}

// Tokens [i, i + n) of the block, n <= W. With `mean`, the log-ratio of their sequence.
FASTRLHF_INLINE void ppo_step(const PpoLoss& a, const PpoBlock& block, int64_t i, int64_t n, int64_t begin,
                              const float* mean, PpoVectors* sums) {
  const vint here = mask_lanes(block.mask + i, n);
  const auto get = [&](int which) { return block.load(which, i, n, here); };
  const auto one_where = [&](vint mask) { return select(mask, splat(1.0f), vfloat{}); };

  const vfloat logprobs = get(PpoBlock::kLogprobs), advantage = get(PpoBlock::kAdvantages);
  const vfloat log_ratio = mean ? select(here, splat(*mean), vfloat{}) : logprobs - get(PpoBlock::kOld);
  const vfloat weight = block.input[PpoBlock::kWeights] ? get(PpoBlock::kWeights) : one_where(here);
  const vfloat ratio = exp_any(log_ratio);
  const vfloat bounded =
      at_most(at_least(ratio, splat(static_cast<float>(1 - a.clip_low))), splat(static_cast<float>(1 + a.clip_high)));
  const vfloat plain = -advantage * ratio, clipped = -advantage * bounded;
  vint cut = clipped > plain;
  vfloat loss = select(cut, clipped, plain), slope = select(cut, vfloat{}, plain);
  if (a.cispo) {
    cut = (ratio != bounded) & here;
    slope = clipped;
    loss = clipped * logprobs;
  } else if (a.dual_clip < kInf) {
    const vfloat ceiling = -advantage * static_cast<float>(a.dual_clip);
    const vint high = (advantage < 0.0f) & (loss > ceiling);
    cut = cut | high;
    loss = select(high, ceiling, loss);
    slope = select(high, vfloat{}, slope);
  }
  sums->policy += loss * weight;
  slope = slope * weight;
  sums->slope += slope;
  vfloat gradient = mean && !a.cispo ? vfloat{} : slope;
  if (block.input[PpoBlock::kRef]) {
    const vfloat d = logprobs - get(PpoBlock::kRef);
    sums->kl += estimate_kl(a.estimator, d) * weight;
    gradient = gradient + static_cast<float>(a.kl_coef) * kl_slope(a.estimator, d) * weight;
  }
  store_part<F32>(a.grad_logprobs + begin + i, n, gradient);
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
    sums->value += 0.5f * chosen * chosen * weight;
    sums->value_clipped += one_where(value_cut);
    const vfloat value_slope = static_cast<float>(a.value_coef) * off;
    store_part<F32>(a.grad_values + begin + i, n, select(value_cut, vfloat{}, value_slope * weight));
  }
  if (block.input[PpoBlock::kEntropy]) sums->entropy += get(PpoBlock::kEntropy) * weight;
}

// Tokens [begin, end), at most kPpoBlock.
void ppo_tokens(const PpoLoss& a, int64_t begin, int64_t end, const float* mean, PpoVectors* sums) {
  const PpoBlock block(a, begin, end - begin);
  int64_t i = 0;
  for (; i + W <= end - begin; i += W) ppo_step(a, block, i, W, begin, mean, sums);
  if (i < end - begin) ppo_step(a, block, i, end - begin - i, begin, mean, sums);
}

// The mean log-ratio of a sequence over the positions that count, and their number (at least 1).
float mean_log_ratio(const PpoLoss& a, int64_t begin, int64_t end, double* count) {
  float scratch[2][kPpoBlock];
  double total = 0, counted = 0;
  for (int64_t from = begin; from < end; from += kPpoBlock) {
    const int64_t size = end - from < kPpoBlock ? end - from : kPpoBlock;
    const float* logprobs = as_floats(a.logprobs, from, size, scratch[0]);
    const float* old = as_floats(a.old_logprobs, from, size, scratch[1]);
    for (int64_t i = 0; i < size; ++i) {
      total += a.mask[from + i] ? static_cast<double>(logprobs[i]) - old[i] : 0.0;
      counted += a.mask[from + i];
    }
  }
  *count = counted > 1 ? counted : 1;
  return static_cast<float>(total / *count);
}

void ppo_sequence(const PpoLoss& a, int64_t begin, int64_t end, PpoVectors* sums) {
  double count;
  const float mean = mean_log_ratio(a, begin, end, &count);
  for (int64_t from = begin; from < end; from += kPpoBlock)
    ppo_tokens(a, from, end - from < kPpoBlock ? end : from + kPpoBlock, &mean, sums);
  if (a.cispo) return;
  // Every token of a sequence moves its ratio by 1 / n, and with it the terms of all.
  const float each = static_cast<float>(sum_of(sums->slope) / count);
  for (int64_t i = begin; i < end; ++i) a.grad_logprobs[i] += a.mask[i] ? each : 0.0f;
}

PpoSums ppo_loss(const PpoLoss& a, int64_t begin, int64_t end) {
  PpoVectors sums;
  if (a.by_sequence)
    ppo_sequence(a, begin, end, &sums);
  else
    ppo_tokens(a, begin, end, nullptr, &sums);
  const double ratio = sum_of(sums.ratio);
  return {sum_of(sums.policy),
          sum_of(sums.value),
          sum_of(sums.entropy),
          sum_of(sums.clipped),
          sum_of(sums.value_clipped),
          sum_of(sums.approx_kl),
          ratio,
          sum_of(sums.count),
          sum_of(sums.kl),
          ratio == ratio ? max_of(sums.ratio_max) : __builtin_nanf("")};
}

}  // namespace
}  // namespace fastrlhf
