// Attention of one new window per row over the ring of those before it, and what moves rings: kernels/ring.py in CUDA.
//
// R rows (one stream and query each), H heads, W windows that a ring holds, D channels of a head. Rings keep their keys
// turned by their slot (models/temporal.py). Storage is fp32 or, in the kernels called *_half, fp16; all else is fp32.
#ifndef LIVEMOMENTS_HOST
#include <cuda_fp16.h>
#endif

constexpr int WIDEST = 128;   // D at most: WIDEST of ring.py
constexpr int LONGEST = 128;  // W at most: LONGEST of ring.py
constexpr int LANES = 16;     // threads that share a key: they read 64 bytes in a row
constexpr int THREADS = 128;  // of a block, at most; a multiple of LANES, and at least D

__device__ __forceinline__ float loaded(const float* place) { return *place; }
__device__ __forceinline__ float loaded(const __half* place) { return __half2float(*place); }
__device__ __forceinline__ void store(float* place, float value) { *place = value; }
__device__ __forceinline__ void store(__half* place, float value) { *place = __float2half(value); }

// Channel `channel` of x (size) turned by `place`: channels i and i + size / 2 span a plane.
__device__ __forceinline__ float turned(const float* x, int channel, int size, float angle) {
    const int half = size / 2;
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    return x[channel] * cosine + (channel < half ? -x[channel + half] : x[channel - half]) * sine;
}

// A block is one head of one row. A ring is read once, and of it only what counts.
template <typename Stored>
__device__ __forceinline__ void ring_head(
    const float* queries, const float* new_keys, const float* new_values, Stored* keys, Stored* values,
    const long long* counts, const float* rates, const unsigned char* active, int window, int size, float* mixed) {
    __shared__ float query[3][WIDEST];  // turned by the slot, by the slot one round later, and not at all
    __shared__ float key[WIDEST];       // not turned
    // Of each slot, and behind them of the new window itself:
    __shared__ float partial[(LONGEST + 1) * (LANES + 1)];  // LANES + 1: threads that sum neighbours use other banks
    __shared__ float score[LONGEST + 1], weight[LONGEST + 1];
    const int thread = (int)threadIdx.x, threads = (int)blockDim.x;
    const int row = (int)blockIdx.y;
    const size_t head = (size_t)row * gridDim.x + blockIdx.x;
    mixed += head * size;
    if (active != nullptr && !active[row]) {  // all of the block
        if (thread < size) mixed[thread] = 0.0f;
        return;
    }
    keys += head * window * size;
    values += head * window * size;
    const long long count = counts[row];
    const int slot = (int)(count % window);
    const int seen = count < window ? (int)count : window;

    if (thread < size) {
        query[2][thread] = queries[head * size + thread];
        key[thread] = new_keys[head * size + thread];
    }
    __syncthreads();
    if (thread < size) {
        const float rate = rates[thread];
        query[0][thread] = turned(query[2], thread, size, (float)slot * rate);
        query[1][thread] = turned(query[2], thread, size, (float)(slot + window) * rate);
        // What stands in the slot is too old by one: nobody reads it below.
        store(keys + slot * size + thread, turned(key, thread, size, (float)slot * rate));
        store(values + slot * size + thread, new_values[head * size + thread]);
    }
    __syncthreads();

    // Keys behind the slot are of the round before: against them the query stands one round later.
    const int lane = thread % LANES, groups = threads / LANES;
    for (int at = thread / LANES; at <= window; at += groups) {
        if (at < window && (at == slot || at >= seen)) continue;
        float sum = 0.0f;
        if (at == window)
            for (int channel = lane; channel < size; channel += LANES) sum += query[2][channel] * key[channel];
        else
            for (int channel = lane; channel < size; channel += LANES)
                sum += query[at > slot][channel] * loaded(keys + at * size + channel);
        partial[at * (LANES + 1) + lane] = sum;
    }
    __syncthreads();
    for (int at = thread; at <= window; at += threads) {
        float sum = 0.0f;
        if (at == window || (at != slot && at < seen))
            for (int each = 0; each < LANES; ++each) sum += partial[at * (LANES + 1) + each];
        else
            sum = -INFINITY;
        score[at] = sum;
    }
    __syncthreads();

    // Each thread finds the maximum by itself, and later the sum: all read the same word at a time.
    float highest = score[window];
    for (int at = 0; at < seen; ++at) highest = fmaxf(highest, score[at]);
    for (int at = thread; at <= window; at += threads) weight[at] = expf(score[at] - highest);
    __syncthreads();

    const int parts = threads / size, part = thread / size, channel = thread % size;
    if (part < parts) {
        float sum = 0.0f;
        for (int at = part; at < seen; at += parts)
            if (at != slot) sum += weight[at] * loaded(values + at * size + channel);
        partial[thread] = sum;
    }
    __syncthreads();
    if (thread < size) {
        float total = weight[window], sum = total * new_values[head * size + thread];
        for (int at = 0; at < seen; ++at) total += weight[at];
        for (int each = 0; each < parts; ++each) sum += partial[each * size + thread];
        mixed[thread] = sum / total;
    }
}

// A block is one row: its new columns (A, B) go to slot count % length of its ring (A, length, B).
template <typename Stored>
__device__ __forceinline__ void append_row(
    Stored* ring, const float* columns, const long long* counts, const unsigned char* active, int across, int length,
    int width) {
    const size_t row = blockIdx.x;
    if (active != nullptr && !active[row]) return;
    const int slot = (int)(counts[row] % length);
    for (int each = (int)threadIdx.x; each < across * width; each += (int)blockDim.x) {
        const size_t plane = row * across + each / width;
        store(ring + (plane * length + slot) * width + each % width, columns[row * across * width + each]);
    }
}

// ring_attention, as kernels/ring.py has it:
//
// query, key, value  (R, H, D); query already divided by the root of D, none of them turned
// keys, values       (R, H, W, D) rings; slot count % W of the active rows is written
// count              (R,) windows that each row saw before this one; `advance` adds to it once all rings are written
// rates              (D,) radians per window, the second half the same as the first
// active             (R,) 0 where there is no new window: mixed is 0 then and the rings stay; NULL: all are active
// window, size       W, at most LONGEST, and D, even, at most WIDEST and at most the threads of a block
// mixed              (R, H, D) out
//
// append: columns (R, across, width) into rings (R, across, length, width).
#define RING_KERNELS(suffix, Stored)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) ring_attention##suffix(                                      \
        const float* __restrict__ query, const float* __restrict__ key, const float* __restrict__ value,               \
        Stored* __restrict__ keys, Stored* __restrict__ values, const long long* __restrict__ count,                   \
        const float* __restrict__ rates, const unsigned char* __restrict__ active, int window, int size,               \
        float* __restrict__ mixed) {                                                                                   \
        ring_head(query, key, value, keys, values, count, rates, active, window, size, mixed);                         \
    }                                                                                                                  \
    extern "C" __global__ void append##suffix(                                                                         \
        Stored* __restrict__ ring, const float* __restrict__ columns, const long long* __restrict__ count,             \
        const unsigned char* __restrict__ active, int across, int length, int width) {                                 \
        append_row(ring, columns, count, active, across, length, width);                                               \
    }

RING_KERNELS(, float)
RING_KERNELS(_half, __half)

// The last of a window, once all rings took it in. A thread is a row.
extern "C" __global__ void advance(long long* __restrict__ count, const unsigned char* __restrict__ active, int rows) {
    const int row = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (row < rows && (active == nullptr || active[row])) ++count[row];
}

// A block is one row of the result: that which lay at place[row], or 0 where it is negative. Rows are `words` times four
// bytes, whatever they hold: rings of either type, counts.
extern "C" __global__ void gather_rows(
    const unsigned* __restrict__ old, unsigned* __restrict__ gathered, const int* __restrict__ place, int words) {
    const int from = place[blockIdx.x];
    for (int word = (int)threadIdx.x; word < words; word += (int)blockDim.x)
        gathered[(size_t)blockIdx.x * words + word] = from < 0 ? 0 : old[(size_t)from * words + word];
}

#ifdef LIVEMOMENTS_HOST
LAUNCHER(ring_attention)
LAUNCHER(ring_attention_half)
LAUNCHER(append)
LAUNCHER(append_half)
LAUNCHER(advance)
LAUNCHER(gather_rows)
#endif
