/* One-dimensional transforms of Winograd's F(4, 3) at the points 0, ±3/4, ±3/2 and infinity
   (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016). These points round
   almost as well as a direct sum, and all are exact in binary. */
#ifndef OC_WINOGRAD_H
#define OC_WINOGRAD_H
#include "simd.h"

/* x[0], x[s], … x[5 s] become the six values at the points */
INLINE void winograd_input(vf *x, int s) {
  const vf x0 = x[0], x1 = x[s], x2 = x[2 * s], x3 = x[3 * s], x4 = x[4 * s], x5 = x[5 * s];
  const vf e1 = vf_fma(vf_set(-2.25f), x2, x4), o1 = vf_mul(vf_set(.75f), vf_fma(vf_set(-2.25f), x1, x3));
  const vf e2 = vf_fma(vf_set(-.5625f), x2, x4), o2 = vf_mul(vf_set(1.5f), vf_fma(vf_set(-.5625f), x1, x3));
  x[0] = vf_fma(vf_set(1.265625f), x0, vf_fma(vf_set(-2.8125f), x2, x4));
  x[s] = vf_add(e1, o1);
  x[2 * s] = vf_sub(e1, o1);
  x[3 * s] = vf_add(e2, o2);
  x[4 * s] = vf_sub(e2, o2);
  x[5 * s] = vf_fma(vf_set(1.265625f), x1, vf_fma(vf_set(-2.8125f), x3, x5));
}

/* the six products m[0], m[s], … become four outputs y[0], y[t], … y[3 t] */
INLINE void winograd_output(const vf *m, int s, vf *y, int t) {
  const vf s1 = vf_add(m[s], m[2 * s]), d1 = vf_sub(m[s], m[2 * s]);
  const vf s2 = vf_add(m[3 * s], m[4 * s]), d2 = vf_sub(m[3 * s], m[4 * s]);
  y[0] = vf_add(m[0], vf_add(s1, s2));
  y[t] = vf_fma(vf_set(.75f), d1, vf_mul(vf_set(1.5f), d2));
  y[2 * t] = vf_fma(vf_set(.5625f), s1, vf_mul(vf_set(2.25f), s2));
  y[3 * t] = vf_fma(vf_set(.421875f), d1, vf_fma(vf_set(3.375f), d2, m[5 * s]));
}
#endif
