# The one list of CUDA sources: for nvcc in cuda/, for the CPU in testing/.
set(YOPO_CUDA_SOURCES fused_16.cu fused_32.cu fused_160.cu general.cu patches.cu select.cu update.cu)
