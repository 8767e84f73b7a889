/* Vectors of AArch64, with the dot products of ARMv8.2 (SDOT). */
#ifndef OC_NEON_H
#define OC_NEON_H
#if defined(OC_NEON_DOTPROD)
#include <arm_neon.h>
#define VL 4
typedef float32x4_t vf;
typedef int32x4_t vi;
typedef uint32x4_t vm;
INLINE vf vf_set(float x) { return vdupq_n_f32(x); }
INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
INLINE vf vf_loadn(const float *p, int n) { float t[VL] = {0}; memcpy(t, p, 4 * (size_t)n); return vf_load(t); }
INLINE void vf_store(float *p, vf v) { vst1q_f32(p, v); }
INLINE void vf_storen(float *p, vf v, int n) { float t[VL]; vf_store(t, v); memcpy(p, t, 4 * (size_t)n); }
INLINE vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
INLINE vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
INLINE vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
INLINE vf vf_where(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }
INLINE vm vf_lt(vf a, vf b) { return vcltq_f32(a, b); }
INLINE vm vf_le(vf a, vf b) { return vcleq_f32(a, b); }
INLINE vm vf_eq(vf a, vf b) { return vceqq_f32(a, b); }
INLINE vf vf_min(vf a, vf b) { return vf_where(vf_lt(a, b), a, b); }
INLINE vf vf_max(vf a, vf b) { return vf_where(vf_lt(b, a), a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf vf_sqrt(vf a) { return vsqrtq_f32(a); }
INLINE vf vf_abs(vf a) { return vabsq_f32(a); }
INLINE vf vf_round(vf a) { return vrndnq_f32(a); }
INLINE vf vf_floor(vf a) { return vrndmq_f32(a); }
INLINE vf vf_ceil(vf a) { return vrndpq_f32(a); }
INLINE vm vm_and(vm a, vm b) { return vandq_u32(a, b); }
INLINE vm vm_or(vm a, vm b) { return vorrq_u32(a, b); }
INLINE vm vm_xor(vm a, vm b) { return veorq_u32(a, b); }
INLINE vm vm_not(vm a) { return vmvnq_u32(a); }
INLINE vm vf_isnan(vf a) { return vm_not(vf_eq(a, a)); }
INLINE vf vf_keep(vf a, int n, float fill) {
  const int32_t lanes[VL] = {0, 1, 2, 3};
  return vf_where(vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n)), a, vf_set(fill));
}
INLINE vi vi_set(int32_t x) { return vdupq_n_s32(x); }
INLINE vi vi_load(const int32_t *p) { return vld1q_s32(p); }
INLINE vi vi_loadn(const int32_t *p, int n) { int32_t t[VL] = {0}; memcpy(t, p, 4 * (size_t)n); return vi_load(t); }
INLINE void vi_store(int32_t *p, vi v) { vst1q_s32(p, v); }
INLINE void vi_storen(int32_t *p, vi v, int n) { int32_t t[VL]; vi_store(t, v); memcpy(p, t, 4 * (size_t)n); }
INLINE uint8x8_t oc_bytes(const void *p, int n) {
  uint32_t x = 0;
  memcpy(&x, p, (size_t)n);
  return vcreate_u8(x);
}
INLINE vi vi_u8n(const uint8_t *p, int n) {
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(oc_bytes(p, n)))));
}
INLINE vi vi_s8n(const int8_t *p, int n) {
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(oc_bytes(p, n)))));
}
INLINE vi vi_u8(const uint8_t *p) { return vi_u8n(p, VL); }
INLINE vi vi_s8(const int8_t *p) { return vi_s8n(p, VL); }
INLINE void vi_to8n(void *p, vi v, int n) {
  const int16x4_t half = vmovn_s32(v);
  const uint32_t x = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
  memcpy(p, &x, (size_t)n);
}
INLINE void vi_to8(void *p, vi v) { vi_to8n(p, v, VL); }
INLINE vm vm_loadn(const uint8_t *p, int n) { return vtstq_s32(vi_u8n(p, n), vi_set(-1)); }
INLINE void vm_storen(uint8_t *p, vm m, int n) { vi_to8n(p, vreinterpretq_s32_u32(vandq_u32(m, vdupq_n_u32(1))), n); }
INLINE vi vi_max(vi a, vi b) { return vmaxq_s32(a, b); }
INLINE vi vi_min(vi a, vi b) { return vminq_s32(a, b); }
INLINE vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
INLINE vi vi_sub(vi a, vi b) { return vsubq_s32(a, b); }
INLINE vf vi_float(vi a) { return vcvtq_f32_s32(a); }
INLINE vi vf_int(vf a) { return vcvtnq_s32_f32(a); }
INLINE vi vf_bits(vf a) { return vreinterpretq_s32_f32(a); }
INLINE vf vi_asfloat(vi a) { return vreinterpretq_f32_s32(a); }
INLINE vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
INLINE vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
INLINE vi vi_xor(vi a, vi b) { return veorq_s32(a, b); }
INLINE vi vi_shl(vi a, int n) { return vshlq_s32(a, vi_set(n)); }
INLINE vi vi_shr(vi a, int n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vi_set(-n))); }
INLINE vf vf_exponent(vi e) { return vi_asfloat(vi_shl(vi_add(e, vi_set(127)), 23)); }
INLINE vi vi_u16(const uint16_t *p) { return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p))); }
INLINE vi vi_u16n(const uint16_t *p, int n) { uint16_t t[VL] = {0}; memcpy(t, p, 2 * (size_t)n); return vi_u16(t); }
INLINE void vi_to16(uint16_t *p, vi v) { vst1_u16(p, vmovn_u32(vreinterpretq_u32_s32(v))); }
INLINE void vi_to16n(uint16_t *p, vi v, int n) { uint16_t t[VL]; vi_to16(t, v); memcpy(p, t, 2 * (size_t)n); }
INLINE float vf_sum(vf a) { return vaddvq_f32(a); }
INLINE float vf_hmax(vf a) { return vmaxnmvq_f32(a); }
INLINE float vf_hmin(vf a) { return vminnmvq_f32(a); }
/* as many of a, b, c, d as `count` says (2 to 4) plus `zero`, saturated, as adjacent bytes */
#define OC_JOIN(name, narrow, bytes)                                                                  \
  INLINE void name(void *p, vi a, vi b, vi c, vi d, int count, int zero) {                            \
    const int16x8_t z = vdupq_n_s16((int16_t)zero);                                                   \
    const int16x8_t ab = vqaddq_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b)), z);                   \
    const int16x8_t cd = vqaddq_s16(vcombine_s16(vqmovn_s32(c), vqmovn_s32(d)), z);                   \
    uint8_t t[16];                                                                                    \
    vst1q_u8(t, vcombine_u8(bytes(narrow(ab)), bytes(narrow(cd))));                                   \
    memcpy(p, t, 4 * (size_t)count);                                                                  \
  }
OC_JOIN(vi_join_u8, vqmovun_s16, )
OC_JOIN(vi_join_s8, vqmovn_s16, vreinterpret_u8_s8)
/* Unsigned bytes as signed ones, 128 less, as SDOT wants: four steps of K, or one in every lane. */
INLINE int8x16_t vi_turned(const uint8_t *p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128))); }
INLINE int8x16_t vi_turned1(const uint8_t *p) {
  return vreinterpretq_s8_s32(veorq_s32(vi_set(load32(p)), vi_set((int32_t)0x80808080)));
}
/* four signed bytes in each lane of w against those in one lane of x */
#define vi_sdot(c, w, x, lane) vdotq_laneq_s32(c, vreinterpretq_s8_s32(w), x, lane)
/* four unsigned bytes of a4 against four signed bytes in each lane of w */
INLINE vi vi_dot(vi c, int32_t a4, vi w) {
  const int8x16_t bytes = vreinterpretq_s8_s32(w);
  const vi sums = vdotq_s32(vi_set(0), bytes, vdupq_n_s8(1));
  return vdotq_s32(vi_add(c, vi_shl(sums, 7)), bytes, vi_turned1((const uint8_t *)&a4));
}
#endif
#endif
