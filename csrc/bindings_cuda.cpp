// torch.ops.fastrlhf_cuda: kernels that use GPU features Triton does not expose. No autograd here.
#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/logprob_cluster.h"
#include "layouts.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using namespace fastrlhf;

LogitsType logits_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return LogitsType::f32;
    case ScalarType::BFloat16: return LogitsType::bf16;
    case ScalarType::Half: return LogitsType::f16;
    default: throw std::runtime_error("fastrlhf_cuda: logits must be fp32, bf16 or fp16");
  }
}

DeviceRows rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1), "fastrlhf_cuda: expected rows [B, L, V]");
  return {x.data_ptr(), std::max<int64_t>(x.size(1), 1), x.stride(0), x.stride(1)};
}

template <class T>
const T* flat(const Tensor& x, const Tensor& rows, ScalarType dtype) {
  const int64_t count = rows.size(0) * rows.size(1);
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.numel() == count && x.is_contiguous() && x.is_cuda() &&
                      x.get_device_index() == rows.get_device_index(),
                  "fastrlhf_cuda: expected a contiguous per-token tensor of ", count,
                  " elements on the device of the logits");
  return static_cast<const T*>(x.data_ptr());
}

const float* floats(const OptionalTensor& x, const Tensor& rows) {
  return x ? flat<float>(*x, rows, ScalarType::Float) : nullptr;
}

void check(cudaError_t error, const char* doing) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastrlhf_cuda: ", doing, ": ", cudaGetErrorString(error));
}

Tensor run(const Tensor& rows, const Tensor& labels, const OptionalTensor& mask, const OptionalTensor& grad_logprobs,
           const OptionalTensor& grad_entropy, const OptionalTensor& grad_logsumexp, double temperature,
           int64_t vocab_start, int64_t columns, const OptionalTensor& out) {
  const int64_t count = rows.size(0) * rows.size(1);
  STD_TORCH_CHECK(count <= INT32_MAX / 8, "fastrlhf_cuda: ", count, " tokens are too many, expected at most ",
                  INT32_MAX / 8);
  STD_TORCH_CHECK(0 <= columns && columns <= rows.size(2), "fastrlhf_cuda: columns must be from 0 to V");
  const auto device = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the capability");
  STD_TORCH_CHECK(major >= 9, "fastrlhf_cuda: clusters need compute capability 9.0 or more, this GPU has ", major,
                  ".x");

  Tensor stats = torch::stable::new_empty(rows, {SoftmaxStatistic::size, count}, ScalarType::Float);
  const LogprobArgs args{
      .rows = rows_of(rows),
      .out = out ? rows_of(*out) : DeviceRows{nullptr, 1, 0, 0},
      .type = logits_type(rows),
      .count = count,
      .labels = flat<int64_t>(labels, rows, ScalarType::Long),
      .mask = mask ? flat<bool>(*mask, rows, ScalarType::Bool) : nullptr,
      .grad_logprobs = floats(grad_logprobs, rows),
      .grad_entropy = floats(grad_entropy, rows),
      .grad_logsumexp = floats(grad_logsumexp, rows),
      .temperature = static_cast<float>(temperature),
      .vocab_start = vocab_start,
      .columns = columns,
      .width = rows.size(2),
      .stats = static_cast<float*>(stats.data_ptr()),
  };
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = logprob_cluster(args, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error != cudaErrorInvalidValue, "fastrlhf_cuda: a row of ", columns,
                  " columns does not fit the shared memory of a cluster");
  check(error, "launching logprob_row");
  return stats;
}

// As the torch implementation of that name in fastrlhf/ops/logprob_kernels.py.
Tensor logprob_statistics(const Tensor rows, const Tensor labels, const OptionalTensor mask, double temperature,
                          int64_t vocab_start, int64_t columns) {
  const OptionalTensor none;
  return run(rows, labels, mask, none, none, none, temperature, vocab_start, columns, none);
}

// Returns the statistics and writes the gradient into `out` (which may be `rows`), for upstream gradients known
// beforehand. Only for complete rows: sharded ones must exchange their statistics first.
Tensor logprob_forward_backward(const Tensor rows, const Tensor labels, const OptionalTensor mask,
                                const OptionalTensor grad_logprobs, const OptionalTensor grad_entropy,
                                const OptionalTensor grad_logsumexp, double temperature, int64_t vocab_start,
                                int64_t columns, const Tensor out) {
  STD_TORCH_CHECK(out.scalar_type() == rows.scalar_type() && out.numel() == rows.numel() && out.is_cuda() &&
                      out.get_device_index() == rows.get_device_index(),
                  "fastrlhf_cuda: out is not like rows");
  return run(rows, labels, mask, grad_logprobs, grad_entropy, grad_logsumexp, temperature, vocab_start, columns, out);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastrlhf_cuda, m) {
  m.def(
      "logprob_statistics(Tensor rows, Tensor labels, Tensor? mask, float temperature, int vocab_start, int columns)"
      " -> Tensor");
  m.def(
      "logprob_forward_backward(Tensor rows, Tensor labels, Tensor? mask, Tensor? grad_logprobs, Tensor? grad_entropy,"
      " Tensor? grad_logsumexp, float temperature, int vocab_start, int columns, Tensor(a!) out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastrlhf_cuda, CUDA, m) {
  m.impl("logprob_statistics", TORCH_BOX(&logprob_statistics));
  m.impl("logprob_forward_backward", TORCH_BOX(&logprob_forward_backward));
}

// `import fastrlhf._C_cuda` loads this library, and loading it registers the ops above.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
