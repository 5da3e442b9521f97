// Moves rows to a centre, turns them by a Hadamard matrix, and rounds them to codes of 8 or 4 bits.
// A row stays in the nearest cache from its first number to its last code.

#include "vectors.h"

struct Work {  // mirrored by `_Work` in quantization.py
  int64_t groups, tokens, stride;  // groups of as many rows one after another, and from one to the
                                   // next of them
  int64_t dim, block;              // block: the largest power of two in dim
  int64_t bytes, most;                      // of the codes of a row; the largest code
  int64_t bfloat16, threads;
};

// To the nearest bfloat16, of two equally near ones to the even one.
static inline uint16_t narrow(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  if (number != number) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Sums and differences of lanes that are 1, 2, ... LANES / 2 away from each other.
template <int HALF = 1>
static inline Floats turn_lanes(Floats vector) {
  if constexpr (HALF == LANES) {
    return vector;
  } else {
    Floats signs{};
    for (int lane = 0; lane < LANES; lane++) signs[lane] = lane & HALF ? -1.0f : 1.0f;
    return turn_lanes<HALF * 2>(swapped<HALF>(vector) + vector * signs);
  }
}

// Multiplies blocks of a row by a Hadamard matrix of 1 and -1.
static inline void turn(float *row, int64_t dim, int64_t block) {
  int64_t half = 1;
  if (block >= LANES) {
    for (int64_t d = 0; d < dim; d += LANES) {
      const Floats turned = turn_lanes(load(row + d));
      memcpy(row + d, &turned, sizeof turned);
    }
    half = LANES;
  }
  for (; half < block; half *= 2)
    for (int64_t start = 0; start < dim; start += 2 * half)
      for (int64_t d = start; d < start + half; d++) {
        const float a = row[d], b = row[d + half];
        row[d] = a + b;
        row[d + half] = a - b;
      }
}

template <typename Number>
static void quantize(const Work &work, const Number *rows, const float *centres, uint8_t *codes,
                     uint16_t *ranges) {
  const int64_t dim = work.dim, bytes = work.bytes;
  const float most = (float)work.most, length = 1.0f / __builtin_sqrtf((float)work.block);
#pragma omp parallel num_threads(work.threads)
  {
    std::vector<float> memory(dim);
    std::vector<uint8_t> room(dim);
    float *numbers = memory.data();
    uint8_t *rounded = room.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < work.groups * work.tokens; row++) {
      const int64_t group = row / work.tokens;
      const Number *from = rows + group * work.stride + row % work.tokens * dim;
      const float *centre = centres + group * dim;
      for (int64_t d = 0; d < dim; d++) numbers[d] = widen(from[d]) - centre[d];
      turn(numbers, dim, work.block);
      float low = MOST, high = -MOST, finite = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : finite)
      for (int64_t d = 0; d < dim; d++) {
        const float number = numbers[d] * length;
        numbers[d] = number;
        low = number < low ? number : low;
        high = number > high ? number : high;
        finite += number * 0.0f;
      }
      low += finite;  // a row that is not finite has neither end
      high += finite;
      uint8_t *to = codes + row * bytes;
      ranges[row * 2] = narrow(low);
      ranges[row * 2 + 1] = narrow((high - low) / most);
      low = widen(ranges[row * 2]);
      const float step = widen(ranges[row * 2 + 1]);
      if (!(step > 0)) {  // equal numbers, or none
        std::fill(to, to + bytes, 0);
        continue;
      }
      const float rate = 1.0f / step;
      uint8_t *each = bytes == dim ? to : rounded;
      for (int64_t d = 0; d < dim; d++) {
        float steps = (numbers[d] - low) * rate;
        steps = steps < 0.0f ? 0.0f : steps;
        steps = steps > most ? most : steps;
        each[d] = (uint8_t)(int32_t)(steps + 0.5f);
      }
      if (bytes == dim) continue;
      for (int64_t d = 0; d < dim - bytes; d++)
        to[d] = (uint8_t)(rounded[d] | rounded[d + bytes] << 4);
      for (int64_t d = dim - bytes; d < bytes; d++) to[d] = rounded[d];
    }
  }
}

// centres [groups][dim]: the means of a group's rows, without those that are not finite.
template <typename Number>
static void centre(const Work &work, const Number *rows, float *centres) {
  constexpr int64_t FEW = 64;  // rows whose sum float32 holds well enough
  const int64_t dim = work.dim, each = work.tokens;
#pragma omp parallel for num_threads(work.threads) schedule(static)
  for (int64_t group = 0; group < work.groups; group++) {
    std::vector<double> sums(dim);
    std::vector<float> memory(2 * dim);
    float *few = memory.data(), *row = few + dim;
    int64_t good = 0;
    for (int64_t first = 0; first < each; first += FEW) {
      std::fill(few, few + dim, 0.0f);
      for (int64_t r = first; r < std::min(each, first + FEW); r++) {
        const Number *from = rows + group * work.stride + r * dim;
        float finite = 0;
#pragma omp simd reduction(+ : finite)
        for (int64_t d = 0; d < dim; d++) {
          row[d] = widen(from[d]);
          finite += row[d] * 0.0f;
        }
        if (finite != finite) continue;
        good++;
        for (int64_t d = 0; d < dim; d++) few[d] += row[d];
      }
      for (int64_t d = 0; d < dim; d++) sums[d] += few[d];
    }
    for (int64_t d = 0; d < dim; d++)
      centres[group * dim + d] = (float)(sums[d] / (double)std::max<int64_t>(1, good));
  }
}

extern "C" void starkv_quantize(const Work *work, const void *rows, const float *centres,
                                uint8_t *codes, uint16_t *ranges) {
  if (work->bfloat16) return quantize(*work, (const uint16_t *)rows, centres, codes, ranges);
  return quantize(*work, (const float *)rows, centres, codes, ranges);
}

extern "C" void starkv_centre(const Work *work, const void *rows, float *centres) {
  if (work->bfloat16) return centre(*work, (const uint16_t *)rows, centres);
  return centre(*work, (const float *)rows, centres);
}
