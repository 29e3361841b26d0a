// What Python calls: every operator by itself, for its tests and benchmarks, and the whole forward
// pass. One build has one number format. Strides are in numbers; the last dimension is contiguous.
#include "adapter.h"
#include "blocks.h"
#include "forward.h"
#include "greedy.h"
#include "sample.h"

extern "C" {

void linear(const Number* x, int64_t x_stride, const Number* weight, const Number* bias, Number* y,
            int64_t y_stride, int64_t rows, int64_t inputs, int64_t outputs, int64_t add) {
  const Product product{x, {{weight, inputs, outputs}}, bias, y, x_stride, y_stride, outputs, add != 0};
  std::atomic<int64_t> taken{0};
#pragma omp parallel
  product.run(rows, taken);
}

void rms_norm(const Number* x, int64_t x_stride, const Number* weight, Number* y, int64_t rows,
              int64_t size, float eps) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    normalise(x + row * x_stride, weight, y + row * size, size, eps);
}

void silu_mul_rows(const Number* x, int64_t x_stride, Number* y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) silu_mul(x + row * x_stride, y + row * size, size);
}

void rotate_and_store(Number* qkv, int64_t stride, int64_t rows, int64_t heads, const Rope* rope,
                      const Cache* cache, const int64_t* slots, const int64_t* positions) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    rope->row(qkv + row * stride, heads, slots[row], positions[row], *cache);
}

void attention(const Number* q, int64_t stride, int64_t rows, int64_t heads, const Cache* cache,
               const int64_t* slots, const int64_t* positions, int64_t window, Number* out) {
  Attention work(rows, slots, positions, heads, cache->kv_heads, cache->dim, window);
  std::atomic<int64_t> taken{0};
#pragma omp parallel
  work.run(q, stride, *cache, out, taken);
}

void lora(const Number* x, int64_t x_stride, Number* y, int64_t y_stride, const Group* group,
          const Stack* stacks, const Run* runs, int64_t count, int64_t layer) {
  const int64_t rows = count ? runs[count - 1].stop : 0;
  Lora work(*group, stacks, runs, count, rows);
  // A product with nothing: what is there before stays, and what is worn is added.
  const Dressed nothing{{nullptr, 0, group->width()}, &work, layer};
  const Product product{x, nothing, nullptr, y, x_stride, y_stride, group->width(), true};
  std::atomic<int64_t> taken{0};
#pragma omp parallel
  {
    work.shrink(layer, x, x_stride);
    product.run(rows, taken);
  }
}

void greedy_rows(const Number* scores, int64_t stride, int64_t rows, int64_t size, int64_t* tokens,
                 uint8_t* finite) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; row++)
    greedy(scores + row * stride, size, tokens + row, finite + row);
}

void sample_rows(const float* scores, int64_t stride, int64_t rows, int64_t size,
                 const Wish* wishes, int64_t* tokens) {
#pragma omp parallel
  {
    Sampling own(size);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; row++)
      tokens[row] = own.draw(scores + row * stride, wishes[row]);
  }
}

// What is kept is copied by one thread, while others write what the step gave.
void copy_blocks(const Blocks* blocks, const int64_t* kept, int64_t count, int64_t slot,
                 int64_t first, int64_t back, uint8_t* finite) {
  bool whole = true;
#pragma omp parallel for collapse(3) schedule(static) reduction(&& : whole) if (back)
  for (int64_t i = 0; i < count; i++)
    for (int64_t half = 0; half < 2; half++)
      for (int64_t layer = 0; layer < blocks->layers; layer++)
        whole = blocks->copy(kept[i], half, layer, slot, first + i, back) && whole;
  *finite = whole;
}

// Returns the place of the first one that is not finite, or `count`. One thread: others run steps.
int64_t write_adapter(const uint8_t* file, const FileTensor* tensors, int64_t count,
                      Number* adapter) {
  for (int64_t i = 0; i < count; i++)
    if (!tensors[i].write(file, adapter)) return i;
  return count;
}

void forward(const Model* model, const Step* step) {
  Forward pass(*model, *step);
#pragma omp parallel
  pass.run();
}

}  // extern "C"
