// What second_moment_ shares on the CPU and on CUDA.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

namespace lightedit {

inline void check_second_moment(const at::Tensor& gram, const at::Tensor& keys, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(keys.dim() == 2 && gram.dim() == 2 && gram.size(0) == keys.size(1) && gram.size(1) == keys.size(1),
              "expected gram [d, d] and keys [n, d]");
  TORCH_CHECK(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, "gram is float32 or float64");
  TORCH_CHECK(!mask || (mask->dim() == 1 && mask->size(0) == keys.size(0) && mask->scalar_type() == at::kBool),
              "expected a bool mask [n]");
}

// gram += keys^T keys on and below the diagonal by the vendor's BLAS. A square block on the diagonal is two half as large,
// and the rectangle below one and left of the other, which is one large product. Blocks of size `leaf` are computed whole.
inline void add_products(const at::Tensor& gram, const at::Tensor& keys, int64_t leaf) {
  const int64_t d = gram.size(0);
  if (d <= leaf) {
    gram.add_(at::mm(keys.t(), keys).tril_());
    return;
  }
  const int64_t half = (d / 2 + 63) / 64 * 64;  // whole cache lines
  const auto first = keys.narrow(1, 0, half), second = keys.narrow(1, half, d - half);
  add_products(gram.narrow(0, 0, half).narrow(1, 0, half), first, leaf);
  const auto rectangle = gram.narrow(0, half, d - half).narrow(1, 0, half);
  if (gram.scalar_type() == keys.scalar_type()) {
    rectangle.addmm_(second.t(), first);
  } else {
    rectangle.add_(at::mm(second.t(), first));
  }
  add_products(gram.narrow(0, half, d - half).narrow(1, half, d - half), second, leaf);
}

}  // namespace lightedit
