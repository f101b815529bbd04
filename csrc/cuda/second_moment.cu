// gram += keys^T diag(mask) keys on and below the diagonal, for keys of 16 bits: products on the tensor cores, which are
// exact, and sums in float32.
//
// A block owns a tile of gram and streams all keys past it, through a ring of stages in shared memory that cp.async
// fills; a key that does not count is filled in as zeros and never read. Sums go to gram after each kSegment keys: tensor
// cores cut off what a sum cannot hold, where a processor rounds, so longer sums would come out too small.
//
// A stage holds kDepth keys of the tile's rows and then of its columns, in panels of 64 columns: [panel][key][64], 128
// bytes a key, of which the 16-byte chunk c lies at c ^ (key & 7). Hopper's wgmma knows that layout as its 128-byte
// swizzle for operands whose rows run along memory, and for ldmatrix it is free of bank conflicts.
#include "kernels.h"

#include <algorithm>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lightedit {
namespace {

constexpr int kRows = 128, kColumns = 256;  // of a tile
constexpr int kDepth = 32;                  // keys of a stage
constexpr int kSegment = 4096;              // keys summed in the tensor cores; a multiple of kDepth
constexpr int kThreads = 256;
constexpr int kSide = 2048;                 // of the squares in which tiles are visited, to read the same keys together
constexpr int kPanel = kDepth * 128;        // bytes of 64 columns of a stage
constexpr int kRowPanels = kRows / 64, kPanels = kRowPanels + kColumns / 64;
constexpr int kStage = kPanels * kPanel;
constexpr int kAlignment = 1024;            // of a panel, for the swizzle counts in addresses
constexpr int kSums = kRows * kColumns / kThreads;  // of a thread
static_assert(kSegment % kDepth == 0 && kPanel % kAlignment == 0 && kSide % kRows == 0 && kSide % kColumns == 0);

__device__ inline void copy_chunk(uint32_t to, const void* from, bool counts) {
  const int bytes = counts ? 16 : 0;  // the rest of the 16 is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Where a panel lies: start, distance of panels (which each hold 64 numbers of a row), distance of 8 keys; swizzled.
__device__ inline uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(kPanel >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}

#define LIGHTEDIT_4(x, i) "+f"(x[i]), "+f"(x[(i) + 1]), "+f"(x[(i) + 2]), "+f"(x[(i) + 3])
#define LIGHTEDIT_16(x, i) LIGHTEDIT_4(x, i), LIGHTEDIT_4(x, (i) + 4), LIGHTEDIT_4(x, (i) + 8), LIGHTEDIT_4(x, (i) + 12)
#define LIGHTEDIT_64(x, i) \
  LIGHTEDIT_16(x, i), LIGHTEDIT_16(x, (i) + 16), LIGHTEDIT_16(x, (i) + 32), LIGHTEDIT_16(x, (i) + 48)
// 64 x 256 sums += 16 keys of 64 rows and of 256 columns, both of which run along memory: hence 1, 1 at the end
#define LIGHTEDIT_WGMMA(type)                                                                                         \
  asm volatile(                                                                                                       \
      "{.reg .pred add; setp.ne.b32 add, %130, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                    \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"  \
      "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"  \
      "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,"  \
      "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,"  \
      "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127},"         \
      " %128, %129, add, 1, 1, 1, 1;}\n"                                                                              \
      : LIGHTEDIT_64(sums, 0), LIGHTEDIT_64(sums, 64)                                                                 \
      : "l"(rows), "l"(columns), "r"(1))

// Keeps the compiler from touching the sums across this point: it does not know that wgmma goes on writing them.
__device__ inline void pin(float (&sums)[kSums]) {
  asm volatile("" : LIGHTEDIT_64(sums, 0), LIGHTEDIT_64(sums, 64)::"memory");
}

// A warpgroup of four warps has 64 rows of the tile. Its products are under way when this returns.
template <bool kIsBFloat16>
__device__ inline void multiply(float (&sums)[kSums], uint32_t stage, int warp, int) {
  pin(sums);
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    const uint64_t rows = descriptor(stage + warp / 4 * kPanel + k * 128);
    const uint64_t columns = descriptor(stage + kRowPanels * kPanel + k * 128);
    if constexpr (kIsBFloat16) {
      LIGHTEDIT_WGMMA("bf16");
    } else {
      LIGHTEDIT_WGMMA("f16");
    }
  }
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int kPending>
__device__ inline void finish(float (&sums)[kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;\n"
               : LIGHTEDIT_64(sums, 0), LIGHTEDIT_64(sums, 64)
               : "n"(kPending)
               : "memory");
}

// What cp.async wrote is to be seen by the tensor cores' own path to shared memory.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ inline int row_of(int i, int warp, int lane) { return warp * 16 + lane / 4 + i / 2 % 2 * 8; }
__device__ inline int column_of(int i, int, int lane) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

#else

__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// 8 numbers of one key, from `column`, a multiple of 8 within a run of panels
__device__ inline uint32_t chunk(uint32_t panels, int key, int column) {
  return panels + column / 64 * kPanel + key * 128 + ((column % 64 / 8) ^ (key & 7)) * 16;
}

// A warp has 64 rows and 64 columns of the tile.
template <bool kIsBFloat16>
__device__ inline void multiply(float (&sums)[kSums], uint32_t stage, int warp, int lane) {
  const int top = warp / 4 * 64, left = warp % 4 * 64;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t rows[4][4], columns[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // lanes 0-7, 8-15, 16-23 and 24-31 name the 8 x 8 parts (rows 0, keys 0), (8, 0), (0, 8) and (8, 8)
      load_transposed(rows[i], chunk(stage, k + lane % 8 + lane / 16 * 8, top + i * 16 + lane / 8 % 2 * 8));
      // and here (columns 0, keys 0), (0, 8), (8, 0) and (8, 8)
      load_transposed(columns[i], chunk(stage + kRowPanels * kPanel, k + lane % 8 + lane / 8 % 2 * 8,
                                        left + i * 16 + lane / 16 * 8));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float* sum = sums + (i * 8 + j) * 4;
        const uint32_t b0 = columns[j / 2][j % 2 * 2], b1 = columns[j / 2][j % 2 * 2 + 1];
        if constexpr (kIsBFloat16) {
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
              "{%0,%1,%2,%3};\n"
              : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
              : "r"(rows[i][0]), "r"(rows[i][1]), "r"(rows[i][2]), "r"(rows[i][3]), "r"(b0), "r"(b1));
        } else {
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
              "{%0,%1,%2,%3};\n"
              : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
              : "r"(rows[i][0]), "r"(rows[i][1]), "r"(rows[i][2]), "r"(rows[i][3]), "r"(b0), "r"(b1));
        }
      }
    }
  }
}

template <int kPending>
__device__ inline void finish(float (&)[kSums]) {}
__device__ inline void publish() {}

__device__ inline int row_of(int i, int warp, int lane) {
  return warp / 4 * 64 + i / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
}
__device__ inline int column_of(int i, int warp, int lane) {
  return warp % 4 * 64 + i / 4 % 8 * 8 + lane % 4 * 2 + i % 2;
}

#endif

struct Problem {
  int64_t gram_row, gram_column;
  const uint16_t* keys;
  int64_t key_row;
  const bool* mask;
  int64_t n;
  int columns, d;
};

// Which keys of a stage count, of those that a thread copies
struct Counts {
  static constexpr int kKeys = kDepth / (kThreads / 8);
  bool of[kKeys];
};

__device__ inline Counts counts(const Problem& p, int64_t stage) {
  Counts result;
#pragma unroll
  for (int i = 0; i < Counts::kKeys; ++i) {
    const int64_t t = stage * kDepth + threadIdx.x / 8 + i * (kThreads / 8);
    result.of[i] = t < p.n && (p.mask == nullptr || p.mask[t]);
  }
  return result;
}

// A thread copies the same chunk of 8 columns of every panel.
__device__ inline void copy_stage(const Problem& p, uint32_t to, int64_t stage, const Counts& counts, int top, int left) {
  const int c = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < Counts::kKeys; ++i) {
    const int key = threadIdx.x / 8 + i * (kThreads / 8);
    const uint16_t* from = p.keys + (stage * kDepth + key) * p.key_row;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = (panel < kRowPanels ? top + panel * 64 : left + (panel - kRowPanels) * 64) + c * 8;
      const bool there = counts.of[i] && column < p.columns;
      copy_chunk(to + panel * kPanel + key * 128 + (c ^ (key & 7)) * 16, there ? from + column : p.keys, there);
    }
  }
}

template <bool kIsBFloat16, typename gram_t, int kStages>
__global__ void __launch_bounds__(kThreads, 1) second_moment_kernel(gram_t* gram, const Problem p) {
  extern __shared__ uint8_t memory[];
  constexpr int kDown = kSide / kRows, kSquare = kDown * (kSide / kColumns);
  // Squares of the triangle are counted row by row; the root is off by one at most
  const int square = blockIdx.x / kSquare, tile = blockIdx.x % kSquare;
  int band = static_cast<int>((sqrtf(8.0f * static_cast<float>(square) + 1.0f) - 1.0f) / 2.0f);
  if (band * (band + 1) / 2 > square) --band;
  if ((band + 1) * (band + 2) / 2 <= square) ++band;
  const int top = band * kSide + tile % kDown * kRows;
  const int left = (square - band * (band + 1) / 2) * kSide + tile / kDown * kColumns;
  if (top >= p.d || left >= p.d || left >= top + kRows) return;

  const uint32_t base = (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + kAlignment - 1) & ~(kAlignment - 1u);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t stages = (p.n + kDepth - 1) / kDepth;
  // Stages are copied so far ahead that the one written to is of the products before the last ones, which may still run
  constexpr int kAhead = kStages - 2;
  for (int64_t s = 0; s < kAhead; ++s) {
    if (s < stages) copy_stage(p, base + static_cast<uint32_t>(s) * kStage, s, counts(p, s), top, left);
    asm volatile("cp.async.commit_group;\n" ::: "memory");
  }
  Counts next = counts(p, kAhead);
  int slot = 0;
  for (int64_t s = 0; s < stages;) {
    float sums[kSums] = {};
    for (const int64_t end = min(s + kSegment / kDepth, stages); s < end; ++s) {
      asm volatile("cp.async.wait_group %0;\n" ::"n"(kAhead - 1) : "memory");
      publish();
      __syncthreads();
      multiply<kIsBFloat16>(sums, base + slot * kStage, warp, lane);
      finish<1>(sums);
      if (s + kAhead < stages) {
        copy_stage(p, base + (slot + kAhead) % kStages * kStage, s + kAhead, next, top, left);
        next = counts(p, s + kAhead + 1);  // read one step before it is needed
      }
      asm volatile("cp.async.commit_group;\n" ::: "memory");
      slot = (slot + 1) % kStages;
    }
    finish<0>(sums);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      int row = top + row_of(i, warp, lane), column = left + column_of(i, warp, lane);
      // Opaque and in order, or addresses and loads of all sums are made at once and take the registers of the loop
      asm volatile("" : "+r"(row), "+r"(column)::"memory");
      if (row < p.d && column <= row) gram[row * p.gram_row + column * p.gram_column] += static_cast<gram_t>(sums[i]);
    }
  }
}

template <bool kIsBFloat16, typename gram_t, int kStages>
cudaError_t launch(gram_t* gram, const Problem& p, cudaStream_t stream) {
  constexpr int kBytes = kStages * kStage + kAlignment;
  const auto kernel = second_moment_kernel<kIsBFloat16, gram_t, kStages>;
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)) return error;
  const int64_t squares = (p.d + kSide - 1) / kSide;
  const auto blocks = static_cast<unsigned>(squares * (squares + 1) / 2 * (kSide / kRows) * (kSide / kColumns));
  kernel<<<blocks, kThreads, kBytes, stream>>>(gram, p);
  return cudaGetLastError();
}

template <bool kIsBFloat16, typename gram_t>
cudaError_t choose_stages(gram_t* gram, const Problem& p, cudaStream_t stream) {
  int device = 0, memory = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  return memory >= 8 * kStage + kAlignment ? launch<kIsBFloat16, gram_t, 8>(gram, p, stream)
                                           : launch<kIsBFloat16, gram_t, 4>(gram, p, stream);
}

}  // namespace

cudaError_t second_moment(void* gram, bool gram_is_double, int64_t gram_row, int64_t gram_column, const void* keys,
                          Half type, int64_t key_row, int64_t columns, const bool* mask, int64_t n, int64_t d,
                          cudaStream_t stream) {
  const Problem p{gram_row, gram_column, static_cast<const uint16_t*>(keys), key_row, mask, n, static_cast<int>(columns),
                  static_cast<int>(d)};
  if (n == 0 || d == 0) return cudaSuccess;
  if (gram_is_double) {
    auto* out = static_cast<double*>(gram);
    return type == Half::kBFloat16 ? choose_stages<true>(out, p, stream) : choose_stages<false>(out, p, stream);
  }
  auto* out = static_cast<float*>(gram);
  return type == Half::kBFloat16 ? choose_stages<true>(out, p, stream) : choose_stages<false>(out, p, stream);
}

}  // namespace lightedit
