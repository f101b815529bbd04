// S = gamma I + K^T X of small systems, its Cholesky factor L, and L^-1, in float64. A first kernel sums parts of d, a
// block each; a second one, a block for a system, adds the parts in order and factors: the same call gives the same bits.
#include "kernels.h"

#include <algorithm>

namespace lightedit {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 16;                 // rows of keys and solved in shared memory at one time
constexpr int64_t kPart = 256;             // rows of a part at least
constexpr int64_t kBlocks = 256;           // that are enough to fill a GPU
constexpr int kSize = kLargestSystem;
constexpr int kEach = kSize / 16;          // rows, and columns, of S that a thread sums

template <typename real_t>
__global__ void __launch_bounds__(kThreads) sum_parts(const real_t* keys, const real_t* solved, double* space,
                                                      int64_t d, int64_t part, int size) {
  __shared__ double k[kDepth][kSize], x[kDepth][kSize];
  const int64_t system = blockIdx.y, first = blockIdx.x * part, last = min(first + part, d);
  const real_t *keys_at = keys + system * d * size, *solved_at = solved + system * d * size;
  const int down = threadIdx.x / 16, across = threadIdx.x % 16;
  double sums[kEach][kEach] = {};
  for (int64_t start = first; start < last; start += kDepth) {
    for (int at = threadIdx.x; at < kDepth * kSize; at += kThreads) {
      const int row = at / kSize, column = at % kSize;
      const bool inside = start + row < last && column < size;
      k[row][column] = inside ? static_cast<double>(keys_at[(start + row) * size + column]) : 0.0;
      x[row][column] = inside ? static_cast<double>(solved_at[(start + row) * size + column]) : 0.0;
    }
    __syncthreads();
    for (int row = 0; row < kDepth; ++row) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i * 16 >= size) break;
        const double left = k[row][i * 16 + down];
#pragma unroll
        for (int j = 0; j <= i; ++j) sums[i][j] += left * x[row][j * 16 + across];
      }
    }
    __syncthreads();
  }
  double* out = space + (system * gridDim.x + blockIdx.x) * size * size;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      const int row = i * 16 + down, column = j * 16 + across;
      if (row < size && column <= row) out[row * size + column] = sums[i][j];
    }
  }
}

__device__ inline int packed(int row, int column) { return row * (row + 1) / 2 + column; }

// A thread for each column, and for each row: blockDim.x >= size.
template <typename real_t>
__global__ void __launch_bounds__(kSize) factor_kernel(const double* space, int parts, double gamma, real_t* inverse,
                                                       real_t* pivots, double* rows, int size) {
  extern __shared__ double lower[];  // triangle of S, then of L
  __shared__ double whole[kSize];
  __shared__ int bad;
  const int64_t system = blockIdx.x;
  const int me = threadIdx.x, entries = size * size;
  space += system * parts * entries;
  inverse += system * entries;
  rows += system * parts * entries;  // space of the system again, once its parts are added: L^-1 in float64
  for (int at = me; at < entries; at += blockDim.x) {
    const int row = at / size, column = at % size;
    if (column > row) continue;
    double sum = row == column ? gamma : 0.0;
    for (int part = 0; part < parts; ++part) sum += space[static_cast<int64_t>(part) * entries + at];
    lower[packed(row, column)] = sum;
    if (row == column) whole[row] = sum;
  }
  if (me == 0) bad = 0;
  __syncthreads();
  for (int j = 0; j < size; ++j) {
    const double pivot = lower[packed(j, j)];
    __syncthreads();  // all have read it
    if (!(pivot > 0.0) || !(pivot <= 1.7976931348623157e308)) {
      if (me == 0) bad = 1;
      break;  // every thread sees the same pivot
    }
    const double root = sqrt(pivot);
    if (me == j) {
      lower[packed(j, j)] = root;
      pivots[system * size + j] = static_cast<real_t>(pivot / whole[j]);
    } else if (me > j && me < size) {
      lower[packed(me, j)] /= root;
    }
    __syncthreads();
    if (me > j && me < size) {
      const double mine = lower[packed(me, j)];
      for (int column = j + 1; column <= me; ++column) lower[packed(me, column)] -= mine * lower[packed(column, j)];
    }
    __syncthreads();
  }
  __syncthreads();
  if (me >= size) return;
  if (bad) {
    pivots[system * size + me] = static_cast<real_t>(0);
    for (int row = 0; row < size; ++row) inverse[row * size + me] = static_cast<real_t>(0);
    return;
  }
  for (int row = 0; row < size; ++row) {  // a column of L^-1, which no other thread reads
    double rest = row == me ? 1.0 : 0.0;
    for (int k = me; k < row; ++k) rest -= lower[packed(row, k)] * rows[k * size + me];
    rest = row < me ? 0.0 : rest / lower[packed(row, row)];
    rows[row * size + me] = rest;
    inverse[row * size + me] = static_cast<real_t>(rest);
  }
}

int64_t rows_of_part(int64_t systems, int64_t d) {
  const int64_t parts = std::max<int64_t>(1, std::min(d / kPart, kBlocks / std::max<int64_t>(1, systems)));
  return std::max<int64_t>(1, (d + parts - 1) / parts);
}

template <typename real_t>
cudaError_t launch(const real_t* keys, const real_t* solved, double gamma, real_t* inverse, real_t* pivots,
                   double* space, int64_t systems, int64_t d, int size, cudaStream_t stream) {
  constexpr int64_t kGrid = 65535;  // the largest second dimension
  const int64_t part = rows_of_part(systems, d), parts = factor_parts(systems, d);
  constexpr int kTriangle = static_cast<int>(sizeof(double)) / 2;  // bytes of size (size + 1) numbers, halved
  const int bytes = size * (size + 1) * kTriangle;
  constexpr int kMost = kSize * (kSize + 1) * kTriangle;  // allowed whatever this call's size, as others may run beside it
  const auto kernel = factor_kernel<real_t>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost)) return error;
  for (int64_t first = 0; first < systems; first += kGrid) {
    const auto count = static_cast<unsigned>(std::min(kGrid, systems - first));
    double* at = space + first * parts * size * size;
    const dim3 grid(static_cast<unsigned>(parts), count);
    sum_parts<real_t><<<grid, kThreads, 0, stream>>>(keys + first * d * size, solved + first * d * size, at, d, part,
                                                     size);
    if (const auto error = cudaGetLastError()) return error;
    kernel<<<count, kSize, bytes, stream>>>(at, static_cast<int>(parts), gamma, inverse + first * size * size,
                                            pivots + first * size, at, size);
    if (const auto error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t factor_parts(int64_t systems, int64_t d) {
  const int64_t part = rows_of_part(systems, d);
  return std::max<int64_t>(1, (d + part - 1) / part);
}

cudaError_t factor(const void* keys, const void* solved, bool is_double, double gamma, void* inverse, void* pivots,
                   double* space, int64_t systems, int64_t d, int64_t size, cudaStream_t stream) {
  if (systems == 0 || size == 0) return cudaSuccess;
  const int n = static_cast<int>(size);
  if (is_double) {
    return launch(static_cast<const double*>(keys), static_cast<const double*>(solved), gamma,
                  static_cast<double*>(inverse), static_cast<double*>(pivots), space, systems, d, n, stream);
  }
  return launch(static_cast<const float*>(keys), static_cast<const float*>(solved), gamma, static_cast<float*>(inverse),
                static_cast<float*>(pivots), space, systems, d, n, stream);
}

}  // namespace lightedit
