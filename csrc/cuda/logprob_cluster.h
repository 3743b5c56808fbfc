// Log-prob kernels for Hopper and later, as seen from the host: raw pointers, no torch types.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastrlhf {

enum class LogitsType : int { f32, bf16, f16 };

// Logits [B, L, V] with any row strides: token n is row (n / L, n % L). Strides are in elements.
struct DeviceRows {
  void* data;
  int64_t length;  // L
  int64_t stride_b, stride_l;
};

struct LogprobArgs {
  DeviceRows rows, out;  // out.data: null for statistics alone; may be rows.data
  LogitsType type;
  int64_t count;                                               // N
  const int64_t* labels;                                       // [N]
  const bool* mask;                                            // [N], or null
  const float *grad_logprobs, *grad_entropy, *grad_logsumexp;  // [N] each; null is 0
  float temperature;
  int64_t vocab_start, columns, width;  // width: V
  float* stats;                         // [4, N], rows as SoftmaxStatistic (layouts.h)
};

// Launches on `stream`. cudaErrorInvalidValue: a row does not fit the shared memory of a cluster.
cudaError_t logprob_cluster(const LogprobArgs& args, cudaStream_t stream);

}  // namespace fastrlhf
