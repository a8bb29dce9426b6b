// What a training step does between its large products, on a processor and in bfloat16: attention over the segments
// of a pack, root-mean-square norms, gated units and rotary embeddings, forward and backward. `kernels.py` builds and
// calls them; each says its equation and is tested against it.
//
// Numbers are stored in bfloat16 and computed in float32, sixteen at a time. Products take bfloat16 in pairs, as
// processors multiply them (vdpbf16ps): both numbers of a pair stand next to each other, and are summed over.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

using bf16 = uint16_t;
using pair = uint32_t;  // two bf16, the first one in the lower half
constexpr int LANES = 16;
using f32s = float __attribute__((vector_size(64)));
using u32s = uint32_t __attribute__((vector_size(64)));
using i32s = int32_t __attribute__((vector_size(64)));
using bf16s = bf16 __attribute__((vector_size(32)));
static const i32s LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class To, class From>
static inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class Vector, class Number>
static inline Vector read(const Number* from) {
    Vector v;
    memcpy(&v, from, sizeof(v));
    return v;
}

static inline f32s all(float x) { return f32s{} + x; }
static inline f32s floats(const bf16* x) { return as<f32s>(__builtin_convertvector(read<bf16s>(x), u32s) << 16); }

static inline void write(float* to, f32s x) { memcpy(to, &x, sizeof(x)); }

static inline void write(bf16* to, f32s x) {  // rounded to the nearest, to even where two are as near
#ifdef __AVX512BF16__
    const bf16s y = as<bf16s>(_mm512_cvtneps_pbh(as<__m512>(x)));
#else
    const u32s bits = as<u32s>(x);
    const u32s nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bf16s y = __builtin_convertvector(x == x ? nearest : (bits >> 16) | 0x40, bf16s);  // not a number stays so
#endif
    memcpy(to, &y, sizeof(y));
}

static inline f32s dot(f32s sum, u32s a, u32s b) {
#ifdef __AVX512BF16__
    return as<f32s>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(a), as<__m512bh>(b)));
#else
    sum += as<f32s>(a << 16) * as<f32s>(b << 16);
    return sum + as<f32s>(a & 0xffff0000) * as<f32s>(b & 0xffff0000);
#endif
}

// Lane by lane a number of a (0 .. 15) or of b (16 .. 31)
static inline u32s chosen(u32s a, u32s b, i32s lanes) {
#ifdef __clang__
    u32s c{};
    for (int i = 0; i < LANES; i++) c[i] = lanes[i] < LANES ? a[lanes[i]] : b[lanes[i] - LANES];
    return c;
#else
    return __builtin_shuffle(a, b, as<u32s>(lanes));
#endif
}

static inline float sum(f32s x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

static inline float largest(f32s x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
}

// e^x for x in -87 .. 88, the nearest of these elsewhere; what is not a number stays so. e^x = 2^n e^r with r within
// ln 2 / 2 of 0, and for e^r a polynomial (Cephes' expf), good to the last place or two of float32.
static inline f32s exponential(f32s x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const f32s shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 has no place for a fraction: n in the lowest bits
    const f32s n = shifted - 12582912.0f;
    const f32s r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    f32s p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return as<f32s>(as<u32s>(p) + (as<u32s>(shifted) << 23));
}

static int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
using Room = std::unique_ptr<T[], decltype(&std::free)>;

template <class T>
static Room<T> room(long n) {  // as it comes, not zero
    return {static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64)), &std::free};
}

// Products of small matrices ------------------------------------------------------------------------------------------

struct Pairs {  // a matrix of pairs: (row, k) stands at [row * by_row + k * by_k]
    const pair* at;
    long by_row, by_k;
};

static Pairs in_rows(const bf16* at, long by_row) { return {reinterpret_cast<const pair*>(at), by_row / 2, 1}; }

// R rows and V * 16 columns of a product, which stay in registers
template <int R, int V>
static void block(Pairs a, const pair* b, long b_row, float* c, long c_row, int K, bool add) {
    f32s sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = add ? read<f32s>(c + r * c_row + v * LANES) : f32s{};
    for (int k = 0; k < K; k++) {
        u32s columns[V];
        for (int v = 0; v < V; v++) columns[v] = read<u32s>(b + k * b_row + v * LANES);
        for (int r = 0; r < R; r++) {
            const u32s row = u32s{} + a.at[r * a.by_row + k * a.by_k];
            for (int v = 0; v < V; v++) sums[r][v] = dot(sums[r][v], row, columns[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) write(c + r * c_row + v * LANES, sums[r][v]);
}

template <int V>
static void strip(int rows, Pairs a, const pair* b, long b_row, float* c, long c_row, int K, bool add) {
    const auto down = [&](auto block_of, int R) {
        for (; rows >= R; rows -= R, a.at += R * a.by_row, c += R * c_row) block_of(a, b, b_row, c, c_row, K, add);
    };
    if (V == 1) down(block<12, V>, 12);  // products take some cycles: a processor wants a dozen of them under way
    down(block<6, V>, 6);
    down(block<2, V>, 2);
    down(block<1, V>, 1);
}

// c [rows, columns] = (with `add`, +=) the sum over K of a(row, k) . b [K, columns]; columns in sixteens
static void product(int rows, int columns, int K, Pairs a, const pair* b, long b_row, float* c, long c_row,
                    bool add = false) {
    int n = 0;
    for (; n + 4 * LANES <= columns; n += 4 * LANES) strip<4>(rows, a, b + n, b_row, c + n, c_row, K, add);
    const auto rest = (columns - n) / LANES == 3 ? strip<3> : (columns - n) / LANES == 2 ? strip<2> : strip<1>;
    if (n < columns) rest(rows, a, b + n, b_row, c + n, c_row, K, add);
}

// Attention -----------------------------------------------------------------------------------------------------------

struct Heads {  // bf16 (head, token, D): a row of D numbers at [head * by_head + token * by_token]
    bf16* at;
    long by_head, by_token;
    bf16* row(int head, int token) const { return at + head * by_head + token * by_token; }
};

struct Shape {
    int queries, keys;  // tokens of the pack; the same and what stands before all of them
    int H, G, D;        // heads of queries, heads of keys and values, numbers of each
    float scale;
    int threads;
};

struct Segment {  // `length` queries from `start`; they see all of `keys` keys but those of their own that come later
    int start, length, keys, ranges;
    const int* range;  // [2 * ranges]: where the keys stand, from and to
};

constexpr int QUERIES = 48;  // at a time: their scores stay in the cache for the next pass, products are not flat

static int most_keys(const Segment* segments, int count) {
    int most = 0;
    for (int n = 0; n < count; n++) most = std::max(most, up_to(segments[n].keys, LANES));
    return most;
}

template <class Do>
static void each_key(const Segment& s, Do work) {
    int n = 0;
    for (int r = 0; r < s.ranges; r++)
        for (int key = s.range[2 * r]; key < s.range[2 * r + 1]; key++) work(n++, key);
}

// Two rows of n numbers -> n pairs
static void zip(const bf16* first, const bf16* second, int n, pair* to) {
    for (int i = 0; i < n; i++) to[i] = first[i] | static_cast<pair>(second[i]) << 16;
}

// A row and zeros
static void zip(const bf16* row, int n, pair* to) { std::copy(row, row + n, to); }

// Rows under each other [count, n], count even or a row of zeros more -> [count / 2, n] pairs of neighbouring rows
static void zip_rows(const bf16* rows, long by_row, int count, int n, pair* to) {
    for (int i = 0; i + 1 < count; i += 2) zip(rows + i * by_row, rows + (i + 1) * by_row, n, to + i / 2 * n);
    if (count % 2) zip(rows + (count - 1) * by_row, n, to + count / 2 * n);
}

// The S keys of a segment [S, D], zeros up to `padded` -> [D / 2, padded]: pairs along D, to sum over D
static void over_D(const Segment& s, Heads t, int head, int D, int padded, pair* to) {
    each_key(s, [&](int n, int key) {
        const bf16* row = t.row(head, key);
        for (long d = 0; d < D / 2; d++) to[d * padded + n] = read<pair>(row + 2 * d);
    });
    for (long d = 0; d < D / 2; d++) std::fill(to + d * padded + s.keys, to + (d + 1) * padded, 0);
}

// The same -> [padded / 2, D]: pairs of neighbouring keys, to sum over keys
static void over_keys(const Segment& s, Heads t, int head, int D, int padded, pair* to) {
    const bf16* before = nullptr;
    each_key(s, [&](int n, int key) {
        const bf16* row = t.row(head, key);
        if (n % 2) zip(before, row, D, to + n / 2 * D);
        before = row;
    });
    if (s.keys % 2) zip(before, D, to + s.keys / 2 * D);
    std::fill(to + (s.keys + 1) / 2 * D, to + padded / 2 * D, 0);
}

// Some queries of a segment, in one of the heads that share their keys: `rows` of them from `start`, the first behind
// `before` keys, none of which sees more than `seen`
struct Queries {
    int head, start, rows, before, seen;
};

template <class Do>
static void each_queries(const Segment& s, int g, int group, Do work) {
    for (int head = g * group; head < (g + 1) * group; head++)
        for (int first = 0; first < s.length; first += QUERIES) {
            const int rows = std::min(QUERIES, s.length - first), before = s.keys - s.length + first;
            work(Queries{head, s.start + first, rows, before, up_to(before + rows, LANES)});
        }
}

// Each of these rows times all keys (or values) that are seen: [rows, padded]
static void on_keys(const Queries& some, Heads t, const pair* keys, int D, int padded, float* to) {
    const Pairs rows = in_rows(t.row(some.head, some.start), t.by_token);
    product(some.rows, some.seen, D / 2, rows, keys, padded, to, padded);
}

// out = P v for P = softmax(scale q k^T) over the keys that each query sees. log_sums [H, queries]: the log of the sum
// of exp(scale q k^T), by which the backward pass has P again
extern "C" void attend(Heads q, Heads k, Heads v, Heads out, float* log_sums, Shape shape, const Segment* segments,
                       int count) {
    const int G = shape.G, D = shape.D, group = shape.H / G, most = most_keys(segments, count);
#pragma omp parallel num_threads(shape.threads)
    {
        const auto keys = room<pair>(most * D / 2), values = room<pair>(most * D / 2);
        const auto scores = room<float>(QUERIES * most), made = room<float>(QUERIES * D), sums = room<float>(QUERIES);
        const auto P = room<bf16>(QUERIES * most);
#pragma omp for schedule(static, 1)
        for (int task = 0; task < count * G; task++) {
            const Segment& s = segments[task / G];
            const int g = task % G, padded = up_to(s.keys, LANES);
            over_D(s, k, g, D, padded, keys.get());
            over_keys(s, v, g, D, padded, values.get());
            each_queries(s, g, group, [&](const Queries& some) {
                on_keys(some, q, keys.get(), D, padded, &scores[0]);
                for (int i = 0; i < some.rows; i++) {
                    const float* score = &scores[i * padded];
                    const int own = some.before + i + 1;
                    f32s tops = all(-INFINITY), total{};
                    for (int j = 0; j < own; j += LANES) {
                        const f32s x = read<f32s>(score + j);
                        tops = (LANE < own - j) & (x > tops) ? x : tops;
                    }
                    const float top = largest(tops);
                    for (int j = 0; j < some.seen; j += LANES) {
                        const f32s p = exponential((read<f32s>(score + j) - top) * shape.scale);
                        const f32s shown = LANE < own - j ? p : f32s{};
                        total += shown;
                        write(&P[i * padded + j], shown);
                    }
                    sums[i] = sum(total);
                    log_sums[some.head * shape.queries + some.start + i] = top * shape.scale + std::log(sums[i]);
                }
                product(some.rows, D, some.seen / 2, in_rows(P.get(), padded), values.get(), D, &made[0], D);
                for (int i = 0; i < some.rows; i++)
                    for (int d = 0; d < D; d += LANES)
                        write(out.row(some.head, some.start + i) + d, read<f32s>(&made[i * D + d]) / sums[i]);
            });
        }
    }
}

// With dP = dO v^T and dS = scale P (dP - the sum of P dP over keys): dq = dS k, dk = dS^T q, dv = P^T dO. What several
// segments and heads add to dk and dv [keys, G, D] is summed in float32, by thread and then in the order of threads, so
// that a number of threads has one result
extern "C" void attend_backward(Heads dO, Heads q, Heads k, Heads v, const float* log_sums, Heads dq, bf16* dk,
                                bf16* dv, Shape shape, const Segment* segments, int count) {
    const int G = shape.G, D = shape.D, group = shape.H / G, most = most_keys(segments, count);
    const long size = static_cast<long>(shape.keys) * G * D;
    const auto by_thread = room<float>(2 * size * shape.threads);
#pragma omp parallel num_threads(shape.threads)
    {
        float* all_dk = &by_thread[2 * size * omp_get_thread_num()];
        std::fill(all_dk, all_dk + 2 * size, 0.0f);
        const auto keys = room<pair>(most * D / 2), values = room<pair>(most * D / 2), keys_ = room<pair>(most * D / 2);
        const auto queries_ = room<pair>(QUERIES * D / 2), dO_ = room<pair>(QUERIES * D / 2);
        const auto P_ = room<pair>(QUERIES * most / 2), dS_ = room<pair>(QUERIES * most / 2);
        const auto P = room<bf16>(QUERIES * most), dS = room<bf16>(QUERIES * most);
        const auto scores = room<float>(QUERIES * most), dP = room<float>(QUERIES * most);
        const auto made = room<float>(QUERIES * D);
        const auto sum_dk = room<float>(most * D), sum_dv = room<float>(most * D);
#pragma omp for schedule(static, 1)
        for (int task = 0; task < count * G; task++) {
            const Segment& s = segments[task / G];
            const int g = task % G, padded = up_to(s.keys, LANES);
            over_D(s, k, g, D, padded, keys.get());
            over_D(s, v, g, D, padded, values.get());
            over_keys(s, k, g, D, padded, keys_.get());
            std::fill(&sum_dk[0], &sum_dk[padded * D], 0.0f);
            std::fill(&sum_dv[0], &sum_dv[padded * D], 0.0f);
            each_queries(s, g, group, [&](const Queries& some) {
                const int rows = some.rows, seen = some.seen, pairs = (rows + 1) / 2;
                on_keys(some, q, keys.get(), D, padded, &scores[0]);
                on_keys(some, dO, values.get(), D, padded, &dP[0]);
                for (int i = 0; i < rows; i++) {
                    float *p = &scores[i * padded], *dp = &dP[i * padded];
                    const float log_sum = log_sums[some.head * shape.queries + some.start + i];
                    f32s total{};
                    for (int j = 0; j < seen; j += LANES) {
                        const f32s whole = exponential(read<f32s>(p + j) * shape.scale - log_sum);
                        const f32s shown = LANE < some.before + i + 1 - j ? whole : f32s{};
                        total += shown * read<f32s>(dp + j);
                        write(p + j, shown);
                        write(&P[i * padded + j], shown);
                    }
                    const float mean = sum(total);
                    for (int j = 0; j < seen; j += LANES)
                        write(&dS[i * padded + j], read<f32s>(p + j) * (read<f32s>(dp + j) - mean) * shape.scale);
                }
                product(rows, D, seen / 2, in_rows(dS.get(), padded), keys_.get(), D, &made[0], D);
                for (int i = 0; i < rows; i++)
                    for (int d = 0; d < D; d += LANES)
                        write(dq.row(some.head, some.start + i) + d, read<f32s>(&made[i * D + d]));
                zip_rows(P.get(), padded, rows, seen, P_.get());
                zip_rows(dS.get(), padded, rows, seen, dS_.get());
                zip_rows(q.row(some.head, some.start), q.by_token, rows, D, queries_.get());
                zip_rows(dO.row(some.head, some.start), dO.by_token, rows, D, dO_.get());
                product(seen, D, pairs, {dS_.get(), 1, seen}, queries_.get(), D, &sum_dk[0], D, true);
                product(seen, D, pairs, {P_.get(), 1, seen}, dO_.get(), D, &sum_dv[0], D, true);
            });
            each_key(s, [&](int n, int key) {
                float *to_dk = all_dk + (static_cast<long>(key) * G + g) * D, *to_dv = to_dk + size;
                for (int d = 0; d < D; d++) to_dk[d] += sum_dk[n * D + d], to_dv[d] += sum_dv[n * D + d];
            });
        }
#pragma omp for schedule(static)
        for (long i = 0; i < size; i += LANES) {
            f32s for_k{}, for_v{};
            for (int thread = 0; thread < omp_get_num_threads(); thread++) {
                for_k += read<f32s>(&by_thread[2 * size * thread + i]);
                for_v += read<f32s>(&by_thread[2 * size * thread + size + i]);
            }
            write(dk + i, for_k);
            write(dv + i, for_v);
        }
    }
}

// Frozen linear layers with low-rank factors --------------------------------------------------------------------------

constexpr int PANEL = 4 * LANES;      // columns of a product that are computed together, from one packed piece of W
constexpr int ROWS = 192, DEPTH = 512;  // rows and pairs of a piece of a product: what it needs stays in the cache

// One step of a transposition of sixteen rows of sixteen: the blocks of S that lie off the diagonal change places
template <int S>
static inline void exchange(u32s rows[LANES]) {
    const i32s first = (LANE & S) != 0 ? LANE + LANES - S : LANE, second = (LANE & S) != 0 ? LANE + LANES : LANE + S;
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) {
            const u32s a = rows[i], b = rows[i + S];
            rows[i] = chosen(a, b, first);
            rows[i + S] = chosen(a, b, second);
        }
}

// Rows of a matrix, one a column of a product: [n, 2 K] -> [K, n] pairs, n in sixteens, to sum along the rows
static void pack_along(const bf16* rows, long by_row, int n, int K, pair* to) {
    for (int i = 0; i < n; i += LANES) {
        int k = 0;
        for (; k + LANES <= K; k += LANES) {
            u32s square[LANES];
            for (int row = 0; row < LANES; row++) square[row] = read<u32s>(rows + (i + row) * by_row + 2 * k);
            exchange<8>(square), exchange<4>(square), exchange<2>(square), exchange<1>(square);
            for (int row = 0; row < LANES; row++) memcpy(to + static_cast<long>(k + row) * n + i, &square[row], 64);
        }
        for (; k < K; k++)
            for (int row = i; row < i + LANES; row++)
                to[static_cast<long>(k) * n + row] = read<pair>(rows + row * by_row + 2 * k);
    }
}

// Columns of a matrix, one a column of a product: [2 K, n] -> [K, n] pairs, to sum down the columns
static void pack_down(const bf16* rows, long by_row, int n, int K, pair* to) { zip_rows(rows, by_row, 2 * K, n, to); }

struct Linear {  // x [tokens, d_in], W [d_out, d_in], A [r, d_in], B [d_out, r]; all but tokens in sixteens
    int tokens, d_in, d_out, r, threads;
};

// What this thread does of a number of rows: from .. to, in sixes as long as there are any. There may be fewer threads
// than were asked for
static void share(int rows, int* from, int* to) {
    const int threads = omp_get_num_threads(), each = up_to((rows + threads - 1) / threads, 6);
    *from = std::min(rows, omp_get_thread_num() * each), *to = std::min(rows, *from + each);
}

// y [from .. to, columns] = x . b + u . c for b [K, columns] and c [R, columns], which stand under each other in one piece
static void deep_product(const bf16* x, int K, const bf16* u, int R, int from, int to, int columns, const pair* b,
                         bf16* y, int by_row, float* sums) {
    for (int first = from; first < to; first += ROWS) {
        const int rows = std::min(ROWS, to - first);
        for (int k = 0; k < K; k += DEPTH)
            product(rows, columns, std::min(DEPTH, K - k), in_rows(x + first * 2L * K + 2 * k, 2 * K),
                    b + static_cast<long>(k) * columns, columns, sums, columns, k > 0);
        if (R)
            product(rows, columns, R, in_rows(u + first * 2L * R, 2 * R), b + static_cast<long>(K) * columns, columns,
                    sums, columns, true);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j += LANES)
                write(y + static_cast<long>(first + i) * by_row + j, read<f32s>(sums + i * columns + j));
    }
}

// u = x A^T [tokens, r], y = x W^T + u B^T
extern "C" void low_rank(const bf16* x, const bf16* W, const bf16* A, const bf16* B, bf16* u, bf16* y, Linear shape) {
    const int K = shape.d_in / 2, R = shape.r / 2, panels = (shape.d_out + PANEL - 1) / PANEL;
    const auto A_ = room<pair>(static_cast<long>(K) * shape.r), W_ = room<pair>(static_cast<long>(K + R) * shape.d_out);
#pragma omp parallel num_threads(shape.threads)
    {
        const auto sums = room<float>(ROWS * std::max(PANEL, shape.r));
#pragma omp for schedule(static)
        for (int panel = -1; panel < panels; panel++) {
            const int first = panel * PANEL, n = std::min(PANEL, shape.d_out - first);
            if (panel < 0) {
                pack_along(A, shape.d_in, shape.r, K, A_.get());
            } else {
                pair* to = &W_[static_cast<long>(K + R) * first];
                pack_along(W + static_cast<long>(first) * shape.d_in, shape.d_in, n, K, to);
                pack_along(B + static_cast<long>(first) * shape.r, shape.r, n, R, to + static_cast<long>(K) * n);
            }
        }
        int from, to;
        share(shape.tokens, &from, &to);
        deep_product(x, K, nullptr, 0, from, to, shape.r, A_.get(), u, shape.r, sums.get());
        for (int first = 0; first < shape.d_out; first += PANEL)
            deep_product(x, K, u, R, from, to, std::min(PANEL, shape.d_out - first),
                         &W_[static_cast<long>(K + R) * first], y + first, shape.d_out, sums.get());
    }
}

// c [r, columns] = a^T b over tokens, for a [tokens, r] as pairs of neighbouring tokens and b [tokens, columns]
static void over_tokens(const pair* a, const bf16* b, long by_row, int tokens, int r, int columns, float* c, long c_row,
                        pair* scratch) {
    for (int first = 0; first < tokens; first += 2 * DEPTH) {
        const int rows = std::min(2 * DEPTH, tokens - first);
        zip_rows(b + first * by_row, by_row, rows, columns, scratch);
        product(r, columns, (rows + 1) / 2, {a + static_cast<long>(first / 2) * r, 1, r}, scratch, columns, c, c_row,
                first > 0);
    }
}

// With du = dy B: dx = dy W + du A (unless null), dA [r, d_in] = du^T x, dB^T [r, d_out] = u^T dy (each unless null)
extern "C" void low_rank_backward(const bf16* dy, const bf16* x, const bf16* u, const bf16* W, const bf16* A,
                                  const bf16* B, bf16* dx, float* dA, float* dB, Linear shape) {
    const int K = shape.d_out / 2, R = shape.r / 2, r = shape.r, pairs = (shape.tokens + 1) / 2;
    const int panels = (shape.d_in + PANEL - 1) / PANEL;
    const auto B_ = room<pair>(static_cast<long>(K) * r), W_ = room<pair>(static_cast<long>(K + R) * shape.d_in);
    const auto du = room<bf16>(static_cast<long>(shape.tokens) * r);
    const auto du_ = room<pair>(static_cast<long>(pairs) * r), u_ = room<pair>(static_cast<long>(pairs) * r);
#pragma omp parallel num_threads(shape.threads)
    {
        const auto sums = room<float>(ROWS * std::max(PANEL, r));
        const auto scratch = room<pair>(DEPTH * PANEL);
#pragma omp for schedule(static)
        for (int panel = -1; panel < (dx ? panels : 0); panel++) {
            const int first = panel * PANEL, n = std::min(PANEL, shape.d_in - first);
            if (panel < 0) {
                pack_down(B, r, r, K, B_.get());
            } else {
                pair* to = &W_[static_cast<long>(K + R) * first];
                pack_down(W + first, shape.d_in, n, K, to);
                pack_down(A + first, shape.d_in, n, R, to + static_cast<long>(K) * n);
            }
        }
        int from, to;
        share(shape.tokens, &from, &to);
        deep_product(dy, K, nullptr, 0, from, to, r, B_.get(), du.get(), r, sums.get());
        for (int first = 0; dx && first < shape.d_in; first += PANEL)
            deep_product(dy, K, du.get(), R, from, to, std::min(PANEL, shape.d_in - first),
                         &W_[static_cast<long>(K + R) * first], dx + first, shape.d_in, sums.get());
#pragma omp barrier
#pragma omp for schedule(static)
        for (int token = 0; token < shape.tokens; token += 2) {
            const int rows = std::min(2, shape.tokens - token);
            zip_rows(du.get() + static_cast<long>(token) * r, r, rows, r, &du_[static_cast<long>(token / 2) * r]);
            zip_rows(u + static_cast<long>(token) * r, r, rows, r, &u_[static_cast<long>(token / 2) * r]);
        }
#pragma omp for schedule(static) nowait
        for (int first = 0; first < (dA ? shape.d_in : 0); first += PANEL)
            over_tokens(du_.get(), x + first, shape.d_in, shape.tokens, r, std::min(PANEL, shape.d_in - first),
                        dA + first, shape.d_in, scratch.get());
#pragma omp for schedule(static)
        for (int first = 0; first < (dB ? shape.d_out : 0); first += PANEL)
            over_tokens(u_.get(), dy + first, shape.d_out, shape.tokens, r, std::min(PANEL, shape.d_out - first),
                        dB + first, shape.d_out, scratch.get());
    }
}

// Passes over memory --------------------------------------------------------------------------------------------------

// y = gain x / sqrt(mean(x^2) + eps) over rows of d
extern "C" void rms_norm(const bf16* x, const bf16* gain, bf16* y, long rows, int d, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16* x_ = x + row * d;
        f32s squares{};
        for (int i = 0; i < d; i += LANES) squares += floats(x_ + i) * floats(x_ + i);
        const float by = 1 / std::sqrt(sum(squares) / d + eps);
        for (int i = 0; i < d; i += LANES) write(y + row * d + i, floats(x_ + i) * by * floats(gain + i));
    }
}

// dx = by (u - x by^2 mean(u x)) for u = gain dy and by = 1 / sqrt(mean(x^2) + eps)
extern "C" void rms_norm_backward(const bf16* dy, const bf16* x, const bf16* gain, bf16* dx, long rows, int d,
                                  float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *x_ = x + row * d, *dy_ = dy + row * d;
        f32s squares{}, along{};
        for (int i = 0; i < d; i += LANES) {
            squares += floats(x_ + i) * floats(x_ + i);
            along += floats(x_ + i) * floats(dy_ + i) * floats(gain + i);
        }
        const float by = 1 / std::sqrt(sum(squares) / d + eps), back = by * by * sum(along) / d;
        for (int i = 0; i < d; i += LANES)
            write(dx + row * d + i, by * (floats(dy_ + i) * floats(gain + i) - floats(x_ + i) * back));
    }
}

// y = g sigmoid(g) up, over n numbers, n in sixteens
extern "C" void silu_gate(const bf16* gate, const bf16* up, bf16* y, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i += LANES) {
        const f32s g = floats(gate + i);
        write(y + i, g / (1 + exponential(-g)) * floats(up + i));
    }
}

// dgate = dy up s (1 + g (1 - s)), dup = dy g s, for s = sigmoid(g)
extern "C" void silu_gate_backward(const bf16* dy, const bf16* gate, const bf16* up, bf16* dgate, bf16* dup, long n,
                                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i += LANES) {
        const f32s g = floats(gate + i), dy_ = floats(dy + i), s = 1 / (1 + exponential(-g));
        write(dgate + i, dy_ * floats(up + i) * s * (1 + g * (1 - s)));
        write(dup + i, dy_ * g * s);
    }
}

// Each head's numbers turned, n with n + D / 2: y = a cos - b sin, b cos + a sin. `back` turns the other way, which is
// the gradient. cos and sin [tokens, D]
extern "C" void rotate(Heads x, const bf16* cos, const bf16* sin, Heads y, int heads, int tokens, int D, bool back,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < heads; h++)
            for (int i = 0, j = D / 2; i < D / 2; i += LANES, j += LANES) {
                const bf16 *in = x.row(h, t), *c = cos + static_cast<long>(t) * D, *s = sin + static_cast<long>(t) * D;
                const f32s a = floats(in + i), b = floats(in + j);
                const f32s sin_a = back ? -floats(s + j) : floats(s + i), sin_b = back ? -floats(s + i) : floats(s + j);
                write(y.row(h, t) + i, a * floats(c + i) - b * sin_a);
                write(y.row(h, t) + j, b * floats(c + j) + a * sin_b);
            }
}

// Attention of one new token of each of several requests to its own keys and values, for generation. The new keys and
// values are written behind those of the cache first. Here numbers may be float32 too.
//
//     out[t] = sum_j softmax_j(scale q[t] . k_j) v_j        j in 0 .. always - 1 and first .. length - 1

struct Request {
    long token;  // the row of q, k, v and out
    long keys, values;  // addresses of [G, capacity, D] and [G, capacity, D_v]
    long keys_by_head, values_by_head;
    long always, first, length;  // the new token is the last of `length`
};

static inline f32s widened(const float* x) { return read<f32s>(x); }
static inline f32s widened(const bf16* x) { return floats(x); }

static inline float folded(f32s x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(as<__m512>(x));
#else
    return sum(x);
#endif
}

template <class Number, class Do>
static void each_seen(const Request& r, const Number* rows, int width, Do work) {
    long at = 0;
    for (long j = 0; j < r.always; j++) work(at++, rows + j * width);
    for (long j = r.first; j < r.length; j++) work(at++, rows + j * width);
}

// e^(x - max x) in place of x[0 .. n), the room behind filled up to whole vectors; their sum
static float exponentials(float* x, long n) {
    const long whole = up_to(n, LANES);
    std::fill(x + n, x + whole, -INFINITY);
    f32s most = read<f32s>(x);
    for (long j = LANES; j < whole; j += LANES) {
        const f32s next = read<f32s>(x + j);
        most = next > most ? next : most;
    }
    const float top = largest(most);
    f32s total{};
    for (long j = 0; j < whole; j += LANES) {
        const f32s given = read<f32s>(x + j), e = exponential(given - top);
        const f32s kept = given == -INFINITY ? f32s{} : e;
        write(x + j, kept);
        total += kept;
    }
    return folded(total);
}

template <class Number>
static void attend_new(const Number* q, const Number* k, const Number* v, const long* strides, Number* out,
                       const Request* requests, int count, int H, int G, int D, int D_v, float scale, int threads) {
    const int group = H / G;
    const auto [q_token, q_head, k_token, k_head, v_token, v_head] =
        std::tuple(strides[0], strides[1], strides[2], strides[3], strides[4], strides[5]);
    long longest = 0;
    for (int i = 0; i < count; i++) longest = std::max(longest, requests[i].always + requests[i].length);
    const long row = up_to(longest, LANES) + LANES;
#pragma omp parallel num_threads(std::min(threads, count * G))
    {
        auto scores = room<float>(group * row), queries = room<float>(group * D), sums = room<float>(group * D_v);
#pragma omp for collapse(2) schedule(dynamic)
        for (int i = 0; i < count; i++)
            for (int g = 0; g < G; g++) {
                const Request& r = requests[i];
                Number* keys = reinterpret_cast<Number*>(r.keys) + g * r.keys_by_head;
                Number* values = reinterpret_cast<Number*>(r.values) + g * r.values_by_head;
                std::copy_n(k + r.token * k_token + g * k_head, D, keys + (r.length - 1) * D);
                std::copy_n(v + r.token * v_token + g * v_head, D_v, values + (r.length - 1) * D_v);
                for (int h = 0; h < group; h++)
                    for (int d = 0; d < D; d += LANES)
                        write(&queries[h * D + d], scale * widened(q + r.token * q_token + (g * group + h) * q_head + d));
                each_seen(r, keys, D, [&](long at, const Number* key) {
                    for (int h = 0; h < group; h++) {
                        f32s product{};
                        for (int d = 0; d < D; d += LANES) product += read<f32s>(&queries[h * D + d]) * widened(key + d);
                        scores[h * row + at] = folded(product);
                    }
                });
                const long seen = r.always + r.length - r.first;
                float totals[64];
                for (int h = 0; h < group; h++) totals[h] = exponentials(&scores[h * row], seen);
                std::fill_n(&sums[0], group * D_v, 0.0f);
                each_seen(r, values, D_v, [&](long at, const Number* value) {
                    for (int d = 0; d < D_v; d += LANES) {
                        const f32s numbers = widened(value + d);
                        for (int h = 0; h < group; h++)
                            write(&sums[h * D_v + d], read<f32s>(&sums[h * D_v + d]) + scores[h * row + at] * numbers);
                    }
                });
                for (int h = 0; h < group; h++)
                    for (int d = 0; d < D_v; d += LANES)
                        write(out + (r.token * H + g * group + h) * D_v + d, read<f32s>(&sums[h * D_v + d]) / totals[h]);
            }
    }
}

extern "C" void attend_new_float32(const float* q, const float* k, const float* v, const long* strides, float* out,
                                   const Request* requests, int count, int H, int G, int D, int D_v, float scale,
                                   int threads) {
    attend_new(q, k, v, strides, out, requests, count, H, G, D, D_v, scale, threads);
}

extern "C" void attend_new_bfloat16(const bf16* q, const bf16* k, const bf16* v, const long* strides, bf16* out,
                                    const Request* requests, int count, int H, int G, int D, int D_v, float scale,
                                    int threads) {
    attend_new(q, k, v, strides, out, requests, count, H, G, D, D_v, scale, threads);
}

// The low-rank changes of many adapters at once, for generation: each token of a pass has those of its span.
//
//     y[t] = sum over the changes of t's span of  share B (A x[t])        A [r, d_in], B^T [r, d_out]
//
// Both factors are read along their rows: A for dot products with x, B^T to be added, u times, to y.

struct Change {
    long A, BT;  // addresses of float32 or, where `narrow`, of bfloat16
    long r, narrow;
    double share;
};

static inline f32s some(const float* x, int n) {
#ifdef __AVX512F__
    return as<f32s>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), x));
#else
    f32s all{};
    memcpy(&all, x, n * sizeof(float));
    return all;
#endif
}

static inline f32s some(const bf16* x, int n) {
    bf16 all[LANES] = {};
    memcpy(all, x, n * sizeof(bf16));
    return floats(all);
}

// The sums of sixteen vectors, one in each lane
static inline f32s sums_of(const f32s* v) {
#ifdef __AVX512F__
    __m512 fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 twos[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const auto a = as<__m512>(v[4 * i + 2 * j]), b = as<__m512>(v[4 * i + 2 * j + 1]);
            twos[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        const auto a = _mm512_castps_pd(twos[0]), b = _mm512_castps_pd(twos[1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto folded_of = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return as<f32s>(folded_of(folded_of(fours[0], fours[1]), folded_of(fours[2], fours[3])));
#else
    f32s all{};
    for (int i = 0; i < LANES; i++) all[i] = sum(v[i]);
    return all;
#endif
}

// u = share M x for up to sixteen rows of M, one after the other: the processor fetches ahead what is read in order.
// Zeros come behind the last sum; the room of x is filled up with them.
template <class Number>
static void dots(const Number* M, int rows, int K, const float* x, float share, float* u) {
    f32s v[LANES] = {};
    for (int i = 0; i < rows; i++, M += K) {
        f32s sums[4] = {};
        int k = 0;
        for (; k + 4 * LANES <= K; k += 4 * LANES)
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) sums[n] += widened(M + k + n * LANES) * read<f32s>(x + k + n * LANES);
        for (; k + LANES <= K; k += LANES) sums[0] += widened(M + k) * read<f32s>(x + k);
        if (k < K) sums[1] += some(M + k, K - k) * read<f32s>(x + k);
        v[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    write(u, share * sums_of(v));
}

// y [n] += u [r] times r rows of M, one after the other, too; the room of y is filled up
template <class Number>
static void add_rows(const Number* M, int r, int n, const float* u, float* y) {
    for (int i = 0; i < r; i++, M += n) {
        int d = 0;
        for (; d + LANES <= n; d += LANES) write(y + d, read<f32s>(y + d) + u[i] * widened(M + d));
        if (d < n) write(y + d, read<f32s>(y + d) + u[i] * some(M + d, n - d));
    }
}

// y += share B (A x)
template <class Number>
static void both(const Change& c, int d_in, int d_out, const float* x, float* u, float* y) {
    const auto A = reinterpret_cast<const Number*>(c.A), BT = reinterpret_cast<const Number*>(c.BT);
    const int r = static_cast<int>(c.r);
    for (int row = 0; row < r; row += LANES)
        dots(A + static_cast<long>(row) * d_in, std::min(LANES, r - row), d_in, x, static_cast<float>(c.share), u + row);
    add_rows(BT, r, d_out, u, y);
}

// Sixteen vectors as a matrix -> its columns
static inline void transpose(f32s* v) {
#pragma GCC unroll 4
    for (int s = 1; s < LANES; s *= 2) {  // blocks of s change places with those across the diagonal
        const i32s upper = (LANE & s) != 0 ? LANE - s + LANES : LANE;
        const i32s lower = (LANE & s) != 0 ? LANE + LANES : LANE + s;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & s) continue;
            const u32s a = as<u32s>(v[i]), b = as<u32s>(v[i + s]);
            v[i] = as<f32s>(chosen(a, b, upper));
            v[i + s] = as<f32s>(chosen(a, b, lower));
        }
    }
}

// Sixteen rows of M [rows, K] from `row`, sixteen numbers of each from `k`; zeros where M ends
template <class Number>
static inline void sixteen(const Number* M, int rows, int K, int row, int k, f32s* v) {
    const int columns = std::min(LANES, K - k);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const Number* from = M + static_cast<long>(row + i) * K + k;
        v[i] = row + i >= rows ? f32s{} : columns == LANES ? widened(from) : some(from, columns);
    }
}

// scale M^T [K, rows]
template <class From, class To>
static void scaled_transpose(const From* M, int rows, int K, float scale, To* to) {
    for (int row = 0; row < rows; row += LANES)
        for (int k = 0; k < K; k += LANES) {
            f32s v[LANES];
            sixteen(M, rows, K, row, k, v);
            transpose(v);
            for (int c = 0; c < std::min(LANES, K - k); c++) {
                To* at = to + static_cast<long>(k + c) * rows + row;
                if (row + LANES <= rows) {
                    write(at, scale * v[c]);
                } else {
                    To last[LANES];
                    write(last, scale * v[c]);
                    std::copy_n(last, rows - row, at);
                }
            }
        }
}

extern "C" void scaled_transpose(const void* M, int from_narrow, int rows, int K, float scale, void* to, int narrow) {
    const auto wide = static_cast<const float*>(M);
    const auto half = static_cast<const bf16*>(M);
    if (from_narrow && narrow) scaled_transpose(half, rows, K, scale, static_cast<bf16*>(to));
    else if (from_narrow) scaled_transpose(half, rows, K, scale, static_cast<float*>(to));
    else if (narrow) scaled_transpose(wide, rows, K, scale, static_cast<bf16*>(to));
    else scaled_transpose(wide, rows, K, scale, static_cast<float*>(to));
}

// For several tokens: M by panels of sixteen rows, (k, row) of a panel at [k * 16 + row]
template <class Number>
static void in_panels(const Number* M, int rows, int K, float* to) {
    for (int row = 0; row < rows; row += LANES)
        for (int k = 0; k < K; k += LANES) {
            f32s v[LANES];
            sixteen(M, rows, K, row, k, v);
            transpose(v);
            for (int c = 0; c < std::min(LANES, K - k); c++, to += LANES) write(to, v[c]);
        }
}

// u [T, 16] = share x [T, K] times a panel
template <int T>
static void panel_times(const float* panel, int K, const float* x, long x_row, float share, float* u, long u_row) {
    f32s sums[T] = {};
    for (int k = 0; k < K; k++) {
        const f32s m = read<f32s>(panel + k * LANES);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sums[t] += m * x[t * x_row + k];
    }
    for (int t = 0; t < T; t++) write(u + t * u_row, share * sums[t]);
}

// y [T, V * 16] += u [T, r] times r rows of M, n apart, of which `columns` are there: V * 16 where `whole`, or fewer
template <int T, int V, bool whole, class Number>
static void rows_times(const Number* M, int n, int r, const float* u, long u_row, float* y, long y_row, int columns) {
    f32s sums[T][V];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) sums[t][v] = read<f32s>(y + t * y_row + v * LANES);
    for (int k = 0; k < r; k++) {
        f32s m[V];
        for (int v = 0; v < V; v++) {
            const Number* from = M + static_cast<long>(k) * n + v * LANES;
            m[v] = whole ? widened(from) : some(from, columns);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            for (int v = 0; v < V; v++) sums[t][v] += u[t * u_row + k] * m[v];
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) write(y + t * y_row + v * LANES, sums[t][v]);
}

template <class Number>
static void both_for(int tokens, const Change& c, int d_in, int d_out, float* panels, const float* x, float* u,
                     float* y) {
    const int in = up_to(d_in, LANES), r = static_cast<int>(c.r), out = up_to(d_out, LANES);
    const long u_row = up_to(r, LANES);
    const auto BT = reinterpret_cast<const Number*>(c.BT);
    const auto share = static_cast<float>(c.share);
    in_panels(reinterpret_cast<const Number*>(c.A), r, d_in, panels);
    for (int row = 0; row < r; row += LANES, panels += static_cast<long>(d_in) * LANES) {
        int t = 0;
        for (; t + 8 <= tokens; t += 8) panel_times<8>(panels, d_in, x + t * in, in, share, u + t * u_row + row, u_row);
        for (; t < tokens; t++) panel_times<1>(panels, d_in, x + t * in, in, share, u + t * u_row + row, u_row);
    }
    const auto add = [&](auto T, int t) {
        const float* u_ = u + t * u_row;
        float* y_ = y + static_cast<long>(t) * out;
        int n = 0;
        for (; n + 3 * LANES <= d_out; n += 3 * LANES)
            rows_times<T, 3, true>(BT + n, d_out, r, u_, u_row, y_ + n, out, 0);
        for (; n + LANES <= d_out; n += LANES) rows_times<T, 1, true>(BT + n, d_out, r, u_, u_row, y_ + n, out, 0);
        if (n < d_out) rows_times<T, 1, false>(BT + n, d_out, r, u_, u_row, y_ + n, out, d_out - n);
    };
    int t = 0;
    for (; t + 8 <= tokens; t += 8) add(std::integral_constant<int, 8>{}, t);
    for (; t < tokens; t++) add(std::integral_constant<int, 1>{}, t);
}

template <class Number>
static void to_floats(const Number* from, int n, float* to) {
    int d = 0;
    for (; d + LANES <= n; d += LANES) write(to + d, widened(from + d));
    if (d < n) write(to + d, some(from + d, n - d));
}

template <class Number>
static void from_floats(const float* from, int n, Number* to) {
    int d = 0;
    for (; d + LANES <= n; d += LANES) write(to + d, read<f32s>(from + d));
    if (d < n) {
        Number last[LANES];
        write(last, read<f32s>(from + d));
        std::copy_n(last, n - d, to + d);
    }
}

struct Run {  // tokens of a span, some at a time
    long token, count, span;
};

// The changes of span s are those from begins[s] to begins[s + 1]
template <class Number>
static void many_low_rank(const Number* x, Number* y, const Run* runs, int count, const long* begins,
                          const Change* changes, int d_in, int d_out, int largest_r, int threads) {
    long most = 1;
    for (int n = 0; n < count; n++) most = std::max(most, runs[n].count);
    const int in = up_to(d_in, LANES), r = up_to(largest_r, LANES), out = up_to(d_out, LANES);
#pragma omp parallel num_threads(std::min(threads, count)) if (threads > 1)
    {
        auto x_ = room<float>(most * in), u = room<float>(most * r + LANES), y_ = room<float>(most * out),
             panels = room<float>(most > 2 ? static_cast<long>(r) * in : 1);
#pragma omp for schedule(dynamic)
        for (int n = 0; n < count; n++) {
            const auto [token, tokens, span] = runs[n];
            if (begins[span] == begins[span + 1]) {
                std::fill_n(y + token * d_out, tokens * d_out, Number{});
                continue;
            }
            for (long t = 0; t < tokens; t++) to_floats(x + (token + t) * d_in, d_in, &x_[t * in]);
            std::fill_n(&y_[0], tokens * out, 0.0f);
            for (long c = begins[span]; c < begins[span + 1]; c++) {
                const Change& change = changes[c];
                const auto many = change.narrow ? both_for<bf16> : both_for<float>;
                const auto one = change.narrow ? both<bf16> : both<float>;
                if (tokens > 2) many(tokens, change, d_in, d_out, &panels[0], &x_[0], &u[0], &y_[0]);
                for (long t = 0; tokens <= 2 && t < tokens; t++)
                    one(change, d_in, d_out, &x_[t * in], &u[0], &y_[t * out]);
            }
            for (long t = 0; t < tokens; t++) from_floats(&y_[t * out], d_out, y + (token + t) * d_out);
        }
    }
}

extern "C" void many_low_rank_float32(const float* x, float* y, const Run* runs, int count, const long* begins,
                                      const Change* changes, int d_in, int d_out, int largest_r, int threads) {
    many_low_rank(x, y, runs, count, begins, changes, d_in, d_out, largest_r, threads);
}

extern "C" void many_low_rank_bfloat16(const bf16* x, bf16* y, const Run* runs, int count, const long* begins,
                                       const Change* changes, int d_in, int d_out, int largest_r, int threads) {
    many_low_rank(x, y, runs, count, begins, changes, d_in, d_out, largest_r, threads);
}

// Products with a weight that lies in panels ----------------------------------------------------------------------------

// A panel is 48 rows of the weight, column by column: number k of row n at [k * 48 + n], for bfloat16 pairs of
// numbers. Eight rows of x take each number of it once, from memory; more rows take it from the cache.
constexpr int PANEL_VECTORS = 3, PANEL_ROWS = PANEL_VECTORS * LANES;
constexpr int PANEL_DEPTH = 1024;  // numbers or pairs of a row at a time: a part of a panel that stays in the cache

static inline f32s added(f32s sum, float x, f32s w) { return sum + x * w; }
static inline f32s added(f32s sum, pair x, u32s w) { return dot(sum, u32s{} + x, w); }

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> { using type = f32s; };
template <>
struct VectorOf<pair> { using type = u32s; };

// sums [R, 48] = (with `add`, +=) x [R, K] times a part of a panel [K, 48]; the last of `rows` rows stands for those
// that are missing. The order of the additions does not depend on how many rows there are.
template <int R, class T>
static void panel_block(const T* x, long x_row, int rows, const T* panel, int K, float* sums, bool add) {
    using Vector = typename VectorOf<T>::type;
    f32s s[R][PANEL_VECTORS];
    const T* x_[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        x_[r] = x + std::min(r, rows - 1) * x_row;
        for (int v = 0; v < PANEL_VECTORS; v++) s[r][v] = add ? read<f32s>(sums + r * PANEL_ROWS + v * LANES) : f32s{};
    }
    for (int k = 0; k < K; k++, panel += PANEL_ROWS) {
        Vector w[PANEL_VECTORS];
        for (int v = 0; v < PANEL_VECTORS; v++) w[v] = read<Vector>(panel + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int v = 0; v < PANEL_VECTORS; v++) s[r][v] = added(s[r][v], x_[r][k], w[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int v = 0; v < PANEL_VECTORS; v++) write(sums + r * PANEL_ROWS + v * LANES, s[r][v]);
}

template <class T>
static void panel_product(const T* x, long x_row, int rows, const T* panel, int K, float* sums) {
    for (int k = 0; k < K; k += PANEL_DEPTH) {
        const int depth = std::min(PANEL_DEPTH, K - k);
        for (int row = 0; row < rows; row += 8) {
            const int here = rows - row;
            const auto block = here > 4 ? panel_block<8, T> : here > 1 ? panel_block<4, T> : panel_block<1, T>;
            block(x + row * x_row + k, x_row, here, panel + static_cast<long>(k) * PANEL_ROWS, depth,
                  sums + row * PANEL_ROWS, k > 0);
        }
    }
}

// y [rows, d_out] = x W^T + b + more; `b` [d_out] and `more` [rows, d_out] may be null; the sum is rounded once
template <class T, class Number>
static void panels_product(const T* x, const T* panels, const Number* b, const Number* more, Number* y, int rows,
                           int K, int d_out, int threads) {
    const int count = (d_out + PANEL_ROWS - 1) / PANEL_ROWS;
#pragma omp parallel num_threads(std::min(threads, count)) if (threads > 1)
    {
        const auto sums = room<float>(static_cast<long>(up_to(rows, 8)) * PANEL_ROWS);
#pragma omp for schedule(static)
        for (int panel = 0; panel < count; panel++) {
            panel_product(x, K, rows, panels + static_cast<long>(panel) * K * PANEL_ROWS, K, sums.get());
            const int first = panel * PANEL_ROWS, last = std::min(d_out, first + PANEL_ROWS);
            for (long row = 0; row < rows; row++)
                for (int n = first; n < last; n += LANES) {
                    f32s z = read<f32s>(&sums[row * PANEL_ROWS + n - first]);
                    const long at = row * d_out + n;
                    if (n + LANES <= last) {
                        if (b) z += widened(b + n);
                        if (more) z += widened(more + at);
                        write(y + at, z);
                    } else {
                        if (b) z += some(b + n, last - n);
                        if (more) z += some(more + at, last - n);
                        Number rest[LANES];
                        write(rest, z);
                        std::copy_n(rest, last - n, y + at);
                    }
                }
        }
    }
}

extern "C" void panels_float32(const float* x, const float* panels, const float* b, const float* more, float* y,
                               int rows, int d_in, int d_out, int threads) {
    panels_product(x, panels, b, more, y, rows, d_in, d_out, threads);
}

extern "C" void panels_bfloat16(const bf16* x, const bf16* panels, const bf16* b, const bf16* more, bf16* y, int rows,
                                int d_in, int d_out, int threads) {
    panels_product(reinterpret_cast<const pair*>(x), reinterpret_cast<const pair*>(panels), b, more, y, rows, d_in / 2,
                   d_out, threads);
}

// Whether this processor multiplies panels faster than oneDNN: by vectors of 64 bytes, and without tiles (AMX)
extern "C" int panels_serve_float32() {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

extern "C" int panels_serve_bfloat16() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}
