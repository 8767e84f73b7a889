/* Registers of AMX: accumulators 0 to 3, rows of the first operand 4 and 5, the second 6 and 7. */
#ifndef OC_AMX_H
#define OC_AMX_H
#include "simd.h"
#if defined(OC_AMX)

struct amx_config {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

/* Registers for tiles of so many rows, until amx_end. */
INLINE void amx_begin(int rows) {
  const uint8_t first = (uint8_t)(rows <= 16 ? rows : (rows + 1) / 2), second = (uint8_t)(rows - first);
  struct amx_config c = {.palette = 1};
  for (int i = 0; i < 8; ++i) c.bytes[i] = 64;
  c.rows[0] = c.rows[1] = c.rows[4] = first;
  c.rows[2] = c.rows[3] = c.rows[5] = second ? second : 16;
  c.rows[6] = c.rows[7] = 16;
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&c);
}
INLINE void amx_end(void) { _tile_release(); }

/* Bytes between rows that lie evenly apart; -1 where they do not, or fewer than `rows` are there. */
INLINE long amx_pitch(const uint8_t *const *at, int rows, int count) {
  if (count < rows) return -1;
  if (rows == 1) return 64;
  const long pitch = at[1] - at[0];
  long other = 0;
  for (int r = 2; r < rows; ++r) other |= (at[r] - at[r - 1]) ^ pitch;
  return other ? -1 : pitch;
}

INLINE void amx_gather(uint8_t *to, const uint8_t *const *at, int rows, int count, long k) {
  for (int r = 0; r < rows && r < count; ++r)
    _mm512_store_si512((void *)(to + 64 * r), _mm512_loadu_si512((const void *)(at[r] + k)));
  __asm__ volatile("" ::: "memory");
}
#endif
#endif
