// SwiGLU (arXiv:2002.05202), for processors with AVX512-BF16.

#pragma once

#include "simd.h"

// silu(gate) * up of `count` elements. The silu is rounded before the product too, as in PyTorch.
template <class Element>
AVX512 inline void SiluAndMul(const Element* gate, const Element* up, int64_t count, Element* to) {
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    const __mmask16 mask = LaneMask(count - i);
    const __m512 x = LoadFloats(gate + i, mask), one = _mm512_set1_ps(1.0f);
    const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, Exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    StoreFloats(silu, to + i, mask);
    StoreFloats(_mm512_mul_ps(LoadFloats(to + i, mask), LoadFloats(up + i, mask)), to + i, mask);
  }
}
