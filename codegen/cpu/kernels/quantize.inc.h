// Activations -> planes of int8 limbs (or float32), and sums of the finished tokens -> y. Included once per level, in
// its namespace, with TSLD_TARGET: vector types of GNU C++, which the compiler lowers to what the level has. Sums run in
// a fixed order of 16 lanes, so every level gives the same bits.

template <int DTYPE>
TSLD_TARGET TSLD_INLINE void load16(const void* x, int64_t at, int64_t count, Floats16* out) {
  if (DTYPE == TSLD_CPU_F32) {
    const float* from = static_cast<const float*>(x) + at;
    if (count >= 16) {
      memcpy(out, from, 64);
    } else {
      *out = Floats16{};
      for (int64_t i = 0; i < count; i++) (*out)[i] = from[i];
    }
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x) + at;
  Halves16 raw = {};
  if (count >= 16) memcpy(&raw, from, 32);
  else
    for (int64_t i = 0; i < count; i++) raw[i] = from[i];
  const Words16 h = __builtin_convertvector(raw, Words16);
  if (DTYPE == TSLD_CPU_BF16) {
    *out = (Floats16)(h << 16);
    return;
  }
  const Words16 magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  const Words16 finite = (Words16)((Floats16)magnitude * 0x1p112f);  // subnormals come out right, too
  const Words16 special = (Words16)(magnitude >= 0x0f800000u);
  *out = (Floats16)(sign | (special & (magnitude | 0x7f800000u)) | (~special & finite));
}

// Bits of the largest magnitude of a row; NaN and Inf are the largest.
template <int DTYPE>
TSLD_TARGET uint32_t largest_bits(const void* x, int64_t k) {
  Ints16 top = {};
  for (int64_t i = 0; i < k; i += 16) {
    Floats16 v;
    load16<DTYPE>(x, i, k - i, &v);
    const Ints16 m = (Ints16)v & 0x7fffffff, larger = m > top;
    top = (larger & m) | (~larger & top);
  }
  for (int j = 1; j < 16; j++) top[0] = top[j] > top[0] ? top[j] : top[0];
  return static_cast<uint32_t>(top[0]);
}

// Sum of the squares of x * prescale * inverse.
template <int DTYPE>
TSLD_TARGET float squares_of_row(const void* x, int64_t k, float prescale, float inverse) {
  Floats16 squares = {};
  for (int64_t i = 0; i < k; i += 16) {
    Floats16 v;
    load16<DTYPE>(x, i, k - i, &v);
    v = v * prescale * inverse;
    squares += v * v;
  }
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) squares[j] += squares[j + half];
  return squares[0];
}

// Limbs of one row, from x * prescale * inverse, into planes; LIMBS 1, 2 or 3.
template <int DTYPE, int LIMBS>
TSLD_TARGET void limbs_of_row(const Weights& w, const Workspace& layout, void* ws, const void* x, int64_t token,
                              float prescale, float inverse) {
  int32_t* sums = layout.sums(ws, token);
  int8_t* planes[3];
  for (int l = 0; l < LIMBS; l++)
    planes[l] = layout.tiles ? layout.tile(ws, w, token / 16, l) + token % 16 * 64 : layout.plane(ws, token, l);
  for (int64_t index = 0; index < layout.segments; index++) {
    const Segment s = segment(w, index);
    Ints16 total[LIMBS] = {};
    for (int64_t i = 0; i < s.padded; i += 16) {
      Floats16 v = {};
      if (i < s.length) load16<DTYPE>(x, s.start + i, s.length - i, &v);
      // 1.5 * 2^23: the integer, rounded to even, lands in the low bits
      Ints16 t = (Ints16)(v * prescale * inverse + 12582912.0f) - 0x4b400000;
      const int64_t to = s.at + i, rest = s.padded - i, place = layout.tiles ? to / 64 * 1024 + to % 64 : to;
      for (int l = 0; l < LIMBS; l++) {
        const Bytes16 q = __builtin_convertvector(t, Bytes16);
        const Ints16 digit = t << 24 >> 24;
        total[l] += digit;
        t = (t - digit) >> 8;
        if (rest >= 16) memcpy(planes[l] + place, &q, 16);
        else memcpy(planes[l] + place, &q, static_cast<size_t>(rest));
      }
    }
    for (int l = 0; l < LIMBS; l++) {
      int32_t sum = 0;
      for (int j = 0; j < 16; j++) sum += total[l][j];
      sums[l * layout.segments + index] = sum;
    }
  }
}

template <int DTYPE>
TSLD_TARGET void floats_of_row(const Weights& w, const Workspace& layout, void* ws, const void* x, int64_t token) {
  float* plane = reinterpret_cast<float*>(layout.plane(ws, token, 0));
  for (int64_t index = 0; index < layout.segments; index++) {
    const Segment s = segment(w, index);
    for (int64_t i = 0; i < s.padded; i += 16) {
      Floats16 v = {};
      if (i < s.length) load16<DTYPE>(x, s.start + i, s.length - i, &v);
      memcpy(plane + s.at + i, &v, (s.padded - i < 16 ? static_cast<size_t>(s.padded - i) : 16) * 4);
    }
  }
}

template <int DTYPE>
TSLD_TARGET void quantize_rows(const Weights& w, int level, int activations, const void* x, int64_t ldx,
                               int64_t tokens, void* ws, int64_t t0, int64_t t1) {
  const Workspace layout(w, level, activations, tokens);
  for (int64_t t = t0; t < t1; t++) {
    const void* row = static_cast<const char*>(x) + t * ldx * (DTYPE == TSLD_CPU_F32 ? 4 : 2);
    const uint32_t top = largest_bits<DTYPE>(row, w.k);
    const bool finite = top < 0x7f800000u;
    Token& token = layout.tokens(ws)[t];
    if (layout.floats) {
      token = {finite ? 1.0f : as_float(0x7fc00000u), 1.0f, 1, 0};
      floats_of_row<DTYPE>(w, layout, ws, row, t);
      continue;
    }
    const float largest = as_float(top);
    const bool tiny = largest < 0x1p-60f;  // then 1 / largest or the scale would leave float's range
    const float prescale = finite ? (tiny ? 0x1p64f : 1.0f) : 0.0f, reach = largest * prescale;
    const bool wide =  // float32, or largest > 6 * root mean square
        layout.limbs == 3 && finite && reach > 0 &&
        (DTYPE == TSLD_CPU_F32 ||
         static_cast<float>(w.k) > 36.0f * squares_of_row<DTYPE>(row, w.k, prescale, 1.0f / reach));
    const float range = layout.limbs == 1 ? 127.0f : wide ? 4161536.0f : 32512.0f;  // 127, 127 * 2^15, 127 * 2^8
    const float inverse = finite && reach > 0 ? range / reach : 0.0f;
    token = {finite ? reach / range : as_float(0x7fc00000u), tiny ? 0x1p-64f : 1.0f,
             layout.limbs == 1 ? 1 : wide ? 3 : 2, 0};
    if (layout.limbs == 1) limbs_of_row<DTYPE, 1>(w, layout, ws, row, t, prescale, inverse);
    else if (wide) limbs_of_row<DTYPE, 3>(w, layout, ws, row, t, prescale, inverse);
    else limbs_of_row<DTYPE, 2>(w, layout, ws, row, t, prescale, inverse);
  }
}

// acc[64] += scale * (d - zero * sum) of one segment; d[limb] are int32 [64].
template <int LIMBS>
TSLD_TARGET void fold(const Weights& w, int64_t index, int64_t panel, const int32_t* const* d, const int32_t* sums,
                      int64_t segments, float* acc) {
  const int64_t from = index / w.splits * w.rows + panel * kPanel;
  const float* scales = w.scales() + from;
  const uint8_t* zeros = w.zeros() ? w.zeros() + from : nullptr;
  for (int j = 0; j < kPanel; j += 16) {
    Ints16 zero = Ints16{} + w.zero;
    if (zeros) {
      Codes16 raw;
      memcpy(&raw, zeros + j, 16);
      zero = __builtin_convertvector(raw, Ints16);
    }
    Floats16 f = {}, scale, sum;
    for (int l = 0; l < LIMBS; l++) {
      Ints16 products;
      memcpy(&products, d[l] + j, 64);
      const Ints16 exact = products - zero * sums[l * segments + index];
      f += __builtin_convertvector(exact, Floats16) * (l == 0 ? 1.0f : l == 1 ? 256.0f : 65536.0f);
    }
    memcpy(&scale, scales + j, 64);
    memcpy(&sum, acc + j, 64);
    sum += f * scale;
    memcpy(acc + j, &sum, 64);
  }
}

TSLD_TARGET TSLD_INLINE void fold_token(const Weights& w, int64_t index, int64_t panel, int limbs,
                                        const int32_t* const* d, const int32_t* sums, int64_t segments, float* acc) {
  if (limbs == 1) fold<1>(w, index, panel, d, sums, segments, acc);
  else if (limbs == 2) fold<2>(w, index, panel, d, sums, segments, acc);
  else fold<3>(w, index, panel, d, sums, segments, acc);
}

// Sixteen finished sums -> dtype; ties to even.
TSLD_TARGET TSLD_INLINE void to_16_bits(const Floats16& value, int dtype, uint16_t* out) {
  const Words16 bits = (Words16)value, magnitude = bits & 0x7fffffffu;
  Words16 h;
  if (dtype == TSLD_CPU_BF16) {
    const Words16 nan = (Words16)(magnitude > 0x7f800000u), rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    h = (nan & (bits >> 16 | 0x40)) | (~nan & rounded);
  } else {
    const Words16 normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
    const Words16 tiny = (Words16)((Floats16)magnitude + 0.5f) - 0x3f000000u;  // 0.5 has the ulp of 2^-24
    const Words16 small = (Words16)(magnitude < 0x38800000u), large = (Words16)(magnitude >= 0x477ff000u);
    const Words16 nan = (Words16)(magnitude > 0x7f800000u);
    h = (small & tiny) | (~small & normal);
    h = (large & (0x7c00u | (nan & 0x0200u))) | (~large & h);
    h |= bits >> 16 & 0x8000u;
  }
  const Halves16 halves = __builtin_convertvector(h, Halves16);
  memcpy(out, &halves, 32);
}

TSLD_TARGET static void store(const Weights& w, const Token& token, int64_t panel, const float* acc, const float* bias,
                              void* y, int dtype, int64_t at) {
  const int64_t first = panel * kPanel, left = w.n - first, size = dtype == TSLD_CPU_F32 ? 4 : 2;
  char* to = static_cast<char*>(y) + (at + first) * size;
  for (int64_t j = 0; j < kPanel && j < left; j += 16) {
    const int64_t count = left - j < 16 ? left - j : 16;
    Floats16 f, offset = {};
    memcpy(&f, acc + j, 64);
    f = f * token.scale * token.post;
    if (bias) {
      if (count == 16) memcpy(&offset, bias + first + j, 64);
      else memcpy(&offset, bias + first + j, static_cast<size_t>(count) * 4);
      f += offset;
    }
    uint16_t h[16];
    if (dtype != TSLD_CPU_F32) to_16_bits(f, dtype, h);
    const void* from = dtype == TSLD_CPU_F32 ? static_cast<const void*>(&f) : h;
    if (count < 16) memcpy(to + j * size, from, static_cast<size_t>(count * size));
    else if (dtype == TSLD_CPU_F32) memcpy(to + j * 4, &f, 64);
    else memcpy(to + j * 2, h, 32);
  }
}

// ---------------------------------------------------------------- panels, with dots() and adds() of the level
template <int BITS>
TSLD_TARGET void few_tokens(const Weights& w, const Workspace& layout, const void* ws, const float* bias, void* y,
                            int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t panel) {
  const uint8_t* codes = w.codes() + panel * w.panel_bytes();
  int64_t t = t0;
  while (t < t1) {  // up to four planes at once: whole tokens
    const int8_t* planes[4];
    int64_t count = 0, used = 0;
    for (; t + count < t1; count++) {
      const int limbs = layout.tokens(ws)[t + count].limbs;
      if (used + limbs > 4) break;
      for (int l = 0; l < limbs; l++) planes[used++] = layout.plane(ws, t + count, l);
    }
    alignas(64) float acc[4][kPanel] = {};
    alignas(64) int32_t d[4][kPanel];
    for (int64_t index = 0; index < layout.segments; index++) {
      const Segment s = segment(w, index);
      const int8_t* here[4];
      for (int p = 0; p < used; p++) here[p] = planes[p] + s.at;
      const uint8_t* from = codes + s.at / w.step() * 256;
      const int64_t steps = s.padded / w.step();
      if (used == 1) dots<BITS, 1>(from, steps, here, d);
      else if (used == 2) dots<BITS, 2>(from, steps, here, d);
      else if (used == 3) dots<BITS, 3>(from, steps, here, d);
      else dots<BITS, 4>(from, steps, here, d);
      for (int64_t c = 0, p = 0; c < count; c++) {
        const int limbs = layout.tokens(ws)[t + c].limbs;
        const int32_t* of[3] = {d[p], d[p + 1 < 4 ? p + 1 : p], d[p + 2 < 4 ? p + 2 : p]};
        fold_token(w, index, panel, limbs, of, layout.sums(ws, t + c), layout.segments, acc[c]);
        p += limbs;
      }
    }
    for (int64_t c = 0; c < count; c++)
      store(w, layout.tokens(ws)[t + c], panel, acc[c], bias, y, dtype, (t + c) * ldy);
    t += count;
  }
}

TSLD_TARGET static void add_tokens(const Weights& w, const Workspace& layout, const void* ws, const float* bias,
                                   void* y, int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t panel) {
  const uint8_t* codes = w.codes() + panel * w.panel_bytes();
  for (int64_t t = t0; t < t1; t++) {
    const float* plane = reinterpret_cast<const float*>(layout.plane(ws, t, 0));
    alignas(64) float acc[kPanel] = {};
    for (int64_t index = 0; index < layout.segments; index++) {
      const Segment s = segment(w, index);
      alignas(64) float sum[kPanel] = {};
      for (int64_t at = s.at; at < s.at + s.padded; at += kAddBlock) {
        const int64_t end = s.at + s.padded, inputs = end - at < kAddBlock ? end - at : kAddBlock;
        adds(codes + at / 16 * 256, inputs / 16, plane + at, sum);
      }
      const float* scales = w.scales() + index / w.splits * w.rows + panel * kPanel;
      for (int j = 0; j < kPanel; j++) acc[j] += sum[j] * scales[j];
    }
    store(w, layout.tokens(ws)[t], panel, acc, bias, y, dtype, t * ldy);
  }
}

TSLD_TARGET static void quantize(const Weights& w, int level, int activations, const void* x, int dtype, int64_t ldx,
                                 int64_t tokens, void* ws, int64_t t0, int64_t t1) {
  if (dtype == TSLD_CPU_F32) quantize_rows<TSLD_CPU_F32>(w, level, activations, x, ldx, tokens, ws, t0, t1);
  else if (dtype == TSLD_CPU_BF16) quantize_rows<TSLD_CPU_BF16>(w, level, activations, x, ldx, tokens, ws, t0, t1);
  else quantize_rows<TSLD_CPU_F16>(w, level, activations, x, ldx, tokens, ws, t0, t1);
}

TSLD_TARGET static void multiply(const Weights& w, const Workspace& layout, const void* ws, const float* bias, void* y,
                                 int dtype, int64_t ldy, int64_t t0, int64_t t1, int64_t p0, int64_t p1) {
  for (int64_t panel = p0; panel < p1; panel++) {
    if (layout.floats) add_tokens(w, layout, ws, bias, y, dtype, ldy, t0, t1, panel);
    else if (w.bits == 2) few_tokens<2>(w, layout, ws, bias, y, dtype, ldy, t0, t1, panel);
    else if (w.bits == 4) few_tokens<4>(w, layout, ws, bias, y, dtype, ldy, t0, t1, panel);
    else few_tokens<8>(w, layout, ws, bias, y, dtype, ldy, t0, t1, panel);
  }
}
