// SwiGLU (arXiv:2002.05202).

#pragma once

#include "simd.h"

namespace {

// silu(gate) * up of `count` elements. The silu is rounded before the product too, as in PyTorch.
template <class Element>
SIMD void SiluAndMul(const Element* gate, const Element* up, int64_t count, Element* to) {
  const auto step = [&](int64_t i, auto lanes) SIMD {
    Store(RoundedTo(to, Silu(Load(gate + i, lanes))) * Load(up + i, lanes), to + i, lanes);
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) step(i, AllLanes());
  if (i < count) step(i, FirstLanes(count - i));
}

}  // namespace
