// sum[64] += float additions and subtractions of one panel: no multiplication by a weight anywhere.

TSLD_TARGET static void adds(const uint8_t* codes, int64_t steps, const float* x, float* sum) {
  typedef uint32_t Words __attribute__((vector_size(32)));  // compilers lower these to what the level has
  typedef float Floats __attribute__((vector_size(32)));
  for (int rows = 0; rows < kPanel; rows += 8) {
    Floats plus = {}, minus = {};
    const uint8_t* from = codes + 4 * rows;
    for (int64_t step = 0; step < steps; step++, from += 256) {
      Words words;  // the 16 codes of a row
      memcpy(&words, from, 32);
      for (int input = 0; input < 16; input++) {
        const int bit = input % 4 * 8 + input / 4 * 2;
        const Words code = words >> bit, one = {1, 1, 1, 1, 1, 1, 1, 1};
        const Words adds = -(code >> 1 & one), subtracts = ((code & one) | (code >> 1 & one)) - one;
        const Words value = as_bits(x[16 * step + input]) + Words{};
        plus += (Floats)(value & adds);
        minus += (Floats)(value & subtracts);
      }
    }
    for (int r = 0; r < 8; r++) sum[rows + r] += plus[r] - minus[r];
  }
}
