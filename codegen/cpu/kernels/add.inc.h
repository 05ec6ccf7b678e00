// sum[64] += float additions and subtractions of one panel: no multiplication by a weight anywhere.

TSLD_TARGET static void adds(const uint8_t* codes, int64_t steps, const float* x, float* sum) {
  float plus[kPanel] = {}, minus[kPanel] = {};
  for (int64_t step = 0; step < steps; step++, codes += 256, x += 16)
    for (int block = 0; block < 4; block++) {
      uint32_t words[16];  // the 16 codes of a row
      memcpy(words, codes + 64 * block, 64);
      for (int input = 0; input < 16; input++) {
        const int bit = input % 4 * 8 + input / 4 * 2;
        const uint32_t value = as_bits(x[input]);
        for (int r = 0; r < 16; r++) {
          const uint32_t code = words[r] >> bit & 3;
          plus[16 * block + r] += as_float(code == 2 ? value : 0);
          minus[16 * block + r] += as_float(code == 0 ? value : 0);
        }
      }
    }
  for (int r = 0; r < kPanel; r++) sum[r] += plus[r] - minus[r];
}
