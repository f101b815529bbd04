// weight += left right^T, read and written once, with one rounding.
//
// Products are made on the tensor cores from float32 numbers x = high + low, in tf32 each: high high + high low +
// low high, right to some 2^-21. What is not finite has no low part and no part in the mixed products, so that NaN and
// infinity spread as in a product. Tensor cores cut off what a sum cannot hold, where a processor rounds, so the products
// of 8 columns are summed there, and added to the others outside.
#include "kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lightedit {
namespace {

constexpr int kTile = 128;   // rows and columns of the weight that a block has
constexpr int kDepth = 16;   // of the rank at one time
constexpr int kThreads = 256;
constexpr int kPitch = kDepth + 4;  // numbers from row to row: no bank conflicts between the lanes of a fragment
constexpr int kSumPitch = kTile + 4;
constexpr int kBytes = kTile * kSumPitch * static_cast<int>(sizeof(float));
static_assert(2 * kTile * kPitch * sizeof(float) <= kBytes, "factors and sums share the memory");

struct Split {
  uint32_t whole, high, low;  // whole is high, but for what is not finite
};

// To the nearest number of 11 bits, or towards zero where that would be infinite
__device__ inline float short_of(float x) {
  const uint32_t bits = __float_as_uint(x), nearest = (bits + 0x1000u) & 0xffffe000u;
  return __uint_as_float((nearest & 0x7f800000u) == 0x7f800000u ? bits & 0xffffe000u : nearest);
}

__device__ inline Split split(float x) {
  if (!(fabsf(x) <= 3.402823466e38f)) return {__float_as_uint(x + x), 0, 0};
  const float high = short_of(x);
  return {__float_as_uint(high), __float_as_uint(high), __float_as_uint(short_of(x - high))};
}

__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
__device__ T rounded(float x);
template <>
__device__ inline float rounded<float>(float x) { return x; }
template <>
__device__ inline __half rounded<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

struct Problem {
  int64_t weight_row, weight_column;
  const float *left, *right;
  float* total;
  int64_t total_row, total_column, d_out, d_in, rank;
};

// kTile rows of a factor, kDepth columns, into shared memory; zeros beyond its edges.
__device__ inline void stage(float* to, const float* factor, int64_t first, int64_t rows, int64_t start, int64_t rank) {
  const int k = threadIdx.x % kDepth;
  for (int r = threadIdx.x / kDepth; r < kTile; r += kThreads / kDepth) {
    const bool inside = first + r < rows && start + k < rank;
    to[r * kPitch + k] = inside ? factor[(first + r) * rank + start + k] : 0.0f;
  }
}

template <typename weight_t>
__global__ void __launch_bounds__(kThreads, 2) add_low_rank_kernel(weight_t* weight, const Problem p) {
  extern __shared__ float memory[];
  const int64_t across = (p.d_in + kTile - 1) / kTile;
  const int64_t top = blockIdx.x / across * kTile, left = blockIdx.x % across * kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int down = warp / 4 * 64, right = warp % 4 * 32;  // a warp has 64 x 32 of the tile
  float *rows = memory, *columns = memory + kTile * kPitch;
  float sums[4][4][4] = {};
  for (int64_t start = 0; start < p.rank; start += kDepth) {
    stage(rows, p.left, top, p.d_out, start, p.rank);
    stage(columns, p.right, left, p.d_in, start, p.rank);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      uint32_t b_whole[4][2], b_high[4][2], b_low[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Split x = split(columns[(right + j * 8 + group) * kPitch + k + quad + 4 * h]);
          b_whole[j][h] = x.whole, b_high[j][h] = x.high, b_low[j][h] = x.low;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a_whole[4], a_high[4], a_low[4];
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const Split x = split(rows[(down + i * 16 + group + h % 2 * 8) * kPitch + k + quad + h / 2 * 4]);
          a_whole[h] = x.whole, a_high[h] = x.high, a_low[h] = x.low;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float part[4] = {};
          multiply(part, a_low, b_high[j]);
          multiply(part, a_high, b_low[j]);
          multiply(part, a_whole, b_whole[j]);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] += part[e];
        }
      }
    }
    __syncthreads();
  }
  // Through shared memory, so that a warp reads and writes 32 neighbours of a row
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        memory[(down + i * 16 + group + e / 2 * 8) * kSumPitch + right + j * 8 + quad * 2 + e % 2] = sums[i][j][e];
      }
    }
  }
  __syncthreads();
  const int c = threadIdx.x % kTile;
  if (left + c >= p.d_in) return;
  const int64_t column = left + c;
  constexpr int kStep = kThreads / kTile, kBatch = 16;  // loads on their way at one time
  for (int first = threadIdx.x / kTile; first < kTile; first += kBatch * kStep) {
    float sum[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t row = top + first + i * kStep;
      if (row >= p.d_out) continue;
      sum[i] = p.total ? p.total[row * p.total_row + column * p.total_column]
                       : widen(weight[row * p.weight_row + column * p.weight_column]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t row = top + first + i * kStep;
      if (row >= p.d_out) continue;
      sum[i] += memory[(first + i * kStep) * kSumPitch + c];
      if (p.total) p.total[row * p.total_row + column * p.total_column] = sum[i];
      weight[row * p.weight_row + column * p.weight_column] = rounded<weight_t>(sum[i]);
    }
  }
}

template <typename weight_t>
cudaError_t launch(void* weight, const Problem& p, cudaStream_t stream) {
  const auto kernel = add_low_rank_kernel<weight_t>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)) return error;
  const int64_t blocks = (p.d_out + kTile - 1) / kTile * ((p.d_in + kTile - 1) / kTile);
  kernel<<<static_cast<unsigned>(blocks), kThreads, kBytes, stream>>>(static_cast<weight_t*>(weight), p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t add_low_rank(void* weight, Real type, int64_t weight_row, int64_t weight_column, const float* left,
                         const float* right, float* total, int64_t total_row, int64_t total_column, int64_t d_out,
                         int64_t d_in, int64_t rank, cudaStream_t stream) {
  if (d_out == 0 || d_in == 0) return cudaSuccess;
  const Problem p{weight_row, weight_column, left, right, total, total_row, total_column, d_out, d_in, rank};
  switch (type) {
    case Real::kFloat16:
      return launch<__half>(weight, p, stream);
    case Real::kBFloat16:
      return launch<__nv_bfloat16>(weight, p, stream);
    case Real::kFloat32:
      return launch<float>(weight, p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lightedit
