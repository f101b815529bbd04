// The second moment by the vendor's BLAS, for the types that no kernel takes.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

namespace lightedit {

// gram += keys^T keys on and below the diagonal. A square block on the diagonal is two half as large, and the rectangle
// below one and left of the other, which is one large product. Blocks of size `leaf` are computed whole.
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
