// Layer 2. The operator's arguments (schema: yopo_ext/kernels/ops.py) as Params, and its results as tensors. LibTorch
// stable ABI only.
//
// Shapes, devices and value ranges were checked in Python; what is checked here is what memory safety rests on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/params.h"

namespace yopo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Owns everything a Params points to while a kernel runs.
class Arguments {
 public:
  Arguments(const Tensor& x, const Tensor& eta, const Tensor& costate, const Tensor& weight,
            const std::optional<Tensor>& bias, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
            std::vector<double> mean, std::vector<double> std, const std::vector<int64_t>& stride,
            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
            int64_t activation, double negative_slope, int64_t steps, std::vector<double> step_size,
            std::vector<double> eps, std::vector<double> lo, std::vector<double> hi, int64_t norm, bool mask_start,
            bool need_output, bool need_weight_grad, bool allow_tf32)
      : weight_(weight), inputs_{x, eta, costate, contiguous(weight)}, constants_{std::move(mean),      std::move(std),
                                                                                  std::move(step_size), std::move(eps),
                                                                                  std::move(lo),        std::move(hi)} {
    STD_TORCH_CHECK(x.dim() == 4 && eta.dim() == 4 && costate.dim() == 4 && weight.dim() == 4,
                    "yopo_ext::first_layer_update: x, eta, costate and weight must have 4 dimensions");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "yopo_ext::first_layer_update: stride, padding and dilation must have 2 values");
    Params& p = params;
    p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
    p.kernels = weight.size(0), p.rows = weight.size(2), p.cols = weight.size(3);
    p.out_height = costate.size(2), p.out_width = costate.size(3);
    p.groups = groups;
    for (int i = 0; i < 2; ++i) {
      const auto at = static_cast<size_t>(i);
      p.stride[i] = stride[at], p.padding[i] = padding[at], p.dilation[i] = dilation[at];
      STD_TORCH_CHECK(p.stride[i] > 0 && p.dilation[i] > 0 && p.padding[i] >= 0,
                      "yopo_ext::first_layer_update: stride and dilation must be > 0, padding >= 0");
      const int64_t in = i == 0 ? p.height : p.width, kernel = i == 0 ? p.rows : p.cols;
      const int64_t span = in + 2 * p.padding[i] - p.dilation[i] * (kernel - 1) - 1;
      STD_TORCH_CHECK(
          kernel > 0 && span >= 0 && (i == 0 ? p.out_height : p.out_width) == span / p.stride[i] + 1,
          "yopo_ext::first_layer_update: costate's size does not follow from x, weight, stride, padding and dilation");
    }
    STD_TORCH_CHECK(groups > 0 && p.channels % groups == 0 && p.kernels % groups == 0 &&
                        weight.size(1) == p.channels / groups && costate.size(0) == p.batch &&
                        costate.size(1) == p.kernels,
                    "yopo_ext::first_layer_update: shapes of x, weight, costate and groups do not fit together");
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(eta.size(i) == x.size(i), "yopo_ext::first_layer_update: eta must have x's shape");
    p.compute = dtype_of(x, "x");
    p.costate_dtype = dtype_of(costate, "costate");
    STD_TORCH_CHECK(p.compute == DType::kFloat32 || p.compute == DType::kFloat64,
                    "yopo_ext::first_layer_update: x must be float32 or float64");
    STD_TORCH_CHECK(dtype_of(eta, "eta") == p.compute && dtype_of(weight, "weight") == p.compute,
                    "yopo_ext::first_layer_update: eta and weight must have x's dtype");
    p.x = x.data_ptr(), p.eta = eta.data_ptr(), p.costate = costate.data_ptr(), p.weight = inputs_[3].data_ptr();
    p.bias = parameter(bias), p.scale = parameter(scale), p.shift = parameter(shift);
    p.mean = constant(0), p.std = constant(1), p.step_size = constant(2), p.eps = constant(3);
    p.lo = constant(4), p.hi = constant(5);
    STD_TORCH_CHECK(p.mean.count == p.std.count || p.mean.present() == p.std.present(),
                    "yopo_ext::first_layer_update: mean and std go together");
    for (int i = 2; i < 6; ++i)
      STD_TORCH_CHECK(constant(i).present(), "yopo_ext::first_layer_update: step_size, eps, lo and hi need a value");
    STD_TORCH_CHECK(
        activation >= 0 && activation <= static_cast<int64_t>(Activation::kSilu) && (norm == 0 || norm == 1),
        "yopo_ext::first_layer_update: unknown activation or norm");
    p.activation = static_cast<Activation>(activation);
    p.negative_slope = negative_slope;
    p.steps = steps;
    p.norm = static_cast<Norm>(norm);
    p.mask_start = mask_start;
    p.allow_tf32 = allow_tf32;
    // Results: eta' like x, output like the costate, gradients contiguous like the contiguous weight.
    eta_out_ = torch::stable::empty_like(x);
    output_ = need_output ? torch::stable::empty_like(costate) : torch::stable::new_empty(costate, {0});
    grad_weight_ = need_weight_grad ? torch::stable::empty_like(inputs_[3]) : torch::stable::new_empty(x, {0});
    grad_bias_ = grad_like(bias, need_weight_grad, x);
    grad_scale_ = grad_like(scale, need_weight_grad, x);
    grad_shift_ = grad_like(shift, need_weight_grad, x);
    p.eta_out = eta_out_.data_ptr();
    p.output = need_output ? output_.data_ptr() : nullptr;
    p.grad_weight = need_weight_grad ? grad_weight_.data_ptr() : nullptr;
    p.grad_bias = need_weight_grad && bias ? grad_bias_.data_ptr() : nullptr;
    p.grad_scale = need_weight_grad && scale ? grad_scale_.data_ptr() : nullptr;
    p.grad_shift = need_weight_grad && shift ? grad_shift_.data_ptr() : nullptr;
    strides(x, p.x_strides), strides(eta, p.eta_strides), strides(costate, p.costate_strides);
    strides(eta_out_, p.eta_out_strides);
    strides(need_output ? output_ : costate, p.output_strides);
  }

  Arguments(const Arguments&) = delete;  // params points into this object
  Arguments& operator=(const Arguments&) = delete;

  Results results() const {
    Tensor grad_weight = grad_weight_;
    if (params.grad_weight != nullptr && !weight_.is_contiguous()) {
      grad_weight = torch::stable::empty_like(weight_);
      torch::stable::copy_(grad_weight, grad_weight_);
    }
    return {eta_out_, output_, grad_weight, grad_bias_, grad_scale_, grad_shift_};
  }

  bool all_on_cuda(int32_t device) const {
    for (const Tensor& t : inputs_)
      if (!t.is_cuda() || t.get_device_index() != device) return false;
    return true;
  }

  bool empty() const { return params.batch == 0 || params.channels == 0 || params.kernels == 0; }

  Params params{};

 private:
  static Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

  static DType dtype_of(const Tensor& t, const char* name) {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::Double:
        return DType::kFloat64;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      default:
        STD_TORCH_CHECK(false, "yopo_ext::first_layer_update: unsupported dtype of ", name);
    }
  }

  static void strides(const Tensor& t, int64_t* to) {
    for (int i = 0; i < 4; ++i) to[i] = t.stride(i);
  }

  const void* parameter(const std::optional<Tensor>& t) {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(
        t->dim() == 1 && t->size(0) == params.kernels && dtype_of(*t, "bias, scale or shift") == params.compute,
        "yopo_ext::first_layer_update: bias, scale and shift must have one value per output channel and x's dtype");
    inputs_.push_back(contiguous(*t));
    return inputs_.back().data_ptr();
  }

  ChannelConstant constant(int index) const {
    const std::vector<double>& v = constants_[index];
    STD_TORCH_CHECK(v.size() <= 1 || static_cast<int64_t>(v.size()) == params.channels,
                    "yopo_ext::first_layer_update: constants need one value or one per input channel");
    return {v.data(), static_cast<int>(v.size())};
  }

  static Tensor grad_like(const std::optional<Tensor>& parameter, bool wanted, const Tensor& x) {
    return wanted && parameter.has_value() ? torch::stable::empty_like(*parameter) : torch::stable::new_empty(x, {0});
  }

  Tensor weight_;
  std::vector<Tensor> inputs_;  // kept alive, contiguous where Params says so
  std::vector<double> constants_[6];
  Tensor eta_out_, output_, grad_weight_, grad_bias_, grad_scale_, grad_shift_;
};

// The operator's signature, once: parses the arguments and hands them on.
template <class Result,
          Result (*Body)(const Arguments& arguments, const Tensor& x, const Tensor& costate, const Tensor& weight)>
Result with_arguments(const Tensor& x, const Tensor& eta, const Tensor& costate, const Tensor& weight,
                      std::optional<Tensor> bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
                      std::vector<double> mean, std::vector<double> std, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, int64_t activation,
                      double negative_slope, int64_t steps, std::vector<double> step_size, std::vector<double> eps,
                      std::vector<double> lo, std::vector<double> hi, int64_t norm, bool mask_start, bool need_output,
                      bool need_weight_grad, bool allow_tf32) {
  const Arguments arguments(x, eta, costate, weight, bias, scale, shift, std::move(mean), std::move(std), stride,
                            padding, dilation, groups, activation, negative_slope, steps, std::move(step_size),
                            std::move(eps), std::move(lo), std::move(hi), norm, mask_start, need_output,
                            need_weight_grad, allow_tf32);
  return Body(arguments, x, costate, weight);
}

}  // namespace yopo
