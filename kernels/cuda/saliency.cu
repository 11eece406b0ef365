// Calibrated saliency of every row, and the rows whose state changed: kernels/saliency.py in CUDA.
//
// S streams, one new window each; R rows (one stream and query each); M distractors; D channels. Two launches a tick,
// stream_background first. What is not a number passes through both and crosses nothing: a stream without a new window
// may leave NaN in its place.
constexpr int LANES = 16;     // threads that share a vector: they read 64 bytes in a row
constexpr int THREADS = 128;  // of a block, at most; a multiple of LANES
constexpr int CHUNK = 64;     // distractors between two barriers

// A block is one stream.
//
// windows      (S, D) embeddings, not normalised
// distractors  (M, D) unit norm; M may be 0
// units        (S, D) out: windows / sqrt(|windows|^2 + floor^2)
// background   (S,) out: log of the mean of exp(distractors . unit / temperature), 0 without distractors
// crossed      (1,) out: 0, for row_saliency to count from
extern "C" __global__ void __launch_bounds__(THREADS) stream_background(
    const float* __restrict__ windows, const float* __restrict__ distractors, int texts, int width, float floor,
    float temperature, float* units, float* __restrict__ background, int* __restrict__ crossed) {
    __shared__ float partial[CHUNK * (LANES + 1)];  // + 1: threads that sum neighbours use other banks
    __shared__ float highest[CHUNK], sum[CHUNK];
    const int thread = (int)threadIdx.x, threads = (int)blockDim.x;
    const float* window = windows + (size_t)blockIdx.x * width;
    float* unit = units + (size_t)blockIdx.x * width;
    if (blockIdx.x == 0 && thread == 0) *crossed = 0;

    float square = 0.0f;
    for (int channel = thread; channel < width; channel += threads) square += window[channel] * window[channel];
    partial[thread] = square;
    __syncthreads();
    float total = floor * floor;
    for (int each = 0; each < threads; ++each) total += partial[each];
    const float scale = 1.0f / sqrtf(total);
    for (int channel = thread; channel < width; channel += threads) unit[channel] = window[channel] * scale;
    if (texts == 0) {
        if (thread == 0) background[blockIdx.x] = 0.0f;
        return;
    }
    for (int each = thread; each < CHUNK; each += threads) {
        highest[each] = -INFINITY;
        sum[each] = 0.0f;
    }
    __syncthreads();

    // Place i of `highest` and `sum` stands for distractors i, i + CHUNK, i + 2 CHUNK .. : a sum of exponentials each,
    // relative to the largest so far.
    const int lane = thread % LANES, groups = threads / LANES;
    for (int start = 0; start < texts; start += CHUNK) {
        const int count = min(CHUNK, texts - start);
        for (int each = thread / LANES; each < count; each += groups) {
            const float* text = distractors + (size_t)(start + each) * width;
            float dot = 0.0f;
            for (int channel = lane; channel < width; channel += LANES) dot += text[channel] * unit[channel];
            partial[each * (LANES + 1) + lane] = dot;
        }
        __syncthreads();
        for (int each = thread; each < count; each += threads) {
            float dot = 0.0f;
            for (int one = 0; one < LANES; ++one) dot += partial[each * (LANES + 1) + one];
            dot /= temperature;
            const float most = dot > highest[each] ? dot : highest[each];
            sum[each] = sum[each] * expf(highest[each] - most) + expf(dot - most);
            highest[each] = most;
        }
        __syncthreads();
    }
    if (thread == 0) {
        const int count = min(CHUNK, texts);
        float most = highest[0], all = 0.0f;
        for (int each = 1; each < count; ++each) most = max(most, highest[each]);
        for (int each = 0; each < count; ++each) all += sum[each] * expf(highest[each] - most);
        background[blockIdx.x] = most + logf(all / (float)texts);
    }
}

// LANES threads are one row: blockDim / LANES rows a block.
//
// units, background  of stream_background
// row_stream         (R,) which of them a row reads
// queries            (R, D) unit norm
// level, spread      (R,) of the query's own background
// threshold          (R,)
// state              (R,) 1 while at or above the threshold; written in place
// crossed            (1,) how many rows changed their state, and in no order
// crossed_rows, crossed_scores  (R,) which, and their scores
// scores             (R,) of all rows, or NULL
extern "C" __global__ void __launch_bounds__(THREADS) row_saliency(
    const float* __restrict__ units, const float* __restrict__ background, const int* __restrict__ row_stream,
    const float* __restrict__ queries, const float* __restrict__ level, const float* __restrict__ spread,
    const float* __restrict__ threshold, int rows, int width, float centre, float slope,
    unsigned char* __restrict__ state, int* __restrict__ crossed, int* __restrict__ crossed_rows,
    float* __restrict__ crossed_scores, float* __restrict__ scores) {
    __shared__ float partial[THREADS / LANES][LANES + 1];
    const int lane = (int)threadIdx.x % LANES, group = (int)threadIdx.x / LANES;
    const int row = (int)blockIdx.x * ((int)blockDim.x / LANES) + group;
    const int stream = row < rows ? row_stream[row] : 0;
    float dot = 0.0f;
    if (row < rows) {
        const float* query = queries + (size_t)row * width;
        const float* unit = units + (size_t)stream * width;
        for (int channel = lane; channel < width; channel += LANES) dot += query[channel] * unit[channel];
    }
    partial[group][lane] = dot;
    __syncthreads();
    if (row >= rows || lane != 0) return;

    float raw = 0.0f;
    for (int each = 0; each < LANES; ++each) raw += partial[group][each];
    const float spreads = (raw - level[row]) / spread[row] - background[stream];
    float x = slope * (spreads - centre);
    x = x < -30.0f ? -30.0f : x > 30.0f ? 30.0f : x;  // not fminf: it takes 30 for what is not a number
    const float score = 1.0f / (1.0f + expf(-x));
    if (scores != nullptr) scores[row] = score;
    const unsigned char above = score >= threshold[row];
    if (score == score && above != state[row]) {
        state[row] = above;
        const int place = atomicAdd(crossed, 1);
        crossed_rows[place] = row;
        crossed_scores[place] = score;
    }
}

#ifdef LIVEMOMENTS_HOST
LAUNCHER(stream_background)
LAUNCHER(row_saliency)
#endif
