// SPDX-License-Identifier: Apache-2.0
// Activations of 8 bits, and the base's product with them on AVX512-VNNI.
//
// A row's scale for 64 columns is their largest magnitude over 127. Levels times q are added up as
// 32-bit integers within a group of weights, so nothing but the activations is rounded; the sidecar
// is multiplied with activations as they came.
//
// Codes at run time are uint8 [blocks, K / 8, 16 outputs, 4]: low nibbles are columns 0 to 3 of 8,
// high ones 4 to 7. VPDPBUSD multiplies unsigned bytes by signed ones: levels are shifted by an
// offset to be unsigned, and sums of a group begin at minus the offset times the sum of its
// activations.

#pragma once

#include "linear.h"

#include <immintrin.h>

#include <cstring>

namespace {

// Rows of int8 in tiles of the M rows that are multiplied together, see by_rows.
struct Int8Rows {
  at::Tensor values;  // [K / 4, M, 4] of each tile
  at::Tensor scales;  // float [K / 64, M], the last scale of fewer columns
  at::Tensor starts;  // int32 [K / group, M]: what sums of a group begin at
};

inline int32_t level_offset(bool quad8) { return quad8 ? 128 : 8; }

// 16 floats from 16-bit activations.
inline __m512 load16(const c10::BFloat16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline __m512 load16(const c10::Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Scale of up to 64 activations. Their magnitudes are compared as integers: a NaN is the largest,
// and makes the scale, and so the outputs, NaN.
template <typename X>
float scale_of(const X* x, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < count; c += kLanes)
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(load16(x + c)),
                                                   _mm512_set1_epi32(0x7fffffff)));
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return bits ? largest / 127 : 1;
}

// x [m, k] rounded. K and the groups of weights are multiples of 16.
template <typename X, int Largest>
Int8Rows round_rows(const at::Tensor& x, const Base& base, int64_t chunk) {
  const int64_t rows = x.size(0), k = base.k, groups = k / base.group,
                wide = (k + kScaleColumns - 1) / kScaleColumns;
  Int8Rows out{at::empty({rows, k}, x.options().dtype(at::kChar)),
               at::empty({rows, wide}, x.options().dtype(at::kFloat)),
               at::empty({rows, groups}, x.options().dtype(at::kInt))};
  const X* from = x.const_data_ptr<X>();
  auto* values = out.values.mutable_data_ptr<int8_t>();
  auto* scales = out.scales.mutable_data_ptr<float>();
  auto* starts = out.starts.mutable_data_ptr<int32_t>();
  const int32_t offset = level_offset(base.quad8);
  by_tasks(rows, chunk, 1, k * kLanes, [&](int64_t, int64_t begin, int64_t end) {
    by_rows<Largest>(begin, end, [&](auto tile, int64_t m0) {
      constexpr int M = decltype(tile)::value;
      for (int m = 0; m < M; ++m) {
        const X* row = from + (m0 + m) * k;
        int32_t* row_starts = starts + m0 * groups + m;
        for (int64_t g = 0; g < groups; ++g) row_starts[g * M] = 0;
        for (int64_t w = 0; w < wide; ++w) {
          const int64_t first = w * kScaleColumns, last = std::min(first + kScaleColumns, k);
          const float scale = scale_of(row + first, last - first);
          scales[m0 * wide + w * M + m] = scale;
          for (int64_t c = first; c < last; c += kLanes) {
            const __m512i whole =
                _mm512_cvtps_epi32(_mm512_div_ps(load16(row + c), _mm512_set1_ps(scale)));
            row_starts[c / base.group * M] -= offset * _mm512_reduce_add_epi32(whole);
            alignas(16) int32_t quads[4];
            _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm512_cvtsepi32_epi8(whole));
            for (int q = 0; q < 4; ++q)
              std::memcpy(values + m0 * k + ((c / 4 + q) * M + m) * 4, quads + q, 4);
          }
        }
      }
    });
  });
  return out;
}

// Levels of the 16 codes in their units, plus the offset, in each quarter.
inline __m512i unsigned_levels(bool quad8) {
  alignas(64) uint8_t table[64];
  for (int64_t i = 0; i < 64; ++i)
    table[i] =
        static_cast<uint8_t>(level(i % 16, quad8) / level_unit(quad8) + level_offset(quad8));
  return _mm512_load_si512(table);
}

// out[m] += base times row m0 + m, in units of the output's scale where there is one. factor(g)
// gives the 16 scales of a group as floats.
template <int M, typename Factor>
void multiply_int8(__m512 (&out)[M], const Int8Rows& x, const Base& base, const uint8_t* codes,
                   __m512i levels, int64_t m0, const Factor& factor) {
  // With few rows both halves of 8 columns have sums of their own, which hides the latency.
  constexpr int kParts = M >= 4 ? 1 : 2;
  const int64_t groups = base.k / base.group,
                wide = (base.k + kScaleColumns - 1) / kScaleColumns;
  const int8_t* values = x.values.const_data_ptr<int8_t>() + m0 * base.k;
  const float* scales = x.scales.const_data_ptr<float>() + m0 * wide;
  const int32_t* starts = x.starts.const_data_ptr<int32_t>() + m0 * groups;
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512 unit = _mm512_set1_ps(level_unit(base.quad8));
  const auto quad = [](const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
  };
  for (int64_t g = 0; g < groups; ++g) {
    __m512i acc[M][kParts];
    for (int m = 0; m < M; ++m) {
      acc[m][0] = _mm512_set1_epi32(starts[g * M + m]);
      if constexpr (kParts == 2) acc[m][1] = _mm512_setzero_si512();
    }
    for (int64_t c = 0; c < base.group; c += 8, codes += 64, values += 8 * M) {
      const __m512i raw = _mm512_loadu_si512(codes);
      const __m512i low = _mm512_shuffle_epi8(levels, _mm512_and_si512(raw, nibble));
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], low, quad(values + 4 * m));
      const __m512i high =
          _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble));
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        acc[m][kParts - 1] =
            _mm512_dpbusd_epi32(acc[m][kParts - 1], high, quad(values + 4 * (M + m)));
    }
    const __m512 scale = _mm512_mul_ps(factor(g), unit);
    const float* row_scales = scales + g * base.group / kScaleColumns * M;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      __m512i sum = acc[m][0];
      if constexpr (kParts == 2) sum = _mm512_add_epi32(sum, acc[m][1]);
      out[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum),
                               _mm512_mul_ps(scale, _mm512_set1_ps(row_scales[m])), out[m]);
    }
  }
}

}  // namespace
