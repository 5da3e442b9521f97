// Attention of a few query rows over codes of 8 or 4 bits. Codes become floats in registers, and
// every code is read once for all query heads of its KV head.
//
// A row of codes is one plane of bytes with 8 bits. With 4 bits it is two: the low halves of its
// bytes hold the row's first numbers, the high halves the others. Query rows come in such planes,
// each filled up with zeros to whole vectors.

#include "vectors.h"

constexpr int64_t TASK = 512;  // tokens of one unit of parallel work

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

struct Work {  // mirrored by `_Work` in quantized_attention.py
  int64_t batch, groups, rows, tokens;
  int64_t key_bytes, value_bytes;  // of the codes of one token
  int64_t added_batch, added_group, added_row;  // strides; 0: shared
  int64_t bfloat16;  // 1: ranges are bfloat16, 0: float
  int64_t threads;
  const float *query;              // [B, G, R, planes, whole vectors], scaled
  const float *base;               // [B, G, R]: added to all logits of a row
  const uint8_t *keys, *values;    // [B, G, C, bytes]
  const void *key_ranges, *value_ranges;  // [B, G, C, 2]: least number and step
  const float *added;              // added to the logits; or null
};

static inline int64_t whole(int64_t bytes) { return parts_of(bytes, LANES) * LANES; }

static inline Bytes load(const uint8_t *from) {
  Bytes vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

// The numbers of one plane.
template <int PLANES>
static inline Floats numbers(Bytes bytes, int plane) {
  if (PLANES == 2) bytes = plane ? bytes >> 4 : bytes & 15;
  int32_t wide[LANES];  // GCC 12 converts some vectors one by one, and loops all at once
  for (int lane = 0; lane < LANES; lane++) wide[lane] = bytes[lane];
  Ints whole;
  memcpy(&whole, wide, sizeof whole);
  return __builtin_convertvector(whole, Floats);
}

// Codes of tokens from `first` on, each of whole vectors. Copied where they are not.
struct Codes {
  const uint8_t *first;
  int64_t stride;
  std::vector<uint8_t> room;

  Codes(const uint8_t *from, int64_t bytes, int64_t tokens) : first(from), stride(bytes) {
    if (bytes == whole(bytes)) return;
    stride = whole(bytes);
    room.assign(tokens * stride, 0);
    for (int64_t t = 0; t < tokens; t++) memcpy(&room[t * stride], from + t * bytes, bytes);
    first = room.data();
  }
};

// logits [ROWS][TASK] = query rows times codes. query [ROWS][PLANES][stride].
template <int PLANES, int ROWS>
static void multiply(const float *query, const Codes &codes, int64_t tokens, float *logits) {
  // AVX-512 multiplies by a query that it reads from memory, so it needs fewer other registers.
  constexpr int MOST_SUMS = LANES == 16 ? 28 : SUMS;
  constexpr int TOKENS = 4 * ROWS <= MOST_SUMS ? 4 : 2 * ROWS <= MOST_SUMS ? 2 : 1;
  const int64_t row = PLANES * codes.stride;
  Floats lanes[ROWS][LANES];  // of the sums of LANES tokens
  for (int64_t token = 0; token < parts_of(tokens, LANES) * LANES; token += TOKENS) {
    const uint8_t *from[TOKENS];  // a short last tile repeats its last token
    for (int t = 0; t < TOKENS; t++)
      from[t] = codes.first + std::min(token + t, tokens - 1) * codes.stride;
    Floats products[TOKENS][ROWS] = {};
    for (int64_t d = 0; d < codes.stride; d += LANES) {
      Bytes bytes[TOKENS];
      for (int t = 0; t < TOKENS; t++) bytes[t] = load(from[t] + d);
      for (int plane = 0; plane < PLANES; plane++) {
        Floats code[TOKENS];
        for (int t = 0; t < TOKENS; t++) code[t] = numbers<PLANES>(bytes[t], plane);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          const Floats asked = load(query + r * row + plane * codes.stride + d);
#pragma GCC unroll 4
          for (int t = 0; t < TOKENS; t++) products[t][r] += asked * code[t];
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < TOKENS; t++) lanes[r][token % LANES + t] = products[t][r];
    if ((token + TOKENS) % LANES == 0)
      for (int r = 0; r < ROWS; r++) {
        const Floats whole = sums(lanes[r]);
        memcpy(logits + r * TASK + token + TOKENS - LANES, &whole, sizeof whole);
      }
  }
}

// out [ROWS][PLANES][stride] = factors [ROWS][TASK] times codes.
template <int PLANES, int ROWS>
static void accumulate(const float *factors, const Codes &codes, int64_t tokens, float *out) {
  constexpr int WIDE = PLANES == 1 && 2 * ROWS <= SUMS ? 2 : 1;  // vectors of bytes at once
  constexpr int BLOCK = WIDE * LANES;
  const int64_t row = PLANES * codes.stride;
  for (int64_t d = 0; d < codes.stride; d += BLOCK) {
    const int wide = (int)std::min<int64_t>(WIDE, (codes.stride - d) / LANES);
    const int second = wide == 2 ? LANES : 0;  // a short last block repeats its first vector
    Floats sums[ROWS][WIDE * PLANES] = {};
    for (int64_t token = 0; token < tokens; token++) {
      const uint8_t *from = codes.first + token * codes.stride + d;
      Floats code[WIDE * PLANES];
      for (int w = 0; w < WIDE; w++) {
        const Bytes bytes = load(from + w * second);
        for (int plane = 0; plane < PLANES; plane++)
          code[w * PLANES + plane] = numbers<PLANES>(bytes, plane);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const Floats factor = all(factors[r * TASK + token]);
#pragma GCC unroll 4
        for (int w = 0; w < WIDE * PLANES; w++) sums[r][w] += factor * code[w];
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int w = 0; w < wide; w++)
        for (int plane = 0; plane < PLANES; plane++)
          memcpy(out + r * row + plane * codes.stride + d + w * LANES,
                 &sums[r][w * PLANES + plane], sizeof(Floats));
  }
}

// Calls KERNEL<PLANES, ROWS>(arguments) for blocks of at most 8 of the rows.
template <int PLANES, typename Kernel>
static void by_rows(int64_t rows, Kernel kernel) {
  for (int64_t r = 0; r < rows; r += 8) switch (std::min<int64_t>(8, rows - r)) {
      case 1: kernel(r, std::integral_constant<int, 1>()); break;
      case 2: kernel(r, std::integral_constant<int, 2>()); break;
      case 3: kernel(r, std::integral_constant<int, 3>()); break;
      case 4: kernel(r, std::integral_constant<int, 4>()); break;
      case 5: kernel(r, std::integral_constant<int, 5>()); break;
      case 6: kernel(r, std::integral_constant<int, 6>()); break;
      case 7: kernel(r, std::integral_constant<int, 7>()); break;
      case 8: kernel(r, std::integral_constant<int, 8>()); break;
    }
}

// Sums of one part of a group's tokens. weighted [R][PLANES][whole value bytes], top, total [R].
template <int PLANES>
static void attend_part(const Work &work, int64_t b, int64_t g, int64_t start, int64_t tokens,
                        float *weighted, float *top, float *total) {
  const int64_t group = b * work.groups + g, first = group * work.tokens + start;
  const Codes keys(work.keys + first * work.key_bytes, work.key_bytes, tokens);
  const int64_t asked = PLANES * keys.stride;
  std::vector<float> logits(work.rows * TASK);
  const float *query = work.query + group * work.rows * asked;
  by_rows<PLANES>(work.rows, [&](int64_t r, auto count) {
    multiply<PLANES, count>(query + r * asked, keys, tokens, &logits[r * TASK]);
  });
  float low[TASK] = {}, step[TASK] = {};
  const auto split = [&](auto *ranges) {
    for (int64_t t = 0; t < tokens; t++) {
      low[t] = widen(ranges[(first + t) * 2]);
      step[t] = widen(ranges[(first + t) * 2 + 1]);
    }
  };
  const auto read = [&](const void *ranges) {
    work.bfloat16 ? split((const uint16_t *)ranges) : split((const float *)ranges);
  };
  std::vector<float> of_low(work.rows);
  const int64_t vectors = parts_of(tokens, LANES);
  read(work.key_ranges);
  for (int64_t r = 0; r < work.rows; r++) {
    float *row = &logits[r * TASK];
    Floats asked_sum{};
    for (int64_t d = 0; d < asked; d += LANES) asked_sum += load(query + r * asked + d);
    const float of_query = sum(asked_sum), base = work.base[group * work.rows + r];
    for (int64_t t = 0; t < tokens; t++) row[t] = row[t] * step[t] + (of_query * low[t] + base);
    if (work.added) {
      const float *added = work.added + b * work.added_batch + g * work.added_group +
                           r * work.added_row + start;
      for (int64_t t = 0; t < tokens; t++) row[t] += added[t];
    }
    for (int64_t t = tokens; t < vectors * LANES; t++) row[t] = -__builtin_inff();
    Floats largest = all(-MOST), factors{};
    for (int64_t v = 0; v < vectors; v++) largest = larger(load(row + v * LANES), largest);
    float most = -MOST;
    for (int lane = 0; lane < LANES; lane++) most = std::max(most, largest[lane]);
    for (int64_t v = 0; v < vectors; v++) {
      const Floats logit = load(row + v * LANES);
      const Floats power = exponential(logit - most);
      const Floats factor = logit == logit ? power : logit;  // a logit that is not a number shows
      factors += factor;
      memcpy(row + v * LANES, &factor, sizeof factor);
    }
    top[r] = most;
    total[r] = sum(factors);
  }
  read(work.value_ranges);
  for (int64_t r = 0; r < work.rows; r++) {
    float *row = &logits[r * TASK];
    Floats lows{};
    for (int64_t v = 0; v < vectors; v++) {
      const Floats factor = load(row + v * LANES), scaled = factor * load(step + v * LANES);
      lows += factor * load(low + v * LANES);
      memcpy(row + v * LANES, &scaled, sizeof scaled);
    }
    of_low[r] = sum(lows);
  }
  const Codes values(work.values + first * work.value_bytes, work.value_bytes, tokens);
  const int64_t wide = PLANES * values.stride;
  by_rows<PLANES>(work.rows, [&](int64_t r, auto count) {
    accumulate<PLANES, count>(&logits[r * TASK], values, tokens, weighted + r * wide);
  });
  for (int64_t r = 0; r < work.rows; r++)
    for (int64_t d = 0; d < wide; d++) weighted[r * wide + d] += of_low[r];
}

// weighted [B, G, R, PLANES, whole value bytes], total and top [B, G, R].
template <int PLANES>
static void attend(const Work &work, float *weighted, float *total, float *top) {
  const int64_t parts = parts_of(work.tokens, TASK), groups = work.batch * work.groups;
  const int64_t wide = PLANES * whole(work.value_bytes), rows = work.rows;
  std::vector<float> sums(groups * parts * rows * wide), tops(groups * parts * rows),
      totals(groups * parts * rows);
#pragma omp parallel for num_threads(work.threads) schedule(static)
  for (int64_t unit = 0; unit < groups * parts; unit++) {
    const int64_t group = unit / parts, start = unit % parts * TASK;
    attend_part<PLANES>(work, group / work.groups, group % work.groups, start,
                        std::min(TASK, work.tokens - start), &sums[unit * rows * wide],
                        &tops[unit * rows], &totals[unit * rows]);
  }
  for (int64_t group = 0; group < groups; group++)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = group * rows + r, first = group * parts * rows + r;
      top[row] = -MOST;
      for (int64_t p = 0; p < parts; p++) top[row] = std::max(top[row], tops[first + p * rows]);
      total[row] = 0;
      std::fill(weighted + row * wide, weighted + (row + 1) * wide, 0.0f);
      for (int64_t p = 0; p < parts; p++) {
        const float factor = exponential(all(tops[first + p * rows] - top[row]))[0];
        total[row] += totals[first + p * rows] * factor;
        for (int64_t d = 0; d < wide; d++)
          weighted[row * wide + d] += sums[(first + p * rows) * wide + d] * factor;
      }
    }
}

extern "C" int64_t starkv_lanes() { return LANES; }

extern "C" void starkv_attend(const Work *work, int64_t planes, float *weighted, float *total,
                              float *top) {
  if (planes == 2) return attend<2>(*work, weighted, total, top);
  return attend<1>(*work, weighted, total, top);
}
