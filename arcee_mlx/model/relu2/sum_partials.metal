// y = sum of partials over the slabs, in order, + bias + residual, in float32 and then cast once.
//
// partials  float32 (SLABS, TOKENS, HIDDEN)
// bias      (HIDDEN,), read where HAS_BIAS
// residual  (TOKENS, HIDDEN), read where HAS_RESIDUAL
// y         T (TOKENS, HIDDEN)
//
// Threads: (HIDDEN, TOKENS), one an element; CUDA starts whole threadgroups, and so some more. No threadgroup memory.

const uint column = thread_position_in_grid.x;
const uint token = thread_position_in_grid.y;
if (column < HIDDEN && token < TOKENS) {
  const uint place = token * HIDDEN + column;
  float total = 0.0f;
  for (uint s = 0; s < SLABS; s++) {
    total += partials[s * TOKENS * HIDDEN + place];
  }
  if (HAS_BIAS) {
    total += float(bias[column]);
  }
  if (HAS_RESIDUAL) {
    total += float(residual[place]);
  }
  y[place] = T(total);
}
