// preservation_memorization_solve on the CPU: right = X (gamma I + K^T X)^-1, and the pivots of the system.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

namespace lightedit {
namespace {

constexpr int64_t kSmall = 32;  // systems up to this size are solved each on one core, in float64

// One system with everything in the caches: keys and solved [d, n] contiguous. Returns false where it has no solution.
template <typename scalar_t>
bool solve_small(const scalar_t* keys, const scalar_t* solved, double gamma, int64_t d, int64_t n, double* factor,
                 scalar_t* right, scalar_t* pivots) {
  std::fill(factor, factor + n * n, 0.0);  // lower triangle of the system, then of its Cholesky factor
  for (int64_t r = 0; r < d; ++r) {
    const scalar_t *key = keys + r * n, *x = solved + r * n;
    for (int64_t i = 0; i < n; ++i) {
      const double k = key[i];
      for (int64_t j = 0; j <= i; ++j) factor[i * n + j] += k * static_cast<double>(x[j]);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    double* row = factor + i * n;
    row[i] += gamma;
    const double whole = row[i];
    for (int64_t j = 0; j < i; ++j) {
      const double* other = factor + j * n;
      double rest = row[j];
      for (int64_t k = 0; k < j; ++k) rest -= row[k] * other[k];
      row[j] = rest / other[j];
      row[i] -= row[j] * row[j];
    }
    if (!(row[i] > 0) || !std::isfinite(row[i])) return false;
    pivots[i] = static_cast<scalar_t>(row[i] / whole);
    row[i] = std::sqrt(row[i]);
  }
  double y[kSmall];
  bool finite = true;
  for (int64_t r = 0; r < d; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = solved[r * n + i];
      for (int64_t j = 0; j < i; ++j) y[i] -= factor[i * n + j] * y[j];
      y[i] /= factor[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      for (int64_t j = i + 1; j < n; ++j) y[i] -= factor[j * n + i] * y[j];
      y[i] /= factor[i * n + i];
      right[r * n + i] = static_cast<scalar_t>(y[i]);
      finite = finite && std::isfinite(right[r * n + i]);
    }
  }
  return finite;
}

template <typename scalar_t>
void solve_each(const at::Tensor& keys, const at::Tensor& solved, double gamma, const at::Tensor& right,
                const at::Tensor& pivots) {
  const int64_t d = keys.size(-2), n = keys.size(-1), systems = pivots.numel() / n;
  const auto *k = keys.const_data_ptr<scalar_t>(), *x = solved.const_data_ptr<scalar_t>();
  auto *out = right.data_ptr<scalar_t>(), *shares = pivots.data_ptr<scalar_t>();
  at::parallel_for(0, systems, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> factor(n * n);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t at = s * d * n;
      if (!solve_small(k + at, x + at, gamma, d, n, factor.data(), out + at, shares + s * n)) {
        std::fill(out + at, out + at + d * n, std::numeric_limits<scalar_t>::quiet_NaN());
        std::fill(shares + s * n, shares + (s + 1) * n, scalar_t(0));
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor& keys, const at::Tensor& solved, double gamma) {
  TORCH_CHECK(keys.dim() >= 2 && keys.sizes() == solved.sizes() && keys.scalar_type() == solved.scalar_type(),
              "expected keys and solved [..., d, B] of one dtype");
  const int64_t n = keys.size(-1);
  auto shape = keys.sizes().vec();
  shape.erase(shape.end() - 2);
  auto pivots = at::empty(shape, keys.options());
  if (n <= kSmall) {
    auto right = at::empty(keys.sizes(), keys.options());
    if (pivots.numel()) {
      AT_DISPATCH_FLOATING_TYPES(keys.scalar_type(), "preservation_memorization_solve", [&] {
        solve_each<scalar_t>(keys.contiguous(), solved.contiguous(), gamma, right, pivots);
      });
    }
    return {right, pivots};
  }
  auto system = at::matmul(keys.mT(), solved);
  system.diagonal(0, -2, -1).add_(gamma);
  const auto [factor, info] = at::linalg_cholesky_ex(system);
  pivots = factor.diagonal(0, -2, -1).square().div_(system.diagonal(0, -2, -1));
  const auto half = at::linalg_solve_triangular(factor.mT(), solved, /*upper=*/true, /*left=*/false);
  auto right = at::linalg_solve_triangular(factor, half, /*upper=*/false, /*left=*/false);
  const auto bad = info.ne(0)
                       .logical_or_(pivots.isfinite().all(-1).logical_not_())
                       .logical_or_(right.isfinite().flatten(-2).all(-1).logical_not_());
  right.masked_fill_(bad.unsqueeze(-1).unsqueeze(-1), std::numeric_limits<double>::quiet_NaN());
  pivots.masked_fill_(bad.unsqueeze(-1), 0);
  return {right.contiguous(), pivots};
}

}  // namespace

TORCH_LIBRARY_IMPL(lightedit, CPU, m) { m.impl("preservation_memorization_solve", solve); }

}  // namespace lightedit
