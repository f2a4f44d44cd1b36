#include "emulation/primitives.h"

namespace yopo::cuda {
namespace {
DeviceLimits current{227 * 1024, 228 * 1024, 3};  // few processors, so that blocks take several images
}

DeviceLimits device_limits() { return current; }
void set_device_limits(const DeviceLimits& limits) { current = limits; }

}  // namespace yopo::cuda
