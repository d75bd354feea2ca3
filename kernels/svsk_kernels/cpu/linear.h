// SPDX-License-Identifier: Apache-2.0
// What the paths of torch.ops.svsk.cpu_linear have in common: run-time tensors, tiles of rows,
// tasks.
//
// Checkpoint                          Run time (cpu_kernel.py); a block is 16 outputs
// weight_packed  int32 [N, K / 8]     codes  uint8 [blocks, K / 2, 16]: two neighbours in K a byte
//   8 bits: int32 [N, K / 4]            int8 [blocks, K, 16]
//   int8 activations, AVX512-VNNI       uint8 [blocks, K / 8, 16, 4], see int8_rows.h
// weight_scale   [N, K / group]       scale  [blocks, K / group, 16], int8 where rows have scales
// weight_row_scale  [N, 1]            row_scale  [blocks, 1, 16]
// sidecar_u      int8 [N, B, r]       u      bfloat16 panels [pairs, 16 outputs, 2] of a slot
// sidecar_v      int8 [A, r, K]       v      bfloat16 panels [pairs, 16 ranks, 2] of a column tile
// sidecar_gain   float32 [A, B, r]    gain   float32 [v panels, 16]
//                                     index  int32: where panels lie, and what they multiply
//
// Each path is a file that is compiled for instructions that a processor may lack. All that is here
// has internal linkage, so that no path runs another's code.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace svsk {

// The base of a layer.
struct Base {
  const uint8_t* codes;
  const at::Tensor& scale;
  const std::optional<at::Tensor>& row_scale;  // given where scales are int8
  int64_t k, group, bits;
  bool quad8;
  bool int8;  // activations are rounded to 8 bits for it, by row and 64 columns
  bool invariant;  // a row's result has the same bits whatever rows are beside it
};

// What cpu_kernel.py calls the index: where panels, activations and results of the sidecar lie.
struct Sidecar {
  const uint16_t *u = nullptr, *v = nullptr;  // bfloat16
  const float* gain = nullptr;
  int64_t v_blocks = 0, width = 0;
  const int32_t *v_entries = nullptr, *positions = nullptr, *u_starts = nullptr,
                *u_entries = nullptr;
};

// x W^T + bias: [M, n], of x's dtype. x [M, k] is contiguous, bias of its dtype.
using Linear = at::Tensor(const at::Tensor& x, const Base& base,
                          const std::optional<at::Tensor>& bias, const Sidecar& sidecar, int64_t n);
Linear linear_avx2;         // float32, bfloat16, float16
Linear linear_avx512;       // the same
Linear linear_avx512_bf16;  // bfloat16, float16; int8 activations with AVX512-VNNI

}  // namespace svsk

namespace {

using svsk::Base;
using svsk::Sidecar;

constexpr int64_t kLanes = 16;       // outputs of a block
constexpr int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread
// Activations of a task: about what a second-level cache holds.
constexpr int64_t kChunkBytes = 1 << 20;

// Columns of a row of activations that share a scale where these are int8.
constexpr int64_t kScaleColumns = 64;

// Levels are whole multiples of it.
inline float level_unit(bool quad8) { return quad8 ? 0.125f : 1; }

inline float level(int64_t nibble, bool quad8) {
  const float q = static_cast<float>(nibble - 8);
  return quad8 ? q * (8 + std::abs(q)) / 8 : q;
}

// Calls run(std::integral_constant<int, M>, m) for tiles of Largest, 8, 4, 2, 1 rows that cover
// [m, end).
template <int Largest, typename F>
void by_rows(int64_t m, int64_t end, const F& run) {
  for (; m + Largest <= end; m += Largest) run(std::integral_constant<int, Largest>(), m);
  if constexpr (Largest > 8) {
    if (end - m >= 8) {
      run(std::integral_constant<int, 8>(), m);
      m += 8;
    }
  }
  if (end - m >= 4) {
    run(std::integral_constant<int, 4>(), m);
    m += 4;
  }
  if (end - m >= 2) {
    run(std::integral_constant<int, 2>(), m);
    m += 2;
  }
  if (end - m >= 1) run(std::integral_constant<int, 1>(), m);
}

// run(x) with rows of zeros added where `invariant` asks for it. Tiles of fewer than 4 rows add up in
// several chains, and a single row is scaled in another order: so that a row's bits do not depend
// on its place, there are none.
template <int Largest, typename F>
at::Tensor in_large_tiles(const at::Tensor& x, bool invariant, const F& run) {
  const int64_t given = x.size(0);
  int64_t rows = given;
  while (invariant && rows % Largest % 4) ++rows;
  if (rows == given) return run(x);
  return run(at::constant_pad_nd(x, {0, 0, 0, rows - given})).narrow(0, 0, given);
}

// Calls run(block, first row, end row) for all blocks and chunks of rows on all threads, chunk by
// chunk: a chunk of activations stays in the cache while the packed weights, which are small, go
// past. A row of a block costs `work` multiply-adds.
template <typename F>
void by_tasks(int64_t rows, int64_t chunk, int64_t blocks, int64_t work, const F& run) {
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const int64_t grain = std::max<int64_t>(1, kGrain / (work * std::min(rows, chunk)));
  at::parallel_for(0, chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / blocks * chunk;
      run(task % blocks, m, std::min(m + chunk, rows));
    }
  });
}

}  // namespace
