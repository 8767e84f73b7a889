/* Weights that are stored in few bits, and what makes numbers of them.
   Levels are signed; a weight is (level - zero) * scale, with a scale and a zero for each block of K and each column.
   Nibbles lie eight to a lane of 32 bits, along K. */
#ifndef OC_WEIGHTS_H
#define OC_WEIGHTS_H
#include "half.h"
#include "simd.h"

#if defined(OC_AVX512_VNNI)
/* nibble d of each lane */
INLINE vf weights_nibble(vi w, int d) {
  const vf levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(w, (unsigned)(4 * d)), levels);
}
#elif defined(OC_AVX2)
INLINE vf weights_nibble(vi w, int d) {
  return vi_float(_mm256_srai_epi32(_mm256_slli_epi32(w, 28 - 4 * d), 28));
}
#else
INLINE vf weights_nibble(vi w, int d) { return vi_float(vi_shl(w, 28 - 4 * d) >> 28); }
#endif

/* the low nibble of each byte as a signed byte */
#if defined(OC_AVX512_VNNI)
INLINE vi weights_bytes(vi w) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  return _mm512_shuffle_epi8(bytes, vi_and(w, vi_set(0x0f0f0f0f)));
}
#elif defined(OC_AVX2)
INLINE vi weights_bytes(vi w) {
  const __m128i bytes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), vi_and(w, vi_set(0x0f0f0f0f)));
}
#else
INLINE vi weights_bytes(vi w) {
  const vi sign = vi_and(w, vi_set(0x08080808)), two = vi_or(vi_shl(sign, 1), vi_shl(sign, 2));
  return vi_or(vi_and(w, vi_set(0x0f0f0f0f)), vi_or(two, vi_shl(two, 2)));
}
#endif

/* ones in the first n of four bytes, n from 1 on */
INLINE int32_t weights_ones(long n) { return n >= 4 ? 0x01010101 : 0x01010101 & ((1 << 8 * n) - 1); }

/* sums of each block of a row */
INLINE void weights_sums(float *sums, const float *a, long depth, long block) {
  for (long g = 0; g * block < depth; ++g) {
    const long stop = (g + 1) * block < depth ? (g + 1) * block : depth;
    float sum = 0;
    for (long k = g * block; k < stop; ++k) sum += a[k];
    sums[g] = sum;
  }
}
/* Row k of a panel of floats from vectors of levels; `zero` is null where all are 0. */
INLINE void weights_row(float *row, vf level, vf scale, const int8_t *zero, int j) {
  vf_store(row + j, vf_mul(zero ? vf_sub(level, vi_float(vi_s8(zero + j))) : level, scale));
}
#define OC_EXPAND(name, TYPE, load)                                                                             \
  INLINE void weights_expand_q4##name(float *panel, const int32_t *w, const TYPE *scale, const int8_t *zero,    \
                                      long depth, long block, int width) {                                      \
    for (long k = 0; k < depth; scale += width, zero = zero ? zero + width : zero)                              \
      for (const long stop = k + block < depth ? k + block : depth; k < stop; k += 8, w += width) {             \
        const int deep = stop - k < 8 ? (int)(stop - k) : 8;                                                    \
        for (int j = 0; j < width; j += VL) {                                                                   \
          vi word = vi_load(w + j);                                                                             \
          const vf s = load(scale + j);                                                                         \
          for (int d = 0; d < deep; ++d, word = vi_shr(word, 4))                                                \
            weights_row(panel + (k + d) * width, weights_nibble(word, 0), s, zero, j);                          \
        }                                                                                                       \
        if (deep < 8) k -= 8 - deep;                                                                            \
      }                                                                                                         \
  }                                                                                                             \
  INLINE void weights_expand_q8##name(float *panel, const int8_t *w, const TYPE *scale, const int8_t *zero,     \
                                      long depth, long block, int width) {                                      \
    for (long k = 0; k < depth; scale += width, zero = zero ? zero + width : zero)                              \
      for (const long stop = k + block < depth ? k + block : depth; k < stop; ++k, w += width)                  \
        for (int j = 0; j < width; j += VL)                                                                     \
          weights_row(panel + k * width, vi_float(vi_s8(w + j)), load(scale + j), zero, j);                     \
  }
OC_EXPAND(_f32, float, vf_load)
OC_EXPAND(_f16, uint16_t, vh_load)

INLINE void weights_expand_f16(float *panel, const uint16_t *w, long count) {
  for (long i = 0; i < count; i += VL) vf_store(panel + i, vh_load(w + i));
}
INLINE void weights_expand_bf16(float *panel, const uint16_t *w, long count) {
  for (long i = 0; i < count; i += VL) vf_store(panel + i, vb_load(w + i));
}
#endif
