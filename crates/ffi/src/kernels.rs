//! Parameters, grids and sizes of the kernels: what `kernels/*.cu` say, in Rust.

use std::ffi::c_void;
use std::mem::size_of;

use ::kakeya_codec::Codec;
use ::kakeya_codec::recipe::Quantizer;

use crate::driver::{Device, Kernel};
use crate::error::{Outcome, refuse};
use crate::status::kakeya_status::*;
use crate::version::KAKEYA_BLOCK_TOKENS;

/// `kakeya::PlanParams` of `kernels/params.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PlanParams {
    pub query_start: *const i32,
    pub seq_lens: *const i32,
    pub block_table: *const i32,
    pub open_slot: *const i32,
    pub block_table_stride: i64,
    pub plan: *mut i32,
    pub num_seqs: i32,
    pub max_seqs: i32,
    pub max_tasks: i32,
    pub max_query: i32,
}

/// `kakeya::AppendParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AppendParams {
    pub k: *const c_void,
    pub v: *const c_void,
    pub k_token_stride: i64,
    pub k_head_stride: i64,
    pub v_token_stride: i64,
    pub v_head_stride: i64,
    pub slot_mapping: *const i64,
    pub open_slot: *const i32,
    pub open_blocks: *mut c_void,
    pub num_tokens: i32,
    pub num_kv_heads: i32,
    pub head_dim: i32,
    pub reserved: i32,
}

/// `kakeya::SealParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SealParams {
    pub tables: u64,
    pub k: *const c_void,
    pub v: *const c_void,
    pub k_token_stride: i64,
    pub k_head_stride: i64,
    pub v_token_stride: i64,
    pub v_head_stride: i64,
    pub open_blocks: *const c_void,
    pub plan: *const i32,
    pub pages: *mut u8,
    pub page_block_stride: i64,
    pub page_head_stride: i64,
    pub status: *mut u32,
    pub layer: i32,
    pub first_head: i32,
    pub num_kv_heads: i32,
    pub element: i32,
}

/// `kakeya::OpenParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct OpenParams {
    pub tables: u64,
    pub pages: *const u8,
    pub page_block_stride: i64,
    pub page_head_stride: i64,
    pub blocks: *const i32,
    pub k: *mut c_void,
    pub v: *mut c_void,
    pub k_token_stride: i64,
    pub k_head_stride: i64,
    pub v_token_stride: i64,
    pub v_head_stride: i64,
    pub num_blocks: i32,
    pub layer: i32,
    pub first_head: i32,
    pub num_kv_heads: i32,
    pub element: i32,
    pub reserved: i32,
}

/// `kakeya::AttendParams`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AttendParams {
    pub tables: u64,
    pub pages: *const u8,
    pub page_block_stride: i64,
    pub page_head_stride: i64,
    pub q: *const c_void,
    pub q_token_stride: i64,
    pub q_head_stride: i64,
    pub out: *mut c_void,
    pub out_token_stride: i64,
    pub out_head_stride: i64,
    pub open_blocks: *const c_void,
    pub open_slot: *const i32,
    pub block_table: *const i32,
    pub block_table_stride: i64,
    pub query_start: *const i32,
    pub seq_lens: *const i32,
    pub plan: *const i32,
    pub workspace: *mut f32,
    pub counters: *mut i32,
    pub num_seqs: i32,
    pub max_tasks: i32,
    pub num_kv_heads: i32,
    pub group: i32,
    pub layer: i32,
    pub first_head: i32,
    pub element: i32,
    pub reserved: i32,
    pub scale: f32,
    pub reserved2: i32,
}

/// The head dimensions and the query rows a pass for which there are attention kernels.
const HEAD_DIMS: [usize; 3] = [64, 128, 256];
const ROWS: [u32; 3] = [4, 8, 16];
/// Pages in flight of an attention block: as many as fit.
const STAGES: std::ops::RangeInclusive<u32> = 4..=8;

/// `kakeya_info` of `kernels/info.cu`: sizes that both sides must agree on.
const INFO: &str = "kakeya_info";
const INFO_LEN: usize = 6 + HEAD_DIMS.len() * ROWS.len();

/// What a step may hold at most; see kakeya_cuda_limits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub max_seqs: u32,
    pub max_tokens: u32,
    pub max_query: u32,
    pub num_kv_heads: u32,
}

impl Limits {
    /// Blocks that `seqs` sequences can fill with `tokens` tokens: one that was begun before, then whole ones.
    pub fn tasks(seqs: u32, tokens: u32) -> u32 {
        tokens.min(seqs.saturating_add(tokens / KAKEYA_BLOCK_TOKENS))
    }

    pub fn max_tasks(&self) -> u32 {
        Self::tasks(self.max_seqs, self.max_tokens)
    }

    /// int32 of a plan: `kakeya::plan_size`.
    pub fn plan_len(&self) -> u64 {
        4 + 4 * u64::from(self.max_tasks()) + u64::from(self.max_seqs) + 1
    }
}

/// The attention kernel of one model.
pub(crate) struct Attend {
    pub kernel: Kernel,
    pub stages: u32,
    pub grid: [u32; 2],
    rows: u32,
}

/// The kernels of one model on one device.
pub(crate) struct Kernels {
    pub plan: Kernel,
    /// For bf16 and f16.
    pub append: [Kernel; 2],
    pub seal: [Kernel; 2],
    pub open: [Kernel; 2],
    pub attend: Attend,
}

impl Kernels {
    pub fn new(device: &Device, codec: &Codec, limits: &Limits) -> Outcome<Self> {
        let head_dim = codec.shape().head_dim;
        let Some(column) = HEAD_DIMS.iter().position(|&d| d == head_dim) else {
            return refuse!(
                KAKEYA_ERR_UNSUPPORTED,
                "head_dim is {head_dim}; there are kernels for {HEAD_DIMS:?}"
            );
        };
        let info = device.global(INFO, INFO_LEN)?;
        let ours = [
            size_of::<PlanParams>(),
            size_of::<AppendParams>(),
            size_of::<SealParams>(),
            size_of::<OpenParams>(),
            size_of::<AttendParams>(),
            size_of::<::kakeya_codec::device::Header>(),
        ];
        for (theirs, ours) in info.iter().zip(ours) {
            if *theirs as usize != ours {
                return refuse!(
                    KAKEYA_ERR_NO_KERNELS,
                    "the embedded kernels are of another version (sizes {:?}; valid: {ours:?})",
                    &info[..6]
                );
            }
        }
        let pair = |name: &str, shared| -> Outcome<[Kernel; 2]> {
            Ok([
                device.kernel(&format!("{name}_bf16"), shared)?,
                device.kernel(&format!("{name}_f16"), shared)?,
            ])
        };
        let shared = &info[6 + column * ROWS.len()..][..ROWS.len()];
        Ok(Self {
            plan: device.kernel("kakeya_plan", 0)?,
            append: pair("kakeya_append", 0)?,
            seal: pair("kakeya_seal", seal_shared(head_dim))?,
            open: pair("kakeya_open", 0)?,
            attend: Attend::new(device, codec, limits, shared)?,
        })
    }
}

/// Dynamic shared memory of kakeya_seal: the block's rows as f32.
fn seal_shared(head_dim: usize) -> usize {
    KAKEYA_BLOCK_TOKENS as usize * head_dim * size_of::<f32>()
}

impl Attend {
    /// `shared`: bytes before the stages, by ROWS.
    fn new(device: &Device, codec: &Codec, limits: &Limits, shared: &[u32]) -> Outcome<Self> {
        let shape = codec.shape();
        let group = (shape.num_q_heads / shape.num_kv_heads) as u32;
        let needed = group * limits.max_query;
        let at = ROWS.iter().position(|&rows| rows >= needed).unwrap_or(ROWS.len() - 1);
        let rows = ROWS[at];
        let quantizer = match codec.recipe().quantizer {
            Quantizer::Uniform => "uniform",
            Quantizer::LloydMax => "cubic",
            Quantizer::Trellis => "trellis",
        };
        let name = format!("kakeya_attend_d{}_{quantizer}_r{rows}", shape.head_dim);
        let mut best: Option<(Kernel, u32, u32)> = None;
        let mut refusal = None;
        for stages in STAGES.rev() {
            let bytes = shared[at] as usize + stages as usize * codec.page_bytes();
            match device.kernel(&name, bytes) {
                Ok(kernel) => {
                    let blocks = device.occupancy(&kernel)?;
                    // More blocks hide more latency than deeper rings do.
                    if blocks > best.map_or(0, |(_, _, most)| most) {
                        best = Some((kernel, stages, blocks));
                    }
                }
                Err(failure) => refusal = Some(failure),
            }
        }
        let Some((kernel, stages, blocks)) = best else {
            return match refusal {
                Some(failure) => Err(failure),
                None => refuse!(KAKEYA_ERR_UNSUPPORTED, "{name} does not fit on this GPU"),
            };
        };
        // The last question set the attribute of the fewest stages.
        let kernel = device.kernel(&name, kernel.shared as usize)?;
        Ok(Self { kernel, stages, grid: [device.multiprocessors * blocks, needed.div_ceil(rows)], rows })
    }

    /// float32 of the workspace: a record for each block and each (sequence, KV head), a pass.
    pub fn workspace_len(&self, limits: &Limits, head_dim: usize) -> u64 {
        let records = u64::from(self.grid[0]) + u64::from(limits.max_seqs) * u64::from(limits.num_kv_heads);
        u64::from(self.grid[1]) * records * u64::from(self.rows) * (head_dim as u64 + 2)
    }

    /// Arrival counters, int32.
    pub fn counters_len(&self, limits: &Limits) -> u64 {
        u64::from(self.grid[1]) * u64::from(limits.max_seqs) * u64::from(limits.num_kv_heads)
    }
}

/// Grid of kakeya_append.
pub(crate) fn append_grid(num_tokens: u32, num_kv_heads: u32) -> [u32; 2] {
    [num_tokens, num_kv_heads]
}
