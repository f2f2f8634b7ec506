// Launches that overlap: programmatic dependent launch.
#pragma once

namespace kakeya {

// Launches of a layer overlap from compute capability 9.0 on (programmatic dependent launch, crates/ffi/src/driver.rs).
// The launch behind this one on its stream may begin: it waits by itself for what it needs of this one.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the launch before this one has ended and what it wrote can be seen. Every thread of a kernel that may begin
// early comes here, or else the end of this launch would not mean that the one before it has ended.
__device__ __forceinline__ void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace kakeya
