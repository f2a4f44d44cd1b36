// The CUDA kernels' own source on the CPU, for pytest: memory by address, so that arrays of any dtype and strides will
// do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <vector>

#include "cuda/select.h"
#include "testing/probes.h"

namespace py = pybind11;
using namespace yopo;

namespace {

struct OwnedParams {
  Params params{};
  std::vector<double> constants[6];

  explicit OwnedParams(const py::dict& d) {
    auto integer = [&](const char* key) { return d[key].cast<int64_t>(); };
    auto address = [&](const char* key) { return reinterpret_cast<void*>(d[key].cast<uintptr_t>()); };
    auto list = [&](const char* key, int64_t* to) {
      const auto values = d[key].cast<std::vector<int64_t>>();
      for (size_t i = 0; i < values.size(); ++i) to[i] = values[i];
    };
    Params& p = params;
    p.batch = integer("batch"), p.channels = integer("channels"), p.height = integer("height"),
    p.width = integer("width");
    p.kernels = integer("kernels"), p.out_height = integer("out_height"), p.out_width = integer("out_width");
    p.rows = integer("rows"), p.cols = integer("cols"), p.groups = integer("groups");
    list("stride", p.stride), list("padding", p.padding), list("dilation", p.dilation);
    p.compute = DType(integer("compute")), p.costate_dtype = DType(integer("costate_dtype"));
    p.x = address("x"), p.eta = address("eta"), p.costate = address("costate"), p.weight = address("weight");
    p.bias = address("bias"), p.scale = address("scale"), p.shift = address("shift");
    p.eta_out = address("eta_out"), p.output = address("output"), p.grad_weight = address("grad_weight");
    p.grad_bias = address("grad_bias"), p.grad_scale = address("grad_scale"), p.grad_shift = address("grad_shift");
    list("x_strides", p.x_strides), list("eta_strides", p.eta_strides), list("eta_out_strides", p.eta_out_strides);
    list("costate_strides", p.costate_strides), list("output_strides", p.output_strides);
    p.activation = Activation(integer("activation")), p.norm = Norm(integer("norm"));
    p.negative_slope = d["negative_slope"].cast<double>();
    p.steps = integer("steps"), p.allow_tf32 = d["allow_tf32"].cast<bool>();
    p.mask_start = d["mask_start"].cast<bool>();
    const char* names[6] = {"mean", "std", "step_size", "eps", "lo", "hi"};
    ChannelConstant* targets[6] = {&p.mean, &p.std, &p.step_size, &p.eps, &p.lo, &p.hi};
    for (int i = 0; i < 6; ++i) {
      constants[i] = d[names[i]].cast<std::vector<double>>();
      *targets[i] = {constants[i].data(), int(constants[i].size())};
    }
  }
};

void run(const py::dict& d) {
  OwnedParams owned(d);
  const int64_t bytes = first_layer_update_cuda_workspace(owned.params);
  std::vector<char> workspace(size_t(bytes) + 256, char(0xFF));  // NaN: a launch may not read what none has written
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
  const Status status = first_layer_update_cuda(owned.params, aligned, nullptr);
  if (!status.ok()) throw std::runtime_error(status.error);
}

py::dict describe(const py::dict& d) {
  OwnedParams owned(d);
  const cuda::Selection s = cuda::select_kernel(owned.params, cuda::device_limits());
  py::dict out;
  out["variant"] = cuda_variant(owned.params);
  out["resident"] = s.resident;
  out["general"] = s.general();
  out["shared_bytes"] = std::vector<int>{s.move.shared_bytes, s.results.shared_bytes};
  out["tile_rows"] = std::vector<int>{s.move.tile_rows, s.results.tile_rows};
  out["blocks"] = std::vector<int>{s.move_blocks, s.results_blocks, s.general_blocks};
  out["workspace"] = first_layer_update_cuda_workspace(owned.params);
  return out;
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  py::register_exception<emulation::Failure>(m, "Failure", PyExc_RuntimeError);
  m.def("run", &run);
  m.def("describe", &describe);
  m.def("set_schedule",
        [](int schedule, uint64_t seed) { emulation::set_schedule(emulation::Schedule(schedule), seed); });
  m.def("remove_barrier", &emulation::remove_barrier);
  m.def("set_limits",
        [](int block, int processor, int processors) { cuda::set_device_limits({block, processor, processors}); });
  m.def("tuning_table", [] {
    py::list rows;
    for (const cuda::TuningRow& r : cuda::kTuningTable) rows.append(py::make_tuple(r.name, r.columns(), r.reason));
    return rows;
  });
  m.def("probe", [](const std::string& name) { probe::run(name); });
  m.def("multiply", &probe::multiply);
}
