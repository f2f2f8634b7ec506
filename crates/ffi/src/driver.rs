//! The CUDA driver: one device's primary context, the embedded kernels, launches.
//!
//! libcuda is looked for at run time, so the library loads and serves the CPU where there is none. Everything is done in the
//! device's primary context, the one that torch and the CUDA runtime use: their pointers and streams are valid in it.

use std::ffi::{CString, c_void};
use std::mem::{MaybeUninit, size_of};
use std::ptr::null_mut;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    self, CUdevice_attribute, CUdeviceptr, CUfunction, CUfunction_attribute, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUpointer_attribute, CUresult,
};

use crate::checks::Extent;
use crate::error::{Outcome, refuse};
use crate::status::kakeya_status::*;

/// What `make kernels` compiled and build.rs embedded.
mod images {
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// Targets of the embedded kernels, such as "sm_80 sm_90 compute_80"; empty without kernels.
pub(crate) const ARCHS: &str = images::ARCHS;

/// CUDA 12.4, the first driver whose graphs are known to keep programmatic dependent launches.
const OVERLAPS_FROM: i32 = 12_040;

/// A driver's refusal in words.
fn driver<T>(what: &str, outcome: Result<T, DriverError>) -> Outcome<T> {
    match outcome {
        Ok(value) => Ok(value),
        Err(DriverError(
            CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
        )) => {
            refuse!(KAKEYA_ERR_NO_KERNELS, "{what}: this GPU is none of those the kernels are for ({ARCHS})")
        }
        // Kernels as PTX are compiled by the driver, which knows the PTX of its own time and before.
        Err(DriverError(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION)) => refuse!(
            KAKEYA_ERR_NO_KERNELS,
            "{what}: the CUDA driver is too old to compile the kernels for this GPU, which is none of those they were \
             compiled for ({ARCHS}); a newer driver will do"
        ),
        Err(error) => refuse!(KAKEYA_ERR_CUDA, "{what}: {error:?}"),
    }
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    function: CUfunction,
    /// Threads of a block: the kernel's launch bound.
    pub threads: u32,
    /// Dynamic shared memory of a launch, bytes.
    pub shared: u32,
}

/// A device with the kernels loaded.
pub(crate) struct Device {
    ordinal: i32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    memory: Vec<CUdeviceptr>,
    pub multiprocessors: u32,
    /// Whether a launch may begin before the one before it has ended.
    overlaps: bool,
}

/// The primary context is current on this thread until this is dropped; then whatever was current before.
struct Current;

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = MaybeUninit::uninit();
        // SAFETY: undoes the push that made this value; a failure leaves nothing to mend.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(popped.as_mut_ptr()) };
    }
}

impl Device {
    /// Opens device `ordinal` and loads the kernels.
    pub fn new(ordinal: i32) -> Outcome<Self> {
        if images::IMAGES.is_empty() {
            return refuse!(
                KAKEYA_ERR_NO_KERNELS,
                "this libkakeya was built without kernels; build it with KAKEYA_KERNELS (`make kernels`)"
            );
        }
        // SAFETY: only tries to load libcuda.
        if !unsafe { sys::is_culib_present() } {
            return refuse!(KAKEYA_ERR_NO_CUDA, "no CUDA driver: libcuda.so was not found");
        }
        if let Err(error) = result::init() {
            return refuse!(KAKEYA_ERR_NO_CUDA, "the CUDA driver does not start: {error:?}");
        }
        let count = driver("counting devices", result::device::get_count())?;
        if !(0..count).contains(&ordinal) {
            return refuse!(
                KAKEYA_ERR_WRONG_DEVICE,
                "device is {ordinal}; valid: 0..={} (there are {count})",
                count - 1
            );
        }
        let device = driver("opening the device", result::device::get(ordinal))?;
        // SAFETY: a device of result::device::get; released in drop.
        let context = driver("its primary context", unsafe { result::primary_ctx::retain(device) })?;
        let mut this = Self {
            ordinal,
            device,
            context,
            modules: Vec::new(),
            memory: Vec::new(),
            multiprocessors: 0,
            overlaps: false,
        };
        let _current = this.current()?;
        this.multiprocessors =
            this.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let major = this.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let mut version = 0;
        // SAFETY: writes one int.
        driver("the driver's version", unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
        this.overlaps = major >= 9 && version >= OVERLAPS_FROM;
        for image in images::IMAGES {
            // SAFETY: a whole fat binary of nvcc, aligned (build.rs).
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
            this.modules.push(driver("loading the kernels", module)?);
        }
        Ok(this)
    }

    fn current(&self) -> Outcome<Current> {
        // SAFETY: the context is retained as long as self lives; Current pops it.
        driver("making the context current", unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result())?;
        Ok(Current)
    }

    fn attribute(&self, attribute: CUdevice_attribute) -> Outcome<i32> {
        // SAFETY: a device of result::device::get.
        driver("asking the device", unsafe { result::device::get_attribute(self.device, attribute) })
    }

    /// A kernel by its name, ready for `shared` bytes of dynamic shared memory.
    pub fn kernel(&self, name: &str, shared: usize) -> Outcome<Kernel> {
        let _current = self.current()?;
        for module in &self.modules {
            let symbol = CString::new(name).expect("a name has no NUL");
            // SAFETY: a loaded module, not unloaded before drop.
            let Ok(function) = (unsafe { result::module::get_function(*module, symbol) }) else { continue };
            // SAFETY: a function of a loaded module.
            let threads = unsafe {
                result::function::get_function_attribute(
                    function,
                    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
                )
            };
            let most = self
                .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize;
            if shared > most {
                return refuse!(
                    KAKEYA_ERR_UNSUPPORTED,
                    "{name} needs {shared} bytes of shared memory; this GPU has {most}"
                );
            }
            // SAFETY: as above; the size is within the device's limit.
            let set = unsafe {
                result::function::set_function_attribute(
                    function,
                    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared as i32,
                )
            };
            driver(name, set)?;
            return Ok(Kernel { function, threads: driver(name, threads)? as u32, shared: shared as u32 });
        }
        refuse!(KAKEYA_ERR_NO_KERNELS, "{name} is not among the kernels of this libkakeya")
    }

    /// A global variable of the kernels, copied as u32: from each module that has it, one after the other.
    pub fn global(&self, name: &str) -> Outcome<Vec<u32>> {
        let _current = self.current()?;
        let mut values = Vec::new();
        for module in &self.modules {
            let symbol = CString::new(name).expect("a name has no NUL");
            // SAFETY: a loaded module, not unloaded before drop.
            let Ok((address, bytes)) = (unsafe { result::module::get_global(*module, symbol) }) else {
                continue;
            };
            let mut found = vec![0_u32; bytes / size_of::<u32>()];
            // SAFETY: the variable has these bytes.
            driver(name, unsafe { result::memcpy_dtoh_sync(&mut found, address) })?;
            values.append(&mut found);
        }
        Ok(values)
    }

    /// How many blocks of a kernel one multiprocessor holds at once.
    pub fn occupancy(&self, kernel: &Kernel) -> Outcome<u32> {
        let _current = self.current()?;
        // SAFETY: a function of a loaded module.
        let blocks = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(
                kernel.function,
                kernel.threads as i32,
                kernel.shared as usize,
            )
        };
        Ok(driver("occupancy", blocks)? as u32)
    }

    /// Refuses arrays that do not begin in memory that this device reaches: of this device, managed, or pinned on the host.
    /// A question to the driver's own tables, which waits for nothing and may be asked while a graph is captured.
    pub fn check_memory(&self, arrays: &[Extent]) -> Outcome {
        let _current = self.current()?;
        for array in arrays.iter().filter(|array| array.start != array.end) {
            let address = array.start as CUdeviceptr;
            let mut ordinal = 0_i32;
            // SAFETY: the attribute is an int; the address is only looked up.
            let asked = unsafe {
                sys::cuPointerGetAttribute(
                    (&raw mut ordinal).cast(),
                    CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                    address,
                )
            };
            // Of other answers than these two nothing is concluded: a launch then says what is wrong.
            if asked == CUresult::CUDA_ERROR_INVALID_VALUE {
                return refuse!(
                    KAKEYA_ERR_WRONG_DEVICE,
                    "{} is at {address:#x}, which is no memory that CUDA knows; valid: memory of device {}",
                    array.name,
                    self.ordinal
                );
            }
            let elsewhere = asked == CUresult::CUDA_SUCCESS && ordinal >= 0 && ordinal != self.ordinal;
            if elsewhere && Self::only_there(address) {
                return refuse!(
                    KAKEYA_ERR_WRONG_DEVICE,
                    "{} is memory of device {ordinal}; valid: memory of device {}",
                    array.name,
                    self.ordinal
                );
            }
        }
        Ok(())
    }

    /// Whether an address of another device is that device's own memory: neither managed nor pinned on the host.
    fn only_there(address: CUdeviceptr) -> bool {
        let (mut kind, mut managed) = (0_u32, 0_u32);
        // SAFETY: both attributes are of 4 bytes at most; the address is only looked up.
        let asked = unsafe {
            [
                sys::cuPointerGetAttribute(
                    (&raw mut kind).cast(),
                    CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                    address,
                ),
                sys::cuPointerGetAttribute(
                    (&raw mut managed).cast(),
                    CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
                    address,
                ),
            ]
        };
        asked == [CUresult::CUDA_SUCCESS; 2]
            && kind == sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32
            && managed == 0
    }

    /// Copies `bytes` to memory of the device that lives as long as self.
    pub fn upload(&mut self, bytes: &[u8]) -> Outcome<CUdeviceptr> {
        let _current = self.current()?;
        // SAFETY: freed in drop.
        let address = driver("allocating tables", unsafe { result::malloc_sync(bytes.len()) })?;
        self.memory.push(address);
        // SAFETY: the allocation has this size.
        driver("copying tables", unsafe { result::memcpy_htod_sync(address, bytes) })?;
        Ok(address)
    }

    /// Launches a kernel on a stream of the primary context. `arguments` point to the kernel's parameters in order. Does
    /// not wait, so it may be captured in a graph. `early`: the kernel may begin before the launch before it has ended
    /// (it waits by itself where it must: `await_previous` of kernels/overlap.cuh).
    ///
    /// # Safety
    /// The parameters are those of the kernel, and what they point to is there until the kernel has run.
    pub unsafe fn launch(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        stream: *mut c_void,
        early: bool,
        arguments: &mut [*mut c_void],
    ) -> Outcome {
        if grid.contains(&0) {
            return Ok(());
        }
        let _current = self.current()?;
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: kernel.shared,
            hStream: stream.cast(),
            attrs: &raw mut attribute,
            numAttrs: (early && self.overlaps).into(),
        };
        // SAFETY: promised by the caller; the function's module is loaded as long as self lives, and the attribute
        // during the call.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&raw const config, kernel.function, arguments.as_mut_ptr(), null_mut())
        };
        driver("launching a kernel", launched.result())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Ok(_current) = self.current() {
            for address in self.memory.drain(..) {
                // SAFETY: allocated by upload, freed once; frees wait for kernels that still read.
                let _ = unsafe { result::free_sync(address) };
            }
            for module in self.modules.drain(..) {
                // SAFETY: loaded in new, unloaded once.
                let _ = unsafe { result::module::unload(module) };
            }
        }
        // SAFETY: retained in new, released once.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}
