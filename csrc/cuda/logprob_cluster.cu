// Softmax statistics of a row and, when the upstream gradients are known beforehand, the gradient of its logits: one
// read and one write of the logits, where a forward and a backward kernel read them twice.
//
// A row is shared by a cluster of 1 to 8 thread blocks, because one block could not hold it: 128,256 columns in bf16
// are 256 KB. Each block keeps its slice in shared memory while it forms its part of the sums; the blocks then read one
// another's sums through distributed shared memory, always in rank order, so that all hold the same bits. A slice is at
// most 108 KB where that is possible: two blocks on a multiprocessor, one loading while the other stores. Not
// supported: rows sharded over GPUs (their sums must leave the cluster), and GPUs before sm_90.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../layouts.h"
#include "logprob_cluster.h"

namespace cg = cooperative_groups;

namespace fastrlhf {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBatch = 4;  // vectors a thread has in flight: two blocks of 512 keep 64 KB coming to a multiprocessor
constexpr int kMaxCluster = 8;             // the portable limit
constexpr int kGoodSlice = 108 * 1024;     // bytes
constexpr int kLargestSlice = 220 * 1024;  // bytes, of the 227 KB that a block may have
constexpr float kLog2e = 1.4426950408889634f;

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float v, float* to) { *to = v; }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void from_float(float v, __half* to) { *to = __float2half_rn(v); }

template <class T>
union Vector {
  uint4 raw;
  T value[kPerVector<T>];
};

// sum e_j and sum e_j (x_j - top) / T with e_j = exp((x_j - top) / T), over some of a row's columns.
struct Sums {
  float top, sum, weighted;
};

__device__ __forceinline__ float exp_scaled(float d, float inverse) { return exp2f(d * inverse * kLog2e); }

__device__ __forceinline__ Sums moved(Sums a, float top, float inverse) {
  const float scale = a.sum == 0.0f ? 0.0f : exp_scaled(a.top - top, inverse);
  if (scale == 0.0f) return {top, scale * a.sum, scale * a.sum};  // 0, not 0 * -inf; NaN stays
  return {top, scale * a.sum, scale * (a.weighted + (a.top - top) * inverse * a.sum)};
}

__device__ __forceinline__ Sums combined(Sums a, Sums b, float inverse) {
  const float top = fmaxf(a.top, b.top);
  a = moved(a, top, inverse);
  b = moved(b, top, inverse);
  return {top, a.sum + b.sum, a.weighted + b.weighted};
}

// Add `n` columns to the sums. fmaxf skips NaN; the sum does not.
template <int n>
__device__ __forceinline__ void add_columns(const float (&x)[n], float inverse, Sums* sums) {
  float top = sums->top;
#pragma unroll
  for (int i = 0; i < n; ++i) top = fmaxf(top, x[i]);
  if (top > sums->top) *sums = moved(*sums, top, inverse);
  const float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float d = x[i] - shift, e = exp_scaled(d, inverse);
    sums->sum += e;
    sums->weighted += e == 0.0f ? 0.0f : e * (d * inverse);
  }
}

template <class T>
__device__ __forceinline__ void add_vector(const Vector<T>& v, float inverse, Sums* sums) {
  float x[kPerVector<T>];
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) x[i] = to_float(v.value[i]);
  add_columns(x, inverse, sums);
}

// The sums of all threads of the cluster, in a fixed order. The caller synchronizes the cluster before it exits, so
// that shared memory outlives the reads of the other blocks.
__device__ Sums reduced(Sums mine, float inverse, cg::cluster_group cluster) {
  __shared__ Sums warps[kWarps];
  __shared__ Sums block;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Sums other = {__shfl_xor_sync(~0u, mine.top, step), __shfl_xor_sync(~0u, mine.sum, step),
                        __shfl_xor_sync(~0u, mine.weighted, step)};
    const bool lower = (threadIdx.x & step) == 0;  // the same order of operands in both lanes
    mine = lower ? combined(mine, other, inverse) : combined(other, mine, inverse);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    Sums total = warps[0];
    for (int w = 1; w < kWarps; ++w) total = combined(total, warps[w], inverse);
    block = total;
  }
  cluster.sync();
  Sums total = *cluster.map_shared_rank(&block, 0);
  for (unsigned rank = 1; rank < cluster.num_blocks(); ++rank)
    total = combined(total, *cluster.map_shared_rank(&block, rank), inverse);
  return total;
}

// The terms of a column's gradient other than its logit.
struct Gradient {
  float shift, inverse, per_sum;     // per_sum: 1 / sum e
  float to_label, to_p, to_entropy;  // upstream, already divided by T
  float offset;                      // log p_j + H = (x_j - top) / T + offset

  __device__ __forceinline__ float of(float x, bool is_label) const {
    const float d = x - shift, p = exp_scaled(d, inverse) * per_sum;
    const float rest = p == 0.0f ? 0.0f : p * (to_p - to_entropy * (d * inverse + offset));
    return is_label ? to_label + rest : rest;
  }
};

__device__ __forceinline__ Gradient gradient_of(const LogprobArgs& a, int64_t n, Sums row) {
  const float inverse = 1.0f / a.temperature;
  const float label = a.grad_logprobs ? a.grad_logprobs[n] : 0.0f;
  const float entropy = a.grad_entropy ? a.grad_entropy[n] : 0.0f;
  const float lse = a.grad_logsumexp ? a.grad_logsumexp[n] : 0.0f;
  // H - log sum = -(sum e u) / sum
  return {row.top,
          inverse,
          1.0f / row.sum,
          label * inverse,
          (lse - label) * inverse,
          entropy * inverse,
          -row.weighted / row.sum};
}

// One block's share of a row: whole 16-byte vectors [first, first + vectors) counted from the row's first aligned
// column `head`, and, in the first and last block, the few columns before and after them.
struct Slice {
  int64_t head, first, vectors, tail;  // tail: the first column after the row's last whole vector
  bool is_first, is_last;
};

template <class T>
__device__ __forceinline__ Slice slice_of(const T* x, int64_t columns, cg::cluster_group cluster) {
  const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t head = min(off == 0 ? 0 : kPerVector<T> - off, columns);
  const int64_t all = (columns - head) / kPerVector<T>, each = (all + cluster.num_blocks() - 1) / cluster.num_blocks();
  const int64_t first = min(each * cluster.block_rank(), all);
  return {head,
          first,
          min(each, all - first),
          head + all * kPerVector<T>,
          cluster.block_rank() == 0,
          cluster.block_rank() + 1 == cluster.num_blocks()};
}

// Calls f(column) for the columns of this slice that are in no vector, one thread each.
template <class F>
__device__ __forceinline__ void loose_columns(const Slice& slice, int64_t columns, const F& f) {
  if (slice.is_first && threadIdx.x < slice.head) f(static_cast<int64_t>(threadIdx.x));
  if (slice.is_last && slice.tail + threadIdx.x < columns) f(slice.tail + threadIdx.x);
}

template <class T, bool kKeep>
__device__ __forceinline__ Sums read_slice(const T* x, const Slice& slice, int64_t columns, float inverse,
                                           uint4* kept) {
  const uint4* from = reinterpret_cast<const uint4*>(x + slice.head) + slice.first;
  Sums sums = {-INFINITY, 0.0f, 0.0f};
  int64_t i = threadIdx.x;
  for (; i + (kBatch - 1) * kThreads < slice.vectors; i += kBatch * kThreads) {
    Vector<T> batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k].raw = __ldcs(from + i + k * kThreads);  // read once
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (kKeep) kept[i + k * kThreads] = batch[k].raw;
      add_vector(batch[k], inverse, &sums);
    }
  }
  for (; i < slice.vectors; i += kThreads) {
    Vector<T> v;
    v.raw = __ldcs(from + i);
    if (kKeep) kept[i] = v.raw;
    add_vector(v, inverse, &sums);
  }
  loose_columns(slice, columns, [&](int64_t column) {
    const float one[1] = {to_float(x[column])};
    add_columns(one, inverse, &sums);
  });
  return sums;
}

template <class T>
__device__ __forceinline__ void write_slice(const T* x, T* out, const Slice& slice, int64_t columns, int64_t label,
                                            const Gradient& gradient, const uint4* kept) {
  const int64_t begin = slice.head + slice.first * kPerVector<T>;
  if (reinterpret_cast<uintptr_t>(out + begin) % 16 == 0) {
    uint4* to = reinterpret_cast<uint4*>(out + begin);
    for (int64_t i = threadIdx.x; i < slice.vectors; i += kThreads) {
      Vector<T> v;
      v.raw = kept[i];
#pragma unroll
      for (int k = 0; k < kPerVector<T>; ++k)
        from_float(gradient.of(to_float(v.value[k]), begin + i * kPerVector<T> + k == label), &v.value[k]);
      __stcs(to + i, v.raw);
    }
  } else {  // rows of `out` begin elsewhere than those of `rows`, modulo 16 bytes
    const T* value = reinterpret_cast<const T*>(kept);
    for (int64_t i = threadIdx.x; i < slice.vectors * kPerVector<T>; i += kThreads)
      from_float(gradient.of(to_float(value[i]), begin + i == label), out + begin + i);
  }
  loose_columns(slice, columns,
                [&](int64_t column) { from_float(gradient.of(to_float(x[column]), column == label), out + column); });
}

template <class T>
__device__ __forceinline__ T* row_of(const DeviceRows& rows, int64_t n) {
  return static_cast<T*>(rows.data) + n / rows.length * rows.stride_b + n % rows.length * rows.stride_l;
}

template <class T>
__device__ __forceinline__ void clear(T* out, int64_t from, int64_t to) {
  for (int64_t i = from + threadIdx.x; i < to; i += kThreads) from_float(0.0f, out + i);
}

__device__ __forceinline__ void store_stats(const LogprobArgs& a, int64_t n, Sums row, float target) {
  float* const stats = a.stats + n;
  stats[SoftmaxStatistic::row_max * a.count] = row.sum == row.sum ? row.top : row.sum;  // NaN when the sum is
  stats[SoftmaxStatistic::row_sum * a.count] = row.sum;
  stats[SoftmaxStatistic::weighted * a.count] = row.weighted;
  stats[SoftmaxStatistic::target * a.count] = target;
}

// Grid: cluster size x N blocks; one cluster a row.
template <class T, bool kGradient>
__global__ void __launch_bounds__(kThreads, 2) logprob_row(const LogprobArgs a) {
  extern __shared__ uint4 kept[];
  const cg::cluster_group cluster = cg::this_cluster();
  const int64_t n = blockIdx.x / cluster.num_blocks();
  const T* x = row_of<T>(a.rows, n);
  const bool writes_stats = cluster.block_rank() == 0 && threadIdx.x == 0;
  if (a.mask && !a.mask[n]) {  // never read; all blocks of the cluster return
    if (writes_stats) store_stats(a, n, {0.0f, 1.0f, 0.0f}, 0.0f);
    if (kGradient && cluster.block_rank() == 0) clear(row_of<T>(a.out, n), 0, a.width);
    return;
  }
  const uint64_t local = static_cast<uint64_t>(a.labels[n]) - static_cast<uint64_t>(a.vocab_start);
  const int64_t label = local < static_cast<uint64_t>(a.columns) ? static_cast<int64_t>(local) : -1;
  // Before the cluster synchronizes, and so before any write: `out` may be `rows`.
  const float target = writes_stats && label >= 0 ? to_float(x[label]) : -INFINITY;

  const float inverse = 1.0f / a.temperature;
  const Slice slice = slice_of(x, a.columns, cluster);
  const Sums row = reduced(read_slice<T, kGradient>(x, slice, a.columns, inverse, kept), inverse, cluster);
  if (writes_stats) store_stats(a, n, row, target);
  if (kGradient) {
    T* out = row_of<T>(a.out, n);
    write_slice(x, out, slice, a.columns, label, gradient_of(a, n, row), kept);
    if (slice.is_last) clear(out, a.columns, a.width);
  }
  cluster.sync();  // the others may still be reading this block's sums
}

template <class T>
cudaError_t launch(const LogprobArgs& args, cudaStream_t stream) {
  const auto kernel = args.out.data ? logprob_row<T, true> : logprob_row<T, false>;
  const int64_t row_bytes = args.columns * static_cast<int64_t>(sizeof(T));
  unsigned cluster = 1;
  while (cluster < kMaxCluster && row_bytes / cluster > kGoodSlice) cluster *= 2;
  const int64_t slice = (row_bytes / 16 + cluster - 1) / cluster * 16;
  if (args.out.data && slice > kLargestSlice) return cudaErrorInvalidValue;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.count * cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = args.out.data ? static_cast<size_t>(slice) : 0;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const int wanted = static_cast<int>(config.dynamicSmemBytes);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, wanted);
  return error != cudaSuccess ? error : cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

cudaError_t logprob_cluster(const LogprobArgs& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  switch (args.type) {
    case LogitsType::f32: return launch<float>(args, stream);
    case LogitsType::bf16: return launch<__nv_bfloat16>(args, stream);
    default: return launch<__half>(args, stream);
  }
}

}  // namespace fastrlhf
