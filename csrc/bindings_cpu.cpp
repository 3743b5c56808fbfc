// torch.ops.fastrlhf_cpu: the CPU kernels for torch tensors, through torch's stable ABI (one build serves every torch
// from 2.11 on). Signatures and results are those of the torch implementations in fastrlhf/ops. No autograd here.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu_tensors.h"
#include "layouts.h"
#include "output_pool.h"

namespace {

// --- ops ------------------------------------------------------------------------------------------------------------

Tensor logprob_statistics(const Tensor rows, const Tensor labels, const OptionalTensor mask, double temperature,
                          int64_t vocab_start, int64_t columns, const std::optional<double> softcap) {
  const int64_t count = rows.size(0) * rows.size(1);
  check_columns(rows, columns);
  const Table stats({SoftmaxStatistic::size, count});
  const LogprobStatistics args{
      .rows = rows_of(rows),
      .dtype = logits_dtype(rows),
      .labels = flat<int64_t>(labels, count, ScalarType::Long),
      .mask = mask_of(mask, count),
      .temperature = temperature,
      .softcap = softcap.value_or(0.0),
      .vocab_start = vocab_start,
      .columns = columns,
      .row_max = stats.row(SoftmaxStatistic::row_max),
      .row_sum = stats.row(SoftmaxStatistic::row_sum),
      .weighted = stats.row(SoftmaxStatistic::weighted),
      .target = stats.row(SoftmaxStatistic::target),
  };
  const Kernels& kernels = *level().kernels;
  for_each_range(count, rows_at_a_time(columns),
                 [&](int64_t begin, int64_t end) { kernels.logprob_statistics(args, begin, end); });
  return stats.tensor;
}

void logprob_backward(const Tensor rows, const Tensor labels, const OptionalTensor mask, const Tensor row_max,
                      const Tensor row_sum, const OptionalTensor entropy, const OptionalTensor grad_logprobs,
                      const OptionalTensor grad_entropy, const OptionalTensor grad_logsumexp, double temperature,
                      int64_t vocab_start, int64_t columns, const Tensor out, const std::optional<double> softcap) {
  const int64_t count = rows.size(0) * rows.size(1);
  check_columns(rows, columns);
  STD_TORCH_CHECK(!grad_entropy || entropy, "fastrlhf_cpu: grad_entropy needs entropy");
  STD_TORCH_CHECK(out.scalar_type() == rows.scalar_type() && out.numel() == rows.numel(),
                  "fastrlhf_cpu: out is not like rows");
  check_same_shape(rows, out);
  const LogprobBackward args{
      .rows = rows_of(rows),
      .out = rows_of(out),
      .dtype = logits_dtype(rows),
      .labels = flat<int64_t>(labels, count, ScalarType::Long),
      .mask = mask_of(mask, count),
      .row_max = floats(row_max, count),
      .row_sum = floats(row_sum, count),
      .entropy = floats(entropy, count),
      .grad_logprobs = floats(grad_logprobs, count),
      .grad_entropy = floats(grad_entropy, count),
      .grad_logsumexp = floats(grad_logsumexp, count),
      .temperature = temperature,
      .softcap = softcap.value_or(0.0),
      .vocab_start = vocab_start,
      .columns = columns,
      .width = rows.size(2),
  };
  const Pages pages(out, count);
  const Kernels& kernels = *level().kernels;
  for_each_range(count, rows_at_a_time(rows.size(2)), [&](int64_t begin, int64_t end) {
    if (args.out.data != args.rows.data) pages.get(begin, end);
    kernels.logprob_backward(args, begin, end);
  });
}

Tensor logits_kl_statistics(const Tensor rows, const Tensor ref_rows, const OptionalTensor mask, double temperature,
                            int64_t columns) {
  const int64_t count = rows.size(0) * rows.size(1);
  check_columns(rows, columns);
  STD_TORCH_CHECK(ref_rows.scalar_type() == rows.scalar_type() && ref_rows.numel() == rows.numel(),
                  "fastrlhf_cpu: ref_rows is not like rows");
  check_same_shape(rows, ref_rows);
  const Table stats({KLStatistic::size, count});
  const KlStatistics args{
      .rows = rows_of(rows),
      .ref = rows_of(ref_rows),
      .dtype = logits_dtype(rows),
      .mask = mask_of(mask, count),
      .temperature = temperature,
      .columns = columns,
      .max_x = stats.row(KLStatistic::row_max),
      .sum_x = stats.row(KLStatistic::row_sum),
      .max_y = stats.row(KLStatistic::ref_max),
      .sum_y = stats.row(KLStatistic::ref_sum),
      .cross = stats.row(KLStatistic::cross),
  };
  const Kernels& kernels = *level().kernels;
  for_each_range(count, rows_at_a_time(columns),
                 [&](int64_t begin, int64_t end) { kernels.kl_statistics(args, begin, end); });
  return stats.tensor;
}

void logits_kl_backward(const Tensor rows, const Tensor ref_rows, const OptionalTensor mask, const Tensor stats,
                        const Tensor kl, const Tensor grad, double temperature, int64_t columns,
                        const OptionalTensor out, const OptionalTensor ref_out) {
  const int64_t count = rows.size(0) * rows.size(1);
  check_columns(rows, columns);
  check_same_shape(rows, ref_rows);
  std::vector<Pages> pages;
  for (const OptionalTensor& written : {out, ref_out}) {
    if (!written) continue;
    STD_TORCH_CHECK(written->scalar_type() == rows.scalar_type() && written->numel() == rows.numel(),
                    "fastrlhf_cpu: out is not like rows");
    check_same_shape(rows, *written);
    pages.emplace_back(*written, count);
  }
  const Table saved(stats, KLStatistic::size, count);
  const KlBackward args{
      .rows = rows_of(rows),
      .ref = rows_of(ref_rows),
      .out = rows_of(out),
      .ref_out = rows_of(ref_out),
      .dtype = logits_dtype(rows),
      .mask = mask_of(mask, count),
      .max_x = saved.row(KLStatistic::row_max),
      .sum_x = saved.row(KLStatistic::row_sum),
      .max_y = saved.row(KLStatistic::ref_max),
      .sum_y = saved.row(KLStatistic::ref_sum),
      .kl = floats(kl, count),
      .grad = floats(grad, count),
      .temperature = temperature,
      .columns = columns,
      .width = rows.size(2),
  };
  const Kernels& kernels = *level().kernels;
  for_each_range(count, rows_at_a_time(rows.size(2)), [&](int64_t begin, int64_t end) {
    for (const Pages& each : pages) each.get(begin, end);
    kernels.kl_backward(args, begin, end);
  });
}

Tensor empty_pooled(const Tensor like, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "fastrlhf_cpu: expected sizes of 0 or more");
  return OutputPool::instance().empty({rows, columns}, like.scalar_type(), static_cast<int64_t>(like.element_size()));
}

void release() { OutputPool::instance().release(); }

double scalar(const Tensor& x) {
  const Tensor wide = torch::stable::to(x, ScalarType::Double);
  return *static_cast<const double*>(wide.data_ptr());
}

std::tuple<Tensor, Tensor> gae(const Tensor rewards, const Tensor values, const Tensor mask, double gamma, double lam,
                               const OptionalTensor bootstrap) {
  STD_TORCH_CHECK(rewards.dim() == 2, "fastrlhf_cpu: expected rewards [B, T]");
  const int64_t batch = rewards.size(0), length = rewards.size(1), count = batch * length;
  Tensor advantages = empty({batch, length}), returns = empty({batch, length});
  const Gae args{
      .rewards = any_floats(rewards, count),
      .values = any_floats(values, count),
      .bootstrap = any_floats(bootstrap, batch),
      .mask = flat<bool>(mask, count, ScalarType::Bool),
      .length = length,
      .gamma = gamma,
      .lam = lam,
      .advantages = floats(advantages, count),
      .returns = floats(returns, count),
  };
  const Kernels& kernels = *level().kernels;
  for_each_range(count == 0 ? 0 : batch, rollout_rows(length),
                 [&](int64_t begin, int64_t end) { kernels.gae(args, begin, end); });
  return {advantages, returns};
}

Estimator estimator_of(const std::string& name) {
  if (name == "k1") return Estimator::k1;
  if (name == "abs") return Estimator::abs;
  if (name == "k2") return Estimator::k2;
  if (name == "k3") return Estimator::k3;
  throw std::runtime_error("fastrlhf_cpu: unknown estimator " + name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shaped_gae(
    const Tensor scores, const Tensor logprobs, const Tensor ref_logprobs, const Tensor values, const Tensor mask,
    const OptionalTensor bootstrap, double kl_coef, const std::optional<double> clip, double gamma, double lam,
    const std::string estimator) {
  STD_TORCH_CHECK(logprobs.dim() == 2, "fastrlhf_cpu: expected logprobs [B, T]");
  const int64_t batch = logprobs.size(0), length = logprobs.size(1), count = batch * length;
  const Tensor rewards = empty({batch, length}), kl = empty({batch, length}), advantages = empty({batch, length}),
               returns = empty({batch, length}), moments = empty({batch, Moment::size});
  const bool* keep = flat<bool>(mask, count, ScalarType::Bool);
  const ShapedRewards shape{
      .scores = any_floats(scores, batch),
      .logprobs = any_floats(logprobs, count),
      .ref_logprobs = any_floats(ref_logprobs, count),
      .mask = keep,
      .length = length,
      .estimator = estimator_of(estimator),
      .kl_coef = static_cast<float>(kl_coef),
      .clip = static_cast<float>(clip.value_or(HUGE_VAL)),
      .rewards = floats(rewards, count),
      .kl = floats(kl, count),
  };
  const Gae estimate{
      .rewards = any_floats(rewards, count),
      .values = any_floats(values, count),
      .bootstrap = any_floats(bootstrap, batch),
      .mask = keep,
      .length = length,
      .gamma = gamma,
      .lam = lam,
      .advantages = floats(advantages, count),
      .returns = floats(returns, count),
  };
  const Moments moment{
      .advantages = floats(advantages, count),
      .mask = keep,
      .length = length,
      .out = floats(moments, Moment::size * batch),
  };
  const Kernels& kernels = *level().kernels;
  for_each_range(batch, rollout_rows(length), [&](int64_t begin, int64_t end) {
    kernels.shaped_rewards(shape, begin, end);
    kernels.gae(estimate, begin, end);
    kernels.moments(moment, begin, end);
  });
  return {rewards, kl, advantages, returns, moments};
}

std::tuple<Tensor, Tensor, Tensor> ppo_loss(const Tensor logprobs, const Tensor old_logprobs, const Tensor advantages,
                                            const Tensor mask, const OptionalTensor values,
                                            const OptionalTensor old_values, const OptionalTensor returns,
                                            const OptionalTensor entropy, const OptionalTensor ref_logprobs,
                                            const OptionalTensor weights, const OptionalTensor denominator,
                                            double clip_low, double clip_high, double value_clip, double value_coef,
                                            double entropy_coef, double dual_clip, double kl_coef,
                                            const std::string objective, const std::string ratio,
                                            const std::string kl_estimator, int64_t length) {
  const int64_t count = logprobs.numel();
  const bool with_values = values && old_values && returns, by_sequence = ratio == "sequence";
  STD_TORCH_CHECK(!by_sequence || count == 0 || (length > 0 && count % length == 0),
                  "fastrlhf_cpu: expected sequences of one length");
  Tensor metrics = empty({PPOMetric::size}), grad_logprobs = empty({count}),
         grad_values = empty({with_values ? count : 0});
  const OptionalTensor nothing;
  const PpoLoss args{
      .logprobs = any_floats(logprobs, count),
      .old_logprobs = any_floats(old_logprobs, count),
      .advantages = any_floats(advantages, count),
      .values = any_floats(with_values ? values : nothing, count),
      .old_values = any_floats(with_values ? old_values : nothing, count),
      .returns = any_floats(with_values ? returns : nothing, count),
      .entropy = any_floats(entropy, count),
      .ref_logprobs = any_floats(ref_logprobs, count),
      .weights = any_floats(weights, count),
      .mask = flat<bool>(mask, count, ScalarType::Bool),
      .cispo = objective == "cispo",
      .by_sequence = by_sequence,
      .estimator = estimator_of(kl_estimator),
      .clip_low = clip_low,
      .clip_high = clip_high,
      .value_clip = value_clip,
      .value_coef = value_coef,
      .dual_clip = dual_clip,
      .kl_coef = kl_coef,
      .grad_logprobs = floats(grad_logprobs, count),
      .grad_values = with_values ? floats(grad_values, count) : nullptr,
  };

  // Blocks are fixed and their sums are added in order: the result does not depend on the threads.
  const int64_t extent = by_sequence ? std::max<int64_t>(length, 1) : kPpoBlock;
  std::vector<PpoSums> blocks((count + extent - 1) / extent);
  const Kernels& kernels = *level().kernels;
  for_each_range(static_cast<int64_t>(blocks.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      blocks[b] = kernels.ppo_loss(args, b * extent, std::min((b + 1) * extent, count));
  });
  PpoSums total{};
  for (const PpoSums& b : blocks) {
    total.policy += b.policy, total.value += b.value, total.entropy += b.entropy, total.clipped += b.clipped;
    total.value_clipped += b.value_clipped, total.approx_kl += b.approx_kl, total.ratio += b.ratio;
    total.count += b.count, total.kl += b.kl;
    if (!(b.ratio_max <= total.ratio_max)) total.ratio_max = b.ratio_max;  // keeps NaN
  }
  const double scale = 1 / (denominator ? scalar(*denominator) : std::max(total.count, 1.0));
  double loss = total.policy + value_coef * total.value - entropy_coef * total.entropy;
  if (ref_logprobs) loss += kl_coef * total.kl;
  float* metric = floats(metrics, PPOMetric::size);
  const auto set_mean = [&](int64_t which, double sum) { metric[which] = static_cast<float>(sum * scale); };
  set_mean(PPOMetric::loss, loss);
  set_mean(PPOMetric::policy_loss, total.policy);
  set_mean(PPOMetric::value_loss, total.value);
  set_mean(PPOMetric::entropy, total.entropy);
  set_mean(PPOMetric::clip_fraction, total.clipped);
  set_mean(PPOMetric::value_clip_fraction, total.value_clipped);
  set_mean(PPOMetric::approx_kl, total.approx_kl);
  set_mean(PPOMetric::ratio_mean, total.ratio);
  set_mean(PPOMetric::kl, total.kl);
  metric[PPOMetric::ratio_max] = total.ratio_max;
  metric[PPOMetric::grad_scale] = static_cast<float>(scale);
  return {metrics, grad_logprobs, grad_values};
}

bool is_integer(const Tensor& x) { return x.scalar_type() == ScalarType::Long || x.scalar_type() == ScalarType::Int; }

std::tuple<Tensor, Tensor> ranking_loss(const Tensor scores, const Tensor ranks, const Tensor prompt_offsets,
                                        bool per_prompt, const OptionalTensor margins, double center_coef) {
  using torch::stable::to;
  const int64_t count = scores.numel(), prompts = prompt_offsets.numel() - 1;
  const OptionalTensor margin = margins ? OptionalTensor(to(*margins, ScalarType::Float)) : std::nullopt;
  const Tensor x = to(scores, ScalarType::Float), offsets = to(prompt_offsets, ScalarType::Long);
  const bool integers = is_integer(ranks);
  const Tensor rank = to(ranks, integers ? ScalarType::Long : ScalarType::Double);
  const int64_t* offset = flat<int64_t>(offsets, prompts + 1, ScalarType::Long);
  bool rising = offset[0] == 0 && offset[prompts] == count;
  for (int64_t g = 0; g < prompts; ++g) rising = rising && offset[g] <= offset[g + 1];
  STD_TORCH_CHECK(rising, "prompt_offsets must rise from 0 to the number of scores, ", count);

  Tensor metrics = empty({RankingMetric::size}), grad = empty({count});
  const Ranking args{
      .scores = floats(x, count),
      .int_ranks = integers ? flat<int64_t>(rank, count, ScalarType::Long) : nullptr,
      .float_ranks = integers ? nullptr : flat<double>(rank, count, ScalarType::Double),
      .margins = floats(margin, count),
      .center_coef = static_cast<float>(center_coef),
      .per_prompt = per_prompt,
      .grad = floats(grad, count),
  };
  std::vector<RankingSums> sums(prompts);
  const Kernels& kernels = *level().kernels;
  const int64_t pairs_each = prompts ? count / prompts * (count / prompts) : 0;
  for_each_range(prompts, rows_at_a_time(pairs_each), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) sums[g] = kernels.ranking(args, offset[g], offset[g + 1]);
  });
  RankingSums total{};
  double counted = 0;
  for (const RankingSums& prompt : sums) {
    total.loss += per_prompt ? prompt.loss / std::max(prompt.pairs, 1.0) : prompt.loss;
    total.correct += prompt.correct, total.pairs += prompt.pairs, total.margin += prompt.margin;
    counted += prompt.pairs > 0;
  }
  const double scale = 1 / std::max(per_prompt ? counted : total.pairs, 1.0), per_pair = 1 / std::max(total.pairs, 1.0);
  float* metric = floats(metrics, RankingMetric::size);
  metric[RankingMetric::loss] = static_cast<float>(total.loss * scale);
  metric[RankingMetric::accuracy] = static_cast<float>(total.correct * per_pair);
  metric[RankingMetric::pairs] = static_cast<float>(total.pairs);
  metric[RankingMetric::margin] = static_cast<float>(total.margin * per_pair);
  metric[RankingMetric::grad_scale] = static_cast<float>(scale);
  return {metrics, grad};
}

BiasGelu bias_gelu_args(const Tensor& x, const Tensor& bias, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "fastrlhf_cpu: expected contiguous rows [N, H]");
  STD_TORCH_CHECK(bias.is_contiguous() && bias.numel() == x.size(1) && bias.scalar_type() == x.scalar_type(),
                  "fastrlhf_cpu: expected a bias [H] of the rows' dtype");
  return {x.data_ptr(), bias.data_ptr(), nullptr, logits_dtype(x), x.size(1), out.data_ptr()};
}

Tensor bias_gelu(const Tensor x, const Tensor bias) {
  Tensor out = torch::stable::empty_like(x);
  const BiasGelu args = bias_gelu_args(x, bias, out);
  const Kernels& kernels = *level().kernels;
  for_each_range(x.size(0), rows_at_a_time(x.size(1)),
                 [&](int64_t begin, int64_t end) { kernels.bias_gelu(args, begin, end); });
  return out;
}

// Returns the gradients of x and of the bias, the latter in fp32.
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor grad, const Tensor x, const Tensor bias) {
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(),
                  "fastrlhf_cpu: expected a contiguous gradient of the rows' shape and dtype");
  Tensor out = torch::stable::empty_like(x);
  BiasGelu args = bias_gelu_args(x, bias, out);
  args.grad = grad.data_ptr();
  const int64_t step = rows_at_a_time(args.width), blocks = (x.size(0) + step - 1) / step;
  // One sum per block of rows, added in order: the result does not depend on the threads.
  std::vector<float> sums(blocks * args.width);
  const Kernels& kernels = *level().kernels;
  for_each_range(x.size(0), step, [&](int64_t begin, int64_t end) {
    kernels.bias_gelu_backward(args, begin, end, sums.data() + begin / step * args.width);
  });
  Tensor bias_grad = empty({args.width});
  float* total = floats(bias_grad, args.width);
  std::fill(total, total + args.width, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < args.width; ++i) total[i] += sums[block * args.width + i];
  return {out, bias_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY(fastrlhf_cpu, m) {
  m.def("isa() -> str");
  m.def("release() -> ()");
  m.def("empty_pooled(Tensor like, int rows, int columns) -> Tensor");
  m.def(
      "logprob_statistics(Tensor rows, Tensor labels, Tensor? mask, float temperature, int vocab_start, int columns,"
      " float? softcap=None) -> Tensor");
  m.def(
      "logprob_backward(Tensor rows, Tensor labels, Tensor? mask, Tensor row_max, Tensor row_sum, Tensor? entropy,"
      " Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp, float temperature, int vocab_start,"
      " int columns, Tensor(a!) out, float? softcap=None) -> ()");
  m.def("logits_kl_statistics(Tensor rows, Tensor ref_rows, Tensor? mask, float temperature, int columns) -> Tensor");
  m.def(
      "logits_kl_backward(Tensor rows, Tensor ref_rows, Tensor? mask, Tensor stats, Tensor kl, Tensor grad,"
      " float temperature, int columns, Tensor(a!)? out, Tensor(b!)? ref_out) -> ()");
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? bootstrap=None)"
      " -> (Tensor, Tensor)");
  m.def(
      "shaped_gae(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask,"
      " Tensor? bootstrap, float kl_coef, float? clip, float gamma, float lam, str estimator) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? values,"
      " Tensor? old_values, Tensor? returns, Tensor? entropy, Tensor? ref_logprobs, Tensor? weights,"
      " Tensor? denominator, float clip_low, float clip_high, float value_clip, float value_coef, float entropy_coef,"
      " float dual_clip, float kl_coef, str objective, str ratio, str kl_estimator, int length)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "ranking_loss(Tensor scores, Tensor ranks, Tensor prompt_offsets, bool per_prompt, Tensor? margins=None,"
      " float center_coef=0.0) -> (Tensor, Tensor)");
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrlhf_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("release", TORCH_BOX(&release));
}

STABLE_TORCH_LIBRARY_IMPL(fastrlhf_cpu, CPU, m) {
  m.impl("empty_pooled", TORCH_BOX(&empty_pooled));
  m.impl("logprob_statistics", TORCH_BOX(&logprob_statistics));
  m.impl("logprob_backward", TORCH_BOX(&logprob_backward));
  m.impl("logits_kl_statistics", TORCH_BOX(&logits_kl_statistics));
  m.impl("logits_kl_backward", TORCH_BOX(&logits_kl_backward));
  m.impl("gae", TORCH_BOX(&gae));
  m.impl("shaped_gae", TORCH_BOX(&shaped_gae));
  m.impl("ppo_loss", TORCH_BOX(&ppo_loss));
  m.impl("ranking_loss", TORCH_BOX(&ranking_loss));
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}

// `import fastrlhf._C_cpu` loads this library, and loading it registers the ops above.
PyMODINIT_FUNC PyInit__C_cpu(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
