// SPDX-License-Identifier: Apache-2.0
// The paths of torch.ops.svsk.cpu_linear that multiply in float32: AVX2, and AVX-512 without units
// for bfloat16 or for float32 activations. Compiled once for each.
//
// With one row of activations codes are decoded in registers. With more, 16 outputs times 256
// inputs are decoded into a panel of floats in the first-level cache, which all rows of a chunk
// then read: a level times its group's scale is exact in float32 where scales have 16 bits or less.
//
// Activations of 8 bits are rounded here and multiplied as floats: the same results as on
// processors with products of bytes, and no faster than without. AVX2's product of bytes saturates
// with quad8's levels, and by halves it takes as many instructions as floats do.

#include "linear.h"

#include <immintrin.h>

#include <cstring>
#include <vector>

namespace {

constexpr int64_t kPanelColumns = 256;  // a multiple of every group size
// Rows of a task at most: their sums lie beside the panel in the second-level cache.
constexpr int64_t kMostRows = 512;

// 16 floats, one per output of a block.
#ifdef __AVX512F__

// Rows of activations that are multiplied together: their sums, weights and a broadcast fit the
// vector registers, 32 here and 16 of half the size with AVX2.
constexpr int kTileRows = 12;

struct Vec {
  __m512 v;
};
Vec zero() { return {_mm512_setzero_ps()}; }
Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
Vec fma(Vec a, float b, Vec c) { return {_mm512_fmadd_ps(a.v, _mm512_set1_ps(b), c.v)}; }
Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
Vec from_bytes(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }

// bfloat16 panels of two columns [16, 2] to both columns.
void expand_pairs(const uint16_t* p, Vec& first, Vec& second) {
  const __m512i both = _mm512_loadu_si512(p);
  first.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  second.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
}

#else

constexpr int kTileRows = 6;

struct Vec {
  __m256 v[2];
};
Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}; }
Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}; }
Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])};
}
Vec fma(Vec a, float b, Vec c) {
  const __m256 all = _mm256_set1_ps(b);
  return {_mm256_fmadd_ps(a.v[0], all, c.v[0]), _mm256_fmadd_ps(a.v[1], all, c.v[1])};
}
Vec from_bytes(__m128i bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

// bfloat16 panels of two columns [16, 2] to both columns.
void expand_pairs(const uint16_t* p, Vec& first, Vec& second) {
  for (int half = 0; half < 2; ++half) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * half));
    first.v[half] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    second.v[half] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
  }
}

#endif

__m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

template <typename T>
Vec load16(const T* p) {
  alignas(64) float wide[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<float>(p[i]);
  return load(wide);
}
template <>
Vec load16(const float* p) {
  return load(p);
}
template <>
Vec load16(const int8_t* p) {
  return from_bytes(load_bytes(p));
}

// Levels of the 16 codes as int8, in units of `unit`.
struct Levels {
  __m128i table;
  float unit;
};

Levels level_table(bool quad8) {
  const float unit = level_unit(quad8);
  alignas(16) int8_t table[16];
  for (int64_t i = 0; i < 16; ++i) table[i] = static_cast<int8_t>(level(i, quad8) / unit);
  return {load_bytes(table), unit};
}

// Two columns of codes to levels in the table's units.
template <int Bits>
void decode(const uint8_t* codes, __m128i table, Vec& first, Vec& second) {
  if constexpr (Bits == 8) {
    first = from_bytes(load_bytes(codes));
    second = from_bytes(load_bytes(codes + kLanes));
  } else {
    const __m128i raw = load_bytes(codes), nibble = _mm_set1_epi8(15);
    first = from_bytes(_mm_shuffle_epi8(table, _mm_and_si128(raw, nibble)));
    second = from_bytes(_mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(raw, 4), nibble)));
  }
}

// Sums of M rows. With few rows the two columns of a pair have sums of their own, which hides the
// latency of a product.
template <int M>
struct Sums {
  static constexpr int kParts = M >= 4 ? 1 : 2;
  Vec part[M][kParts];
  void clear() {
    for (auto& row : part)
      for (auto& v : row) v = zero();
  }
  Vec total(int m) const {
    if constexpr (kParts == 1) return part[m][0];
    return add(part[m][0], part[m][kParts - 1]);
  }
};

// acc[m] += sum over the pairs [0, pairs) of the two columns that weights(p, first, second) gives,
// times x of row m. x is a tile [columns, M].
template <int M, typename Weights>
void multiply(Sums<M>& acc, const float* x, int64_t pairs, const Weights& weights) {
  for (int64_t p = 0; p < pairs; ++p, x += 2 * M) {
    Vec first, second;
    weights(p, first, second);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc.part[m][0] = fma(first, x[m], acc.part[m][0]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      acc.part[m][Sums<M>::kParts - 1] = fma(second, x[M + m], acc.part[m][Sums<M>::kParts - 1]);
  }
}

// The same with weights that are decoded already, [columns, 16]: a column at a time where rows are
// many, because the second of a pair would push sums out of the registers.
template <int M>
void multiply_panel(Sums<M>& acc, const float* x, int64_t columns, const float* panel) {
  constexpr int kParts = Sums<M>::kParts;
  for (int64_t c = 0; c < columns; c += kParts, x += kParts * M, panel += kParts * kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const Vec weights = load(panel + part * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        acc.part[m][part] = fma(weights, x[part * M + m], acc.part[m][part]);
    }
  }
}

// Tiles of activations, or of z: [columns, M] of the M rows that are multiplied together, one
// after the other, see by_rows.
struct Tiles {
  const float* data;
  int64_t columns;
};

// sums[row] (+)= 16 sums over `columns` columns of x from `first` on, for rows [m_begin, m_end).
// decode(start, count, panel) gives weights as floats [count, 16].
template <typename Decode>
void multiply_rows(const Tiles& x, int64_t first, int64_t columns, int64_t m_begin, int64_t m_end,
                   bool add, float* sums, const Decode& decode) {
  alignas(64) float panel[kPanelColumns * kLanes];
  for (int64_t start = 0; start < columns; start += kPanelColumns) {
    const int64_t count = std::min(kPanelColumns, columns - start);
    decode(start, count, panel);
    by_rows<kTileRows>(m_begin, m_end, [&](auto rows, int64_t m0) {
      constexpr int M = decltype(rows)::value;
      float* row_sums = sums + (m0 - m_begin) * kLanes;
      Sums<M> acc;
      acc.clear();
      if (start || add)
        for (int m = 0; m < M; ++m) acc.part[m][0] = load(row_sums + m * kLanes);
      multiply_panel<M>(acc, x.data + m0 * x.columns + (first + start) * M, count, panel);
      for (int m = 0; m < M; ++m) store(row_sums + m * kLanes, acc.total(m));
    });
  }
}

// The same with weights that lie as bfloat16 pairs.
void multiply_pairs(const Tiles& x, int64_t first, int64_t pairs, int64_t m_begin, int64_t m_end,
                    bool add, float* sums, const uint16_t* weights) {
  if (m_end - m_begin == 1) {
    Sums<1> acc;
    acc.clear();
    multiply<1>(acc, x.data + m_begin * x.columns + first, pairs,
                [&](int64_t p, Vec& even, Vec& odd) {
                  expand_pairs(weights + 2 * kLanes * p, even, odd);
                });
    store(sums, add ? ::add(load(sums), acc.total(0)) : acc.total(0));
    return;
  }
  multiply_rows(x, first, 2 * pairs, m_begin, m_end, add, sums,
                [&](int64_t start, int64_t count, float* panel) {
                  for (int64_t c = 0; c < count; c += 2, panel += 2 * kLanes) {
                    Vec even, odd;
                    expand_pairs(weights + (start + c) * kLanes, even, odd);
                    store(panel, even);
                    store(panel + kLanes, odd);
                  }
                });
}

// The base of one row, in units of the output's scale: decoded in registers, scaled by group.
template <typename S, int Bits>
void multiply_row(const Base& base, const Levels& levels, const uint8_t* codes, const S* scale,
                  const float* x, float* sums) {
  constexpr int64_t kPairBytes = kLanes * Bits / 4;
  Vec out = zero();
  for (int64_t g = 0; g < base.k / base.group; ++g) {
    Sums<1> acc;
    acc.clear();
    multiply<1>(acc, x + g * base.group, base.group / 2,
                [&](int64_t p, Vec& first, Vec& second) {
                  decode<Bits>(codes + p * kPairBytes, levels.table, first, second);
                });
    codes += base.group / 2 * kPairBytes;
    out = fma(acc.total(0), load16(scale + g * kLanes), out);
  }
  store(sums, fma(out, levels.unit, zero()));
}

// Columns of the base as floats, times the scales of their groups.
template <typename S, int Bits>
void decode_panel(const Base& base, const Levels& levels, const uint8_t* codes, const S* scale,
                  int64_t start, int64_t count, float* panel) {
  constexpr int64_t kPairBytes = kLanes * Bits / 4;
  codes += start / 2 * kPairBytes;
  for (int64_t g = start / base.group; g < (start + count) / base.group; ++g) {
    const Vec factor = fma(load16(scale + g * kLanes), levels.unit, zero());
    for (int64_t p = 0; p < base.group / 2; ++p, codes += kPairBytes, panel += 2 * kLanes) {
      Vec first, second;
      decode<Bits>(codes, levels.table, first, second);
      store(panel, mul(first, factor));
      store(panel + kLanes, mul(second, factor));
    }
  }
}

// 16 sums for each row of a task. One buffer per thread: tasks are small, and so many that each
// would wait for the allocator.
float* sums_of(int64_t rows) {
  thread_local std::vector<float> sums;
  sums.resize(rows * kLanes);
  return sums.data();
}

// One V panel: z = gain * (V x) of the rows [m_begin, m_end), at the places where U panels want it.
void project_panel(const Sidecar& s, const Tiles& x, int64_t block, int64_t m_begin, int64_t m_end,
                   float* z) {
  const int32_t* entry = s.v_entries + 3 * block;
  const int32_t* positions = s.positions + kLanes * block;
  const float* gain = s.gain + kLanes * block;
  float* sums = sums_of(m_end - m_begin);
  multiply_pairs(x, entry[1], entry[2], m_begin, m_end, false, sums,
                 s.v + int64_t{entry[0]} * 2 * kLanes);
  // times gain, to the places in z that the index says; -1 is padding
  by_rows<kTileRows>(m_begin, m_end, [&](auto rows, int64_t m0) {
    constexpr int M = decltype(rows)::value;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (positions[lane] < 0) continue;
      float* to = z + m0 * s.width + int64_t{positions[lane]} * M;
      for (int m = 0; m < M; ++m) to[m] = sums[(m0 - m_begin + m) * kLanes + lane] * gain[lane];
    }
  });
}

// What is the same for every block of outputs.
template <typename X>
struct Job {
  const Base& base;
  const Sidecar& sidecar;
  Tiles x, z;
  const X* bias;
  X* y;
  int64_t n;
  Levels levels;
};

// One block: y = base + bias + U z for the rows [m_begin, m_end). Scales of groups are of the type
// S: X, or int8 with a scale per output; codes have Bits bits.
template <typename X, typename S, int Bits>
void compute_block(const Job<X>& job, int64_t block, int64_t m_begin, int64_t m_end) {
  const Base& base = job.base;
  const Sidecar& s = job.sidecar;
  const int64_t n0 = block * kLanes, count = std::min(kLanes, job.n - n0), rows = m_end - m_begin;
  const uint8_t* codes = base.codes + block * base.k * kLanes * Bits / 8;
  const S* scale = base.scale.const_data_ptr<S>() + block * (base.k / base.group) * kLanes;
  float* sums = sums_of(rows);
  // With 8 bits the table is not used, and levels are the codes.
  const Levels levels{job.levels.table, Bits == 8 ? 1.0f : job.levels.unit};
  if (rows == 1)
    multiply_row<S, Bits>(base, levels, codes, scale, job.x.data + m_begin * base.k, sums);
  else
    multiply_rows(job.x, 0, base.k, m_begin, m_end, false, sums,
                  [&](int64_t start, int64_t columns, float* panel) {
                    decode_panel<S, Bits>(base, levels, codes, scale, start, columns, panel);
                  });
  constexpr bool kRowScaled = !std::is_same_v<S, X>;
  alignas(64) float bias[kLanes] = {};
  if (job.bias)
    for (int64_t i = 0; i < count; ++i) bias[i] = static_cast<float>(job.bias[n0 + i]);
  Vec row_scale = zero();
  if constexpr (kRowScaled) row_scale = load16(base.row_scale->const_data_ptr<X>() + n0);
  for (float* row = sums; row < sums + rows * kLanes; row += kLanes)
    store(row, kRowScaled ? fma(load(row), row_scale, load(bias)) : add(load(row), load(bias)));
  // the sidecar: U z for each slot that this block meets
  for (int32_t e = s.u ? s.u_starts[block] : 0, last = s.u ? s.u_starts[block + 1] : 0; e < last;
       ++e) {
    const int32_t* entry = s.u_entries + 3 * e;
    multiply_pairs(job.z, entry[1], entry[2], m_begin, m_end, true, sums,
                   s.u + int64_t{entry[0]} * 2 * kLanes);
  }
  // to memory, rounded once; outputs beyond N stay away
  for (int64_t row = 0; row < rows; ++row) {
    X* y = job.y + (m_begin + row) * job.n + n0;
    for (int64_t i = 0; i < count; ++i) y[i] = static_cast<X>(sums[row * kLanes + i]);
  }
}

// What 8 bits make of a row, by 64 columns: scale * round(x / scale), the scale being the
// largest magnitude over 127. Magnitudes are compared as integers, so that a NaN is the largest.
void round_row(float* row, int64_t k) {
  for (int64_t first = 0; first < k; first += kScaleColumns) {
    const int64_t last = std::min(first + kScaleColumns, k);
    int32_t most = 0;
    for (int64_t c = first; c < last; ++c) {
      int32_t bits;
      std::memcpy(&bits, row + c, sizeof bits);
      most = std::max(most, bits & 0x7fffffff);
    }
    float scale;
    std::memcpy(&scale, &most, sizeof scale);
    scale = most ? scale / 127 : 1;
    for (int64_t c = first; c < last; ++c) row[c] = std::nearbyint(row[c] / scale) * scale;
  }
}

// x [m, k] as tiles of float32, for the base (rounded, where activations are int8) or the sidecar.
template <typename X>
at::Tensor make_tiles(const at::Tensor& x, int64_t chunk, bool int8) {
  const int64_t rows = x.size(0), k = x.size(1);
  if (rows == 1 && !int8) return x.to(at::kFloat);  // one row is a tile as it is
  at::Tensor tiles = at::empty({rows, k}, x.options().dtype(at::kFloat));
  const X* from = x.const_data_ptr<X>();
  float* to = tiles.mutable_data_ptr<float>();
  by_tasks(rows, chunk, 1, k * kLanes, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> row(k);
    by_rows<kTileRows>(begin, end, [&](auto tile, int64_t m0) {
      constexpr int M = decltype(tile)::value;
      for (int m = 0; m < M; ++m) {
        for (int64_t c = 0; c < k; ++c) row[c] = static_cast<float>(from[(m0 + m) * k + c]);
        if (int8) round_row(row.data(), k);
        float* column = to + m0 * k + m;
        for (int64_t c = 0; c < k; ++c) column[c * M] = row[c];
      }
    });
  });
  return tiles;
}

template <typename X>
at::Tensor run(const at::Tensor& x, const Base& base, const std::optional<at::Tensor>& bias,
               const Sidecar& s, int64_t n) {
  const int64_t m = x.size(0);
  at::Tensor y = at::empty({m, n}, x.options());
  if (m == 0) return y;
  // whole tiles of rows that fit the second-level cache together
  const int64_t fit = kChunkBytes / (base.k * static_cast<int64_t>(sizeof(float))),
                work = kLanes * base.k,
                chunk = std::clamp<int64_t>(fit / kTileRows, 1, kMostRows / kTileRows) * kTileRows;
  const at::Tensor tiles = make_tiles<X>(x, chunk, base.int8),
                   plain = base.int8 && s.u ? make_tiles<X>(x, chunk, false) : tiles;
  Job<X> job{base,
             s,
             {tiles.const_data_ptr<float>(), base.k},
             {nullptr, s.width},
             bias ? bias->const_data_ptr<X>() : nullptr,
             y.mutable_data_ptr<X>(),
             n,
             level_table(base.quad8)};
  at::Tensor z;
  if (s.u) {
    // first all of z: every block of outputs may need any of it. Zeros, since pairs may be padded
    z = at::zeros({m, s.width}, x.options().dtype(at::kFloat));
    float* z_data = z.mutable_data_ptr<float>();
    job.z.data = z_data;
    const Tiles given{plain.const_data_ptr<float>(), base.k};
    by_tasks(m, chunk, s.v_blocks, work, [&](int64_t block, int64_t begin, int64_t end) {
      project_panel(s, given, block, begin, end, z_data);
    });
  }
  by_tasks(m, chunk, (n + kLanes - 1) / kLanes, work,
           [&](int64_t block, int64_t begin, int64_t end) {
             if (base.bits == 8)
               compute_block<X, X, 8>(job, block, begin, end);
             else if (base.row_scale)
               compute_block<X, int8_t, 4>(job, block, begin, end);
             else
               compute_block<X, X, 4>(job, block, begin, end);
           });
  return y;
}

}  // namespace

#ifdef __AVX512F__
#define SVSK_PATH linear_avx512
#else
#define SVSK_PATH linear_avx2
#endif

at::Tensor svsk::SVSK_PATH(const at::Tensor& x, const Base& base,
                           const std::optional<at::Tensor>& bias, const Sidecar& sidecar,
                           int64_t n) {
  return in_large_tiles<kTileRows>(x, base.invariant, [&](const at::Tensor& rows) {
    switch (x.scalar_type()) {
      case at::kBFloat16:
        return run<c10::BFloat16>(rows, base, bias, sidecar, n);
      case at::kHalf:
        return run<c10::Half>(rows, base, bias, sidecar, n);
      default:
        return run<float>(rows, base, bias, sidecar, n);
    }
  });
}
