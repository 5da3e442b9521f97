// Novelty of tokens in space, in time and among each other: cosines of a few pairs of keys, each
// summed over all KV heads without a copy of the keys.

#include "vectors.h"

struct Keys {  // mirrored by `_Keys` in novelty.py
  int64_t batch, groups, tokens, dim;
  int64_t of_batch, of_group, of_token;  // strides
  int64_t bfloat16, threads;
  const void *numbers;  // float, or bfloat16 as 16 bits
};

template <typename Number>
struct Rows {
  const Keys &keys;

  const Number *at(int64_t b, int64_t g, int64_t t) const {
    return (const Number *)keys.numbers + b * keys.of_batch + g * keys.of_group +
           t * keys.of_token;
  }

  // Products of token s with each of PAIRS * `others`; several at a time, as a sum waits for itself.
  template <int PAIRS>
  void products(int64_t b, int64_t s, const int64_t *others, float *found) const {
    constexpr int AT_ONCE = PAIRS == 1 ? 2 : 1;  // sums of one pair
    Floats sums[PAIRS][AT_ONCE] = {};
    float rest[PAIRS] = {};
    for (int64_t g = 0; g < keys.groups; g++) {
      const Number *left = at(b, g, s), *right[PAIRS];
      for (int n = 0; n < PAIRS; n++) right[n] = at(b, g, others[n]);
      int64_t d = 0;
      for (; d + AT_ONCE * LANES <= keys.dim; d += AT_ONCE * LANES)
        for (int i = 0; i < AT_ONCE; i++) {
          const int64_t from = d + i * LANES;
          const Floats one = load(left + from);
          for (int n = 0; n < PAIRS; n++) sums[n][i] += one * load(right[n] + from);
        }
      for (; d < keys.dim; d++)
        for (int n = 0; n < PAIRS; n++) rest[n] += widen(left[d]) * widen(right[n][d]);
    }
    for (int n = 0; n < PAIRS; n++) {
      Floats whole = sums[n][0];
      for (int i = 1; i < AT_ONCE; i++) whole += sums[n][i];
      found[n] = rest[n] + sum(whole);
    }
  }

  float product(int64_t b, int64_t s, int64_t t) const {
    float found;
    products<1>(b, s, &t, &found);
    return found;
  }

  // Squared lengths of the tokens from `first` on: [B][tokens - first].
  std::vector<float> sizes(int64_t first) const {
    const int64_t count = keys.tokens - first;
    std::vector<float> found(keys.batch * count);
#pragma omp parallel for num_threads(keys.threads) schedule(static)
    for (int64_t i = 0; i < keys.batch * count; i++)
      found[i] = product(i / count, first + i % count, first + i % count);
    return found;
  }
};

// 0 where it is undefined.
static inline float cosine(float product, float size, float other) {
  const float found = product / __builtin_sqrtf(size * other);
  return found - found == 0 ? found : 0;
}

static inline float unlike(float cosine) { return std::max(0.0f, 1.0f - cosine); }

// out [B][tokens - before]. frame, row, column [B][tokens].
template <typename Number>
static void spatial(const Keys &keys, const int64_t *frames, const int64_t *rows,
                    const int64_t *columns, int64_t before, float *out) {
  constexpr int64_t AHEAD[4][2] = {{0, 1}, {1, -1}, {1, 0}, {1, 1}};  // later in reading order
  const Rows<Number> of{keys};
  const int64_t count = keys.tokens - before;
  const std::vector<float> sizes = of.sizes(before);
  for (int64_t b = 0; b < keys.batch; b++) {
    const int64_t first = b * keys.tokens + before;
    const int64_t *frame = frames + first, *row = rows + first, *column = columns + first;
    const float *size = sizes.data() + b * count;
    std::vector<int64_t> next_row(count, count);  // where the next row of any frame begins
    for (int64_t t = count - 1, next = count; t >= 0; t--) {
      next_row[t] = next;
      if (frame[t] >= 0 && column[t] == 0) next = t;
    }
    std::vector<float> met(4 * count);
    std::vector<int64_t> others(4 * count, -1);
#pragma omp parallel for num_threads(keys.threads) schedule(static)
    for (int64_t t = 0; t < count; t++) {
      if (frame[t] < 0) continue;
      int64_t there[4];
      float product[4];
      for (int way = 0; way < 4; way++) {
        const int64_t down = AHEAD[way][0], right = AHEAD[way][1];
        const int64_t other = (down ? next_row[t] + column[t] : t) + right;
        const bool found = other >= 0 && other < count && frame[other] == frame[t] &&
                           row[other] == row[t] + down && column[other] == column[t] + right;
        if (found) others[way * count + t] = other;
        there[way] = before + (found ? other : t);
      }
      of.template products<4>(b, before + t, there, product);
      for (int way = 0; way < 4; way++) {
        const int64_t other = others[way * count + t];
        if (other >= 0) met[way * count + t] = cosine(product[way], size[t], size[other]);
      }
    }
    std::vector<float> total(count);
    std::vector<int64_t> number(count);
    for (int way = 0; way < 4; way++)
      for (int64_t t = 0; t < count; t++) {
        const int64_t other = others[way * count + t];
        if (other < 0) continue;
        for (int64_t one : {t, other}) {
          total[one] += met[way * count + t];
          number[one]++;
        }
      }
    for (int64_t t = 0; t < count; t++)
      out[b * count + t] = unlike(total[t] / (float)std::max<int64_t>(1, number[t]));
  }
}

// out [B][tokens]. current [B][places]: tokens of the newest frame, -1 for none.
template <typename Number>
static void temporal(const Keys &keys, const int64_t *frames, const int64_t *rows,
                     const int64_t *columns, const int64_t *currents, int64_t places,
                     int64_t stored, float least, float *out) {
  const Rows<Number> of{keys};
  const int64_t tokens = keys.tokens;
  for (int64_t b = 0; b < keys.batch; b++) {
    const int64_t *frame = frames + b * tokens, *row = rows + b * tokens;
    const int64_t *column = columns + b * tokens, *current = currents + b * places;
    int64_t width = 0, newest = -1;
    for (int64_t p = 0; p < places; p++)
      if (current[p] >= 0 && current[p] < tokens) width = std::max(width, column[current[p]]);
    for (int64_t t = 0; t < tokens; t++) newest = std::max(newest, frame[t]);
    width++;
    const auto place = [&](int64_t t) {
      return std::max<int64_t>(0, std::min(row[t] * width + column[t], places - 1));
    };
    // A frame that was cut has lost tokens: `current` holds what is left, one after the other.
    std::vector<int64_t> table(places, -1);
    for (int64_t p = 0; p < places; p++)
      if (current[p] >= 0 && current[p] < tokens) table[place(current[p])] = current[p];
    std::vector<float> changed(tokens, -1.0f);
#pragma omp parallel for num_threads(keys.threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t other = places ? table[place(t)] : -1;
      if (frame[t] < 0 || frame[t] >= newest || other < 0) continue;
      if (row[other] != row[t] || column[other] != column[t]) continue;
      const float size = of.product(b, t, t), there = of.product(b, other, other);
      changed[t] = unlike(cosine(of.product(b, t, other), size, there));
    }
    float most = 1e-30f;
    for (int64_t t = 0; t < tokens; t++) most = std::max(most, changed[t]);
    for (int64_t t = 0; t < tokens; t++) {
      const float share = changed[t] < 0 ? 1.0f : std::min(1.0f, changed[t] / most);
      out[b * tokens + t] = t < stored ? least + (1.0f - least) * share : share;
    }
  }
}

// out [B][tokens]. among [B][tokens].
template <typename Number>
static void among_all(const Keys &keys, const bool *among, float *out) {
  const Rows<Number> of{keys};
  const int64_t tokens = keys.tokens, wide = keys.groups * keys.dim;
  std::vector<float> scale(tokens), mean(wide);
  std::vector<double> sum(wide);
  for (int64_t b = 0; b < keys.batch; b++) {
    const bool *asked = among + b * tokens;
    const int64_t count = std::count(asked, asked + tokens, true);
#pragma omp parallel for num_threads(keys.threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      const float size = asked[t] ? of.product(b, t, t) : 0;
      scale[t] = size > 0 && size <= MOST ? 1.0f / __builtin_sqrtf(size) : 0;
    }
#pragma omp parallel for num_threads(keys.threads) schedule(static)
    for (int64_t g = 0; g < keys.groups; g++) {
      double *part = sum.data() + g * keys.dim;
      std::fill(part, part + keys.dim, 0.0);
      for (int64_t t = 0; t < tokens; t++) {
        if (scale[t] == 0) continue;
        const Number *row = of.at(b, g, t);
        for (int64_t d = 0; d < keys.dim; d++) part[d] += widen(row[d]) * scale[t];
      }
    }
    for (int64_t d = 0; d < wide; d++) mean[d] = (float)(sum[d] / (double)std::max<int64_t>(1, count));
#pragma omp parallel for num_threads(keys.threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
      out[b * tokens + t] = 0;
      if (scale[t] == 0) continue;
      float total = 0;
      for (int64_t g = 0; g < keys.groups; g++) {
        const Number *row = of.at(b, g, t);
        const float *there = mean.data() + g * keys.dim;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t d = 0; d < keys.dim; d++) part += widen(row[d]) * there[d];
        total += part;
      }
      out[b * tokens + t] = unlike(total * scale[t]);
    }
  }
}

#define DISPATCH(KERNEL, ...)                                     \
  if (keys->bfloat16) return KERNEL<uint16_t>(*keys, __VA_ARGS__); \
  return KERNEL<float>(*keys, __VA_ARGS__);

extern "C" void starkv_spatial(const Keys *keys, const int64_t *frame, const int64_t *row,
                               const int64_t *column, int64_t before, float *out) {
  DISPATCH(spatial, frame, row, column, before, out)
}

extern "C" void starkv_temporal(const Keys *keys, const int64_t *frame, const int64_t *row,
                                const int64_t *column, const int64_t *current, int64_t places,
                                int64_t stored, float least, float *out) {
  DISPATCH(temporal, frame, row, column, current, places, stored, least, out)
}

extern "C" void starkv_among(const Keys *keys, const bool *among, float *out) {
  DISPATCH(among_all, among, out)
}
