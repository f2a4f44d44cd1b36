#include "cuda/fused_launch.h"

namespace yopo::cuda {

Status launch_fused_16(const FusedArgs& args, int blocks, CudaStream stream) {
  return launch_fused_row<0>(args, blocks, stream);
}

Status prepare_fused_16() { return prepare_fused_row<0>(); }

}  // namespace yopo::cuda
