// Interface of the CPU kernels: plain structs of pointers and sizes, no torch types.
//
// kernels.cpp is compiled once for each instruction set, so this table exists up to four times; bindings_cpu.cpp
// chooses one at run time. All tables compute the same results, to within rounding.
//
// Sizes: N tokens, V columns of logits, of which the first `columns` are vocabulary and the rest padding.
// `mask` is a torch bool tensor's bytes, or null when every position counts.
#pragma once

#include <cstdint>

namespace fastrlhf {

enum class DType : int { f32, bf16, f16, f64 };  // f64 only where `Floats` is read

// Logits [B, L, V] with any row strides: token n is row (n / L, n % L). Strides are in elements.
struct Rows {
  void* data;
  int64_t length;  // L
  int64_t stride_b, stride_l;
};

// A contiguous tensor of any floating dtype, or null.
struct Floats {
  const void* data;
  DType dtype;
};

struct LogprobStatistics {
  Rows rows;
  DType dtype;
  const int64_t* labels;  // [N]
  const bool* mask;       // [N]
  double temperature, softcap;  // softcap: 0 for none
  int64_t vocab_start, columns;
  float *row_max, *row_sum, *weighted, *target;  // [N] each
};

struct LogprobBackward {
  Rows rows, out;  // out.data may be rows.data
  DType dtype;
  const int64_t* labels;
  const bool* mask;
  const float *row_max, *row_sum, *entropy;                    // [N]; entropy may be null
  const float *grad_logprobs, *grad_entropy, *grad_logsumexp;  // [N]; null is 0
  double temperature, softcap;          // softcap: 0 for none
  int64_t vocab_start, columns, width;  // width: V
};

struct KlStatistics {
  Rows rows, ref;
  DType dtype;
  const bool* mask;
  double temperature;
  int64_t columns;
  float *max_x, *sum_x, *max_y, *sum_y, *cross;  // [N] each
};

struct KlBackward {
  Rows rows, ref, out, ref_out;  // out.data or ref_out.data may be null
  DType dtype;
  const bool* mask;
  const float *max_x, *sum_x, *max_y, *sum_y, *kl, *grad;  // [N] each
  double temperature;
  int64_t columns, width;
};

struct Gae {
  Floats rewards, values;  // [B, T]
  Floats bootstrap;        // [B], the value after each row, or null for 0
  const bool* mask;        // [B, T]
  int64_t length;          // T
  double gamma, lam;
  float *advantages, *returns;  // [B, T]
};

enum class Estimator : int { k1, abs, k2, k3 };

struct ShapedRewards {
  Floats scores;                  // [B]
  Floats logprobs, ref_logprobs;  // [B, T]
  const bool* mask;               // [B, T]
  int64_t length;                 // T
  Estimator estimator;
  float kl_coef, clip;  // clip: infinity for none
  float *rewards, *kl;  // [B, T]
};

// Moments (layouts.h) of each row's advantages at the True positions.
struct Moments {
  const float* advantages;  // [B, T]
  const bool* mask;         // [B, T]
  int64_t length;           // T
  float* out;               // [B, 3]
};

// Partial sums of one block of tokens.
struct PpoSums {
  double policy, value, entropy, clipped, value_clipped, approx_kl, ratio, count, kl;
  float ratio_max;
};

struct PpoLoss {
  Floats logprobs, old_logprobs, advantages;                                // [N]
  Floats values, old_values, returns, entropy, ref_logprobs, weights;  // [N], or null
  const bool* mask;
  bool cispo, by_sequence;
  Estimator estimator;
  double clip_low, clip_high, value_clip, value_coef, dual_clip, kl_coef;  // dual_clip: infinity for none
  float *grad_logprobs, *grad_values;  // [N]; grad_values null without values
};

// Sums over the strict pairs of one prompt.
struct RankingSums {
  double loss, correct, pairs, margin;
};

struct Ranking {
  const float* scores;        // [N]
  const int64_t* int_ranks;   // [N], or null
  const double* float_ranks;  // [N], or null
  const float* margins;       // [N], or null
  float center_coef;
  bool per_prompt;
  float* grad;  // [N]
};

// Rows [width] of a matrix product without its bias.
struct BiasGelu {
  const void *x, *bias, *grad;  // [N, width], [width], [N, width]; grad null in the forward
  DType dtype;
  int64_t width;
  void* out;  // [N, width]: the activation, or the gradient of x
};

// A kernel computes a range, so that the caller owns the threads. Results do not depend on the ranges.
struct Kernels {
  void (*logprob_statistics)(const LogprobStatistics&, int64_t begin, int64_t end);  // tokens
  void (*logprob_backward)(const LogprobBackward&, int64_t begin, int64_t end);      // tokens
  void (*kl_statistics)(const KlStatistics&, int64_t begin, int64_t end);            // tokens
  void (*kl_backward)(const KlBackward&, int64_t begin, int64_t end);                // tokens
  void (*gae)(const Gae&, int64_t begin, int64_t end);                               // rows
  void (*shaped_rewards)(const ShapedRewards&, int64_t begin, int64_t end);          // rows
  void (*moments)(const Moments&, int64_t begin, int64_t end);                       // rows
  PpoSums (*ppo_loss)(const PpoLoss&, int64_t begin, int64_t end);  // at most kPpoBlock tokens, or one sequence
  RankingSums (*ranking)(const Ranking&, int64_t begin, int64_t end);                // responses of one prompt
  void (*bias_gelu)(const BiasGelu&, int64_t begin, int64_t end);                    // rows
  void (*bias_gelu_backward)(const BiasGelu&, int64_t begin, int64_t end, float* bias_grad);  // rows; [width], added to
};

constexpr int64_t kPpoBlock = 1024;

extern const Kernels kernels_default;
#ifdef FASTRLHF_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef FASTRLHF_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef FASTRLHF_HAVE_AVX512BF16
extern const Kernels kernels_avx512bf16;
#endif

}  // namespace fastrlhf
