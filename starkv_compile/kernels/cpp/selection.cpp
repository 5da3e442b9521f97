// The best-scored tokens of each row, in ascending order of index; ties go to the lowest index.
//
// Three counts of 11, 11 and 10 bits find the score that the last selected token has, exactly and
// without sorting; one more pass writes the indices down.

#include <cstdint>
#include <cstring>
#include <vector>

// Unsigned numbers in the order of the scores. What is not finite comes before all that is.
static uint32_t ordered(float score) {
  if (score == 0) score = 0;  // of either sign
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  if ((bits & 0x7f800000u) == 0x7f800000u) bits = 0xff7fffffu;  // the smallest finite number's
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// scores [B, past]; real [B, length] of bytes, 0 at padding, which comes before all else, or null.
// out [B, width]: `selected` indices of each row, in its first columns.
extern "C" void starkv_select(const float *scores, const uint8_t *real, int64_t *out, int64_t batch,
                              int64_t past, int64_t length, int64_t selected, int64_t width) {
  std::vector<uint32_t> keys(past);
  for (int64_t row = 0; row < batch; row++) {
    for (int64_t i = 0; i < past; i++) {
      keys[i] = ordered(scores[row * past + i]);
      if (real && !real[row * length + i]) keys[i] = 0;
    }
    uint32_t threshold = 0, fixed = 0;  // bits of the threshold found so far, and which those are
    int64_t ties = selected;            // wanted of the tokens whose fixed bits are the threshold's
    for (int shift : {21, 10, 0}) {
      const uint32_t digits = shift ? 2047 : 1023;
      int64_t count[2048] = {};
      for (uint32_t key : keys)
        if ((key & fixed) == threshold) count[key >> shift & digits]++;
      uint32_t digit = digits;
      while (ties > count[digit]) ties -= count[digit--];
      threshold |= digit << shift;
      fixed |= digits << shift;
    }
    int64_t *place = out + row * width;
    for (int64_t i = 0; i < past; i++)
      if (keys[i] > threshold || (keys[i] == threshold && ties-- > 0)) *place++ = i;
  }
}
