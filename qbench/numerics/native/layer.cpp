// A layer in training on a CPU: its weight and bias error, what follows its convolution, and the gradients of that.
//
// The values are those of `nn/qat/parameters.py` and `numerics/generated_epilogue.py`, operation by operation: what is
// rounded there is rounded here, and nothing else is; `std::fma` stands where those round once. Sums of rows are taken
// in float32, sums of these in float64. NaN goes through.
//
// Activations are (outer, channels, inner), or (outer, inner, channels) where `last`. What may be missing is said by
// `given`, a bit each; a pointer to anything stands in its place.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>

#if !defined(__FMA__) && !defined(__aarch64__)
#error "a processor with fused products is needed: without, each costs a call"
#endif

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kSmallestScale = 0x1p-100f;
constexpr float kSmallestBiasScale = 0x1p-120f;
constexpr float kLargestStep = 0x1p100f;
constexpr int64_t kRows = 64;  // so many are summed in float32 where channels are last
constexpr int64_t kValues = 512;  // so many are worked on at a time where there are no rows

enum Given : int64_t {
    kBias = 1,
    kGamma = 2,
    kBeta = 4,
    kInputScale = 8,
    kBatchNorm = 16,
    kError = 32,
    kSilenced = 64,
    kBatches = 128,
    kObserves = 256,
    kCodes = 512,
    kBounds = 1024,
    kLearns = 2048,
    kKeeps = 4096,
    kZero = 8192,
    kApart = 16384,
    kInputApart = 32768,
};

double double_of(int64_t bits) {
    double found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

float float_of(int32_t bits) {
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

int32_t bits_of(float x) {
    int32_t found;
    std::memcpy(&found, &x, sizeof found);
    return found;
}

float at_least(float x, float low) { return x < low ? low : x; }
float at_most(float x, float high) { return x > high ? high : x; }
float larger(float a, float b) { return a >= b || a != a ? a : b; }
float smaller(float a, float b) { return a <= b || a != a ? a : b; }

// A scale: as it is, or |v₀ + δ| where start and change are kept apart; and what a gradient is multiplied by on its way
// to what is learned.
struct Scale {
    float value, slope;
    Scale(float learned, float beside, float factor, bool apart) : value(learned), slope(1.0f) {
        if (!apart) return;
        const float sum = learned + beside;
        value = at_least(std::fabs(sum), kSmallestScale);
        slope = std::copysign(factor, sum);
    }
};

// Rows are shared out among threads; each gets those from `first` to `end`.
struct Share {
    int64_t first, end;
    explicit Share(int64_t rows) {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        first = rows * thread / threads;
        end = rows * (thread + 1) / threads;
    }
};

void round_row(const float* weight, int64_t values, float step, float low, float high, float* value) {
    const float inverse = 1.0f / step;
#pragma omp simd
    for (int64_t i = 0; i < values; ++i) value[i] = at_most(at_least(std::rint(weight[i] * inverse), low), high) * step;
}

// (rows, columns) as (columns, rows).
void turn(const float* from, int64_t rows, int64_t columns, float* to) {
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < rows; ++r) to[c * rows + r] = from[r * columns + c];
}

// Rounds rows of (positions, …) to rows of (…, positions).
class Rounding {
  public:
    Rounding(int64_t values, int64_t positions, int64_t qmin, int64_t qmax)
        : values_(values), positions_(positions), low_(static_cast<float>(qmin)), high_(static_cast<float>(qmax)),
          room_(positions > 1 ? values : 0) {}
    void operator()(const float* weight, float step, float* value) {
        if (positions_ == 1) return round_row(weight, values_, step, low_, high_, value);
        round_row(weight, values_, step, low_, high_, room_.data());
        turn(room_.data(), positions_, values_ / positions_, value);
    }

  private:
    const int64_t values_, positions_;
    const float low_, high_;
    std::vector<float> room_;
};

// max |W| of a row; NaN where there is one.
float largest_of(const float* weight, int64_t values) {
    float largest = 0.0f;
    int32_t broken = 0;
#pragma omp simd reduction(max : largest) reduction(| : broken)
    for (int64_t i = 0; i < values; ++i) {
        const float size = std::fabs(weight[i]);
        largest = size > largest ? size : largest;
        broken |= weight[i] != weight[i];
    }
    return broken ? std::numeric_limits<float>::quiet_NaN() : largest;
}

// A bias on its grid: its place there in steps, and the code, which saturates.
struct BiasCode {
    double position, rounded, code;
    BiasCode(float bias, float scale, int64_t bits)
        : position(static_cast<double>(bias) / static_cast<double>(scale)), rounded(std::rint(position)) {
        const double lowest = -std::exp2(static_cast<double>(bits - 1)), highest = -lowest - 1.0;
        code = rounded != rounded ? 0.0 : std::min(std::max(rounded, lowest), highest);
    }
    // ∂b̂/∂s_b, the code held.
    double slope() const { return code == rounded ? code - position : code; }
};

// Ŵ/k and e, or without a BatchNorm Ŵ and b̂; from the range of W, or from steps that are learned. What their backward
// needs, (4, channels) at `kept`: the folded bias, s_w, ∂s_w/∂step, and ∂step/∂(what is learned of it); then `s_in`, and
// ∂s_in/∂(what is learned of it).
void parameters(const float* weight, const float* bias, const float* gamma, const float* beta, const float* mean,
                const float* var, const float* input_scale, const float* beside_input, const float* learned,
                const float* beside, int64_t given, int64_t channels, int64_t values, int64_t positions, int64_t eps,
                int64_t qmin, int64_t qmax, int64_t bias_bits, int64_t code_limit, float input_factor, float factor_of_step,
                float* value, float* step, float* error, bool* silenced, float* kept) {
    const bool normalized = given & kBatchNorm;
    const Scale input(*input_scale, *beside_input, input_factor, given & kInputApart);
    if (given & kKeeps) {
        kept[4 * channels] = input.value;
        kept[4 * channels + 1] = input.slope;
    }
    Rounding round(values, positions, qmin, qmax);
#pragma omp parallel for schedule(static) firstprivate(round)
    for (int64_t c = 0; c < channels; ++c) {
        const float* row = weight + c * values;
        const Scale given_step(learned[c], beside[c], factor_of_step, given & kApart);
        const float own = given & kLearns
                              ? given_step.value
                              : at_least(largest_of(row, values) / static_cast<float>(qmax), kSmallestScale);
        float factor = 1.0f, folded = given & kBias ? bias[c] : 0.0f;
        if (normalized) {
            const float deviation = static_cast<float>(std::sqrt(static_cast<double>(var[c]) + double_of(eps)));
            factor = (given & kGamma ? gamma[c] : 1.0f) / deviation;
            const float centred = given & kBias ? bias[c] - mean[c] : -mean[c];
            folded = given & kBeta ? beta[c] + factor * centred : factor * centred;
        }
        float found = normalized ? at_most(own, kLargestStep) : own;
        float scale = 0.0f, through = 0.0f, share = found == own ? 1.0f : 0.0f;
        silenced[c] = false;
        if (given & kInputScale) {
            const double room = static_cast<double>(code_limit) * static_cast<double>(input.value);
            const double needed = std::fabs(static_cast<double>(folded)) / room;
            float floor = std::nextafter(static_cast<float>(needed), kInfinity) * (needed > 0 ? 1.0f : 0.0f);
            floor = larger(floor, kSmallestBiasScale / input.value);
            if (normalized) {
                const float size = std::fabs(factor);
                const bool live = size > 0;
                const float needed_step = live ? floor / size : 0.0f, raised_step = larger(own, needed_step);
                found = at_most(raised_step, kLargestStep);
                const bool moves = live && found < kLargestStep;
                scale = moves ? size * found : floor;
                through = moves && scale >= kSmallestScale ? size : 0.0f;
                scale = at_least(scale, kSmallestScale);
                share = found != raised_step || own < needed_step ? 0.0f : own == needed_step ? 0.5f : 1.0f;
                const bool raised = found > own && own > kSmallestScale;
                if (live && raised) {
                    const float largest = given & kLearns ? largest_of(row, values) : own * static_cast<float>(qmax);
                    silenced[c] = largest > 0 && largest * (1.0f / found) <= 0.5f;
                }
            } else {
                scale = found = larger(own, floor);
                through = 1.0f;
                share = own < floor ? 0.0f : own == floor ? 0.5f : 1.0f;
            }
            const float bias_scale = input.value * scale;
            const float rounded = static_cast<float>(BiasCode(folded, bias_scale, bias_bits).code + 0.0) * bias_scale;
            error[c] = normalized ? rounded - folded : rounded;
        }
        step[c] = found;
        if (given & kKeeps) {
            kept[c] = folded;
            kept[channels + c] = scale;
            kept[2 * channels + c] = through;
            kept[3 * channels + c] = share * given_step.slope;
        }
        round(row, found, value + c * values);
    }
}

// Ŵ/k once more, from the step that was found.
void again(const float* weight, const float* step, int64_t channels, int64_t values, int64_t positions, int64_t qmin,
           int64_t qmax, float* value) {
    Rounding round(values, positions, qmin, qmax);
#pragma omp parallel for schedule(static) firstprivate(round)
    for (int64_t c = 0; c < channels; ++c) round(weight + c * values, step[c], value + c * values);
}

// A gradient to Ŵ/k, rows of (…, positions), becomes one in the order of W, rows of (positions, …).
void turned(float* grad, int64_t channels, int64_t values, int64_t positions) {
#pragma omp parallel
    {
        std::vector<float> room(values);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            float* row = grad + c * values;
            std::copy(row, row + values, room.data());
            turn(room.data(), values / positions, positions, row);
        }
    }
}

struct Sums {
    double first = 0.0, second = 0.0;  // Σ(y − centre), Σ(y − centre)²
    float centre = 0.0f, low = kInfinity, high = -kInfinity;
};

void sum_rows(const float* y, int64_t outer, int64_t channels, int64_t inner, std::vector<Sums>& found) {
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
        Sums sums;
        float start = 0.0f;
#pragma omp simd reduction(+ : start)
        for (int64_t i = 0; i < inner; ++i) start += y[c * inner + i];
        sums.centre = start / static_cast<float>(inner);
        for (int64_t n = 0; n < outer; ++n) {
            const float* row = y + (n * channels + c) * inner;
            const float centre = sums.centre;
            float first = 0.0f, second = 0.0f, low = sums.low, high = sums.high;
#pragma omp simd reduction(+ : first, second) reduction(min : low) reduction(max : high)
            for (int64_t i = 0; i < inner; ++i) {
                const float value = row[i], shifted = value - centre;
                first += shifted;
                second += shifted * shifted;
                low = value < low ? value : low;
                high = value > high ? value : high;
            }
            sums.first += first;
            sums.second += second;
            sums.low = low;
            sums.high = high;
        }
        found[c] = sums;
    }
}

void sum_columns(const float* y, int64_t rows, int64_t channels, std::vector<Sums>& found) {
    const int64_t sample = std::min(rows, kRows);
    std::vector<float> centres(channels, 0.0f);
    for (int64_t r = 0; r < sample; ++r)
        for (int64_t c = 0; c < channels; ++c) centres[c] += y[r * channels + c];
    for (int64_t c = 0; c < channels; ++c) found[c].centre = centres[c] /= static_cast<float>(sample);
    std::vector<std::vector<Sums>> parts(omp_get_max_threads());
#pragma omp parallel
    {
        const Share share(rows);
        std::vector<double> total(2 * channels, 0.0);
        std::vector<float> room(4 * channels);
        float *first = room.data(), *second = first + channels, *low = second + channels, *high = low + channels;
        const float* centre = centres.data();
        std::fill(low, low + channels, kInfinity);
        std::fill(high, high + channels, -kInfinity);
        for (int64_t start = share.first; start < share.end; start += kRows) {
            std::fill(first, first + 2 * channels, 0.0f);
            for (int64_t r = start; r < std::min(start + kRows, share.end); ++r) {
                const float* row = y + r * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float value = row[c], shifted = value - centre[c];
                    first[c] += shifted;
                    second[c] += shifted * shifted;
                    low[c] = value < low[c] ? value : low[c];
                    high[c] = value > high[c] ? value : high[c];
                }
            }
            for (int64_t c = 0; c < 2 * channels; ++c) total[c] += room[c];
        }
        for (int64_t c = 0; c < channels; ++c)
            parts[omp_get_thread_num()].push_back({total[c], total[channels + c], centre[c], low[c], high[c]});
    }
    for (const std::vector<Sums>& part : parts)  // in this order, so that it is the same in each run
        for (size_t c = 0; c < part.size(); ++c) {
            found[c].first += part[c].first;
            found[c].second += part[c].second;
            found[c].low = std::min(found[c].low, part[c].low);
            found[c].high = std::max(found[c].high, part[c].high);
        }
}

// μ, 1/sqrt(σ² + ε), α and β' of the batch, (4, channels) at `kept`, and the ends of the activation behind them, (2,)
// at `ends`; the running statistics move, and the batch is counted.
void statistics(const float* y, const float* gamma, const float* beta, const float* error, const bool* silenced,
                float* running_mean, float* running_var, int64_t* batches, int64_t given, int64_t outer,
                int64_t channels, int64_t inner, int64_t last, int64_t eps, float momentum, float rest, float low,
                float high, float* kept, float* ends) {
    std::vector<Sums> found(channels);
    if (last)
        sum_columns(y, outer * inner, channels, found);
    else
        sum_rows(y, outer, channels, inner, found);
    const double count = static_cast<double>(outer * inner);
    float *mean = kept, *inverse = kept + channels, *factor = inverse + channels, *constant = factor + channels;
    float lowest = kInfinity, highest = -kInfinity;
    for (int64_t c = 0; c < channels; ++c) {
        const double offset = found[c].first / count;
        double variance = found[c].second / count - offset * offset;
        variance = variance < 0.0 ? 0.0 : variance;
        mean[c] = static_cast<float>(static_cast<double>(found[c].centre) + offset);
        inverse[c] = static_cast<float>(1.0 / std::sqrt(variance + double_of(eps)));
        if (!(given & kSilenced && silenced[c])) {
            const float unbiased = static_cast<float>(variance * (count / (count - 1.0)));
            running_mean[c] = momentum * mean[c] + rest * running_mean[c];
            running_var[c] = momentum * unbiased + rest * running_var[c];
        }
        factor[c] = given & kGamma ? inverse[c] * gamma[c] : inverse[c];
        float shift = given & kError ? error[c] : 0.0f;
        if (given & kBeta) shift = given & kError ? beta[c] + shift : beta[c];
        constant[c] = std::fma(-mean[c], factor[c], shift);
        const float a = std::fma(found[c].low, factor[c], constant[c]);
        const float b = std::fma(found[c].high, factor[c], constant[c]);
        lowest = smaller(lowest, at_most(at_least(smaller(a, b), low), high));
        highest = larger(highest, at_most(at_least(larger(a, b), low), high));
        if (a != a || b != b) lowest = highest = a + b;
    }
    ends[0] = lowest;
    ends[1] = highest;
    if (given & kBatches) ++*batches;
}

// What is known of a quantizer per tensor: `QSpec`, and how its observer follows ranges.
struct Rule {
    int64_t qmin, qmax;
    bool symmetric;
    float weight;  // of the newest range in a moving average; negative for the range of everything seen
};

// The observer's range, and `s` and `z`, after a tensor with these ends: `Observer.follow`, then `grid_of`.
void observe(float low, float high, const Rule rule, float* min_val, float* max_val, float* scale, int32_t* zero) {
    if (rule.weight < 0.0f) {
        low = smaller(*min_val, low);
        high = larger(*max_val, high);
    } else if (!(*min_val > *max_val)) {  // otherwise nothing was seen yet
        low = *min_val + rule.weight * (low - *min_val);
        high = *max_val + rule.weight * (high - *max_val);
    }
    *min_val = low;
    *max_val = high;
    const int64_t half = rule.qmin < 0 ? rule.qmax : (rule.qmax - rule.qmin) / 2;
    if (rule.symmetric) {
        *scale = at_least(larger(-low, high) / static_cast<float>(half), kSmallestScale);
        *zero = rule.qmin < 0 ? 0 : static_cast<int32_t>(rule.qmin + half + 1);
        return;
    }
    low = at_most(low, 0.0f);
    *scale = at_least((at_least(high, 0.0f) - low) / static_cast<float>(rule.qmax - rule.qmin), kSmallestScale);
    const float first = static_cast<float>(rule.qmin), shift = first - std::rint(low / *scale);
    *zero = static_cast<int32_t>(at_most(at_least(shift != shift ? 0.0f : shift, first), static_cast<float>(rule.qmax)));
}

// The smallest float v with rne(v · (1/s)) > steps: `interval.first_beyond`.
float first_beyond(float steps, float scale) {
    constexpr int32_t kReach = 4, kInfinityBits = 0x7F800000;
    const float inverse = 1.0f / scale;
    const int32_t start = bits_of((steps + 0.5f) * scale) - kReach;
    int32_t found = start;
    for (int32_t offset = 0; offset < 2 * kReach; ++offset)
        found += std::rint(float_of(std::min(start + offset, kInfinityBits)) * inverse) <= steps;
    return float_of(std::min(found, kInfinityBits));
}

// The grid, and the activation before it: both clamps are one.
struct Grid {
    float scale, inverse, low, high;
    Grid(float size, float least, float most, float from, float to) : scale(size), inverse(1.0f / size) {
        const float first = least * scale, end = most * scale;
        low = from == -kInfinity ? first : smaller(at_least(first, from), end);
        high = to == kInfinity ? end : larger(at_most(end, to), first);
    }
    float steps(float v) const {
        float clipped = v > low ? v : low;
        clipped = clipped < high ? clipped : high;
        return std::rint((v != v ? v : clipped) * inverse);
    }
};

// A grid as it is now, with what follows from it: between which values gradients pass, and what stands for zero in the
// codes, which are `lowered` by so much.
struct Placed {
    float least, most;
    Grid grid;
    float above, below, zero;
    Placed(float scale, int32_t zero_point, float low, float high, int64_t qmin, int64_t qmax, int64_t lowered,
           bool by_bounds)
        : least(static_cast<float>(qmin) - static_cast<float>(zero_point)),
          most(static_cast<float>(qmax) - static_cast<float>(zero_point)),
          grid(scale, least, most, low, high),
          zero(static_cast<float>(zero_point) - static_cast<float>(lowered)) {
        above = by_bounds ? std::nextafter(least * scale, -kInfinity) : -first_beyond(-least, scale);
        below = by_bounds ? std::nextafter(most * scale, kInfinity) : first_beyond(most, scale);
        above = at_least(above, low);
        below = at_most(below, high);
    }
};

template <bool kWithCodes>
void quantize_all(const float* y, int64_t outer, int64_t channels, int64_t inner, bool last, const float* factor,
                  const float* constant, const Grid grid, float zero, float* out, int8_t* codes) {
    const int64_t rows = last ? outer * inner : outer * channels, columns = last ? channels : inner;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = y + r * columns;
        float* target = out + r * columns;
        int8_t* code = kWithCodes ? codes + r * columns : nullptr;
        if (last) {
#pragma omp simd
            for (int64_t c = 0; c < columns; ++c) {
                const float steps = grid.steps(std::fma(row[c], factor[c], constant[c]));
                target[c] = steps * grid.scale;
                if (kWithCodes) code[c] = static_cast<int8_t>(static_cast<int32_t>(steps + zero));
            }
        } else {
            const float a = factor[r % channels], b = constant[r % channels];
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) {
                const float steps = grid.steps(std::fma(row[i], a, b));
                target[i] = steps * grid.scale;
                if (kWithCodes) code[i] = static_cast<int8_t>(static_cast<int32_t>(steps + zero));
            }
        }
    }
}

// The activation of α·y + β' on the grid. Behind `kept` come: ∂s/∂(what is learned of it), between which values gradients
// pass, `s`, and what stands for zero in the codes, which are `lowered` by so much.
void quantize(const float* y, float* kept, const Scale scale, const int32_t* zero_point, int64_t given, int64_t outer,
              int64_t channels, int64_t inner, int64_t last, float low, float high, int64_t qmin, int64_t qmax,
              int64_t lowered, float* out, int8_t* codes) {
    const float *factor = kept + 2 * channels, *constant = kept + 3 * channels;
    const Placed placed(scale.value, *zero_point, low, high, qmin, qmax, lowered, given & kBounds);
    const Grid& grid = placed.grid;
    float* more = kept + 4 * channels;
    more[0] = scale.slope;
    more[1] = placed.above;
    more[2] = placed.below;
    more[3] = grid.scale;
    more[4] = placed.zero;
    if (given & kCodes)
        quantize_all<true>(y, outer, channels, inner, last, factor, constant, grid, placed.zero, out, codes);
    else
        quantize_all<false>(y, outer, channels, inner, last, factor, constant, grid, placed.zero, out, codes);
}

// What follows a convolution: the three of them, one after the other.
void forward(const float* y, const float* gamma, const float* beta, const float* error, const bool* silenced,
             float* running_mean, float* running_var, int64_t* batches, float* min_val, float* max_val, float* scale,
             int32_t* zero_point, const float* beside, float factor_of_scale, int64_t given, int64_t outer,
             int64_t channels, int64_t inner, int64_t last, int64_t eps, float momentum, float rest, float low,
             float high, int64_t qmin, int64_t qmax, int64_t lowered, int64_t symmetric, float weight, float* kept,
             float* out, int8_t* codes) {
    float ends[2];
    statistics(y, gamma, beta, error, silenced, running_mean, running_var, batches, given, outer, channels, inner, last,
               eps, momentum, rest, low, high, kept, ends);
    if (given & kObserves)
        observe(ends[0], ends[1], {qmin, qmax, symmetric != 0, weight}, min_val, max_val, scale,
                zero_point);
    const Scale found(*scale, *beside, factor_of_scale, given & kApart);
    quantize(y, kept, found, zero_point, given, outer, channels, inner, last, low, high, qmin, qmax, lowered, out,
             codes);
}

// What BatchNorm's backward subtracts, for a channel.
struct Slope {
    float shift, slope;
    Slope(double total, double products, double count, float inverse, float* grad_gamma, float* grad_beta) {
        const double along = products * static_cast<double>(inverse);
        shift = static_cast<float>(total / count);
        slope = static_cast<float>(along / count * static_cast<double>(inverse));
        *grad_gamma = static_cast<float>(along);
        *grad_beta = static_cast<float>(total);
    }
};

float passed(float grad, float v, float above, float below) {
    const float under = v < below ? grad : 0.0f;
    return v > above ? under : 0.0f;
}

// How a grid gets its gradient: `GridGradient`.
enum Gradient { kNone, kResidual, kByBounds };

// A grid that learns: what each value hands to `s` and to −z·s, `Rounding.shared`.
template <Gradient kGradient>
struct Learning {
    float low, high, inverse, least, most, first, end;
    Learning(float scale, float zero, float from, float to, int64_t qmin, int64_t qmax)
        : low(from), high(to), inverse(1.0f / scale), least(static_cast<float>(qmin) - zero),
          most(static_cast<float>(qmax) - zero) {
        first = kGradient == kByBounds ? least * scale : least;
        end = kGradient == kByBounds ? most * scale : most;
    }
    // What a value hands to `s`, and whether it hands something to `z`.
    float to_scale(float grad, float v, bool* outside) const {
        const float a = at_most(at_least(v, low), high), position = a * inverse, steps = std::rint(position);
        const float code = at_most(at_least(steps, least), most);
        const float place = kGradient == kByBounds ? a : steps;
        const bool inside = (place >= first) & (place <= end);  // `code != steps` would be taken for a branch
        *outside = !inside;
        if (kGradient == kByBounds) return grad * (inside ? 0.0f : code);
        return grad * (code - (inside ? position : 0.0f));
    }
};

// Σg', Σg'·(y − μ), and where the grid learns what goes to `s` and to −z·s, of some values of a channel.
struct Passed {
    double total = 0.0, products = 0.0, to_scale = 0.0, to_zero = 0.0;
};

template <Gradient kGradient, bool kWithZero>
void backward_of_rows(const float* grad, const float* y, const float* kept, int64_t outer, int64_t channels,
                      int64_t inner, const Learning<kGradient> learning, float* grad_y, float* grad_gamma, float* grad_beta,
                      std::vector<Passed>& sums) {
    const float above = kept[4 * channels + 1], below = kept[4 * channels + 2];
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
        const float mean = kept[c], factor = kept[2 * channels + c], constant = kept[3 * channels + c];
        Passed found;
        for (int64_t n = 0; n < outer; ++n) {
            const float *row = y + (n * channels + c) * inner, *given = grad + (n * channels + c) * inner;
            float sum = 0.0f, product = 0.0f, to_scale = 0.0f, to_zero = 0.0f;
#pragma omp simd reduction(+ : sum, product, to_scale, to_zero)
            for (int64_t i = 0; i < inner; ++i) {
                const float v = std::fma(row[i], factor, constant), value = passed(given[i], v, above, below);
                sum += value;
                product += value * (row[i] - mean);
                if (kGradient != kNone) {
                    bool outside;
                    to_scale += learning.to_scale(given[i], v, &outside);
                    if (kWithZero) to_zero += outside ? given[i] : 0.0f;
                }
            }
            found.total += sum;
            found.products += product;
            found.to_scale += to_scale;
            found.to_zero += to_zero;
        }
        sums[c] = found;
        const Slope by(found.total, found.products, static_cast<double>(outer * inner), kept[channels + c],
                       grad_gamma + c, grad_beta + c);
        for (int64_t n = 0; n < outer; ++n) {
            const int64_t start = (n * channels + c) * inner;
            const float *row = y + start, *given = grad + start;
            float* target = grad_y + start;
#pragma omp simd
            for (int64_t i = 0; i < inner; ++i) {
                const float value = passed(given[i], std::fma(row[i], factor, constant), above, below);
                target[i] = ((value - by.shift) - (row[i] - mean) * by.slope) * factor;
            }
        }
    }
}

template <Gradient kGradient, bool kWithZero>
void backward_of_columns(const float* grad, const float* y, const float* kept, int64_t rows, int64_t channels,
                         const Learning<kGradient> learning, float* grad_y, float* grad_gamma, float* grad_beta,
                         std::vector<Passed>& sums) {
    const float above = kept[4 * channels + 1], below = kept[4 * channels + 2];
    const float *mean = kept, *factor = kept + 2 * channels, *constant = kept + 3 * channels;
    std::vector<std::vector<Passed>> parts(omp_get_max_threads());
    std::vector<float> slopes(2 * channels);
    float *shift = slopes.data(), *slope = shift + channels;
#pragma omp parallel
    {
        const Learning<kGradient> by_value(learning);  // in registers, where a reference would be read for each value
        const Share share(rows);
        std::vector<Passed>& found = parts[omp_get_thread_num()];
        found.resize(channels);
        std::vector<float> room(4 * channels);
        float *sum = room.data(), *product = sum + channels, *to_scale = product + channels, *to_zero = to_scale + channels;
        for (int64_t start = share.first; start < share.end; start += kRows) {
            std::fill(room.begin(), room.begin() + (kGradient != kNone ? 4 : 2) * channels, 0.0f);
            for (int64_t r = start; r < std::min(start + kRows, share.end); ++r) {
                const float *row = y + r * channels, *given = grad + r * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float v = std::fma(row[c], factor[c], constant[c]), value = passed(given[c], v, above, below);
                    sum[c] += value;
                    product[c] += value * (row[c] - mean[c]);
                    if (kGradient != kNone) {
                        bool outside;
                        to_scale[c] += by_value.to_scale(given[c], v, &outside);
                        if (kWithZero) to_zero[c] += outside ? given[c] : 0.0f;
                    }
                }
            }
            for (int64_t c = 0; c < channels; ++c) {
                found[c].total += sum[c];
                found[c].products += product[c];
                if (kGradient != kNone) {
                    found[c].to_scale += to_scale[c];
                    found[c].to_zero += to_zero[c];
                }
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            Passed all;
            for (const std::vector<Passed>& part : parts) {  // in this order, so that it is the same in each run
                if (part.empty()) continue;
                all.total += part[c].total;
                all.products += part[c].products;
                all.to_scale += part[c].to_scale;
                all.to_zero += part[c].to_zero;
            }
            sums[c] = all;
            const Slope by(all.total, all.products, static_cast<double>(rows), kept[channels + c], grad_gamma + c,
                           grad_beta + c);
            shift[c] = by.shift;
            slope[c] = by.slope;
        }
        for (int64_t r = share.first; r < share.end; ++r) {
            const float *row = y + r * channels, *given = grad + r * channels;
            float* target = grad_y + r * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) {
                const float value = passed(given[c], std::fma(row[c], factor[c], constant[c]), above, below);
                target[c] = ((value - shift[c]) - (row[c] - mean[c]) * slope[c]) * factor[c];
            }
        }
    }
}

template <Gradient kGradient, bool kWithZero>
void backward_by(const float* grad, const float* y, const float* kept, int64_t outer, int64_t channels, int64_t inner,
                 bool last, float low, float high, int64_t qmin, int64_t qmax, int64_t lowered, float* grad_y,
                 float* grad_gamma, float* grad_beta, float* grad_grid) {
    const float* more = kept + 4 * channels;
    const Learning<kGradient> learning(more[3], more[4] + static_cast<float>(lowered), low, high, qmin, qmax);
    std::vector<Passed> sums(channels);
    if (last)
        backward_of_columns<kGradient, kWithZero>(grad, y, kept, outer * inner, channels, learning, grad_y, grad_gamma, grad_beta, sums);
    else
        backward_of_rows<kGradient, kWithZero>(grad, y, kept, outer, channels, inner, learning, grad_y, grad_gamma, grad_beta, sums);
    if (kGradient == kNone) return;
    double to_scale = 0.0, to_zero = 0.0;
    for (const Passed& one : sums) {
        to_scale += one.to_scale;
        to_zero += one.to_zero;
    }
    grad_grid[0] = static_cast<float>(to_scale) * more[0];
    grad_grid[1] = -more[3] * static_cast<float>(to_zero);
}

// Gradients to y, γ and β, given that of the output; where the grid learns also that to what is learned of `s`, and with
// kZero that to `z`, at `grad_grid`.
void backward(const float* grad, const float* y, const float* kept, int64_t given, int64_t outer, int64_t channels,
              int64_t inner, int64_t last, float low, float high, int64_t qmin, int64_t qmax, int64_t lowered,
              float* grad_y, float* grad_gamma, float* grad_beta, float* grad_grid) {
    const bool bounds = given & kBounds, zero = given & kZero;
    const auto by = !(given & kLearns) ? backward_by<kNone, false>
                    : bounds           ? (zero ? backward_by<kByBounds, true> : backward_by<kByBounds, false>)
                                       : (zero ? backward_by<kResidual, true> : backward_by<kResidual, false>);
    by(grad, y, kept, outer, channels, inner, last, low, high, qmin, qmax, lowered, grad_y, grad_gamma, grad_beta,
       grad_grid);
}

// Of what `parameters` found: with kLearns, gradients to W, which may take the place of that to the rounded weight, and
// to what is learned of its steps; with kError, what the bias error hands to that, and to what is learned of `s_in`.
void backward_of_weight(const float* grad, const float* weight, const float* step, const float* grad_error,
                        const float* kept, int64_t given, int64_t channels, int64_t values, int64_t qmin, int64_t qmax,
                        int64_t bias_bits, float* grad_weight, float* grad_step, float* grad_input) {
    const float least = static_cast<float>(qmin), most = static_cast<float>(qmax);
    std::vector<float> to_input(given & kError ? channels : 0);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < channels; ++c) {
        float sum = 0.0f;
        if (given & kLearns) {
            const float *row = weight + c * values, *gradient = grad + c * values, inverse = 1.0f / step[c];
            float* target = grad_weight + c * values;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < values; ++i) {
                const float value = gradient[i], position = row[i] * inverse, steps = std::rint(position);
                const bool inside = (steps >= least) & (steps <= most);
                sum += value * (inside ? steps - position : at_most(at_least(steps, least), most));
                target[i] = inside ? value : 0.0f;
            }
        }
        if (given & kError) {
            const float scale = kept[channels + c];
            const float input_scale = kept[4 * channels];
            const double slope = BiasCode(kept[c], input_scale * scale, bias_bits).slope();
            const float to_bias_scale = static_cast<float>(slope * static_cast<double>(grad_error[c]));
            to_input[c] = to_bias_scale * scale;
            sum += to_bias_scale * input_scale * kept[2 * channels + c];
        }
        if (given & kLearns) grad_step[c] = given & kKeeps ? sum * kept[3 * channels + c] : sum;
    }
    double total = 0.0;
    for (const float one : to_input) total += one;
    if (given & kError) *grad_input = static_cast<float>(total) * kept[4 * channels + 1];
}

// An activation and the quantizer behind it: the values, which may take the place of those before, 1 in `mask` where
// gradients pass and else 0, and codes. `s` and what stands for zero in the codes are put at `kept`.
void clip(const float* v, float* min_val, float* max_val, float* scale, int32_t* zero_point, int64_t given, int64_t values,
          float low, float high, int64_t qmin, int64_t qmax, int64_t lowered, int64_t symmetric, float weight,
          float* out, int8_t* mask, float* kept, int8_t* codes) {
    if (given & kObserves) {
        float lowest = kInfinity, highest = -kInfinity;
        int32_t broken = 0;
#pragma omp parallel for simd schedule(static) reduction(min : lowest) reduction(max : highest) reduction(| : broken)
        for (int64_t i = 0; i < values; ++i) {
            lowest = v[i] < lowest ? v[i] : lowest;
            highest = v[i] > highest ? v[i] : highest;
            broken |= v[i] != v[i];
        }
        if (broken) lowest = highest = std::numeric_limits<float>::quiet_NaN();
        observe(at_most(at_least(lowest, low), high), at_most(at_least(highest, low), high),
                {qmin, qmax, symmetric != 0, weight}, min_val, max_val, scale, zero_point);
    }
    const Placed placed(*scale, *zero_point, low, high, qmin, qmax, lowered, false);
    kept[0] = placed.grid.scale;
    kept[1] = placed.zero;
    const bool with_codes = given & kCodes;
#pragma omp parallel
    {
        const Grid grid = placed.grid;  // in registers, where a reference would be read for each value
        const float above = placed.above, below = placed.below, offset = placed.zero;
        const Share share(values);
        if (with_codes) {
#pragma omp simd
            for (int64_t i = share.first; i < share.end; ++i)
                codes[i] = static_cast<int8_t>(static_cast<int32_t>(grid.steps(v[i]) + offset));
        }
#pragma omp simd
        for (int64_t i = share.first; i < share.end; ++i) {
            const float value = v[i];
            mask[i] = static_cast<int8_t>(static_cast<int32_t>(passed(1.0f, value, above, below)));
            out[i] = grid.steps(value) * grid.scale;
        }
    }
}

// An activation and a quantizer whose grid is learned.
void rounded(const float* v, const float* scale, const int32_t* zero_point, int64_t values, float low, float high,
             int64_t qmin, int64_t qmax, float* out) {
    const Placed placed(*scale, *zero_point, low, high, qmin, qmax, 0, false);
#pragma omp parallel
    {
        const Grid grid = placed.grid;  // in registers, where a reference would be read for each value
        const Share share(values);
#pragma omp simd
        for (int64_t i = share.first; i < share.end; ++i) out[i] = grid.steps(v[i]) * grid.scale;
    }
}

template <Gradient kGradient>
void backward_of_rounded_by(const float* grad, const float* v, const Placed& placed, float zero, int64_t values,
                            float low, float high, int64_t qmin, int64_t qmax, float* grad_v, float* grad_grid) {
    std::vector<Passed> parts(omp_get_max_threads());
#pragma omp parallel
    {
        const Learning<kGradient> learning(placed.grid.scale, zero, low, high, qmin, qmax);
        const float above = placed.above, below = placed.below;
        const Share share(values);
        double to_scale = 0.0, to_zero = 0.0;
        float of_scale[kValues], of_zero[kValues];  // widened in a loop of its own, or neither is one of vectors
        for (int64_t start = share.first; start < share.end; start += kValues) {
            const int64_t count = std::min(kValues, share.end - start);
            const float *x = v + start, *given = grad + start;
            float* target = grad_v + start;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                const float g = given[i], value = x[i];
                bool outside;
                of_scale[i] = learning.to_scale(g, value, &outside);
                of_zero[i] = outside ? g : 0.0f;
                target[i] = passed(g, value, above, below);
            }
#pragma omp simd reduction(+ : to_scale, to_zero)
            for (int64_t i = 0; i < count; ++i) {
                to_scale += static_cast<double>(of_scale[i]);
                to_zero += static_cast<double>(of_zero[i]);
            }
        }
        parts[omp_get_thread_num()] = {0.0, 0.0, to_scale, to_zero};
    }
    double to_scale = 0.0, to_zero = 0.0;
    for (const Passed& part : parts) {  // in this order, so that it is the same in each run
        to_scale += part.to_scale;
        to_zero += part.to_zero;
    }
    grad_grid[0] = static_cast<float>(to_scale);
    grad_grid[1] = -placed.grid.scale * static_cast<float>(to_zero);
}

// Gradients to v, and to `s` and `z` at `grad_grid`.
void backward_of_rounded(const float* grad, const float* v, const float* scale, const int32_t* zero_point,
                         int64_t given, int64_t values, float low, float high, int64_t qmin, int64_t qmax,
                         float* grad_v, float* grad_grid) {
    const Placed placed(*scale, *zero_point, low, high, qmin, qmax, 0, given & kBounds);
    (given & kBounds ? backward_of_rounded_by<kByBounds> : backward_of_rounded_by<kResidual>)(
        grad, v, placed, static_cast<float>(*zero_point), values, low, high, qmin, qmax, grad_v, grad_grid);
}

// g where a mask is 1, 0 where it is 0.
void masked(const float* grad, const int8_t* mask, int64_t values, float* out) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < values; ++i) out[i] = grad[i] * static_cast<float>(mask[i]);
}

// (c − z)·s of codes that share a grid.
void decode(const int8_t* codes, const float* scale, const float* zero, int64_t values, float* out) {
    const float size = *scale, offset = *zero;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < values; ++i) out[i] = (static_cast<float>(codes[i]) - offset) * size;
}

}  // namespace
