/* IEEE half floats (vh): 16 bits in memory and a vf elsewhere. Stores round to nearest, halves to even. */
#ifndef OC_HALF_H
#define OC_HALF_H
#include "simd.h"

#if defined(OC_AVX512_VNNI)
#define OC_TO_HALF(v) _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
INLINE vf vh_load(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vf vh_loadn(const uint16_t *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(LANES(n), p)); }
INLINE void vh_store(uint16_t *p, vf v) { _mm256_storeu_si256((__m256i *)p, OC_TO_HALF(v)); }
INLINE void vh_storen(uint16_t *p, vf v, int n) { _mm256_mask_storeu_epi16(p, LANES(n), OC_TO_HALF(v)); }
INLINE vf vh_round(vf v) { return _mm512_cvtph_ps(OC_TO_HALF(v)); }
#else
#if defined(OC_AVX2)
#define OC_TO_HALF(v) _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)
INLINE vf vh_load(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void vh_store(uint16_t *p, vf v) { _mm_storeu_si128((__m128i *)p, OC_TO_HALF(v)); }
INLINE vf vh_round(vf v) { return _mm256_cvtph_ps(OC_TO_HALF(v)); }
#elif defined(OC_NEON_DOTPROD)
INLINE vf vh_load(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void vh_store(uint16_t *p, vf v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
INLINE vf vh_round(vf v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
#else
/* the exponent moves by 112; those at the ends, infinite and subnormal ones, by arithmetic */
INLINE vf vh_widen(vi bits) {
  const vi rest = vi_shl(vi_and(bits, vi_set(0x7fff)), 13), sign = vi_shl(vi_and(bits, vi_set(0x8000)), 16);
  const vf near = vf_mul(vi_asfloat(rest), vf_set(0x1p112f));
  const vf open = vi_asfloat(vi_or(rest, vi_set(0x7f800000)));
  const vf value = vf_where(vf_lt(near, vf_set(65536.0f)), near, open);
  return vi_asfloat(vi_or(vf_bits(value), sign));
}
INLINE vi vh_bits(vf v) {
  const vi all = vf_bits(v), bits = vi_and(all, vi_set(0x7fffffff));
  const vi sign = vi_and(vi_shr(all, 16), vi_set(0x8000));
  const vf a = vi_asfloat(bits);
  const vi odd = vi_and(vi_shr(bits, 13), vi_set(1));
  const vi normal = vi_shr(vi_add(bits, vi_add(odd, vi_set((int32_t)0xc8000fff))), 13);
  /* a sum whose last place is the last of a subnormal half */
  const vi small = vi_sub(vf_bits(vf_add(a, vf_set(0.5f))), vi_set(0x3f000000));
  const vi large = vf_bits(vf_where(vf_isnan(v), vi_asfloat(vi_set(0x7e00)), vi_asfloat(vi_set(0x7c00))));
  const vf some = vf_where(vf_lt(a, vf_set(0x1p-14f)), vi_asfloat(small), vi_asfloat(normal));
  return vi_or(vf_bits(vf_where(vf_lt(a, vf_set(65520.0f)), some, vi_asfloat(large))), sign);
}
INLINE vf vh_load(const uint16_t *p) { return vh_widen(vi_u16(p)); }
INLINE void vh_store(uint16_t *p, vf v) { vi_to16(p, vh_bits(v)); }
INLINE vf vh_round(vf v) { return vh_widen(vh_bits(v)); }
#endif
INLINE vf vh_loadn(const uint16_t *p, int n) { uint16_t t[VL] = {0}; memcpy(t, p, 2 * (size_t)n); return vh_load(t); }
INLINE void vh_storen(uint16_t *p, vf v, int n) { uint16_t t[VL]; vh_store(t, v); memcpy(p, t, 2 * (size_t)n); }
#endif
INLINE vf vh_set(uint16_t x) { uint16_t t[VL]; for (int i = 0; i < VL; ++i) t[i] = x; return vh_load(t); }
INLINE vf vh_loads(const uint16_t *p, long s, int n) { uint16_t t[VL] = {0}; for (int i = 0; i < n; ++i) t[i] = p[i * s]; return vh_load(t); }
INLINE void vh_stores(uint16_t *p, vf v, long s, int n) { uint16_t t[VL]; vh_store(t, v); for (int i = 0; i < n; ++i) p[i * s] = t[i]; }
#endif
