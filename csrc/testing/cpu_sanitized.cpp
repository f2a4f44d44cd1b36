// Runs the CPU kernels on random geometries under whatever sanitizer it was built with, tensors in exactly sized
// blocks, on several threads, and holds them against plain loops. Exits with 1 on a difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "core/activations.h"
#include "core/projection.h"
#include "launch.h"

using namespace yopo;

namespace {

void on_threads(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  constexpr int64_t kThreads = 3;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back([=] { body(tasks * i / kThreads, tasks * (i + 1) / kThreads, context); });
  for (auto& t : threads) t.join();
}

struct Case {
  Params p{};
  std::vector<double> x, eta, costate, weight, bias, eta_out, output, grad_weight, grad_bias;
  double constants[4] = {0.02, 0.05, 0.0, 1.0};

  // Plain loops over the definition; one pixel's pre-activation.
  double pre(const std::vector<double>& u, int64_t b, int64_t k, int64_t oh, int64_t ow) const {
    const int64_t in = p.channels / p.groups, group = k / (p.kernels / p.groups);
    double z = bias[static_cast<size_t>(k)];
    each_tap(oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
      for (int64_t c = 0; c < in; ++c)
        z += weight[at4(k, c, 0, tap, in, 1, p.rows * p.cols)] *
             u[at4(b, group * in + c, h, w, p.channels, p.height, p.width)];
    });
    return z;
  }
  static size_t at4(int64_t a, int64_t b, int64_t c, int64_t d, int64_t B, int64_t C, int64_t D) {
    return static_cast<size_t>(((a * B + b) * C + c) * D + d);
  }
  template <class F>
  void each_tap(int64_t oh, int64_t ow, const F& f) const {
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t s = 0; s < p.cols; ++s) {
        const int64_t h = oh * p.stride[0] + r * p.dilation[0] - p.padding[0];
        const int64_t w = ow * p.stride[1] + s * p.dilation[1] - p.padding[1];
        if (h >= 0 && h < p.height && w >= 0 && w < p.width) f(h, w, r * p.cols + s);
      }
  }
  template <class F>
  void each_output(const F& f) const {
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t k = 0; k < p.kernels; ++k)
        for (int64_t oh = 0; oh < p.out_height; ++oh)
          for (int64_t ow = 0; ow < p.out_width; ++ow)
            f(b, k, oh, ow, at4(b, k, oh, ow, p.kernels, p.out_height, p.out_width));
  }
  double slope(double z) const { return p.affine() ? 1.0 : Silu::slope(z, 0.0); }

  bool check() {
    std::vector<double> e = eta, u(x.size());
    const int64_t in = p.channels / p.groups;
    for (int64_t step = 0; step < p.steps; ++step) {
      for (size_t i = 0; i < x.size(); ++i) u[i] = p.mask_start ? clamp(x[i] + e[i], 0.0, 1.0) : x[i] + e[i];
      std::vector<double> g(x.size(), 0.0);
      each_output([&](int64_t b, int64_t k, int64_t oh, int64_t ow, size_t i) {
        const double q = costate[i] * slope(p.affine() ? 0.0 : pre(u, b, k, oh, ow));
        const int64_t group = k / (p.kernels / p.groups);
        each_tap(oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
          for (int64_t c = 0; c < in; ++c)
            g[at4(b, group * in + c, h, w, p.channels, p.height, p.width)] +=
                q * weight[at4(k, c, 0, tap, in, 1, p.rows * p.cols)];
        });
      });
      for (size_t i = 0; i < x.size(); ++i) {
        const Interval<double> t = admissible_interval(x[i], constants[1], 0.0, 1.0);
        const double gi = p.mask_start && step == 0 ? masked(g[i], e[i], t.lower, t.upper) : g[i];
        e[i] = project(e[i] + signed_step(gi, constants[0]), t.a, t.b);
      }
    }
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) worst = std::fmax(worst, std::fabs(e[i] - eta_out[i]));
    for (size_t i = 0; i < x.size(); ++i) u[i] = x[i] + eta_out[i];
    std::vector<double> gw(weight.size(), 0.0), gb(bias.size(), 0.0);
    each_output([&](int64_t b, int64_t k, int64_t oh, int64_t ow, size_t i) {
      const double z = pre(u, b, k, oh, ow), q = costate[i] * slope(z);
      worst = std::fmax(worst, std::fabs(output[i] - (p.affine() ? z : Silu::value(z, 0.0))));
      gb[static_cast<size_t>(k)] += q;
      const int64_t group = k / (p.kernels / p.groups);
      each_tap(oh, ow, [&](int64_t h, int64_t w, int64_t tap) {
        for (int64_t c = 0; c < in; ++c)
          gw[at4(k, c, 0, tap, in, 1, p.rows * p.cols)] +=
              q * u[at4(b, group * in + c, h, w, p.channels, p.height, p.width)];
      });
    });
    for (size_t i = 0; i < gw.size(); ++i) worst = std::fmax(worst, std::fabs(gw[i] - grad_weight[i]));
    for (size_t i = 0; i < gb.size(); ++i) worst = std::fmax(worst, std::fabs(gb[i] - grad_bias[i]));
    return worst < 1e-8;
  }
};

void contiguous(int64_t* strides, int64_t c, int64_t h, int64_t w) {
  strides[0] = c * h * w, strides[1] = h * w, strides[2] = w, strides[3] = 1;
}

}  // namespace

int main() {
  std::mt19937 random(7);
  const auto pick = [&](int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(random); };
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(0, 1);
  const auto fill = [&](std::vector<double>& v, int64_t n, auto&& draw) {
    v.resize(static_cast<size_t>(n));
    for (double& d : v) d = draw();
  };
  int checked = 0;
  while (checked < 60) {
    Case c;
    Params& p = c.p;
    p.groups = pick(1, 4) == 1 ? 2 : 1;
    p.batch = pick(1, 40), p.channels = p.groups * pick(1, 5), p.kernels = p.groups * pick(1, 9);
    p.height = pick(1, 19), p.width = pick(1, 19), p.rows = pick(1, 5), p.cols = pick(1, 5);
    for (int i = 0; i < 2; ++i) p.stride[i] = pick(1, 3), p.padding[i] = pick(0, 3), p.dilation[i] = pick(1, 2);
    const int64_t span_h = p.height + 2 * p.padding[0] - p.dilation[0] * (p.rows - 1) - 1;
    const int64_t span_w = p.width + 2 * p.padding[1] - p.dilation[1] * (p.cols - 1) - 1;
    if (span_h < 0 || span_w < 0) continue;
    p.out_height = span_h / p.stride[0] + 1, p.out_width = span_w / p.stride[1] + 1;
    p.compute = p.costate_dtype = DType::kFloat64;
    p.activation = pick(0, 1) == 0 ? Activation::kIdentity : Activation::kSilu;
    p.steps = pick(0, 3);
    p.norm = Norm::kLinf, p.mask_start = pick(0, 1) == 1;
    p.step_size = {&c.constants[0], 1}, p.eps = {&c.constants[1], 1}, p.lo = {&c.constants[2], 1},
    p.hi = {&c.constants[3], 1};
    const int64_t pixels = p.channels * p.height * p.width, outputs = p.kernels * p.out_height * p.out_width;
    fill(c.x, p.batch * pixels, [&] { return uniform(random); });
    fill(c.eta, p.batch * pixels, [&] { return 0.1 * uniform(random) - 0.05; });
    fill(c.costate, p.batch * outputs, [&] { return normal(random); });
    fill(c.weight, p.kernels * p.channels / p.groups * p.rows * p.cols, [&] { return normal(random); });
    fill(c.bias, p.kernels, [&] { return normal(random); });
    c.eta_out.resize(c.x.size()), c.output.resize(c.costate.size());
    c.grad_weight.resize(c.weight.size()), c.grad_bias.resize(c.bias.size());
    p.x = c.x.data(), p.eta = c.eta.data(), p.costate = c.costate.data(), p.weight = c.weight.data(),
    p.bias = c.bias.data();
    p.eta_out = c.eta_out.data(), p.output = c.output.data(), p.grad_weight = c.grad_weight.data(),
    p.grad_bias = c.grad_bias.data();
    contiguous(p.x_strides, p.channels, p.height, p.width);
    contiguous(p.eta_strides, p.channels, p.height, p.width);
    contiguous(p.eta_out_strides, p.channels, p.height, p.width);
    contiguous(p.costate_strides, p.kernels, p.out_height, p.out_width);
    contiguous(p.output_strides, p.kernels, p.out_height, p.out_width);
    const Status status = first_layer_update_cpu(p, {on_threads});
    if (!status.ok() || !c.check()) {
      std::printf("case %d differs (%s)\n", checked, status.ok() ? "values" : status.error);
      return 1;
    }
    ++checked;
  }
  std::printf("%d cases agree (%s)\n", checked, cpu_isa());
  return 0;
}
