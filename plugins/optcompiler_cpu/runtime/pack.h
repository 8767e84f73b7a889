/* Panels of an operand that is computed at run time: `columns` of b, zeros up to `width`. */
#ifndef OC_PACK_H
#define OC_PACK_H
#include "simd.h"

typedef int32_t oc_words __attribute__((vector_size(4 * VL), may_alias));
#if VL == 16
#define OC_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define OC_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VL == 8
#define OC_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define OC_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define OC_LOW 0, 4, 1, 5
#define OC_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
#define OC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define OC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (oc_words){__VA_ARGS__})
#endif

/* `to`, rows of `width` words, becomes the transpose of `rows` times `words` words that begin every `step` bytes and
   are turned by `flip`: at most VL of either; words past `rows` become zero. Every round rotates row and column, as
   one number, by one bit. */
INLINE void pack_square(int32_t *to, long width, const uint8_t *from, long step, int rows, int words, int32_t flip) {
  oc_words x[VL], y[VL];
  _Pragma("GCC unroll 16")
  for (int r = 0; r < VL; ++r)
    x[r] = (oc_words)(r < rows ? vi_xor(vi_loadn((const int32_t *)(const void *)(from + r * step), words), vi_set(flip))
                               : vi_set(0));
  _Pragma("GCC unroll 4")
  for (int round = VL; round > 1; round /= 2) {
    _Pragma("GCC unroll 8")
    for (int i = 0; i < VL / 2; ++i) {
      y[2 * i] = OC_SHUFFLE(x[i], x[i + VL / 2], OC_LOW);
      y[2 * i + 1] = OC_SHUFFLE(x[i], x[i + VL / 2], OC_HIGH);
    }
    _Pragma("GCC unroll 16")
    for (int i = 0; i < VL; ++i) x[i] = y[i];
  }
  _Pragma("GCC unroll 16")
  for (int i = 0; i < VL; ++i)
    if (i < words) vi_store(to + i * width, (vi)x[i]);
}

/* [steps][width] words of columns that begin every `step` bytes */
INLINE void pack_words(int32_t *panel, const void *b, long steps, int columns, int width, long step, int32_t flip) {
  for (int j = 0; j < width; j += VL)
    for (long s = 0; s < steps; s += VL)
      pack_square(panel + s * width + j, width, (const uint8_t *)b + j * step + s * 4, step, columns - j,
                  steps - s < VL ? (int)(steps - s) : VL, flip);
}

/* [depth][width]; b's elements are sk apart along the depth and sn across */
INLINE void pack_f32(float *panel, const float *b, long depth, int columns, int width, long sk, long sn) {
  if (sk == 1) {
    pack_words((int32_t *)(void *)panel, b, depth, columns, width, sn * 4, 0);
    return;
  }
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
  const long paired = sk == 1 ? depth / 2 : 0;
  if (paired) pack_words((int32_t *)(void *)panel, b, paired, columns, width, sn * 2, 0);
  for (long k = 2 * paired; k < depth; k += 2) {
    int32_t *row = (int32_t *)(void *)(panel + k * width);
    const uint16_t *one = b + k * sk, *two = one + sk;
    int j = 0;
    if (k + 1 == depth)
      for (; j < columns; ++j) row[j] = one[j * sn];
    if (sn == 1)
      for (; j + VL <= columns; j += VL)
        vi_store(row + j, vi_or(vi_u16(one + j), vi_shl(vi_u16(two + j), 16)));
    for (; j < columns; ++j) row[j] = (int32_t)(one[j * sn] | (uint32_t)two[j * sn] << 16);
    for (; j < width; ++j) row[j] = 0;
  }
}

/* [depth / 4][width][4] signed bytes: those of b, or, where `turn` is 128, unsigned ones less 128.
   `start` becomes `init` less `zero`, the other operand's zero point as tiles have it, times each column's sum. */
INLINE void pack_i8(int32_t *panel, int32_t *start, const int32_t *init, const void *b, long depth, int columns,
                    int width, long sk, long sn, int turn, int zero) {
  const uint32_t flip = (uint32_t)turn * 0x01010101u;
  const long steps = (depth + 3) / 4;
  const long whole = sk == 1 ? depth / 4 : 0;
  if (whole) pack_words(panel, b, whole, columns, width, sn, (int32_t)flip);
  for (long s = whole; s < steps; ++s) {
    int32_t *row = panel + s * width;
    const uint8_t *from = (const uint8_t *)b + s * 4 * sk;
    const int deep = s * 4 + 4 <= depth ? 4 : (int)(depth - s * 4);
    int j = 0;
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
  const uint32_t distance = (uint32_t)(zero < 0 ? -zero : zero) * 0x01010101u;
  for (int j = 0; j < width; j += VL) {
    const vi from = vi_load(init + j);
    vi sum = vi_set(0);
    if (zero)
      for (long s = 0; s < steps; ++s) sum = vi_dot(sum, (int32_t)distance, vi_load(panel + s * width + j));
    vi_store(start + j, zero < 0 ? vi_add(from, sum) : vi_sub(from, sum));
  }
}
#endif
