// The gate of an MLP (arXiv:2002.05202), for processors with AVX512-BF16.

#pragma once

#include "simd.h"

// silu(gate) * up of so many numbers, rounded after the silu too, as PyTorch does.
template <class Element>
AVX512 inline void Gate(const Element* gate, const Element* up, int64_t number, Element* to) {
  for (int64_t i = 0; i < number; i += kFloats) {
    const __mmask16 first = First(number - i);
    const __m512 x = Floats(gate + i, first), one = _mm512_set1_ps(1.0f);
    const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, Exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    Store(silu, to + i, first);
    Store(_mm512_mul_ps(Floats(to + i, first), Floats(up + i, first)), to + i, first);
  }
}
