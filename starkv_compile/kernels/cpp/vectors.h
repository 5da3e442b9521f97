// Vectors of floats, as wide as the machine has them, and what the kernels compute with them.
// Vectors are those of GCC and Clang.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
constexpr int SUMS = REGISTERS == 32 ? 24 : 12;       // registers that hold products

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

constexpr float MOST = 3.4028234663852886e38f;

static inline Floats all(float x) { return x - Floats{}; }

static inline Floats load(const float *from) {
  Floats vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

// What is not a number counts as invisible, an infinite one as the largest finite number.
static inline Floats finite(Floats x) {
  x = x == x ? x : all(-MOST);
  x = x > MOST ? all(MOST) : x;
  return x < -MOST ? all(-MOST) : x;
}

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x to 2e-7 of its value: 2^n by the exponent's bits times a polynomial (Cephes' coefficients)
// of the rest. Below -87, where float32 stops being normal, 0; above 88 infinity.
static inline Floats exponential(Floats x) {
  const Floats least = all(-87.0f), most = all(88.0f), rounding = all(12582912.0f);  // 1.5 * 2^23
  const Floats inside = x < least ? least : x;
  const Floats shifted = inside * 1.44269504088896341f + rounding;
  const Floats n = shifted - rounding;
  const Floats f = inside - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const Floats power = (Floats)((Ints)p + ((Ints)shifted << 23));
  return x < least ? Floats{} : x > most ? all(__builtin_inff()) : power;
}

// The number of a key: float, or bfloat16 as 16 bits.
static inline float widen(float number) { return number; }

static inline float widen(uint16_t number) {
  const uint32_t bits = (uint32_t)number << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));

static inline Floats load(const uint16_t *from) {
  Halves vector;
  memcpy(&vector, from, sizeof vector);
  return (Floats)(__builtin_convertvector(vector, Bits) << 16);
}

// The sum of the lanes, in halves.
template <int COUNT>
static inline float sum_of(const void *numbers) {
  typedef float Half __attribute__((vector_size(COUNT * 2)));
  Half first, second;
  memcpy(&first, numbers, sizeof first);
  memcpy(&second, (const char *)numbers + sizeof first, sizeof second);
  first += second;
  return sum_of<COUNT / 2>(&first);
}

template <>
inline float sum_of<1>(const void *number) {
  return *(const float *)number;
}

static inline float sum(Floats vector) { return sum_of<LANES>(&vector); }

// The vector with each lane in the place of the one DISTANCE away from it.
template <int DISTANCE>
static inline Floats swapped(Floats vector) {
#if defined(__clang__)
  Floats result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = vector[lane ^ DISTANCE];
  return result;
#else
  Ints places{};
  for (int lane = 0; lane < LANES; lane++) places[lane] = lane ^ DISTANCE;
  return __builtin_shuffle(vector, places);
#endif
}

// Lane i: the sum of vector i. Two vectors fold into one at a time, which makes four instructions
// a sum, where `sum` takes ten.
template <int COUNT = LANES>
static inline Floats sums(const Floats *vectors) {
  if constexpr (COUNT == 1) {
    return vectors[0];
  } else {
    constexpr int HALF = COUNT / 2;
    const Floats first = sums<HALF>(vectors), second = sums<HALF>(vectors + HALF);
    Ints of_second{};
    for (int lane = 0; lane < LANES; lane++) of_second[lane] = lane & HALF ? -1 : 0;
    return (of_second ? second : first) + swapped<HALF>(of_second ? first : second);
  }
}

static inline int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }
