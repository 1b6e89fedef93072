// Products of rows and weights in 8 or 4 bits.
//
// Values are in runs of 32 inputs, as ../grouped_weight.py says. An element of the weight is (value - zero point) · scale,
// rounded to the type of the scale and then to that of the rows, so a product has the same bits as grouped_matmul.h gives
// for the dequantised weight, whichever way it is computed:
//
// - Few rows wait for the memory. A tile widens its features in registers, run by run; the packed values are all that is
//   read. Sixteen values of 4 bits are looked up in a table, which is made once for each group.
// - Many rows have a block of the weight widened into memory that stays in the L2 cache, and are multiplied with that.

#pragma once

#include "grouped_matmul.h"

namespace {

constexpr int64_t kFewRows = 4;
constexpr int64_t kPrefetchBytes = 4096;  // ahead of the values that are read

// Where the values, scales and zero points of a weight [O, C] are.
struct PackedWeight {
  const uint8_t* values;
  const void* scales;
  const int8_t* zero_points;  // may be null
  int64_t num_inputs, group_runs;

  int64_t num_runs() const { return num_inputs / kRun; }
  int64_t num_groups() const { return num_runs() / group_runs; }
};

constexpr int64_t RunBytes(Encoding encoding) { return encoding == Encoding::kInt4 ? kRun / 2 : kRun; }

template <ScaleType type>
SIMD INLINE Floats LoadScale(const void* scales, int64_t index) {
  if constexpr (type == ScaleType::kFloat32) return Set(static_cast<const float*>(scales)[index]);
  const uint16_t bits = static_cast<const uint16_t*>(scales)[index];
  if constexpr (type == ScaleType::kFloat16) return SetFloat16(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float scale;
  std::memcpy(&scale, &wide, sizeof(scale));
  return Set(scale);
}

// Scale and zero point of a group. Values of 4 bits are stored plus 8, and so are their zero points not.
template <Encoding encoding, ScaleType type>
struct GroupScale {
  Floats scale, zero;

  SIMD static INLINE GroupScale Load(const PackedWeight& weight, int64_t index) {
    const float offset = encoding == Encoding::kInt4 ? 8.0f : 0.0f;
    const float zero = weight.zero_points == nullptr ? 0.0f : static_cast<float>(weight.zero_points[index]);
    return {LoadScale<type>(weight.scales, index), Set(offset + zero)};
  }
  SIMD INLINE Floats operator()(Floats values) const {
    const Floats product = BeforeBFloat16(values);
    return type == ScaleType::kBFloat16 ? Rounded(product) : product;
  }
  // The same, for a number that is rounded to bfloat16 in any case.
  SIMD INLINE Floats BeforeBFloat16(Floats values) const {
    const Floats product = (values - zero) * scale;
    return type == ScaleType::kFloat16 ? RoundedToFloat16(product) : product;
  }
};

// The stored values of part `part` of a run: kFloatLanes of them.
template <Encoding encoding>
SIMD INLINE Floats LoadValues(const uint8_t* run, int part) {
  const int first = part * kFloatLanes;
  if constexpr (encoding == Encoding::kInt8) return LoadBytes(reinterpret_cast<const int8_t*>(run) + first);
  return first < kRun / 2 ? LoadLowNibbles(run + first) : LoadHighNibbles(run + first - kRun / 2);
}

// The runs of one feature, widened one after the other to vectors of a type.
template <class Type, Encoding encoding, ScaleType type>
struct RunReader {
  static constexpr int kParts = kRun / Type::kLanes;
  using Scale = GroupScale<encoding, type>;
  Scale scale;

  SIMD INLINE void StartGroup(const PackedWeight& weight, int64_t index) { scale = Scale::Load(weight, index); }
  SIMD INLINE Floats Vector(const uint8_t* run, int part) const { return scale(LoadValues<encoding>(run, part)); }
};

#ifdef HAS_BF16_DOT
template <ScaleType type>
struct RunReader<BFloat16, Encoding::kInt8, type> {
  static constexpr int kParts = 1;
  using Scale = GroupScale<Encoding::kInt8, type>;
  Scale scale;

  SIMD INLINE void StartGroup(const PackedWeight& weight, int64_t index) { scale = Scale::Load(weight, index); }
  SIMD INLINE Floats Vector(const uint8_t* run, int) const {
    return RoundedPairs(scale.BeforeBFloat16(LoadValues<Encoding::kInt8>(run, 0)),
                        scale.BeforeBFloat16(LoadValues<Encoding::kInt8>(run, 1)));
  }
};

template <ScaleType type>
struct RunReader<BFloat16, Encoding::kInt4, type> {
  static constexpr int kParts = 1;
  __m512i table;  // the bfloat16 of each of the 16 values

  SIMD INLINE void StartGroup(const PackedWeight& weight, int64_t index) {
    const auto scale = GroupScale<Encoding::kInt4, type>::Load(weight, index);
    const Floats values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    table = _mm512_castsi256_si512(RoundedBits(scale(values)));
  }
  SIMD INLINE Floats Vector(const uint8_t* run, int) const {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run)));
    const __m256i shifted = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_and_si256(shifted, _mm256_set1_epi8(15)));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, table));
  }
};
#endif

// Multiply rows with four features, from `feature` on, widened in registers.
template <class Type, class Result, Encoding encoding, ScaleType type, int rows>
SIMD void MultiplyRuns(Rows<const typename Type::Row> x, const PackedWeight& weight, int64_t feature, Rows<Result> y) {
  using Reader = RunReader<Type, encoding, type>;
  const int64_t feature_bytes = weight.num_runs() * RunBytes(encoding), num_groups = weight.num_groups();
  const uint8_t* values = weight.values + feature * feature_bytes;
  Floats sums[rows][kTileFeatures];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = Set(0.0f);
  const typename Type::Row* at[rows];
  UNROLL for (int r = 0; r < rows; ++r) at[r] = x[r];
  const char* prefetch = reinterpret_cast<const char*>(values) + kPrefetchBytes;
  for (int64_t group = 0; group < num_groups; ++group) {
    Reader reader[kTileFeatures];
    UNROLL for (int f = 0; f < kTileFeatures; ++f) reader[f].StartGroup(weight, (feature + f) * num_groups + group);
    for (int64_t run = 0; run < weight.group_runs; ++run, values += RunBytes(encoding)) {
      UNROLL for (int64_t line = 0; line < kTileFeatures * RunBytes(encoding); line += kCacheLine, prefetch += kCacheLine) {
        Prefetch(prefetch);
      }
      UNROLL for (int part = 0; part < Reader::kParts; ++part) {
        Floats row[rows];
        UNROLL for (int r = 0; r < rows; ++r) row[r] = Type::LoadVector(at[r] + part * Type::kLanes);
        UNROLL for (int f = 0; f < kTileFeatures; ++f) {
          const Floats w = reader[f].Vector(values + f * feature_bytes, part);
          UNROLL for (int r = 0; r < rows; ++r) sums[r][f] = Type::MultiplyAdd(row[r], w, sums[r][f]);
        }
      }
      UNROLL for (int r = 0; r < rows; ++r) at[r] += kRun;
    }
  }
  UNROLL for (int r = 0; r < rows; ++r) StoreSums(sums[r], y[r] + feature);
}

// Call MultiplyRuns for a number of rows.
template <class Type, class Result, Encoding encoding, ScaleType type, int max_rows>
INLINE void MultiplyRuns(int64_t num_rows, Rows<const typename Type::Row> x, const PackedWeight& weight, int64_t feature,
                         Rows<Result> y) {
  if (num_rows == max_rows) {
    MultiplyRuns<Type, Result, encoding, type, max_rows>(x, weight, feature, y);
  } else if constexpr (max_rows > 1) {
    MultiplyRuns<Type, Result, encoding, type, max_rows - 1>(num_rows, x, weight, feature, y);
  }
}

// Widen features [begin, end) of a weight.
template <class Type, Encoding encoding, ScaleType type>
SIMD void WidenFeatures(const PackedWeight& weight, int64_t begin, int64_t end, typename Type::Element* to) {
  const uint8_t* run = weight.values + begin * weight.num_runs() * RunBytes(encoding);
  for (int64_t group = begin * weight.num_groups(); group < end * weight.num_groups(); ++group) {
    if constexpr (Type::kWidens) {
      const auto scale = GroupScale<encoding, type>::Load(weight, group);
      for (int64_t i = 0; i < weight.group_runs; ++i, run += RunBytes(encoding), to += kRun) {
        UNROLL for (int part = 0; part < kRun / kFloatLanes; ++part) {
          Store(scale.BeforeBFloat16(LoadValues<encoding>(run, part)), to + part * kFloatLanes);
        }
      }
    } else {
      RunReader<Type, encoding, type> reader;
      reader.StartGroup(weight, group);
      for (int64_t i = 0; i < weight.group_runs; ++i, run += RunBytes(encoding)) {
        UNROLL for (int part = 0; part < reader.kParts; ++part, to += Type::kLanes) {
          Store(reader.Vector(run, part), reinterpret_cast<float*>(to));
        }
      }
    }
  }
}

template <class Type, class Result, Encoding encoding, ScaleType type>
void MultiplyPacked(const Pool& pool, const QuantizedMatmulArguments& a) {
  using Element = typename Type::Element;
  const auto x = PrepareRows<Type>(pool, a.x, a.num_rows, a.num_inputs, a.rows);
  const auto groups = NonEmptyGroups(a.sizes, a.num_groups, a.num_rows);
  constexpr int64_t kScaleBytes = type == ScaleType::kFloat32 ? 4 : 2;
  const int64_t num_scales = a.num_features * (a.num_inputs / a.group_size);
  const int64_t num_bytes = a.num_features * (a.num_inputs / kRun) * RunBytes(encoding);
  ParallelForBlocks<Element>(pool, groups, a.num_features, a.num_inputs, [&](const Block& block, const Block*) {
    const Group& group = block.group;
    const PackedWeight weight{static_cast<const uint8_t*>(a.values) + group.index * num_bytes,
                              static_cast<const char*>(a.scales) + group.index * num_scales * kScaleBytes,
                              a.zero_points == nullptr ? nullptr : a.zero_points + group.index * num_scales, a.num_inputs,
                              a.group_size / kRun};
    const Rows<const typename Type::Row> rows{x[group.first_row], x.stride};
    const Rows<Result> y{static_cast<Result*>(a.y) + group.first_row * a.num_features, a.num_features};
    if constexpr (!Type::kWidens) {
      if (group.num_rows <= kFewRows) {
        for (int64_t feature = block.begin; feature < block.end; feature += kTileFeatures) {
          MultiplyRuns<Type, Result, encoding, type, kFewRows>(group.num_rows, rows, weight,
                                                               std::min(feature, block.end - kTileFeatures), y);
        }
        return;
      }
    }
    // The last tile of a block may start before it, if it has too few features.
    const int64_t begin = std::min(block.begin, block.end - kTileFeatures), num_features = block.end - begin;
    auto* const memory = reinterpret_cast<Element*>(
        ThreadMemory<2>(CeilDivide(num_features * a.num_inputs * sizeof(Element), sizeof(float))));
    WidenFeatures<Type, encoding, type>(weight, begin, block.end, memory);
    MultiplyBlock<Type, Result>(rows, group.num_rows, memory, a.num_inputs, {y.data + begin, y.stride}, num_features,
                                nullptr);
  });
}

template <class Type, class Result, Encoding encoding>
void MultiplyPacked(const Pool& pool, const QuantizedMatmulArguments& a) {
  if (a.scale == ScaleType::kFloat32) return MultiplyPacked<Type, Result, encoding, ScaleType::kFloat32>(pool, a);
  if (a.scale == ScaleType::kFloat16) return MultiplyPacked<Type, Result, encoding, ScaleType::kFloat16>(pool, a);
  MultiplyPacked<Type, Result, encoding, ScaleType::kBFloat16>(pool, a);
}

template <class Type, class Result>
void MultiplyPacked(const Pool& pool, const QuantizedMatmulArguments& a) {
  if (a.encoding == Encoding::kInt4) return MultiplyPacked<Type, Result, Encoding::kInt4>(pool, a);
  MultiplyPacked<Type, Result, Encoding::kInt8>(pool, a);
}

void QuantizedMatmul(const Pool& pool, const QuantizedMatmulArguments& a) {
  if (a.dtype == Float::kFloat32) return MultiplyPacked<Float32, float>(pool, a);
  if (a.result == Float::kFloat32) return MultiplyPacked<BFloat16, float>(pool, a);
  MultiplyPacked<BFloat16, uint16_t>(pool, a);
}

}  // namespace
