/* Vectors of VL floats (vf), VL 32-bit integers (vi) and VL truth values (vm), for four kinds of
   machine.
   Names: type_operation; a trailing n takes only the first n lanes, a trailing s a stride. */
#ifndef OC_SIMD_H
#define OC_SIMD_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))
#if defined(__clang__)
#define TILE __attribute__((noinline))
#else
#define TILE __attribute__((noinline, noclone))
#endif

INLINE int32_t load32(const void *p) { int32_t x; memcpy(&x, p, 4); return x; }

#if defined(OC_AVX512_VNNI)
#include <immintrin.h>
#define VL 16
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;
#define LANES(n) ((__mmask16)((1u << (n)) - 1u))
INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vf vf_loadn(const float *p, int n) { return _mm512_maskz_loadu_ps(LANES(n), p); }
INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE void vf_storen(float *p, vf v, int n) { _mm512_mask_storeu_ps(p, LANES(n), v); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, 8); }
INLINE vf vf_floor(vf a) { return _mm512_roundscale_ps(a, 9); }
INLINE vf vf_ceil(vf a) { return _mm512_roundscale_ps(a, 10); }
INLINE vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vm vf_le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE vm vf_isnan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
INLINE vf vf_where(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
INLINE vf vf_keep(vf a, int n, float fill) { return vf_where(LANES(n), a, vf_set(fill)); }
INLINE vm vm_and(vm a, vm b) { return a & b; }
INLINE vm vm_or(vm a, vm b) { return a | b; }
INLINE vm vm_xor(vm a, vm b) { return a ^ b; }
INLINE vm vm_not(vm a) { return (vm)~a; }
INLINE vm vm_loadn(const uint8_t *p, int n) {
  __m128i x = _mm_maskz_loadu_epi8(LANES(n), p);
  return _mm_test_epi8_mask(x, x);
}
INLINE void vm_storen(uint8_t *p, vm m, int n) {
  _mm_mask_storeu_epi8(p, LANES(n), _mm_maskz_set1_epi8(m, 1));
}
INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
INLINE vi vi_loadn(const int32_t *p, int n) { return _mm512_maskz_loadu_epi32(LANES(n), p); }
INLINE void vi_store(int32_t *p, vi v) { _mm512_storeu_si512(p, v); }
INLINE void vi_storen(int32_t *p, vi v, int n) { _mm512_mask_storeu_epi32(p, LANES(n), v); }
INLINE vi vi_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi vi_s8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi vi_u8n(const uint8_t *p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(LANES(n), p)); }
INLINE vi vi_s8n(const int8_t *p, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(LANES(n), p)); }
INLINE void vi_to8(void *p, vi v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v)); }
INLINE void vi_to8n(void *p, vi v, int n) { _mm_mask_storeu_epi8(p, LANES(n), _mm512_cvtepi32_epi8(v)); }
INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
INLINE vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi vf_int(vf a) { return _mm512_cvtps_epi32(a); }
INLINE vf vf_exponent(vi e) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(e, vi_set(127)), 23)); }
INLINE vi vf_bits(vf a) { return _mm512_castps_si512(a); }
INLINE vf vi_asfloat(vi a) { return _mm512_castsi512_ps(a); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
INLINE vi vi_shl(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
INLINE vi vi_shr(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
INLINE vi vi_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vi vi_u16n(const uint16_t *p, int n) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(LANES(n), p)); }
INLINE void vi_to16(uint16_t *p, vi v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(v)); }
INLINE void vi_to16n(uint16_t *p, vi v, int n) { _mm256_mask_storeu_epi16(p, LANES(n), _mm512_cvtepi32_epi16(v)); }
INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
INLINE float vf_hmin(vf a) { return _mm512_reduce_min_ps(a); }
INLINE vf vf_scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
/* a and b as 16-bit integers, saturated, plus `zero`, which is often the constant 0 */
INLINE __m512i oc_pack(vi a, vi b, int zero) {
  const __m512i ab = _mm512_packs_epi32(a, b);
  return __builtin_constant_p(zero) && zero == 0 ? ab : _mm512_adds_epi16(ab, _mm512_set1_epi16((short)zero));
}
/* a, b, c and d plus `zero`, saturated, as bytes in that order */
#define OC_JOINED(name, pack)                                                                             \
  INLINE vi name(vi a, vi b, vi c, vi d, int zero) {                                                      \
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);        \
    return _mm512_permutexvar_epi32(order, pack(oc_pack(a, b, zero), oc_pack(c, d, zero)));               \
  }
OC_JOINED(vi_joined_u8, _mm512_packus_epi16)
OC_JOINED(vi_joined_s8, _mm512_packs_epi16)
#define OC_LIVE(n) ((n) == 64 ? ~0ull : (1ull << (n)) - 1)
/* the first `live` bytes of row `row`, where rows of up to 16 or 32 bytes share a vector */
INLINE void vi_row_to(void *p, vi v, int row, int live) {
  if (live > 32) {
    if (live == 64) _mm512_storeu_si512(p, v);
    else _mm512_mask_storeu_epi8(p, OC_LIVE(live), v);
  } else if (live > 16) {
    const __m256i half = row ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
    if (live == 32) _mm256_storeu_si256((__m256i *)p, half);
    else _mm256_mask_storeu_epi8(p, (__mmask32)OC_LIVE(live), half);
  } else {
    const __m128i part = row == 0 ? _mm512_castsi512_si128(v) : row == 1 ? _mm512_extracti32x4_epi32(v, 1)
                       : row == 2 ? _mm512_extracti32x4_epi32(v, 2) : _mm512_extracti32x4_epi32(v, 3);
    if (live == 16) _mm_storeu_si128((__m128i *)p, part);
    else _mm_mask_storeu_epi8(p, (__mmask16)OC_LIVE(live), part);
  }
}
INLINE vi vi_dot4(vi c, vi bytes, vi w) { return _mm512_dpbusd_epi32(c, bytes, w); }
/* the first `live` of 64 bytes */
INLINE vi vi_bytes(const uint8_t *p, int live) {
  if (__builtin_constant_p(live) && live == 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(OC_LIVE(live), p);
}
INLINE void vi_bytes_to(void *p, int live, vi v) {
  if (live == 64) _mm512_storeu_si512(p, v);
  else _mm512_mask_storeu_epi8(p, OC_LIVE(live), v);
}
/* `live` bytes of pixels `stride` apart, of 16 or 32 channels each */
INLINE vi vi_pixels(const uint8_t *p, long stride, int channels, int live) {
  if (channels == 32) {
    const vi one = _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)p));
    return live == 32 ? one : _mm512_inserti64x4(one, _mm256_loadu_si256((const __m256i *)(p + stride)), 1);
  }
  vi all = _mm512_zextsi128_si512(_mm_loadu_si128((const __m128i *)p));
  if (live > 16) all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(p + stride)), 1);
  if (live > 32) all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(p + 2 * stride)), 2);
  if (live > 48) all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(p + 3 * stride)), 3);
  return all;
}
INLINE void vi_pixels_to(void *to, long stride, int channels, int live, vi v) {
  uint8_t *const p = to;
  if (channels == 32) {
    _mm256_storeu_si256((__m256i *)p, _mm512_castsi512_si256(v));
    if (live > 32) _mm256_storeu_si256((__m256i *)(p + stride), _mm512_extracti64x4_epi64(v, 1));
    return;
  }
  _mm_storeu_si128((__m128i *)p, _mm512_castsi512_si128(v));
  if (live > 16) _mm_storeu_si128((__m128i *)(p + stride), _mm512_extracti32x4_epi32(v, 1));
  if (live > 32) _mm_storeu_si128((__m128i *)(p + 2 * stride), _mm512_extracti32x4_epi32(v, 2));
  if (live > 48) _mm_storeu_si128((__m128i *)(p + 3 * stride), _mm512_extracti32x4_epi32(v, 3));
}
/* bytes of four places as lanes of four; vector q has 16 l + 4 q + (0 to 3), l from 0 to 3 */
INLINE void vi_unpack(vi a, vi b, vi c, vi d, vi *x0, vi *x1, vi *x2, vi *x3) {
  const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
  const __m512i below = _mm512_unpacklo_epi8(c, d), above = _mm512_unpackhi_epi8(c, d);
  *x0 = _mm512_unpacklo_epi16(low, below);
  *x1 = _mm512_unpackhi_epi16(low, below);
  *x2 = _mm512_unpacklo_epi16(high, above);
  *x3 = _mm512_unpackhi_epi16(high, above);
}
/* vectors in that order plus `zero`, saturated, as 64 bytes */
INLINE vi vi_join_lanes_u8(vi a, vi b, vi c, vi d, int zero) {
  return _mm512_packus_epi16(oc_pack(a, b, zero), oc_pack(c, d, zero));
}
INLINE vi vi_join_lanes_s8(vi a, vi b, vi c, vi d, int zero) {
  return _mm512_packs_epi16(oc_pack(a, b, zero), oc_pack(c, d, zero));
}
/* bytes of `count` planes (2 to 4) as pixels: a[0] b[0] ... a[1] b[1] ..., the first n pixels */
INLINE void vi_weave(void *p, vi a, vi b, vi c, vi d, int count, int n) {
  const __m512i low = _mm512_set1_epi32(255);
  __m512i x = _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32(_mm512_and_si512(b, low), 8));
  if (count > 2) x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_and_si512(c, low), 16));
  if (count > 3) x = _mm512_or_si512(x, _mm512_slli_epi32(d, 24));
  if (count == 2) _mm256_mask_storeu_epi16(p, LANES(n), _mm512_cvtepi32_epi16(x));
  else if (count == 4) _mm512_mask_storeu_epi32(p, LANES(n), x);
  else {
    const __m512i three = _mm512_set4_epi32(-1, 0x0e0d0c0a, 0x09080605, 0x04020100);
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
    x = _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(x, three));
    _mm512_mask_storeu_epi8(p, (1ull << 3 * n) - 1, x);
  }
}
/* four unsigned bytes of a4 against four signed bytes in each lane of w */
INLINE vi vi_dot(vi c, int32_t a4, vi w) { return _mm512_dpbusd_epi32(c, _mm512_set1_epi32(a4), w); }

#elif defined(OC_AVX2)
#include <immintrin.h>
#define VL 8
typedef __m256 vf;
typedef __m256i vi;
typedef __m256i vm;
INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE __m256i oc_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE vf vf_loadn(const float *p, int n) { return _mm256_maskload_ps(p, oc_lanes(n)); }
INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
INLINE void vf_storen(float *p, vf v, int n) { _mm256_maskstore_ps(p, oc_lanes(n), v); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
INLINE vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf vf_round(vf a) { return _mm256_round_ps(a, 8); }
INLINE vf vf_floor(vf a) { return _mm256_round_ps(a, 9); }
INLINE vf vf_ceil(vf a) { return _mm256_round_ps(a, 10); }
INLINE vm vf_lt(vf a, vf b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE vm vf_le(vf a, vf b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
INLINE vm vf_eq(vf a, vf b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
INLINE vm vf_isnan(vf a) { return _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
INLINE vf vf_where(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
INLINE vf vf_keep(vf a, int n, float fill) { return vf_where(oc_lanes(n), a, vf_set(fill)); }
INLINE vm vm_and(vm a, vm b) { return _mm256_and_si256(a, b); }
INLINE vm vm_or(vm a, vm b) { return _mm256_or_si256(a, b); }
INLINE vm vm_xor(vm a, vm b) { return _mm256_xor_si256(a, b); }
INLINE vm vm_not(vm a) { return _mm256_xor_si256(a, _mm256_set1_epi32(-1)); }
INLINE vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE vi vi_loadn(const int32_t *p, int n) { return _mm256_maskload_epi32(p, oc_lanes(n)); }
INLINE void vi_store(int32_t *p, vi v) { _mm256_storeu_si256((__m256i *)p, v); }
INLINE void vi_storen(int32_t *p, vi v, int n) { _mm256_maskstore_epi32(p, oc_lanes(n), v); }
INLINE vi vi_u8(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vi vi_s8(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE __m128i oc_bytes(const void *p, int n) { uint64_t x = 0; memcpy(&x, p, (size_t)n); return _mm_cvtsi64_si128((long long)x); }
INLINE vi vi_u8n(const uint8_t *p, int n) { return _mm256_cvtepu8_epi32(oc_bytes(p, n)); }
INLINE vi vi_s8n(const int8_t *p, int n) { return _mm256_cvtepi8_epi32(oc_bytes(p, n)); }
INLINE uint64_t oc_narrow(vi v) {
  __m256i s = _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                                      0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  return (uint32_t)_mm256_extract_epi32(s, 0) | (uint64_t)(uint32_t)_mm256_extract_epi32(s, 4) << 32;
}
INLINE void vi_to8(void *p, vi v) { uint64_t x = oc_narrow(v); memcpy(p, &x, 8); }
INLINE void vi_to8n(void *p, vi v, int n) { uint64_t x = oc_narrow(v); memcpy(p, &x, (size_t)n); }
INLINE vm vm_loadn(const uint8_t *p, int n) { return _mm256_cmpgt_epi32(vi_u8n(p, n), _mm256_setzero_si256()); }
INLINE void vm_storen(uint8_t *p, vm m, int n) { vi_to8n(p, _mm256_and_si256(m, _mm256_set1_epi32(1)), n); }
INLINE vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
INLINE vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
INLINE vf vi_float(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vi vf_int(vf a) { return _mm256_cvtps_epi32(a); }
INLINE vf vf_exponent(vi e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, vi_set(127)), 23)); }
INLINE vi vf_bits(vf a) { return _mm256_castps_si256(a); }
INLINE vf vi_asfloat(vi a) { return _mm256_castsi256_ps(a); }
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
INLINE vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
INLINE vi vi_shl(vi a, int n) { return _mm256_slli_epi32(a, n); }
INLINE vi vi_shr(vi a, int n) { return _mm256_srli_epi32(a, n); }
INLINE vi vi_u16(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vi vi_u16n(const uint16_t *p, int n) { uint16_t t[VL] = {0}; memcpy(t, p, 2 * (size_t)n); return vi_u16(t); }
INLINE void vi_to16(uint16_t *p, vi v) {
  _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
INLINE void vi_to16n(uint16_t *p, vi v, int n) { uint16_t t[VL]; vi_to16(t, v); memcpy(p, t, 2 * (size_t)n); }
INLINE float vf_sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE float vf_hmax(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INLINE float vf_hmin(vf a) { return -vf_hmax(_mm256_xor_ps(a, _mm256_set1_ps(-0.0f))); }
#if defined(OC_AVX_VNNI)
INLINE vi vi_dot(vi c, int32_t a4, vi w) { return _mm256_dpbusd_avx_epi32(c, _mm256_set1_epi32(a4), w); }
#else
/* Bytes 0 and 2, then 1 and 3, of each lane as 16 bits: vpmaddubsw would saturate. */
INLINE vi vi_dot(vi c, int32_t a4, vi w) {
  const __m256i a = _mm256_set1_epi32(a4);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd = _mm256_srai_epi16(w, 8);
  c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi32(0x00ff00ff)), even));
  return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), odd));
}
#endif

#elif defined(OC_NEON_DOTPROD)
#include "neon.h"

#else
#define VL 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef vi vm;
#define EACH(i) for (int i = 0; i < VL; ++i)
INLINE vf vf_set(float x) { return (vf){x, x, x, x}; }
INLINE vi vi_set(int32_t x) { return (vi){x, x, x, x}; }
INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE vf vf_loadn(const float *p, int n) { vf v = {0}; memcpy(&v, p, 4 * (size_t)n); return v; }
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE void vf_storen(float *p, vf v, int n) { memcpy(p, &v, 4 * (size_t)n); }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_sub(vf a, vf b) { return a - b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_div(vf a, vf b) { return a / b; }
INLINE vf vf_where(vm m, vf a, vf b) { return (vf)((m & (vi)a) | (~m & (vi)b)); }
INLINE vf vf_min(vf a, vf b) { return vf_where(a < b, a, b); }
INLINE vf vf_max(vf a, vf b) { return vf_where(a > b, a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_keep(vf a, int n, float fill) { EACH(i) a[i] = i < n ? a[i] : fill; return a; }
INLINE vf vf_sqrt(vf a) { EACH(i) a[i] = sqrtf(a[i]); return a; }
INLINE vf vf_abs(vf a) { return (vf)((vi)a & vi_set(0x7fffffff)); }
INLINE vf vf_round(vf a) { EACH(i) a[i] = nearbyintf(a[i]); return a; }
INLINE vf vf_floor(vf a) { EACH(i) a[i] = floorf(a[i]); return a; }
INLINE vf vf_ceil(vf a) { EACH(i) a[i] = ceilf(a[i]); return a; }
INLINE vm vf_lt(vf a, vf b) { return a < b; }
INLINE vm vf_le(vf a, vf b) { return a <= b; }
INLINE vm vf_eq(vf a, vf b) { return a == b; }
INLINE vm vf_isnan(vf a) { return a != a; }
INLINE vm vm_and(vm a, vm b) { return a & b; }
INLINE vm vm_or(vm a, vm b) { return a | b; }
INLINE vm vm_xor(vm a, vm b) { return a ^ b; }
INLINE vm vm_not(vm a) { return ~a; }
INLINE vi vi_load(const int32_t *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE vi vi_loadn(const int32_t *p, int n) { vi v = {0}; memcpy(&v, p, 4 * (size_t)n); return v; }
INLINE void vi_store(int32_t *p, vi v) { memcpy(p, &v, sizeof v); }
INLINE void vi_storen(int32_t *p, vi v, int n) { memcpy(p, &v, 4 * (size_t)n); }
INLINE vi vi_u8n(const uint8_t *p, int n) { vi v = {0}; for (int i = 0; i < n; ++i) v[i] = p[i]; return v; }
INLINE vi vi_s8n(const int8_t *p, int n) { vi v = {0}; for (int i = 0; i < n; ++i) v[i] = p[i]; return v; }
INLINE vi vi_u8(const uint8_t *p) { return vi_u8n(p, VL); }
INLINE vi vi_s8(const int8_t *p) { return vi_s8n(p, VL); }
INLINE void vi_to8n(void *p, vi v, int n) { uint8_t *q = p; for (int i = 0; i < n; ++i) q[i] = (uint8_t)v[i]; }
INLINE void vi_to8(void *p, vi v) { vi_to8n(p, v, VL); }
INLINE vm vm_loadn(const uint8_t *p, int n) { return vi_u8n(p, n) != 0; }
INLINE void vm_storen(uint8_t *p, vm m, int n) { vi_to8n(p, m & 1, n); }
INLINE vi vi_max(vi a, vi b) { vm m = a > b; return (m & a) | (~m & b); }
INLINE vi vi_min(vi a, vi b) { vm m = a < b; return (m & a) | (~m & b); }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vi vi_sub(vi a, vi b) { return a - b; }
INLINE vf vi_float(vi a) { return __builtin_convertvector(a, vf); }
INLINE vi vf_int(vf a) { vi v = {0}; EACH(i) v[i] = (int32_t)lrintf(a[i]); return v; }
INLINE vf vf_exponent(vi e) { return (vf)((e + 127) << 23); }
INLINE vi vf_bits(vf a) { return (vi)a; }
INLINE vf vi_asfloat(vi a) { return (vf)a; }
INLINE vi vi_and(vi a, vi b) { return a & b; }
INLINE vi vi_or(vi a, vi b) { return a | b; }
INLINE vi vi_xor(vi a, vi b) { return a ^ b; }
INLINE vi vi_shl(vi a, int n) {
  typedef uint32_t vu __attribute__((vector_size(16)));
  return (vi)((vu)a << n);
}
INLINE vi vi_shr(vi a, int n) {
  typedef uint32_t vu __attribute__((vector_size(16)));
  return (vi)((vu)a >> n);
}
INLINE vi vi_u16n(const uint16_t *p, int n) { vi v = {0}; for (int i = 0; i < n; ++i) v[i] = p[i]; return v; }
INLINE vi vi_u16(const uint16_t *p) { return vi_u16n(p, VL); }
INLINE void vi_to16n(uint16_t *p, vi v, int n) { for (int i = 0; i < n; ++i) p[i] = (uint16_t)v[i]; }
INLINE void vi_to16(uint16_t *p, vi v) { vi_to16n(p, v, VL); }
INLINE float vf_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
INLINE float vf_hmax(vf a) { float m = a[0]; EACH(i) m = a[i] > m ? a[i] : m; return m; }
INLINE float vf_hmin(vf a) { float m = a[0]; EACH(i) m = a[i] < m ? a[i] : m; return m; }
#if defined(__SSE2__)
#include <emmintrin.h>
INLINE vi vi_dot(vi c, int32_t a4, vi w) {
  const __m128i a = _mm_set1_epi32(a4), b = (__m128i)w;
  const __m128i even = _mm_srai_epi16(_mm_slli_epi16(b, 8), 8), odd = _mm_srai_epi16(b, 8);
  c += (vi)_mm_madd_epi16(_mm_and_si128(a, _mm_set1_epi32(0x00ff00ff)), even);
  return c + (vi)_mm_madd_epi16(_mm_srli_epi16(a, 8), odd);
}
#else
INLINE vi vi_dot(vi c, int32_t a4, vi w) {
  const uint32_t a = (uint32_t)a4;
  c += (int32_t)(a & 255) * (w << 24 >> 24) + (int32_t)(a >> 8 & 255) * (w << 16 >> 24);
  return c + (int32_t)(a >> 16 & 255) * (w << 8 >> 24) + (int32_t)(a >> 24) * (w >> 24);
}
#endif
#endif

#if !defined(OC_AVX512_VNNI)
INLINE void vi_weave(void *p, vi a, vi b, vi c, vi d, int count, int n) {
  uint8_t t[4][VL], *q = p;
  vi_to8(t[0], a);
  vi_to8(t[1], b);
  vi_to8(t[2], c);
  vi_to8(t[3], d);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < count; ++k) *q++ = t[k][i];
}
#endif

#if !defined(OC_AVX512_VNNI) && !defined(OC_NEON_DOTPROD)
INLINE void oc_join(void *p, vi v, int zero, int low, int high) {
  vi_to8(p, vi_min(vi_max(vi_add(vi_max(v, vi_set(-1000)), vi_set(zero)), vi_set(low)), vi_set(high)));
}
#define OC_JOIN(name, low, high)                                         \
  INLINE void name(void *p, vi a, vi b, vi c, vi d, int count, int zero) { \
    uint8_t *const q = p;                                                  \
    oc_join(q, a, zero, low, high);                                        \
    oc_join(q + VL, b, zero, low, high);                                   \
    if (count > 2) oc_join(q + 2 * VL, c, zero, low, high);                \
    if (count > 3) oc_join(q + 3 * VL, d, zero, low, high);                \
  }
OC_JOIN(vi_join_u8, 0, 255)
OC_JOIN(vi_join_s8, -128, 127)
#endif

INLINE vf vf_loads(const float *p, long s, int n) { float t[VL] = {0}; for (int i = 0; i < n; ++i) t[i] = p[i * s]; return vf_load(t); }
INLINE void vf_stores(float *p, vf v, long s, int n) { float t[VL]; vf_store(t, v); for (int i = 0; i < n; ++i) p[i * s] = t[i]; }
INLINE vi vi_loads(const int32_t *p, long s, int n) { int32_t t[VL] = {0}; for (int i = 0; i < n; ++i) t[i] = p[i * s]; return vi_load(t); }
INLINE void vi_stores(int32_t *p, vi v, long s, int n) { int32_t t[VL]; vi_store(t, v); for (int i = 0; i < n; ++i) p[i * s] = t[i]; }
INLINE vi vi_u8s(const uint8_t *p, long s, int n) { uint8_t t[VL] = {0}; for (int i = 0; i < n; ++i) t[i] = p[i * s]; return vi_u8(t); }
INLINE vi vi_s8s(const int8_t *p, long s, int n) { int8_t t[VL] = {0}; for (int i = 0; i < n; ++i) t[i] = p[i * s]; return vi_s8(t); }
INLINE void vi_to8s(void *p, vi v, long s, int n) { uint8_t t[VL], *q = p; vi_to8(t, v); for (int i = 0; i < n; ++i) q[i * s] = t[i]; }
INLINE vm vm_loads(const uint8_t *p, long s, int n) { uint8_t t[VL] = {0}; for (int i = 0; i < n; ++i) t[i] = p[i * s]; return vm_loadn(t, VL); }
INLINE void vm_stores(uint8_t *p, vm m, long s, int n) { uint8_t t[VL]; vm_storen(t, m, VL); for (int i = 0; i < n; ++i) p[i * s] = t[i]; }
INLINE vm vm_set(int x) { return x ? vf_eq(vf_set(0), vf_set(0)) : vf_lt(vf_set(0), vf_set(0)); }
INLINE vf vm_float(vm m) { return vf_where(m, vf_set(1.0f), vf_set(0.0f)); }
INLINE vf vf_neg(vf a) { return vf_sub(vf_set(-0.0f), a); }
INLINE vf vf_reciprocal(vf a) { return vf_div(vf_set(1.0f), a); }
/* vf_min and vf_max give the second operand where one is NaN; these give NaN. */
INLINE vf vf_min_nan(vf a, vf b) { return vf_where(vf_isnan(a), a, vf_min(a, b)); }
INLINE vf vf_max_nan(vf a, vf b) { return vf_where(vf_isnan(a), a, vf_max(a, b)); }
INLINE float vf_any_nan(vf a) { return vf_sum(vf_where(vf_isnan(a), a, vf_set(-0.0f))); }
INLINE float vf_hmin_nan(vf a) { return vf_hmin(a) + vf_any_nan(a); }
INLINE float vf_hmax_nan(vf a) { return vf_hmax(a) + vf_any_nan(a); }
INLINE float vf_hprod(vf a) { float t[VL], m; vf_store(t, a); m = t[0]; for (int i = 1; i < VL; ++i) m *= t[i]; return m; }

/* bfloat16 (vb), 16 bits in memory and a vf elsewhere. Stores round to nearest, halves to even;
   products are summed as vdpbf16ps does, the second of a pair first. */
INLINE vf vb_widen(vi bits) { return vi_asfloat(vi_shl(bits, 16)); }
INLINE vf vb_load(const uint16_t *p) { return vb_widen(vi_u16(p)); }
INLINE vf vb_loadn(const uint16_t *p, int n) { return vb_widen(vi_u16n(p, n)); }
INLINE vf vb_loads(const uint16_t *p, long s, int n) { uint16_t t[VL] = {0}; for (int i = 0; i < n; ++i) t[i] = p[i * s]; return vb_load(t); }
INLINE vf vb_set(uint16_t x) { return vb_widen(vi_set(x)); }
#if defined(OC_AVX512_BF16)
INLINE __m256i vb_bits(vf v) { return (__m256i)_mm512_cvtneps_pbh(v); }
INLINE vf vb_round(vf v) { return vb_widen(_mm512_cvtepu16_epi32(vb_bits(v))); }
INLINE void vb_store(uint16_t *p, vf v) { _mm256_storeu_si256((__m256i *)p, vb_bits(v)); }
INLINE void vb_storen(uint16_t *p, vf v, int n) { _mm256_mask_storeu_epi16(p, LANES(n), vb_bits(v)); }
INLINE vf vb_dot(vf c, int32_t a2, vi w) { return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(a2), (__m512bh)w); }
#else
INLINE vi vb_bits(vf v) {
  const vi bits = vf_bits(v), odd = vi_and(vi_shr(bits, 16), vi_set(1));
  const vi near = vi_shr(vi_add(bits, vi_add(odd, vi_set(0x7fff))), 16);
  const vi nan = vi_or(vi_shr(bits, 16), vi_set(64));
  return vf_bits(vf_where(vf_isnan(v), vi_asfloat(nan), vi_asfloat(near)));
}
INLINE vf vb_round(vf v) { return vb_widen(vb_bits(v)); }
INLINE void vb_store(uint16_t *p, vf v) { vi_to16(p, vb_bits(v)); }
INLINE void vb_storen(uint16_t *p, vf v, int n) { vi_to16n(p, vb_bits(v), n); }
INLINE vf vb_dot(vf c, int32_t a2, vi w) {
  const vi a = vi_set(a2), high = vi_set(-65536);
  c = vf_fma(vi_asfloat(vi_and(a, high)), vi_asfloat(vi_and(w, high)), c);
  return vf_fma(vb_widen(a), vb_widen(w), c);
}
#endif
INLINE void vb_stores(uint16_t *p, vf v, long s, int n) { uint16_t t[VL]; vb_store(t, v); for (int i = 0; i < n; ++i) p[i * s] = t[i]; }

#if !defined(OC_AVX512_VNNI)
/* a 2^n for whole n in [-252, 254]: by two factors, either a normal number */
INLINE vf vf_scale2(vf a, vf n) {
  vf half = vf_floor(vf_mul(n, vf_set(0.5f)));
  return vf_mul(vf_mul(a, vf_exponent(vf_int(half))), vf_exponent(vf_int(vf_sub(n, half))));
}
#endif

/* exp of x <= 88.8 or NaN: 2^n e^r, |r| <= ln 2 / 2, polynomial of degree 6; relative error below 2e-7. */
INLINE vf vf_exp_below(vf x) {
  vf t = vf_max(vf_set(-104.0f), x); /* of a NaN and a number, the second */
  vf n = vf_round(vf_mul(t, vf_set(1.44269504f)));
  vf r = vf_fma(n, vf_set(-0.693359375f), t);
  r = vf_fma(n, vf_set(2.12194440e-4f), r);
  vf p = vf_set(1.9875691500e-4f);
  p = vf_fma(p, r, vf_set(1.3981999507e-3f));
  p = vf_fma(p, r, vf_set(8.3334519073e-3f));
  p = vf_fma(p, r, vf_set(4.1665795894e-2f));
  p = vf_fma(p, r, vf_set(1.6666665459e-1f));
  p = vf_fma(p, r, vf_set(5.0000001201e-1f));
  p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set(1.0f)));
  return vf_scale2(p, n);
}
/* exp of any x */
INLINE vf vf_exp(vf x) {
  vf p = vf_exp_below(vf_min(vf_set(88.8f), x));
  return vf_where(vf_lt(vf_set(88.72284f), x), vf_set(INFINITY), p);
}
/* log: Cephes logf; relative error below 2e-7; subnormals count as zero. */
INLINE vf vf_log(vf x) {
  vm zero = vf_lt(x, vf_set(1.17549435e-38f)), negative = vf_lt(x, vf_set(0.0f));
  vm same = vm_or(vf_isnan(x), vf_eq(x, vf_set(INFINITY)));
  vi bits = vf_bits(x);
  vf e = vf_sub(vi_float(vi_and(vi_shr(bits, 23), vi_set(255))), vf_set(126.0f));
  vf m = vi_asfloat(vi_or(vi_and(bits, vi_set(0x007fffff)), vi_set(0x3f000000)));
  vm small = vf_lt(m, vf_set(0.707106781f));
  e = vf_sub(e, vm_float(small));
  vf r = vf_sub(vf_add(m, vf_where(small, m, vf_set(0.0f))), vf_set(1.0f));
  vf z = vf_mul(r, r), p = vf_set(7.0376836292e-2f);
  p = vf_fma(p, r, vf_set(-1.1514610310e-1f));
  p = vf_fma(p, r, vf_set(1.1676998740e-1f));
  p = vf_fma(p, r, vf_set(-1.2420140846e-1f));
  p = vf_fma(p, r, vf_set(1.4249322787e-1f));
  p = vf_fma(p, r, vf_set(-1.6668057665e-1f));
  p = vf_fma(p, r, vf_set(2.0000714765e-1f));
  p = vf_fma(p, r, vf_set(-2.4999993993e-1f));
  p = vf_fma(p, r, vf_set(3.3333331174e-1f));
  p = vf_mul(vf_mul(p, r), z);
  p = vf_fma(e, vf_set(-2.12194440e-4f), p);
  p = vf_fma(z, vf_set(-0.5f), p);
  vf y = vf_fma(e, vf_set(0.693359375f), vf_add(r, p));
  y = vf_where(zero, vf_set(-INFINITY), y);
  y = vf_where(negative, vf_set(NAN), y);
  return vf_where(same, x, y);
}
/* tanh: odd rational of degree 13 over 6 on |x| <= 7.905; absolute error below 5e-7. */
INLINE vf vf_tanh(vf x) {
  vf t = vf_min(vf_max(x, vf_set(-7.90531110f)), vf_set(7.90531110f)), s = vf_mul(t, t);
  vf p = vf_set(-2.76076847742355e-16f);
  p = vf_fma(p, s, vf_set(2.00018790482477e-13f));
  p = vf_fma(p, s, vf_set(-8.60467152213735e-11f));
  p = vf_fma(p, s, vf_set(5.12229709037114e-08f));
  p = vf_fma(p, s, vf_set(1.48572235717979e-05f));
  p = vf_fma(p, s, vf_set(6.37261928875436e-04f));
  p = vf_fma(p, s, vf_set(4.89352455891786e-03f));
  vf q = vf_set(1.19825839466702e-06f);
  q = vf_fma(q, s, vf_set(1.18534705686654e-04f));
  q = vf_fma(q, s, vf_set(2.26843463243900e-03f));
  q = vf_fma(q, s, vf_set(4.89352518554385e-03f));
  return vf_where(vf_isnan(x), x, vf_div(vf_mul(t, p), q));
}
/* erf: odd rational of degree 13 over 8 on |x| <= 4; absolute error below 5e-7. */
INLINE vf vf_erf(vf x) {
  vf t = vf_min(vf_max(x, vf_set(-4.0f)), vf_set(4.0f)), s = vf_mul(t, t);
  vf p = vf_set(-2.72614225801306e-10f);
  p = vf_fma(p, s, vf_set(2.77068142495902e-08f));
  p = vf_fma(p, s, vf_set(-2.10102402082508e-06f));
  p = vf_fma(p, s, vf_set(-5.69250639462346e-05f));
  p = vf_fma(p, s, vf_set(-7.34990630326855e-04f));
  p = vf_fma(p, s, vf_set(-2.95459980854025e-03f));
  p = vf_fma(p, s, vf_set(-1.60960333262415e-02f));
  vf q = vf_set(-1.45660718464996e-05f);
  q = vf_fma(q, s, vf_set(-2.13374055278905e-04f));
  q = vf_fma(q, s, vf_set(-1.68282697438203e-03f));
  q = vf_fma(q, s, vf_set(-7.37332916720468e-03f));
  q = vf_fma(q, s, vf_set(-1.42647390514189e-02f));
  return vf_where(vf_isnan(x), x, vf_div(vf_mul(t, p), q));
}
/* x·(1/2 + odd rational of degree 9 over 10, clamped where that is 1/2): error below 3e-7·max(1, |x|). */
INLINE vf vf_gelu(vf x) {
  vf t = vf_min(vf_max(x, vf_set(-5.158f)), vf_set(5.158f)), s = vf_mul(t, t);
  vf p = vf_set(7.716554137e-06f);
  p = vf_fma(p, s, vf_set(4.230838385e-04f));
  p = vf_fma(p, s, vf_set(6.200288422e-03f));
  p = vf_fma(p, s, vf_set(5.910646915e-02f));
  p = vf_fma(p, s, vf_set(3.989409506e-01f));
  vf q = vf_set(6.378613193e-07f);
  q = vf_fma(q, s, vf_set(1.534298208e-04f));
  q = vf_fma(q, s, vf_set(3.317450406e-03f));
  q = vf_fma(q, s, vf_set(4.303936288e-02f));
  q = vf_fma(q, s, vf_set(3.148060143e-01f));
  q = vf_fma(q, s, vf_set(1.0f));
  return vf_mul(x, vf_add(vf_set(0.5f), vf_div(vf_mul(t, p), q)));
}
/* The tanh form: x·(1/2 + odd rational of degree 9 over 10); error below 3e-7·max(1, |x|). */
INLINE vf vf_gelu_tanh(vf x) {
  vf t = vf_min(vf_max(x, vf_set(-4.934f)), vf_set(4.934f)), s = vf_mul(t, t);
  vf p = vf_set(4.728569365e-06f);
  p = vf_fma(p, s, vf_set(1.787124056e-04f));
  p = vf_fma(p, s, vf_set(3.775635501e-03f));
  p = vf_fma(p, s, vf_set(3.823772073e-02f));
  p = vf_fma(p, s, vf_set(3.989416659e-01f));
  vf q = vf_set(4.521852759e-07f);
  q = vf_fma(q, s, vf_set(7.782109606e-05f));
  q = vf_fma(q, s, vf_set(1.512743998e-03f));
  q = vf_fma(q, s, vf_set(2.801077813e-02f));
  q = vf_fma(q, s, vf_set(2.633311450e-01f));
  q = vf_fma(q, s, vf_set(1.0f));
  return vf_mul(x, vf_add(vf_set(0.5f), vf_div(vf_mul(t, p), q)));
}
/* Either form by an odd polynomial, where eight bits are kept of the result: error below 1.4e-4, 0 or x from 4 on. */
INLINE vf vf_gelu_near(vf x) {
  vf y = vf_max(vf_set(-4.0f), x), t = vf_min(vf_set(4.0f), y), s = vf_mul(t, t);
  vf p = vf_set(-4.400779463e-10f);
  p = vf_fma(p, s, vf_set(5.066133113e-08f));
  p = vf_fma(p, s, vf_set(-2.313490995e-06f));
  p = vf_fma(p, s, vf_set(5.744618102e-05f));
  p = vf_fma(p, s, vf_set(-8.831546875e-04f));
  p = vf_fma(p, s, vf_set(9.041151963e-03f));
  p = vf_fma(p, s, vf_set(-6.506667286e-02f));
  p = vf_fma(p, s, vf_set(3.981881440e-01f));
  return vf_mul(y, vf_fma(t, p, vf_set(0.5f)));
}
INLINE vf vf_gelu_tanh_near(vf x) {
  vf y = vf_max(vf_set(-4.0f), x), t = vf_min(vf_set(4.0f), y), s = vf_mul(t, t);
  vf p = vf_set(-1.137576366e-09f);
  p = vf_fma(p, s, vf_set(9.567788339e-08f));
  p = vf_fma(p, s, vf_set(-3.493473969e-06f));
  p = vf_fma(p, s, vf_set(7.350665692e-05f));
  p = vf_fma(p, s, vf_set(-1.002937905e-03f));
  p = vf_fma(p, s, vf_set(9.508554824e-03f));
  p = vf_fma(p, s, vf_set(-6.585232913e-02f));
  p = vf_fma(p, s, vf_set(3.984789252e-01f));
  return vf_mul(y, vf_fma(t, p, vf_set(0.5f)));
}
INLINE vf vf_sigmoid(vf x) { return vf_reciprocal(vf_add(vf_set(1.0f), vf_exp(vf_neg(x)))); }
INLINE vf vf_sign(vf x) {
  vf y = vf_sub(vm_float(vf_lt(vf_set(0.0f), x)), vm_float(vf_lt(x, vf_set(0.0f))));
  return vf_where(vf_isnan(x), x, y);
}
INLINE vm vf_isinf(vf x) { return vf_eq(vf_abs(x), vf_set(INFINITY)); }
INLINE vf vf_sin(vf x) { float t[VL]; vf_store(t, x); for (int i = 0; i < VL; ++i) t[i] = sinf(t[i]); return vf_load(t); }
INLINE vf vf_cos(vf x) { float t[VL]; vf_store(t, x); for (int i = 0; i < VL; ++i) t[i] = cosf(t[i]); return vf_load(t); }
INLINE vf vf_pow(vf x, vf y) { float t[VL], u[VL]; vf_store(t, x); vf_store(u, y); for (int i = 0; i < VL; ++i) t[i] = powf(t[i], u[i]); return vf_load(t); }
#endif
