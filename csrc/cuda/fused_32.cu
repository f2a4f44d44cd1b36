#include "cuda/fused_launch.h"

namespace yopo::cuda {

Status launch_fused_32(const FusedArgs& args, int blocks, CudaStream stream) {
  return launch_fused_row<1>(args, blocks, stream);
}

Status prepare_fused_32() { return prepare_fused_row<1>(); }

}  // namespace yopo::cuda
