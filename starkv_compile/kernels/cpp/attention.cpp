// Window attention on a CPU: softmax weights of the window's rows, summed while they are still in
// registers. Nothing of size rows x keys is stored, and keys are read once a pass.
//
// The rows (query heads of a KV head times window) lie along the lanes of vectors, so a key enters
// as one number at a time and is never transposed.

#include "vectors.h"

constexpr int MOST_VECTORS = REGISTERS == 32 ? 4 : 2;  // of rows, in one block
constexpr int64_t TASK = 1024;                         // keys of one unit of parallel work
constexpr int64_t AHEAD = 24, LINE = 64;  // keys to fetch ahead of use, bytes of a cache line

struct Work {  // mirrored by `_Work` in attention.py
  int64_t batch, groups, heads, window, past, dim;  // heads: query heads of one group
  int64_t key_batch, key_head, key_token;           // strides
  int64_t key_share;                                // groups that read the same KV head
  int64_t mask_batch, mask_head;                    // strides of mask [.., .., L, W]; 0: shared
  int64_t bfloat16, threads;
  const float *query;  // [B, groups, heads * W, D], scaled
  const void *key;     // [B, KV heads, L, D], float, or bfloat16 as 16 bits
  const float *mask;   // added to the logits; or null
};

static inline const float *widen(const float *key, float *, int64_t) { return key; }

static inline const float *widen(const uint16_t *key, float *room, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) {
    const uint32_t bits = (uint32_t)key[d] << 16;
    memcpy(room + d, &bits, sizeof bits);
  }
  return room;
}

// One group of one batch row, its query rows packed as [blocks][D][VECTORS * LANES].
template <typename Key, int VECTORS>
struct Group {
  static constexpr int KEYS = SUMS / VECTORS, WIDTH = VECTORS * LANES;
  typedef Floats Logits[KEYS][VECTORS];

  const Work &work;
  const float *query;
  const Key *key;
  const float *mask;
  int64_t blocks;

  // Calls use(token, count, block, logits) for every `count` keys from `token` on, within
  // [start, end), and every block of rows.
  template <typename Use>
  void visit(int64_t start, int64_t end, Use use) const {
    std::vector<float> room(KEYS * work.dim), shown(blocks * WIDTH);
    for (int64_t token = start; token < end; token += KEYS) {
      const int count = (int)std::min<int64_t>(KEYS, end - token);
      const float *keys[KEYS];
      for (int k = 0; k < KEYS; k++)  // a short last tile repeats its last key
        keys[k] = widen(key + (token + std::min(k, count - 1)) * work.key_token,
                        room.data() + k * work.dim, work.dim);
      for (int64_t next = token + AHEAD; next < std::min(token + AHEAD + KEYS, end); next++)
        for (int64_t d = 0; d < work.dim; d += LINE / (int64_t)sizeof(Key))
          __builtin_prefetch(key + next * work.key_token + d);
      for (int64_t block = 0; block < blocks; block++) {
        Logits logits;
        multiply(query + block * work.dim * WIDTH, keys, logits);
        for (int k = 0; k < count; k++) {
          if (mask) add_mask(token + k, block, shown.data(), logits[k]);
          for (int v = 0; v < VECTORS; v++) logits[k][v] = finite(logits[k][v]);
        }
        use(token, count, block, logits);
      }
    }
  }

  void multiply(const float *rows, const float *const *keys, Logits &logits) const {
    Logits sums = {};  // of its own: these stay in registers
    for (int64_t d = 0; d < work.dim; d++) {
      Floats row[VECTORS];
      for (int v = 0; v < VECTORS; v++) row[v] = load(rows + d * WIDTH + v * LANES);
#pragma GCC unroll 24
      for (int k = 0; k < KEYS; k++) {
        const Floats number = all(keys[k][d]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[k][v] += number * row[v];
      }
    }
    memcpy(logits, sums, sizeof sums);
  }

  void add_mask(int64_t token, int64_t block, float *shown, Floats *logits) const {
    for (int64_t head = 0; head < work.heads; head++)
      memcpy(shown + head * work.window, mask + head * work.mask_head + token * work.window,
             work.window * sizeof(float));
    for (int v = 0; v < VECTORS; v++) logits[v] += load(shown + block * WIDTH + v * LANES);
  }
};

// Runs task(group, b * groups + g, start, end) for the parts of every group's keys, in parallel.
template <typename Key, int VECTORS, typename Task>
static void each_part(const Work &work, Task task) {
  constexpr int WIDTH = VECTORS * LANES;
  const int64_t rows = work.heads * work.window, blocks = parts_of(rows, WIDTH);
  const int64_t groups = work.batch * work.groups, parts = parts_of(work.past, TASK);
  const int64_t packed_size = blocks * work.dim * WIDTH;
  std::vector<float> packed(groups * packed_size);
  for (int64_t group = 0; group < groups; group++)
    for (int64_t row = 0; row < rows; row++) {
      float *block = packed.data() + group * packed_size + row / WIDTH * work.dim * WIDTH;
      for (int64_t d = 0; d < work.dim; d++)
        block[d * WIDTH + row % WIDTH] = work.query[(group * rows + row) * work.dim + d];
    }
#pragma omp parallel for num_threads(work.threads) schedule(static)
  for (int64_t unit = 0; unit < groups * parts; unit++) {
    const int64_t index = unit / parts, start = unit % parts * TASK;
    const int64_t b = index / work.groups, g = index % work.groups;
    const Group<Key, VECTORS> group{
        work, packed.data() + index * packed_size,
        (const Key *)work.key + b * work.key_batch + g / work.key_share * work.key_head,
        work.mask ? work.mask + b * work.mask_batch + g * work.heads * work.mask_head : nullptr,
        blocks};
    task(group, index, start, std::min(start + TASK, work.past));
  }
}

// largest, total [B, groups, parts, rows]: the largest logit of a part's keys, and the sum of
// e^(logit - largest) over them.
template <typename Key, int VECTORS>
static void row_sums(const Work &work, float *largest, float *total) {
  const int64_t rows = work.heads * work.window, parts = parts_of(work.past, TASK);
  each_part<Key, VECTORS>(work, [&](const auto &group, int64_t index, int64_t start, int64_t end) {
    std::vector<Floats> top(group.blocks * VECTORS, all(-MOST)), sum(group.blocks * VECTORS);
    group.visit(start, end, [&](int64_t, int count, int64_t block, const auto &logits) {
      for (int v = 0; v < VECTORS; v++) {
        Floats &largest_yet = top[block * VECTORS + v], &sum_yet = sum[block * VECTORS + v];
        Floats now = largest_yet;
        for (int k = 0; k < count; k++) now = larger(now, logits[k][v]);
        sum_yet *= exponential(largest_yet - now);
        for (int k = 0; k < count; k++) sum_yet += exponential(logits[k][v] - now);
        largest_yet = now;
      }
    });
    const int64_t place = (index * parts + start / TASK) * rows;
    memcpy(largest + place, top.data(), rows * sizeof(float));
    memcpy(total + place, sum.data(), rows * sizeof(float));
  });
}

// out [B, groups, P]: e^(logit - log_sum), summed over the window, the mean over a group's heads.
// log_sum [B, groups, rows]; where it is infinite, a row does not vote.
template <typename Key, int VECTORS>
static void weigh(const Work &work, const float *log_sum, float *out) {
  const int64_t rows = work.heads * work.window;
  each_part<Key, VECTORS>(work, [&](const auto &group, int64_t index, int64_t start, int64_t end) {
    std::vector<Floats> base(group.blocks * VECTORS, all(__builtin_inff()));
    memcpy(base.data(), log_sum + index * rows, rows * sizeof(float));
    float *place = out + index * work.past;
    std::fill(place + start, place + end, 0.0f);
    group.visit(start, end, [&](int64_t token, int count, int64_t block, const auto &logits) {
      for (int k = 0; k < count; k++) {
        Floats weights{};
        for (int v = 0; v < VECTORS; v++)
          weights += exponential(logits[k][v] - base[block * VECTORS + v]);
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += weights[lane];
        place[token + k] += sum;
      }
    });
    for (int64_t token = start; token < end; token++) place[token] /= work.heads;
  });
}

// Calls `KERNEL` for the keys' type and for as many vectors of rows as the rows fill evenly.
#define DISPATCH(KERNEL, ...)                                                             \
  const int64_t vectors = parts_of(work->heads * work->window, LANES);                    \
  const int64_t blocks = parts_of(vectors, MOST_VECTORS);                                 \
  switch (parts_of(vectors, blocks) * 2 + work->bfloat16) {                               \
    case 2: return KERNEL<float, 1>(*work, __VA_ARGS__);                                  \
    case 3: return KERNEL<uint16_t, 1>(*work, __VA_ARGS__);                               \
    case 4: return KERNEL<float, 2>(*work, __VA_ARGS__);                                  \
    case 5: return KERNEL<uint16_t, 2>(*work, __VA_ARGS__);                               \
    case 6: return KERNEL<float, 3>(*work, __VA_ARGS__);                                  \
    case 7: return KERNEL<uint16_t, 3>(*work, __VA_ARGS__);                               \
    case 8: return KERNEL<float, 4>(*work, __VA_ARGS__);                                  \
    case 9: return KERNEL<uint16_t, 4>(*work, __VA_ARGS__);                               \
  }

extern "C" int64_t starkv_parts(int64_t past) { return parts_of(past, TASK); }

extern "C" void starkv_row_sums(const Work *work, float *largest, float *total) {
  DISPATCH(row_sums, largest, total)
}

extern "C" void starkv_weigh(const Work *work, const float *log_sum, float *out) {
  DISPATCH(weigh, log_sum, out)
}
