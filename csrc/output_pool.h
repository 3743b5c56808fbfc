// A bounded cache of freed outputs, so that the next call's outputs use pages that the process already has.
//
// malloc returns blocks of this size to the kernel when they are freed and maps new ones for the next call. Each 4 KiB
// page is then faulted in and cleared, which costs such an op more than its arithmetic. torch's allocator for GPUs
// keeps freed blocks for the same reason. Blocks come from torch's CPU allocator and count in its statistics.
//
// FASTRLHF_POOL_MB (default 512; 0 disables the cache; read once) bounds the free bytes kept, over all sizes; the
// blocks freed the longest time ago are dropped first. Not cached: blocks of more than half of that, which would push
// out all others, and of less than 256 KiB, which malloc keeps.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <list>
#include <mutex>
#include <optional>
#include <vector>

namespace fastrlhf {

class OutputPool {
  using ScalarType = torch::headeronly::ScalarType;

 public:
  // Never destroyed: tensors may outlive the static objects of this library.
  static OutputPool& instance() {
    static OutputPool* pool = new OutputPool;
    return *pool;
  }

  // An uninitialised contiguous tensor. Its storage cannot be resized.
  torch::stable::Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, int64_t element_size) {
    constexpr int64_t least = 256 << 10;
    const std::vector<int64_t> shape(sizes);
    int64_t bytes = element_size;
    for (const int64_t size : shape) bytes *= size;
    if (bytes < least || bytes > limit_ / 2) return torch::stable::empty({shape.data(), shape.size()}, dtype);

    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
    const torch::stable::Tensor block = take(bytes);
    return torch::stable::from_blob(block.data_ptr(), {shape.data(), shape.size()}, {strides.data(), strides.size()},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                    [this, block](void*) { put_back(block); });
  }

  // Free the blocks that no tensor uses.
  void release() {
    std::list<torch::stable::Tensor> dropped;  // freed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(free_);
    kept_ = 0;
  }

 private:
  static int64_t bytes_of(const torch::stable::Tensor& block) { return block.numel(); }

  static int64_t limit_from_environment() {
    const char* text = std::getenv("FASTRLHF_POOL_MB");
    if (text == nullptr || *text == '\0') return int64_t{512} << 20;
    char* end = nullptr;
    const long long megabytes = std::strtoll(text, &end, 10);
    STD_TORCH_CHECK(*end == '\0' && megabytes >= 0 && megabytes < (1LL << 40), "FASTRLHF_POOL_MB=", text,
                    ": expected a whole number of MiB, 0 to keep nothing");
    return megabytes << 20;
  }

  // Best fit: the smallest free block within 25 % of the request (the most recently freed on ties: likely still in
  // cache), or a new allocation.
  torch::stable::Tensor take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const int64_t size = bytes_of(*it);
        if (size >= bytes && size <= bytes + bytes / 4 && (best == free_.end() || size <= bytes_of(*best))) best = it;
      }
      if (best != free_.end()) {
        const torch::stable::Tensor block = *best;
        kept_ -= bytes_of(block);
        free_.erase(best);
        return block;
      }
    }
    return torch::stable::empty({&bytes, 1}, ScalarType::Byte);
  }

  void put_back(const torch::stable::Tensor& block) {
    std::list<torch::stable::Tensor> dropped;  // freed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    kept_ += bytes_of(block);
    while (kept_ > limit_) {
      kept_ -= bytes_of(free_.front());
      dropped.splice(dropped.end(), free_, free_.begin());
    }
  }

  const int64_t limit_ = limit_from_environment();
  std::mutex mutex_;
  std::list<torch::stable::Tensor> free_;  // freed the longest ago first
  int64_t kept_ = 0;
};

}  // namespace fastrlhf
