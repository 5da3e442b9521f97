// How many tokens have each bin of score rank and each place, by a stable radix sort.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int64_t BINS = 16, PLACES = 144;

// Unsigned numbers in the order of the scores; NaN comes last.
static uint32_t ordered(float score) {
  if (score == 0) score = 0;  // of either sign
  if (score != score) return 0xffffffffu;
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// scores [B, G, N], place [B, N] in 0..143, valid [B, N] of bytes, a row's valid tokens first.
// out [B, G, 16, 144], zeros.
extern "C" void starkv_rank_histogram(const float *scores, const int64_t *place,
                                      const uint8_t *valid, int32_t *out, int64_t batch,
                                      int64_t groups, int64_t tokens) {
  typedef struct { uint32_t key; int32_t token; } Item;
  std::vector<Item> items(tokens), sorted(tokens);
  for (int64_t index = 0; index < batch * groups; index++) {
    const int64_t row = index / groups;
    const int64_t count = std::count(valid + row * tokens, valid + (row + 1) * tokens, 1);
    for (int64_t i = 0; i < count; i++) items[i] = {ordered(scores[index * tokens + i]), (int32_t)i};
    for (int shift : {0, 11, 22}) {
      int64_t start[2049] = {};
      for (int64_t i = 0; i < count; i++) start[(items[i].key >> shift & 2047) + 1]++;
      for (int digit = 0; digit < 2048; digit++) start[digit + 1] += start[digit];
      for (int64_t i = 0; i < count; i++) sorted[start[items[i].key >> shift & 2047]++] = items[i];
      items.swap(sorted);
    }
    int32_t *joint = out + index * BINS * PLACES;
    for (int64_t rank = 0; rank < count; rank++)
      joint[rank * BINS / count * PLACES + place[row * tokens + items[rank].token]]++;
  }
}
