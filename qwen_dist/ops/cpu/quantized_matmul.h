// Products of rows and weights in 8 or 4 bits.
//
// Values are in runs of 32 inputs, as ../grouped_weight.py says. An element of the weight is (value - zero point) · scale.
// There are two ways to multiply. Shapes alone choose one, so a result has the same bits whatever the other rows are:
//
// - Scaled sums, for few rows in bfloat16. Such a product is limited by the memory, unless widening a value takes too many
//   instructions. Rows are multiplied with the stored integers, and the sum over a group with its scale, in float32. No
//   element of the weight is computed or rounded. Where bytes can be multiplied, the rows are integers, too: see ByteValues.
// - Dequantised elements, otherwise. They are rounded to the type of the scale and then to that of the rows, so the product
//   has the same bits as grouped_matmul.h gives for the dequantised weight. Few rows in float32 dequantise in registers;
//   many rows dequantise a block of the weight at a time, which stays in the L2 cache.

#pragma once

#include <numeric>

#include "grouped_matmul.h"

namespace {

constexpr int kFewFloatRows = 4;          // float32 rows of a group up to which they dequantise in registers
constexpr int kBlockRuns = 4;             // the most runs of a block, whose sum is scaled once
constexpr int64_t kPrefetchBytes = 8192;  // values are prefetched at least this far ahead

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

// Scale and zero point of a group. Values of 4 bits are stored with 8 added, their zero points are not.
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
  if constexpr (encoding == Encoding::kInt4) return LoadNibbles(run, part);
  return LoadBytes(reinterpret_cast<const int8_t*>(run) + part * kFloatLanes);
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
    table = _mm512_castsi256_si512(RoundedBits(scale.BeforeBFloat16(values)));
  }
  SIMD INLINE Floats Vector(const uint8_t* run, int) const {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run)));
    const __m256i shifted = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_and_si256(shifted, _mm256_set1_epi8(15)));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, table));
  }
};
#endif

// --- Scaled sums ---

// How a tile reads values. A step is kStepRuns runs, and has kVectors vectors of values for each feature; PrepareRow puts a
// row into the same order. A tile has up to kRows rows, as many as there are registers for their sums.

// Vectors of float32, in the order of the inputs.
template <Encoding encoding>
struct FloatValues {
  static constexpr int kStepRuns = 1, kVectors = kRun / kFloatLanes, kRows = kRegisters == 32 ? 4 : 2;
  SIMD static INLINE Floats Vector(const uint8_t* step, int vector) {
    const Floats values = LoadValues<encoding>(step, vector);
    return encoding == Encoding::kInt4 ? values - Set(8.0f) : values;
  }
  SIMD static void PrepareRow(const uint16_t* from, int64_t num_runs, int64_t, float* to) {
    for (int64_t i = 0; i < num_runs * kRun; i += kFloatLanes) Store(Load(from + i), to + i);
  }
};

#ifdef HAS_BF16_DOT
// Bytes. Every processor with AVX512-BF16 also has AVX512-VNNI, which multiplies 64 unsigned bytes with 64 signed ones and adds
// each four products to one of 16 lanes. A vector has 64 values, made unsigned by adding 8 or 128; with int4 the first one has
// the first halves of four runs, and the second the others. An input is a scale times an integer of 16 bits, 256 · high + low,
// whose two bytes are in two vectors.
template <Encoding encoding>
struct ByteValues {
  static constexpr bool kIsInt4 = encoding == Encoding::kInt4;
  static constexpr int kStepRuns = kIsInt4 ? 4 : 2, kVectors = kIsInt4 ? 2 : 1, kRows = 2;
  static constexpr int kOffsetBits = kIsInt4 ? 3 : 7;
  static constexpr int kPlane = 64, kStepBytes = 2 * kVectors * kPlane;
  // A block of a row begins with the sum of the integers of each lane, and the scales of the lanes.
  static constexpr int kSums = 0, kScales = 64, kPlanes = 128;

  SIMD static INLINE __m512i Vector(const uint8_t* step, int vector) {
    const __m512i bytes = _mm512_loadu_si512(step);
    if constexpr (!kIsInt4) return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
    return _mm512_and_si512(vector == 0 ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
  }
  // Spread numbers, one for each run of a step, over the lanes of the runs.
  SIMD static INLINE Floats Lanes(__m128 numbers) {
    const __m512i run = kIsInt4 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_ps(run, _mm512_castps128_ps512(numbers));
  }
  // The numbers of four consecutive groups.
  template <ScaleType type>
  SIMD static INLINE __m128 LoadFour(const void* scales, int64_t index) {
    if constexpr (type == ScaleType::kFloat32) return _mm_loadu_ps(static_cast<const float*>(scales) + index);
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(scales) + index));
    if constexpr (type == ScaleType::kFloat16) return _mm512_castps512_ps128(_mm512_cvtph_ps(_mm256_castsi128_si256(bits)));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
  }

  SIMD static INLINE __m512i Joined(__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

  // Write the blocks of a row, one after the other.
  SIMD static void PrepareRow(const uint16_t* from, int64_t num_runs, int64_t steps, uint16_t* to) {
    auto* block = reinterpret_cast<uint8_t*>(to);
    for (int64_t run = 0; run < num_runs; run += steps * kStepRuns, block += kPlanes + steps * kStepBytes) {
      PrepareBlock(from + run * kRun, std::min(steps * kStepRuns, num_runs - run), steps, block);
    }
  }

 private:
  // Write a block of `steps` steps, of which the first `num_runs` runs exist. Runs in the same lanes have one scale.
  SIMD static void PrepareBlock(const uint16_t* from, int64_t num_runs, int64_t steps, uint8_t* to) {
    std::memset(to + kPlanes, 0, steps * kStepBytes);
    alignas(64) float scales[16] = {};
    constexpr int kRunLanes = kRun / 4 / kVectors;
    for (int lanes = 0; lanes < std::min<int64_t>(kStepRuns, num_runs); ++lanes) {
      __m512i largest = _mm512_setzero_si512();
      for (int64_t run = lanes; run < num_runs; run += kStepRuns) {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(LoadPairs(from + run * kRun), _mm512_set1_epi16(0x7fff)));
      }
      const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(
          _mm512_and_si512(largest, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(largest, 16)));
      const int exponent = std::max<int>(bits >> 7, 16);  // as the bits have it: 127 stands for 2^0
      const bool is_finite = exponent != 255;
      const Floats inverse = Set(PowerOfTwo(127 + 14 - exponent));
      std::fill_n(scales + lanes * kRunLanes, kRunLanes,
                  is_finite ? PowerOfTwo(exponent - 127 - 14) : std::numeric_limits<float>::quiet_NaN());
      for (int64_t run = lanes; is_finite && run < num_runs; run += kStepRuns) {
        UNROLL for (int half = 0; half < 2; ++half) {
          uint8_t* const high_plane = to + kPlanes + run / kStepRuns * kStepBytes + (kIsInt4 ? half * 2 * kPlane : 0);
          const int64_t byte = kIsInt4 ? lanes * 16 : lanes * kRun + half * 16;
          const __m512i wide = _mm512_cvtps_epi32(Load(from + run * kRun + half * 16) * inverse);
          const __m512i integers = _mm512_min_epi32(wide, _mm512_set1_epi32(127 * 256 + 127));
          const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
          const __m512i low = _mm512_sub_epi32(integers, _mm512_slli_epi32(high, 8));
          StoreBytes(high, high_plane + byte);
          StoreBytes(low, high_plane + kPlane + byte);
        }
      }
    }
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int plane = 0; plane < 2 * kVectors * steps; ++plane) {
      sums[plane % 2] = _mm512_dpbusd_epi32(sums[plane % 2], _mm512_set1_epi8(1),
                                            _mm512_loadu_si512(to + kPlanes + plane * kPlane));
    }
    _mm512_storeu_si512(to + kSums, Joined(sums[0], sums[1]));
    std::memcpy(to + kScales, scales, sizeof(scales));
  }
  static float PowerOfTwo(int n) {
    const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
  }
  SIMD static INLINE void StoreBytes(__m512i x, uint8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  }
};

template <Encoding encoding>
using ValuesOf = ByteValues<encoding>;
#else
template <Encoding encoding>
using ValuesOf = FloatValues<encoding>;
#endif

// Blocks are the inputs whose sum is scaled once: up to kBlockRuns runs of one group, or one step where steps have several
// groups. `num` blocks of a feature, `steps` of a block, `per_group` blocks of a group.
template <class Values>
struct Blocks {
  int64_t num, steps, per_group;

  Blocks(int64_t num_runs, int64_t group_runs) {
    constexpr int64_t kRuns = Values::kStepRuns;
    steps = group_runs % kRuns == 0 ? std::gcd(group_runs / kRuns, kBlockRuns / kRuns) : 1;
    num = CeilDivide(num_runs, kRuns * steps);
    per_group = std::max<int64_t>(1, group_runs / (kRuns * steps));
  }
  int64_t Group(int64_t block) const { return static_cast<uint32_t>(block) / static_cast<uint32_t>(per_group); }
};

// Reads the packed values of four features step by step, and widens them in registers.
template <Encoding encoding, ScaleType type>
class PackedReader {
 public:
  using Values = ValuesOf<encoding>;
  static constexpr int64_t kStepBytes = Values::kStepRuns * RunBytes(encoding);

  // `last_step`: kTileFeatures * kStepBytes bytes, where a last step of fewer runs is padded. `prefetch`: where the values of
  // a later tile begin, which are prefetched; may be null.
  SIMD INLINE PackedReader(const PackedWeight& weight, const Blocks<Values>& blocks, int64_t feature, uint8_t* last_step,
                           const uint8_t* prefetch)
      : weight_(weight), blocks_(blocks), first_group_(feature * weight.num_groups()), runs_left_(weight.num_runs()),
        stride_(weight.num_runs() * RunBytes(encoding)), step_(weight.values + feature * stride_), last_step_(last_step),
        prefetch_(reinterpret_cast<const char*>(prefetch)) {
    StartStep();
  }
  SIMD INLINE auto Vector(int feature, int vector) const { return Values::Vector(step_ + feature * stride_, vector); }
  SIMD INLINE void NextStep() {
    step_ += kStepBytes;
    runs_left_ -= Values::kStepRuns;
    StartStep();
  }
  // The scale and the zero point of each lane of a block's sums.
  SIMD INLINE Floats Scale(int feature, int64_t block) const {
    const int64_t first = first_group_ + feature * weight_.num_groups();
    if constexpr (Values::kStepRuns > 1) {
      const int64_t run = block * blocks_.steps * Values::kStepRuns;
      if (weight_.group_runs == 1 && run + 4 <= weight_.num_groups()) {
        return Values::Lanes(Values::template LoadFour<type>(weight_.scales, first + run));
      }
      if (weight_.group_runs % Values::kStepRuns != 0) {
        return OfLanes([&](int64_t group) SIMD { return ::First(LoadScale<type>(weight_.scales, first + group)); }, run);
      }
    }
    return LoadScale<type>(weight_.scales, first + blocks_.Group(block));
  }
  SIMD INLINE Floats ZeroPoint(int feature, int64_t block) const {
    const int8_t* const first = weight_.zero_points + first_group_ + feature * weight_.num_groups();
    if constexpr (Values::kStepRuns > 1) {
      if (weight_.group_runs % Values::kStepRuns != 0) {
        return OfLanes([&](int64_t group) { return static_cast<float>(first[group]); },
                       block * blocks_.steps * Values::kStepRuns);
      }
    }
    return Set(first[blocks_.Group(block)]);
  }

 private:
  SIMD INLINE void StartStep() {
    if (prefetch_ != nullptr) {
      UNROLL for (int64_t line = 0; line < kTileFeatures * kStepBytes; line += kCacheLine, prefetch_ += kCacheLine) {
        Prefetch(prefetch_);
      }
    }
    if (Values::kStepRuns > 1 && runs_left_ > 0 && runs_left_ < Values::kStepRuns) {
      std::memset(last_step_, 0, kTileFeatures * kStepBytes);
      for (int f = 0; f < kTileFeatures; ++f) {
        std::memcpy(last_step_ + f * kStepBytes, step_ + f * stride_, runs_left_ * RunBytes(encoding));
      }
      step_ = last_step_;
      stride_ = kStepBytes;
    }
  }
  // What `load` gives for the groups of a step's runs, of which the last ones may not exist.
  template <class Load>
  SIMD INLINE Floats OfLanes(const Load& load, int64_t run) const {
    float numbers[4] = {};
    for (int n = 0; n < Values::kStepRuns; ++n) {
      numbers[n] = load(std::min(run + n, weight_.num_runs() - 1) / weight_.group_runs);
    }
    return Values::Lanes(_mm_loadu_ps(numbers));
  }

  const PackedWeight& weight_;
  const Blocks<Values>& blocks_;
  const int64_t first_group_;
  int64_t runs_left_, stride_;
  const uint8_t* step_;
  uint8_t* last_step_;
  const char* prefetch_;
};

// Multiply rows with four features of a weight.
template <int rows, bool has_zero_points, class Reader, class Row, class Result>
SIMD void MultiplyValues(Rows<const Row> x, const Blocks<typename Reader::Values>& blocks, Reader reader, Rows<Result> y) {
  constexpr int kVectors = Reader::Values::kVectors;
  Floats sums[rows][kTileFeatures];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = Set(0.0f);
  const Row* at[rows];
  UNROLL for (int r = 0; r < rows; ++r) at[r] = x[r];
  for (int64_t block = 0; block < blocks.num; ++block) {
    Floats row_sums[rows], products[rows][kTileFeatures];
    UNROLL for (int r = 0; r < rows; ++r) {
      row_sums[r] = Set(0.0f);
      UNROLL for (int f = 0; f < kTileFeatures; ++f) products[r][f] = Set(0.0f);
    }
    for (int64_t step = 0; step < blocks.steps; ++step) {
      UNROLL for (int vector = 0; vector < kVectors; ++vector) {
        Floats row[rows];
        UNROLL for (int r = 0; r < rows; ++r) {
          row[r] = Load(at[r] + vector * kFloatLanes);
          if constexpr (has_zero_points) row_sums[r] = row_sums[r] + row[r];
        }
        UNROLL for (int f = 0; f < kTileFeatures; ++f) {
          const Floats values = reader.Vector(f, vector);
          UNROLL for (int r = 0; r < rows; ++r) products[r][f] = MultiplyAdd(row[r], values, products[r][f]);
        }
      }
      UNROLL for (int r = 0; r < rows; ++r) at[r] += kVectors * kFloatLanes;
      reader.NextStep();
    }
    UNROLL for (int f = 0; f < kTileFeatures; ++f) {
      const Floats scale = reader.Scale(f, block);
      UNROLL for (int r = 0; r < rows; ++r) {
        if constexpr (has_zero_points) {
          products[r][f] = NegatedMultiplyAdd(reader.ZeroPoint(f, block), row_sums[r], products[r][f]);
        }
        sums[r][f] = MultiplyAdd(products[r][f], scale, sums[r][f]);
      }
    }
  }
  UNROLL for (int r = 0; r < rows; ++r) StoreSums(sums[r], y[r]);
}

#ifdef HAS_BF16_DOT
// The same, with sums of integers.
template <int rows, bool has_zero_points, Encoding encoding, ScaleType type, class Result>
SIMD void MultiplyValues(Rows<const uint16_t> x, const Blocks<ByteValues<encoding>>& blocks,
                         PackedReader<encoding, type> reader, Rows<Result> y) {
  using Values = ByteValues<encoding>;
  Floats sums[rows][kTileFeatures];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = Set(0.0f);
  const uint8_t* at[rows];
  UNROLL for (int r = 0; r < rows; ++r) at[r] = reinterpret_cast<const uint8_t*>(x[r]);
  for (int64_t block = 0; block < blocks.num; ++block) {
    __m512i high[rows][kTileFeatures], low[rows][kTileFeatures];
    Floats row_scales[rows], row_sums[rows];
    UNROLL for (int r = 0; r < rows; ++r) {
      const __m512i of_lanes = _mm512_loadu_si512(at[r] + Values::kSums);
      row_sums[r] = _mm512_cvtepi32_ps(of_lanes);
      row_scales[r] = _mm512_loadu_ps(at[r] + Values::kScales);
      at[r] += Values::kPlanes;
      UNROLL for (int f = 0; f < kTileFeatures; ++f) {
        high[r][f] = _mm512_setzero_si512();
        low[r][f] = _mm512_sub_epi32(high[r][f], _mm512_slli_epi32(of_lanes, Values::kOffsetBits));
      }
    }
    for (int64_t step = 0; step < blocks.steps; ++step) {
      UNROLL for (int vector = 0; vector < Values::kVectors; ++vector) {
        UNROLL for (int f = 0; f < kTileFeatures; ++f) {
          const __m512i values = reader.Vector(f, vector);
          UNROLL for (int r = 0; r < rows; ++r) {
            const uint8_t* const planes = at[r] + 2 * vector * Values::kPlane;
            high[r][f] = _mm512_dpbusd_epi32(high[r][f], values, _mm512_loadu_si512(planes));
            low[r][f] = _mm512_dpbusd_epi32(low[r][f], values, _mm512_loadu_si512(planes + Values::kPlane));
          }
        }
      }
      UNROLL for (int r = 0; r < rows; ++r) at[r] += Values::kStepBytes;
      reader.NextStep();
    }
    UNROLL for (int f = 0; f < kTileFeatures; ++f) {
      const Floats scale = reader.Scale(f, block);
      UNROLL for (int r = 0; r < rows; ++r) {
        Floats product = _mm512_cvtepi32_ps(Values::Joined(high[r][f], low[r][f]));
        if constexpr (has_zero_points) product = NegatedMultiplyAdd(reader.ZeroPoint(f, block), row_sums[r], product);
        sums[r][f] = MultiplyAdd(product * row_scales[r], scale, sums[r][f]);
      }
    }
  }
  UNROLL for (int r = 0; r < rows; ++r) StoreSums(sums[r], y[r]);
}
#endif

// Call MultiplyValues for a number of rows.
template <int max_rows, bool has_zero_points, class Reader, class Row, class Result>
INLINE void MultiplyValues(int64_t num_rows, Rows<const Row> x, const Blocks<typename Reader::Values>& blocks,
                           const Reader& reader, Rows<Result> y) {
  if (num_rows == max_rows) {
    MultiplyValues<max_rows, has_zero_points>(x, blocks, reader, y);
  } else if constexpr (max_rows > 1) {
    MultiplyValues<max_rows - 1, has_zero_points>(num_rows, x, blocks, reader, y);
  }
}

// Multiply rows with features [begin, end) of a weight.
template <Encoding encoding, ScaleType type, bool has_zero_points, class Row, class Result>
SIMD void MultiplyFewRows(Rows<const Row> x, int64_t num_rows, const PackedWeight& weight, int64_t begin, int64_t end,
                          Rows<Result> y) {
  using Reader = PackedReader<encoding, type>;
  constexpr int kRows = Reader::Values::kRows;
  const Blocks<typename Reader::Values> blocks(weight.num_runs(), weight.group_runs);
  const int64_t feature_bytes = weight.num_runs() * RunBytes(encoding), num_tiles = CeilDivide(num_rows, kRows);
  const int64_t distance = RoundUp(kPrefetchBytes, kTileFeatures * feature_bytes);
  uint8_t last_step[kTileFeatures * Reader::kStepBytes];
  for (int64_t tile = begin; tile < end; tile += kTileFeatures) {
    const int64_t feature = std::min(tile, end - kTileFeatures);
    const uint8_t* const later = weight.values + feature * feature_bytes + distance;
    for (int64_t n = 0; n < num_tiles; ++n) {
      const int64_t row = num_rows * n / num_tiles, rows = num_rows * (n + 1) / num_tiles - row;
      const Reader reader(weight, blocks, feature, last_step, n == 0 ? later : nullptr);
      MultiplyValues<kRows, has_zero_points>(rows, Rows<const Row>{x[row], x.stride}, blocks, reader,
                                             Rows<Result>{y[row] + feature, y.stride});
    }
  }
}

// Put the rows into the order of the values.
template <class Values, class Row>
void PrepareValueRows(const Pool& pool, const QuantizedMatmulArguments& a) {
  const Blocks<Values> blocks(a.num_inputs / kRun, a.group_size / kRun);
  ParallelFor(pool, CeilDivide(a.num_rows, kCopyRowsPerJob), [&](int64_t job) {
    for (int64_t row = job * kCopyRowsPerJob; row < std::min(a.num_rows, (job + 1) * kCopyRowsPerJob); ++row) {
      Values::PrepareRow(static_cast<const uint16_t*>(a.x) + row * a.num_inputs, a.num_inputs / kRun, blocks.steps,
                         static_cast<Row*>(a.rows.data) + row * a.rows.stride);
    }
  });
}

// --- Dequantised elements ---

// Multiply rows with four features, from `feature` on, dequantised in registers.
template <Encoding encoding, ScaleType type, int rows>
SIMD void MultiplyRuns(Rows<const float> x, const PackedWeight& weight, int64_t feature, Rows<float> y) {
  using Reader = RunReader<Float32, encoding, type>;
  const int64_t feature_bytes = weight.num_runs() * RunBytes(encoding), num_groups = weight.num_groups();
  const uint8_t* values = weight.values + feature * feature_bytes;
  Floats sums[rows][kTileFeatures];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = Set(0.0f);
  const float* at[rows];
  UNROLL for (int r = 0; r < rows; ++r) at[r] = x[r];
  const char* prefetch = reinterpret_cast<const char*>(values) + RoundUp(kPrefetchBytes, kTileFeatures * feature_bytes);
  for (int64_t group = 0; group < num_groups; ++group) {
    Reader reader[kTileFeatures];
    UNROLL for (int f = 0; f < kTileFeatures; ++f) reader[f].StartGroup(weight, (feature + f) * num_groups + group);
    for (int64_t run = 0; run < weight.group_runs; ++run, values += RunBytes(encoding)) {
      UNROLL for (int64_t line = 0; line < kTileFeatures * RunBytes(encoding); line += kCacheLine, prefetch += kCacheLine) {
        Prefetch(prefetch);
      }
      UNROLL for (int part = 0; part < Reader::kParts; ++part) {
        Floats row[rows];
        UNROLL for (int r = 0; r < rows; ++r) row[r] = Load(at[r] + part * kFloatLanes);
        UNROLL for (int f = 0; f < kTileFeatures; ++f) {
          const Floats w = reader[f].Vector(values + f * feature_bytes, part);
          UNROLL for (int r = 0; r < rows; ++r) sums[r][f] = MultiplyAdd(row[r], w, sums[r][f]);
        }
      }
      UNROLL for (int r = 0; r < rows; ++r) at[r] += kRun;
    }
  }
  UNROLL for (int r = 0; r < rows; ++r) StoreSums(sums[r], y[r] + feature);
}

// Call MultiplyRuns for a number of rows.
template <Encoding encoding, ScaleType type, int max_rows>
INLINE void MultiplyRuns(int64_t num_rows, Rows<const float> x, const PackedWeight& weight, int64_t feature,
                         Rows<float> y) {
  if (num_rows == max_rows) {
    MultiplyRuns<encoding, type, max_rows>(x, weight, feature, y);
  } else if constexpr (max_rows > 1) {
    MultiplyRuns<encoding, type, max_rows - 1>(num_rows, x, weight, feature, y);
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

#ifdef HAS_AMX
// --- Dequantised elements, in the tiles of AMX ---

// Runs of 32 features that are dequantised at once, and how far apart the features are then: at a power of two they would
// compete for the same lines of the L1 cache.
constexpr int64_t kRangeRuns = 8, kRangeStride = (kRangeRuns + 1) * kRun;

// Widen runs [first, first + num_runs) of `num_features` features from `feature` on, and prefetch those of later features.
template <Encoding encoding, ScaleType type>
SIMD INLINE void WidenRange(const PackedWeight& weight, int64_t num_groups, int64_t feature, int num_features, int64_t first,
                            int64_t num_runs, uint16_t* to) {
  const int64_t first_group = first / weight.group_runs, before = first - first_group * weight.group_runs;
  const uint8_t* const values = weight.values + first * RunBytes(encoding);
  for (int f = 0; f < num_features; ++f) {
    RunReader<BFloat16, encoding, type> reader;
    int64_t group = (feature + f) * num_groups + first_group, left_in_group = weight.group_runs - before;
    reader.StartGroup(weight, group);
    const uint8_t* run = values + (feature + f) * weight.num_runs() * RunBytes(encoding);
    auto* vector = reinterpret_cast<float*>(to + f * kRangeStride);
    const char* const later = reinterpret_cast<const char*>(run) + kPairedFeatures * weight.num_runs() * RunBytes(encoding);
    for (int64_t byte = 0; byte < num_runs * RunBytes(encoding); byte += kCacheLine) Prefetch(later + byte);
    for (int64_t n = 0; n < num_runs; ++n, run += RunBytes(encoding), vector += kFloatLanes, --left_in_group) {
      if (left_in_group == 0) {
        reader.StartGroup(weight, ++group);
        left_in_group = weight.group_runs;
      }
      Store(reader.Vector(run, 0), vector);
    }
  }
}

// Multiply up to 32 rows with features [begin, end) of a weight. A range of a few features' inputs is dequantised at a time.
template <Encoding encoding, ScaleType type, class Result>
SIMD void MultiplyInTiles(const PackedRows& x, int64_t num_rows, const PackedWeight& weight, int64_t begin, int64_t end,
                          Rows<Result> y) {
  alignas(64) uint16_t range[kPairedFeatures * kRangeStride];
  const int64_t num_runs = weight.num_runs(), num_groups = weight.num_groups();
  ForEachTilePair(x, num_rows, end - begin, weight.num_inputs, [&](TileOperands& tiles, int64_t, int64_t feature) SIMD {
    const Rows<Result> to{y.data + begin + feature, y.stride, y.index};
    ComputeTiles(tiles, to, [&](TileOperands tiles, auto has_second_features, auto has_second_rows) SIMD {
      tiles.weight = range;
      tiles.weight_stride = kRangeStride;
      for (int64_t first = 0; first < num_runs; first += kRangeRuns) {
        const int64_t runs = std::min(kRangeRuns, num_runs - first);
        WidenRange<encoding, type>(weight, num_groups, begin + feature, tiles.features[0] + tiles.features[1], first, runs,
                                   range);
        CompilerBarrier();
        tiles.num_inputs = runs * kRun;
        AddProductsOfTiles<has_second_features.value, has_second_rows.value>(tiles);
        for (int n = 0; n < 2; ++n) tiles.packed[n] += tiles.num_inputs * tiles.rows[n];
      }
    });
  });
}
#endif

// --- Both ---

// Call job(x, num_rows, weight, begin, end, y) for blocks of features of each group, with the group's rows and results.
template <class Type, class Result, Encoding encoding, ScaleType type, class Prepared, class Job>
void ForPackedBlocks(const Pool& pool, const QuantizedMatmulArguments& a, const std::vector<Group>& groups, const Prepared& x,
                     const Job& job) {
  constexpr int64_t kScaleBytes = type == ScaleType::kFloat32 ? 4 : 2;
  const int64_t num_scales = a.num_features * (a.num_inputs / a.group_size);
  const int64_t num_bytes = a.num_features * (a.num_inputs / kRun) * RunBytes(encoding);
  ParallelForBlocks<Type>(pool, groups, a.num_features, a.num_inputs, [&](const Block& block, const Block*) {
    const Group& group = block.group;
    const PackedWeight weight{static_cast<const uint8_t*>(a.values) + group.index * num_bytes,
                              static_cast<const char*>(a.scales) + group.index * num_scales * kScaleBytes,
                              a.zero_points == nullptr ? nullptr : a.zero_points + group.index * num_scales, a.num_inputs,
                              a.group_size / kRun};
    const Rows<Result> y{static_cast<Result*>(a.y) + group.first_row * a.num_features, a.num_features};
    job(x.From(group.first_row), group.num_rows, weight, block.begin, block.end, y);
  });
}

template <class Type, class Result, Encoding encoding, ScaleType type>
void MultiplyPacked(const Pool& pool, const QuantizedMatmulArguments& a) {
  using Element = typename Type::Element;
  using Row = typename Type::Row;
  const auto groups = NonEmptyGroups(a.sizes, a.num_groups, a.num_rows);
  if constexpr (std::is_same_v<Type, BFloat16>) {
    if (a.num_rows <= FewRows(Type::kPacks) * a.num_groups) {
      PrepareValueRows<ValuesOf<encoding>, Row>(pool, a);
      const Rows<const Row> x{static_cast<const Row*>(a.rows.data), a.rows.stride};
      const auto multiply = [](auto rows, int64_t num_rows, const PackedWeight& weight, int64_t begin, int64_t end, auto y) {
        if (weight.zero_points == nullptr) {
          MultiplyFewRows<encoding, type, false>(rows, num_rows, weight, begin, end, y);
        } else {
          MultiplyFewRows<encoding, type, true>(rows, num_rows, weight, begin, end, y);
        }
      };
      return ForPackedBlocks<Type, Result, encoding, type>(pool, a, groups, x, multiply);
    }
  }
  const Rows<const Element> rows{static_cast<const Element*>(a.x), a.num_inputs};
  const auto x = PrepareRows<Type>(pool, rows, a.num_rows, a.num_inputs, groups, a.rows);
  const auto multiply = [&](auto rows, int64_t num_rows, const PackedWeight& weight, int64_t begin, int64_t end, auto y) {
    if constexpr (std::is_same_v<Type, Float32>) {
      if (num_rows <= kFewFloatRows) {
        for (int64_t tile = begin; tile < end; tile += kTileFeatures) {
          const int64_t feature = std::min(tile, end - kTileFeatures);
          MultiplyRuns<encoding, type, kFewFloatRows>(num_rows, rows, weight, feature, y);
        }
        return;
      }
    }
#ifdef HAS_AMX
    if constexpr (Type::kPacks) {
      if (num_rows <= kPairedRows) return MultiplyInTiles<encoding, type>(rows, num_rows, weight, begin, end, y);
    }
#endif
    // The last tile of a block may start before it, if it has too few features.
    const int64_t first = std::min(begin, end - kTileFeatures), num_features = end - first;
    auto* const memory = reinterpret_cast<Element*>(
        ThreadMemory<2>(CeilDivide(num_features * a.num_inputs * sizeof(Element), sizeof(float))));
    WidenFeatures<Type, encoding, type>(weight, first, end, memory);
    MultiplyBlock<Type, Result>(rows, num_rows, memory, a.num_inputs, {y.data + first, y.stride}, num_features, nullptr);
  };
  ForPackedBlocks<Type, Result, encoding, type>(pool, a, groups, x, multiply);
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
