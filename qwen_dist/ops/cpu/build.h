// The kernels of one build, which the including file chose by SIMD and SIMD_VECTORS.

#pragma once

#include "attention.h"
#include "delta_rule.h"
#include "elementwise.h"
#include "experts.h"
#include "grouped_matmul.h"
#include "quantized_matmul.h"

namespace {

constexpr Kernels kBuild{BFloat16::kWidens, BFloat16::kPacks, GroupedMatmul,    QuantizedMatmul, Experts,
                         SwiGlu,            Rotate,           ShortConvolution, PagedAttention,  RunDeltaRule};

}  // namespace
