#include "cuda/fused_launch.h"

namespace yopo::cuda {

Status launch_fused_160(const FusedArgs& args, int blocks, CudaStream stream) {
  return launch_fused_row<2>(args, blocks, stream);
}

Status prepare_fused_160() { return prepare_fused_row<2>(); }

}  // namespace yopo::cuda
