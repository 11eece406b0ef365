// Decoded frame -> the crop an image tower takes, in its input: what kernels/preprocess.py does with Pillow, bit for bit.
//
// Antialiased bicubic, rows first. As in Pillow (src/libImaging/Resample.c) weights are integers with 22 fractional bits
// and each pass rounds to a byte. `taps` weights a pixel, from `first` on, always inside the picture; they come from
// preprocess.plan, one plan for all frames of a size. Weights lie as (taps, size), so that neighbours read neighbours.
#ifndef LIVEMOMENTS_HOST
#include <cuda_fp16.h>
#endif

typedef unsigned char Byte;

constexpr int STAGED = 2048;  // pixels of a source row that a block holds: STAGED of preprocess.py
constexpr int BITS = 22;      // BITS of preprocess.py
constexpr int HALF = 1 << (BITS - 1);

__device__ __forceinline__ Byte clipped(int sum) { return (Byte)min(max(sum >> BITS, 0), 255); }

__device__ __forceinline__ unsigned packed(unsigned red, unsigned green, unsigned blue) {
    return red | green << 8 | blue << 16;
}

// Row i of the (3, 4) matrix times (luma, first chroma, second chroma, 1), to the nearest byte.
__device__ __forceinline__ unsigned channel(const float* row, float luma, float first, float second) {
    const float value = row[0] * luma + (row[1] * first + row[2] * second + row[3]);
    return (unsigned)(min(max(value, 0.0f), 255.0f) + 0.5f);
}

// One source row a block row, `per_block` columns of the result a block: pixels are read, and NV12 converted, once.
//
// frame      RGB (H, W, 3), or the luma (H, W) of NV12; rows are `pitch` bytes apart
// chroma     (H / 2, W / 2, 2) of NV12, rows `chroma_pitch` bytes apart, nearest; NULL: the frame is RGB
// colour     (3, 4) of preprocess.COLOURS; read for NV12 only
// narrow     (3, rows, size) out: source rows first_row .. first_row + rows, rows = gridDim.y, at the final width
extern "C" __global__ void resample_rows(
    const Byte* __restrict__ frame, int pitch, const Byte* __restrict__ chroma, int chroma_pitch,
    const float* __restrict__ colour, const int* __restrict__ first, const int* __restrict__ weights, int taps, int size,
    int per_block, int first_row, Byte* __restrict__ narrow) {
    __shared__ unsigned staged[STAGED];
    const int row = first_row + (int)blockIdx.y;
    const int start = (int)blockIdx.x * per_block, end = min(start + per_block, size);
    const int left = first[start], right = first[end - 1] + taps;
    const Byte* line = frame + (size_t)row * pitch;
    if (chroma == nullptr) {
        for (int x = left + (int)threadIdx.x; x < right; x += (int)blockDim.x)
            staged[x - left] = packed(line[3 * x], line[3 * x + 1], line[3 * x + 2]);
    } else {
        const Byte* colours = chroma + (size_t)(row / 2) * chroma_pitch;
        for (int x = left + (int)threadIdx.x; x < right; x += (int)blockDim.x) {
            const float luma = line[x], blue = colours[x / 2 * 2], red = colours[x / 2 * 2 + 1];
            staged[x - left] = packed(
                channel(colour, luma, blue, red), channel(colour + 4, luma, blue, red),
                channel(colour + 8, luma, blue, red));
        }
    }
    __syncthreads();
    const size_t plane = (size_t)gridDim.y * size;
    for (int column = start + (int)threadIdx.x; column < end; column += (int)blockDim.x) {
        const unsigned* source = staged + (first[column] - left);
        int red = HALF, green = HALF, blue = HALF;
        for (int tap = 0; tap < taps; ++tap) {
            const int weight = weights[tap * size + column];
            const unsigned pixel = source[tap];
            red += weight * (int)(pixel & 255);
            green += weight * (int)(pixel >> 8 & 255);
            blue += weight * (int)(pixel >> 16);
        }
        Byte* out = narrow + (size_t)blockIdx.y * size + column;
        out[0] = clipped(red);
        out[plane] = clipped(green);
        out[2 * plane] = clipped(blue);
    }
}

// grid.y = 3 size: a row of a channel of the result; threads run along it.
//
// narrow     (3, rows, size) of resample_rows; `first` counts its rows
// affine     (2, 3) of preprocess.affine: pixel -> pixel * affine[0][c] + affine[1][c]
// batch      (N, 3, size, size) fp16 out: image number `image` of it is written
extern "C" __global__ void resample_columns(
    const Byte* __restrict__ narrow, const int* __restrict__ first, const int* __restrict__ weights, int taps, int size,
    int rows, const float* __restrict__ affine, __half* __restrict__ batch, int image) {
    const int column = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    const int channel = (int)blockIdx.y / size, row = (int)blockIdx.y % size;
    if (column >= size) return;
    const Byte* source = narrow + ((size_t)channel * rows + first[row]) * size + column;
    int sum = HALF;
    for (int tap = 0; tap < taps; ++tap) sum += weights[tap * size + row] * (int)source[(size_t)tap * size];
    const float value = (float)clipped(sum) * affine[channel] + affine[3 + channel];
    batch[(((size_t)image * 3 + channel) * size + row) * size + column] = __float2half(value);
}

#ifdef LIVEMOMENTS_HOST
LAUNCHER(resample_rows)
LAUNCHER(resample_columns)
#endif
