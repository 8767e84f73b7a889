/* Panels of an operand that is computed at run time: `columns` of b, zeros up to `width`. */
#ifndef OC_PACK_H
#define OC_PACK_H
#include "simd.h"

/* [depth][width]; b's elements are sk apart along the depth and sn across */
INLINE void pack_f32(float *panel, const float *b, long depth, int columns, int width, long sk, long sn) {
  for (long k = 0; k < depth; ++k) {
    float *row = panel + k * width;
    const float *from = b + k * sk;
    int j = 0;
    if (sn == 1)
      for (; j + VL <= columns; j += VL) vf_store(row + j, vf_load(from + j));
    for (; j < columns; ++j) row[j] = from[j * sn];
    for (; j < width; ++j) row[j] = 0;
  }
}

/* [depth / 2][width][2], with a zero after an odd depth */
INLINE void pack_bf16(uint16_t *panel, const uint16_t *b, long depth, int columns, int width, long sk, long sn) {
  for (long k = 0; k < depth; k += 2) {
    int32_t *row = (int32_t *)(void *)(panel + k * width);
    const uint16_t *one = b + k * sk, *two = one + sk;
    int j = 0;
    if (k + 1 == depth)
      for (; j < columns; ++j) row[j] = one[j * sn];
    if (sk == 1)
      for (; j < columns; ++j) row[j] = load32(one + j * sn);
    if (sn == 1)
      for (; j + VL <= columns; j += VL)
        vi_store(row + j, vi_or(vi_u16(one + j), vi_shl(vi_u16(two + j), 16)));
    for (; j < columns; ++j) row[j] = (int32_t)(one[j * sn] | (uint32_t)two[j * sn] << 16);
    for (; j < width; ++j) row[j] = 0;
  }
}

/* [depth / 4][width][4] signed bytes: those of b, or, where `turn` is 128, unsigned ones less 128.
   `start` becomes `init` less `zero`, the other operand's zero point, times each column's sum. */
INLINE void pack_i8(int32_t *panel, int32_t *start, const int32_t *init, const void *b, long depth, int columns,
                    int width, long sk, long sn, int turn, int zero) {
  const uint32_t flip = (uint32_t)turn * 0x01010101u;
  const long steps = (depth + 3) / 4;
  for (long s = 0; s < steps; ++s) {
    int32_t *row = panel + s * width;
    const uint8_t *from = (const uint8_t *)b + s * 4 * sk;
    const int deep = s * 4 + 4 <= depth ? 4 : (int)(depth - s * 4);
    int j = 0;
    if (deep == 4 && sk == 1)
      for (; j < columns; ++j) row[j] = (int32_t)((uint32_t)load32(from + j * sn) ^ flip);
    if (deep == 4 && sn == 1)
      for (; j + VL <= columns; j += VL) {
        vi low = vi_or(vi_u8(from + j), vi_shl(vi_u8(from + sk + j), 8));
        vi high = vi_or(vi_shl(vi_u8(from + 2 * sk + j), 16), vi_shl(vi_u8(from + 3 * sk + j), 24));
        vi_store(row + j, vi_xor(vi_or(low, high), vi_set((int32_t)flip)));
      }
    for (; j < columns; ++j) {
      uint32_t word = 0;
      for (int d = 0; d < deep; ++d) word |= (uint32_t)(uint8_t)(from[d * sk + j * sn] ^ turn) << 8 * d;
      row[j] = (int32_t)word;
    }
    for (; j < width; ++j) row[j] = 0;
  }
  for (int j = 0; j < width; j += VL) {
    vi sum = vi_set(0);
    if (zero)
      for (long s = 0; s < steps; ++s) sum = vi_dot(sum, zero * 0x01010101, vi_load(panel + s * width + j));
    vi_store(start + j, vi_sub(vi_load(init + j), sum));
  }
}
#endif
