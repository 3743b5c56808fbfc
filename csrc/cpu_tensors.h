// What the bindings of the CPU kernels share: the choice of the instruction set, torch tensors as pointers, and the
// division of rows among threads. Included by bindings_cpu.cpp alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"
#include "output_pool.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using namespace fastrlhf;

// --- instruction sets ------------------------------------------------------------------------------------------

#ifdef FASTRLHF_HAVE_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#ifdef FASTRLHF_HAVE_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Level {
  const char* name;
  const Kernels* kernels;
};

// Best first.
const std::vector<Level>& levels() {
  static const std::vector<Level> found = [] {
    std::vector<Level> all;
#ifdef FASTRLHF_HAVE_AVX512BF16
    if (has_avx512() && __builtin_cpu_supports("avx512bf16")) all.push_back({"avx512bf16", &kernels_avx512bf16});
#endif
#ifdef FASTRLHF_HAVE_AVX512
    if (has_avx512()) all.push_back({"avx512", &kernels_avx512});
#endif
#ifdef FASTRLHF_HAVE_AVX2
    if (has_avx2()) all.push_back({"avx2", &kernels_avx2});
#endif
    all.push_back({"default", &kernels_default});
    return all;
  }();
  return found;
}

// FASTRLHF_CPU_ISA names a level. It is read at every call, so that a test or a benchmark can select each in turn.
const Level& level() {
  const char* wanted = std::getenv("FASTRLHF_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return levels().front();
  std::string known;
  for (const Level& one : levels()) {
    if (std::string(one.name) == wanted) return one;
    known += std::string(known.empty() ? "" : ", ") + one.name;
  }
  throw std::runtime_error(std::string("FASTRLHF_CPU_ISA=") + wanted + ": this build on this CPU has " + known);
}

std::string isa() { return level().name; }

// --- tensors as pointers --------------------------------------------------------------------------------------------

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: throw std::runtime_error("fastrlhf_cpu: expected a floating tensor");
  }
}

DType logits_dtype(const Tensor& x) {
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype != DType::f64, "fastrlhf_cpu: logits must be fp32, bf16 or fp16");
  return dtype;
}

Rows rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1), "fastrlhf_cpu: expected rows [B, L, V]");
  return {x.data_ptr(), std::max<int64_t>(x.size(1), 1), x.stride(0), x.stride(1)};
}

// The columns that are vocabulary lie inside the rows.
void check_columns(const Tensor& rows, int64_t columns) {
  STD_TORCH_CHECK(rows.dim() == 3 && 0 <= columns && columns <= rows.size(2),
                  "fastrlhf_cpu: expected rows [B, L, V] and columns from 0 to V");
}

void check_same_shape(const Tensor& rows, const Tensor& others) {
  STD_TORCH_CHECK(others.dim() == 3 && others.size(0) == rows.size(0) && others.size(1) == rows.size(1) &&
                      others.size(2) == rows.size(2),
                  "fastrlhf_cpu: expected tensors of the shape of the rows");
}

Rows rows_of(const OptionalTensor& x) { return x ? rows_of(*x) : Rows{nullptr, 1, 0, 0}; }

Tensor empty(std::initializer_list<int64_t> sizes) {
  return OutputPool::instance().empty(sizes, ScalarType::Float, sizeof(float));
}

// Contiguous per-token tensors [count] of one dtype.
template <class T>
T* flat(const Tensor& x, int64_t count, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.numel() == count && x.is_contiguous(),
                  "fastrlhf_cpu: expected a contiguous per-token tensor of ", count, " elements");
  return static_cast<T*>(x.data_ptr());
}

float* floats(const Tensor& x, int64_t count) { return flat<float>(x, count, ScalarType::Float); }
const float* floats(const OptionalTensor& x, int64_t count) { return x ? floats(*x, count) : nullptr; }
const bool* mask_of(const OptionalTensor& x, int64_t count) {
  return x ? flat<bool>(*x, count, ScalarType::Bool) : nullptr;
}

Floats any_floats(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.numel() == count && x.is_contiguous(), "fastrlhf_cpu: expected ", count, " contiguous elements");
  return {x.data_ptr(), dtype_of(x)};
}

Floats any_floats(const OptionalTensor& x, int64_t count) {
  return x ? any_floats(*x, count) : Floats{nullptr, DType::f32};
}

// A float tensor [rows, count] whose rows have names (layouts.h).
struct Table {
  Tensor tensor;
  float* data;
  int64_t count;

  explicit Table(std::initializer_list<int64_t> sizes)
      : tensor(empty(sizes)), data(static_cast<float*>(tensor.data_ptr())), count(*(sizes.begin() + 1)) {}
  Table(const Tensor& x, int64_t rows, int64_t columns) : tensor(x), data(floats(x, rows * columns)), count(columns) {}

  float* row(int64_t which) const { return data + which * count; }
};

// --- threads and memory ---------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 1 << 16;  // elements a thread takes at a time

// Call f(begin, end) over [0, count) in steps of `step`. A thread takes the next step when it has finished one: masked
// rows cost nothing, and would leave an even split unbalanced.
template <class F>
void for_each_range(int64_t count, int64_t step, const F& f) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), (count + step - 1) / step);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t at = next.fetch_add(step); at < count; at = next.fetch_add(step)) f(at, std::min(at + step, count));
  });
}

int64_t rows_at_a_time(int64_t width) { return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, width)); }

// Rows of a rollout per step: a multiple of the rows that gae processes together.
int64_t rollout_rows(int64_t length) { return std::max<int64_t>(16, rows_at_a_time(4 * length) / 16 * 16); }

int64_t bytes_of(const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()); }

// A large, newly allocated buffer has no pages yet. Requesting those that a thread is about to write, all at once,
// saves a page fault per 4 KiB, and they are still in its cache when it writes them: a fifth of the time of a backward
// in fp32. (Stores that bypass the caches, and 2 MiB pages on a virtual machine, took longer than this.)
class Pages {
 public:
  // `out` holds `count` rows.
  Pages(const Tensor& out, int64_t count)
      : begin_(reinterpret_cast<uintptr_t>(out.data_ptr())), bytes_(bytes_of(out)), count_(count) {
    constexpr int64_t worthwhile = 1 << 20;  // malloc keeps smaller ones
    wanted_ = bytes_ >= worthwhile && out.is_contiguous();
  }

  void get([[maybe_unused]] int64_t first_row, [[maybe_unused]] int64_t last_row) const {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
    if (!wanted_) return;
    constexpr uintptr_t page = 4096;
    const uintptr_t row = bytes_ / count_;
    const uintptr_t from = (begin_ + first_row * row + page - 1) / page * page;
    const uintptr_t to = (begin_ + last_row * row) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE);  // a failure is harmless
#endif
  }

 private:
  uintptr_t begin_;
  int64_t bytes_, count_;
  bool wanted_;
};

}  // namespace
